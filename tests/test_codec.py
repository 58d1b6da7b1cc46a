"""The codec, example by example: bytes worked by hand, bad groups, error energy, error feedback, what is refused.

`test_codec_properties` holds it against the statement on arbitrary bits; `test_codec_accumulator` has the server's sum
and the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable

import codec_statement as statement
import numpy as np
import pytest
import torch
from codec_cases import BLOCK, DTYPES, FLT_MAX, FORMATS, NUMPY, ZERO_EDGE, Array, to_body, to_bytes, to_numpy, to_torch

from parablock_rt import _C, codec
from parablock_rt.errors import CodecError, ConfigError, ParaBlockError

Encode = Callable[[Array, str], tuple[bytes, Array, int]]


def encode_by_statement(x: Array, format: str) -> tuple[bytes, Array, int]:
    return statement.encode(x, np.zeros_like(x), None, format)


def encode_by_codec(x: Array, format: str) -> tuple[bytes, Array, int]:
    left = torch.full((x.size,), np.nan)
    packed = codec.encode(to_torch(x), torch.zeros(x.size), residual_out=left, format=format)
    return to_bytes(packed.body), to_numpy(left), packed.bad_groups


@pytest.fixture(params=[encode_by_statement, encode_by_codec], ids=["statement", "codec"])
def encode(request: pytest.FixtureRequest) -> Encode:
    return request.param


def block(*values: float, at: int = 0, numel: int = BLOCK) -> Array:
    x = np.zeros(numel, dtype=np.float32)
    x[at : at + len(values)] = values
    return x


# --- bytes worked by hand -------------------------------------------------------------------------------------------


def test_int8_bytes_of_a_group_worked_by_hand(encode: Encode) -> None:
    # a = 127, s = 127 / 127 = 1 = bf16 0x3F80, inv = 1. Halves go to the even code: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
    body, left, bad = encode(block(127, 1, -3, 0.5, 1.5, 2.5, -127), "int8")
    assert body == bytes.fromhex("803F 7F01FD00020281") + bytes(121)
    np.testing.assert_array_equal(left, block(0, 0, 0, 0.5, -0.5, 0.5, 0))
    assert bad == 0


def test_int8_scale_is_rounded_up_to_bf16(encode: Encode) -> None:
    # a = 1, s = 1/127 = 2**-7 * 1.00787...; bf16 has 7 bits after the point: 1 + ceil(1.00787...) / 128 = 1 + 2/128.
    # So the scale is 2**-7 * 1.015625 (0x3C02), 1 / scale = 126.03 and the code is 126 = 0x7E.
    # 126 * 1.015625 / 128 = 0.999755859375, which leaves 2**-12.
    body, left, _ = encode(block(1), "int8")
    assert body == bytes.fromhex("023C 7E") + bytes(127)
    np.testing.assert_array_equal(left, block(2.0**-12))


def test_int4_bytes_of_two_groups_worked_by_hand(encode: Encode) -> None:
    # Group 0: max(x) = max(-x) = 8, so m = 8 and s = 8 / -8 = -1 (0xBF80). 8 -> -8; -8 -> 8, clamped to 7, leaves -1;
    # 1 -> -1; -2.5 -> 2.5 -> 2, leaves -0.5. Low nibble first: (-8, 7) = 0x78, (-1, 2) = 0x2F.
    # Group 1: m = -4, s = 0.5 (0x3F00). -4 -> -8, 3.5 -> 7: 0x78.
    x = block(8, -8, 1, -2.5) + block(-4, 3.5, at=64)
    body, left, bad = encode(x, "int4")
    assert body == bytes.fromhex("80BF 003F 782F") + bytes(30) + bytes.fromhex("78") + bytes(31)
    np.testing.assert_array_equal(left, block(0, -1, 0, -0.5))
    assert bad == 0


def test_bf16_bytes_worked_by_hand(encode: Encode) -> None:
    # 1 + 2**-8 lies half way between 1.0 (0x3F80, even) and 0x3F81; 1 + 3 * 2**-8 between 0x3F81 and 0x3F82 (even).
    # FLT_MAX rounds to infinity: sent as 0, nothing left, counted.
    x = block(1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -2, np.inf, np.nan, float(np.finfo(np.float32).max))
    body, left, bad = encode(x, "bf16")
    assert body == bytes.fromhex("803F 803F 823F 00C0 0000 0000 0000") + bytes(242)
    np.testing.assert_array_equal(left, block(0, 2.0**-8, -(2.0**-8)))
    assert bad == 3


def test_fp32_bytes_worked_by_hand(encode: Encode) -> None:
    # The smallest subnormal is sent as it is; what is not finite is sent as 0 and counted.
    body, left, bad = encode(block(1, -2, 2.0**-149, np.nan, -np.inf), "fp32")
    assert body == bytes.fromhex("0000803F 000000C0 01000000 00000000 00000000") + bytes(492)
    assert not left.any()
    assert bad == 2


def test_all_scales_precede_all_codes(encode: Encode) -> None:
    x = np.concatenate([block(127, at=group) * np.float32(2.0**group) for group in range(3)])
    body, _, _ = encode(x, "int8")
    assert body[:6] == bytes.fromhex("803F 0040 8040")
    codes = np.frombuffer(body, dtype=np.int8, offset=6)
    np.testing.assert_array_equal(np.flatnonzero(codes), [0, 129, 258])

    x = np.concatenate([block(-8, at=group, numel=64) * np.float32(2.0**group) for group in range(4)])
    body, _, _ = encode(x, "int4")
    assert body[:8] == bytes.fromhex("803F 0040 8040 0041")
    assert {i: body[i] for i in range(8, len(body)) if body[i]} == {8: 0x08, 40: 0x80, 73: 0x08, 105: 0x80}


@pytest.mark.parametrize(("format", "per_block"), [("fp32", 512), ("bf16", 256), ("int8", 130), ("int4", 68)])
def test_body_bytes(format: str, per_block: int) -> None:
    assert codec.body_bytes(128, format) == per_block
    assert codec.body_bytes(128 * 1001, format) == per_block * 1001
    # Flat lengths beyond 32 bits must not wrap.
    assert codec.body_bytes(128 << 30, format) == per_block << 30


# --- the limits of a group ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [ZERO_EDGE - 1, ZERO_EDGE], ids=["below", "at"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_group_up_to_2_to_the_minus_100_is_kept_whole_in_the_residual(
    encode: Encode, format: str, magnitude: int
) -> None:
    x = statement.floats(np.arange(BLOCK, dtype=np.uint32))
    x[[17, 80]] = statement.floats(np.array([magnitude, magnitude | 0x80000000], dtype=np.uint32))
    body, left, bad = encode(x, format)
    assert body == bytes(len(body))
    np.testing.assert_array_equal(statement.bits(left), statement.bits(x))
    assert bad == 0


@pytest.mark.parametrize(("format", "scale"), [("int8", "020A"), ("int4", "010C")])
def test_a_group_just_above_2_to_the_minus_100_is_coded(encode: Encode, format: str, scale: str) -> None:
    # int8: 2**-100 / 127 = 2**-107 * 1.00787, rounded up 2**-107 * (1 + 2/128): exponent field 20, bits 0x0A02.
    # int4: -(2**-100 * (1 + 2**-23)) / -8 rounded up is 2**-103 * (1 + 1/128): exponent field 24, bits 0x0C01.
    x = block()
    x[0] = -statement.floats(np.array([ZERO_EDGE + 1], dtype=np.uint32))[0]
    body, left, _ = encode(x, format)
    assert body[:2] == bytes.fromhex(scale)
    np.testing.assert_array_equal(statement.decode(body, BLOCK, format) + left, x)
    assert left[0] != x[0]


@pytest.mark.parametrize(("format", "largest"), [("int8", FLT_MAX), ("int4", 0x7F7F0000)])
def test_the_largest_values_are_coded_without_overflow(encode: Encode, format: str, largest: int) -> None:
    x = statement.floats(np.full(BLOCK, largest, dtype=np.uint32)) * np.resize(np.float32([1, -1, -1]), BLOCK)
    body, left, bad = encode(x, format)
    assert bad == 0
    assert np.isfinite(left).all()
    decoded = statement.decode(body, BLOCK, format)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded + left, x)


def test_int4_beyond_the_largest_bf16_decodes_to_infinity_and_is_found_the_next_time(encode: Encode) -> None:
    # A corner of the format: above 0x7F7F0000 the scale rounds up to 2**125, and -8 * 2**125 is no fp32. The residual
    # becomes infinite, never a NaN, so the next encoding sees a bad group and starts afresh.
    x = block()
    x[:2] = statement.floats(np.array([0x7F7F0001, 0xFE000000], dtype=np.uint32))
    body, left, bad = encode(x, "int4")
    assert body[:2] == bytes.fromhex("00FE")
    assert body[4] == 0x18  # the code of the largest is -8, that of -2**125 is 1
    assert bad == 0
    assert statement.decode(body, BLOCK, "int4")[0] == np.inf
    assert left[0] == -np.inf
    again = codec.encode(to_torch(x), torch.zeros(BLOCK), to_torch(left), format="int4")
    assert again.bad_groups == 1


def test_an_overflowing_difference_makes_the_group_bad() -> None:
    largest = torch.full((BLOCK,), torch.finfo(torch.float32).max)
    for format, bad in {"fp32": 128, "bf16": 128, "int8": 1, "int4": 2}.items():
        left = torch.full((BLOCK,), 3.0)
        packed = codec.encode(largest, -largest, None, format=format, residual_out=left)
        assert packed.bad_groups == bad
        assert not left.any()


@pytest.mark.parametrize("value", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000], ids=hex)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.usefixtures("instruction_set")
def test_one_element_that_is_not_finite_is_found_wherever_it_is(format: str, value: int) -> None:
    group = statement.GROUP[format]
    x = np.random.default_rng(1).standard_normal((2 * group + 2) * group).astype(np.float32)
    clean, clean_left, _ = encode_by_codec(x, format)
    clean_scales, clean_codes = statement.split(clean, x.size, format)
    pattern = statement.bits(x.copy()).reshape(-1, group)
    for position in range(group):
        pattern[2 * position + 1, position] = value
    hurt = np.zeros(pattern.shape[0], dtype=bool)
    hurt[1 : 2 * group : 2] = True

    body, left, bad = encode_by_codec(statement.floats(pattern.reshape(-1)), format)
    scales, codes = statement.split(body, x.size, format)
    assert bad == group
    assert (scales[hurt] == 0x7FC0).all()
    assert not codes[hurt.repeat(group)].any()
    assert not statement.bits(left)[hurt.repeat(group)].any()
    # The neighbours are as they were.
    np.testing.assert_array_equal(scales[~hurt], clean_scales[~hurt])
    np.testing.assert_array_equal(codes[~hurt.repeat(group)], clean_codes[~hurt.repeat(group)])
    np.testing.assert_array_equal(left[~hurt.repeat(group)], clean_left[~hurt.repeat(group)])
    # And nothing of a bad group reaches a receiver.
    decoded = to_numpy(codec.decode(to_body(body), x.size, format=format))
    assert not statement.bits(decoded)[hurt.repeat(group)].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("where", ["now", "ref", "residual"])
def test_a_nan_in_any_input_leaves_no_nan_in_residual_or_body(where: str, format: str) -> None:
    inputs = {name: torch.randn(256) for name in ("now", "ref", "residual")}
    inputs[where][131] = torch.nan
    packed = codec.encode(**inputs, format=format)
    assert packed.bad_groups == 1
    assert not inputs["residual"].isnan().any()
    assert not codec.decode(packed.body, 256, format=format).isnan().any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("instruction_set")
def test_int8_codes_stay_within_127_for_every_largest_magnitude(seed: int) -> None:
    # Every mantissa a step of the scale's rounding can see, at many exponents.
    rng = np.random.default_rng(seed)
    largest = rng.integers(ZERO_EDGE + 1, FLT_MAX + 1, 4096, dtype=np.uint32)
    largest[:256] = (rng.integers(40, 250, 256) << 23) + rng.integers(0, 3, 256)
    signs = np.resize(np.array([0, 0x80000000], dtype=np.uint32), BLOCK)
    x = statement.floats((largest[:, None] | signs[None, :]).reshape(-1))
    body, left, bad = encode_by_codec(x, "int8")
    assert bad == 0
    _, codes = statement.split(body, x.size, "int8")
    assert codes.min() >= -127
    assert np.abs(codes.astype(int)).min() >= 125
    np.testing.assert_array_equal(to_numpy(codec.decode(to_body(body), x.size, format="int8")) + left, x)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.usefixtures("instruction_set")
def test_every_mantissa_of_the_scale_is_chosen_by_correct_division(format: str) -> None:
    # Largest magnitudes at and around each product of a bf16 scale and 127 (or 8), where a quotient that is off by its
    # last bit is rounded up to the next scale.
    scales = statement.floats((np.array([[30], [127], [240]]) * 128 + np.arange(128)).ravel().astype(np.uint32) << 16)
    top = np.float32(127 if format == "int8" else 8)
    around = (statement.bits(scales * top)[:, None] + np.arange(-3, 4)).astype(np.uint32).ravel()
    x = np.zeros((around.size, BLOCK), dtype=np.float32)
    x[:, 77] = statement.floats(around)
    x[:, 3] = -x[:, 77] / 3
    body, left, _ = encode_by_codec(x.ravel(), format)
    expected, expected_left, _ = encode_by_statement(x.ravel(), format)
    assert body == expected
    np.testing.assert_array_equal(left, expected_left)
    found, _ = statement.split(body, x.size, format)
    exact = found.reshape(scales.size, 7, -1)[:, 3, -1] & np.uint16(0x7FFF)
    np.testing.assert_array_equal(exact, statement.bits(scales) >> 16)


# --- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize(("format", "energy"), [("fp32", 0.0), ("bf16", 2.7e-6), ("int8", 4.2e-5), ("int4", 9.0e-3)])
def test_error_energy_of_gaussian_changes(format: str, energy: float, size: float) -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(3)) * size
    packed = codec.encode(x, torch.zeros_like(x), format=format)
    decoded = codec.decode(packed.body, x.numel(), format=format)
    ratio = ((decoded.double() - x.double()).square().sum() / x.double().square().sum()).item()
    assert ratio == pytest.approx(energy, rel=0.03)


@pytest.mark.parametrize("format", FORMATS)
def test_error_feedback_loses_nothing_over_many_rounds(format: str) -> None:
    # Inputs are small multiples of 2**-12, so that every sum below is exact in float64 and none rounds in fp32.
    generator = torch.Generator().manual_seed(5)
    residual = torch.zeros(512)
    sent = torch.zeros(512, dtype=torch.float64)
    total = torch.zeros(512, dtype=torch.float64)
    for _ in range(50):
        change = torch.randint(-4096, 4097, (512,), generator=generator).float() / 4096
        total += change
        packed = codec.encode(change, torch.zeros(512), residual, format=format)
        sent += codec.decode(packed.body, 512, format=format)
    assert torch.equal(sent, total - residual.double())
    if format in statement.GROUP:
        assert residual.any()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_error_feedback_delivers_changes_too_small_for_the_format(format: str) -> None:
    # Beside a change of 1 the small one is below half a step, and would never be sent without feedback.
    change = torch.zeros(BLOCK)
    change[0], change[5] = 1.0, 0.001
    residual = torch.zeros(BLOCK)
    sent = sum(
        codec.decode(codec.encode(change, torch.zeros(BLOCK), residual, format=format).body, BLOCK, format=format)
        for _ in range(200)
    )
    assert sent[5].item() == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_in_16_bits_rounds_once_to_nearest_even(dtype: str) -> None:
    half_unit = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}[dtype]
    target = to_torch(statement.narrow(np.ones(BLOCK, dtype=np.float32), NUMPY[dtype]))
    change = block(half_unit, 3 * half_unit, -half_unit, half_unit / 2)
    codec.apply_(target, to_body(encode_by_statement(change, "fp32")[0]), format="fp32")
    # 1 + half a unit is a tie and 1 is even; three halves is a tie and goes up; below 1 the unit is half as large.
    expected = [1.0, 1 + 4 * half_unit, 1 - half_unit, 1.0]
    assert target[:4].double().tolist() == expected
    assert torch.equal(target[4:], torch.ones_like(target[4:]))


# --- who writes where -----------------------------------------------------------------------------------------------


def test_residual_is_updated_in_place_without_residual_out() -> None:
    now, residual = torch.randn(256), torch.full((256,), 0.25)
    _, expected, _ = statement.encode(to_numpy(now), np.zeros(256, np.float32), to_numpy(residual), "int4")
    codec.encode(now, torch.zeros(256), residual, format="int4")
    np.testing.assert_array_equal(to_numpy(residual), expected)


def test_residual_out_takes_the_new_residual_and_spares_the_old() -> None:
    now, residual = torch.randn(256), torch.full((256,), 0.25)
    _, expected, _ = statement.encode(to_numpy(now), np.zeros(256, np.float32), to_numpy(residual), "int4")
    left = torch.empty(256)
    codec.encode(now, torch.zeros(256), residual, format="int4", residual_out=left)
    np.testing.assert_array_equal(to_numpy(left), expected)
    assert torch.equal(residual, torch.full((256,), 0.25))


@pytest.mark.parametrize("format", FORMATS)
def test_out_receives_the_body(format: str) -> None:
    now, ref = torch.randn(384), torch.randn(384)
    out = torch.full((codec.body_bytes(384, format),), 0xAA, dtype=torch.uint8)
    packed = codec.encode(now, ref, format=format, out=out)
    assert packed.body.data_ptr() == out.data_ptr()
    assert torch.equal(out, codec.encode(now, ref, format=format).body)


@pytest.mark.parametrize("format", FORMATS)
def test_encode_and_decode_leave_their_inputs_alone(format: str) -> None:
    now, ref = torch.randn(256), torch.randn(256).bfloat16()
    before = now.clone(), ref.clone()
    packed = codec.encode(now, ref, format=format)
    body = packed.body.clone()
    codec.decode(packed.body, 256, format=format)
    codec.apply_(torch.zeros(256), packed.body, format=format)
    assert torch.equal(now, before[0])
    assert torch.equal(ref, before[1])
    assert torch.equal(packed.body, body)


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_block_packs_to_nothing(format: str) -> None:
    packed = codec.encode(torch.zeros(0), torch.zeros(0), torch.zeros(0), format=format)
    assert packed.body.numel() == packed.bad_groups == 0
    assert codec.decode(packed.body, 0, format=format).numel() == 0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_and_the_known_ones_are_named() -> None:
    assert tuple(codec.FORMATS) == FORMATS
    for format in FORMATS:
        codec.check_format(format)
    body = torch.zeros(512, dtype=torch.uint8)
    calls: list[Callable[[], object]] = [
        lambda: codec.check_format("fp8"),
        lambda: codec.body_bytes(128, "fp8"),
        lambda: codec.encode(torch.zeros(128), torch.zeros(128), format="fp8"),
        lambda: codec.decode(body, 128, format="fp8"),
        lambda: codec.apply_(torch.zeros(128), body, format="fp8"),
        lambda: codec.Accumulator(128).add(body, 1.0, format="fp8"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="fp8") as error:
            call()
        assert all(format in str(error.value) for format in FORMATS)


Z = torch.zeros


@pytest.mark.parametrize(
    ("now", "ref", "residual", "options"),
    [
        pytest.param([0.0] * 128, Z(128), None, {}, id="now is a list"),
        pytest.param(Z(128).double(), Z(128), None, {}, id="now is fp64"),
        pytest.param(Z(128), Z(128).int(), None, {}, id="ref is int32"),
        pytest.param(Z(128), Z(128), Z(128).half(), {}, id="residual is fp16"),
        pytest.param(Z(256)[::2], Z(128), None, {}, id="now has gaps"),
        pytest.param(Z(128), Z(256)[::2], None, {}, id="ref has gaps"),
        pytest.param(Z(128), Z(128), Z(256)[::2], {}, id="residual has gaps"),
        pytest.param(Z(100), Z(100), None, {}, id="length is no multiple of 128"),
        pytest.param(Z(64), Z(64), None, {}, id="length is one int4 group"),
        pytest.param(Z(256), Z(128), None, {}, id="ref is shorter"),
        pytest.param(Z(128), Z(256), None, {}, id="ref is longer"),
        pytest.param(Z(128), Z(128), Z(256), {}, id="residual is longer"),
        pytest.param(Z(2, 64), Z(2, 64), None, {}, id="two dimensions"),
        pytest.param(Z(128), Z(128), None, {"residual_out": Z(256)}, id="residual_out is longer"),
        pytest.param(Z(128), Z(128), None, {"residual_out": Z(128).bfloat16()}, id="residual_out is bf16"),
        pytest.param(Z(128), Z(128), None, {"out": Z(129, dtype=torch.uint8)}, id="out is too short"),
        pytest.param(Z(128), Z(128), None, {"out": Z(131, dtype=torch.uint8)}, id="out is too long"),
        pytest.param(Z(128), Z(128), None, {"out": Z(130)}, id="out is fp32"),
        pytest.param(Z(128), Z(128), None, {"out": Z(260, dtype=torch.uint8)[::2]}, id="out has gaps"),
        pytest.param(Z(128), Z(128), None, {"threads": 0}, id="no threads"),
    ],
)
def test_encode_refuses(
    now: torch.Tensor, ref: torch.Tensor, residual: torch.Tensor | None, options: dict[str, object]
) -> None:
    with pytest.raises(ParaBlockError) as error:
        codec.encode(now, ref, residual, format="int8", **options)
    assert isinstance(error.value, (CodecError, ConfigError))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("extra", [-1, 1, -130])
def test_a_body_of_the_wrong_size_is_refused(format: str, extra: int) -> None:
    body = torch.zeros(codec.body_bytes(256, format) + extra, dtype=torch.uint8)
    for call in (
        lambda: codec.decode(body, 256, format=format),
        lambda: codec.apply_(torch.zeros(256), body, format=format),
        lambda: codec.Accumulator(256).add(body, 1.0, format=format),
    ):
        with pytest.raises(CodecError, match=str(codec.body_bytes(256, format))):
            call()


@pytest.mark.parametrize(
    ("target", "body"),
    [
        pytest.param(Z(128).double(), Z(130, dtype=torch.uint8), id="target is fp64"),
        pytest.param(Z(256)[::2], Z(130, dtype=torch.uint8), id="target has gaps"),
        pytest.param(Z(100), Z(130, dtype=torch.uint8), id="length is no multiple of 128"),
        pytest.param(Z(2, 64), Z(130, dtype=torch.uint8), id="two dimensions"),
        pytest.param(Z(128), Z(130, dtype=torch.int8), id="body is int8"),
        pytest.param(Z(128), Z(260, dtype=torch.uint8)[::2], id="body has gaps"),
    ],
)
def test_apply_refuses(target: torch.Tensor, body: torch.Tensor) -> None:
    with pytest.raises(CodecError):
        codec.apply_(target, body, format="int8")


@pytest.mark.parametrize("numel", [-128, 1, 127, 129])
def test_a_length_that_no_block_has_is_refused(numel: int) -> None:
    with pytest.raises(CodecError):
        codec.decode(torch.zeros(0, dtype=torch.uint8), numel, format="int8")
    with pytest.raises(CodecError):
        codec.Accumulator(numel)


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    before = _C.instruction_set()
    with pytest.raises(ValueError, match="sse9"):
        _C.force_instruction_set("sse9")
    assert _C.instruction_set() == before


def test_the_portable_instruction_set_exists_everywhere() -> None:
    before = _C.instruction_set()
    assert before in ("avx512-vnni", "avx512", "avx2", "portable")
    _C.force_instruction_set("portable")
    try:
        assert _C.instruction_set() == "portable"
    finally:
        _C.force_instruction_set(before)


def test_a_gpu_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoTriton:
        def __getattr__(self, name: str) -> object:
            raise ImportError(f"parablock_rt.kernels.{name}: expected the package triton, found none; install it")

    monkeypatch.setattr(codec, "_gpu_codec", lambda tensor: NoTriton())
    block, body = torch.zeros(128), torch.zeros(codec.body_bytes(128, "int8"), dtype=torch.uint8)
    for call in (
        lambda: codec.encode(block, block),
        lambda: codec.decode(body, 128),
        lambda: codec.apply_(block, body),
        lambda: codec.fingerprint(block),
    ):
        with pytest.raises(CodecError, match="expected the package triton, found none; install it"):
            call()


def test_devices_without_kernels_are_refused() -> None:
    block = torch.zeros(128, device="meta")
    with pytest.raises(CodecError, match="now: expected host memory, found it on meta"):
        codec.encode(block, block)


def test_the_count_of_bad_groups_is_read_when_it_is_asked_for_and_once() -> None:
    class Counter:
        reads = 0

        def __int__(self) -> int:
            self.reads += 1
            return 3

    counter = Counter()
    packed = codec.Packed(torch.zeros(0, dtype=torch.uint8), counter)  # type: ignore[arg-type]
    assert counter.reads == 0
    assert packed.bad_groups == packed.bad_groups == 3
    assert counter.reads == 1
