"""The kernels in Triton's interpreter against the native codec and the statement, bit for bit.

Not collected by itself: the interpreter must be chosen before triton is imported, and for a whole process.
`test_kernels_interpreter` runs this file in a process of its own; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernel_cases_interpreted.py
"""

from __future__ import annotations

import codec_cases as cases
import codec_golden as golden
import codec_statement as statement
import kernel_checks as checks
import numpy as np
import pytest
import torch
from codec_cases import DTYPES, FORMATS, KINDS, to_body, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock_rt import codec, kernels
from parablock_rt.errors import CodecError

assert kernels.common.INTERPRETED, "set TRITON_INTERPRET=1 in the environment of this process"

CPU = "cpu"
PAIRS = [(now, ref) for now in DTYPES for ref in DTYPES]


@pytest.mark.parametrize("format", FORMATS)
def test_sixty_odd_sized_parameters_in_one_block_keep_their_gaps_zero(format: str) -> None:
    change, gap = checks.odd_sized_block(60, 7)
    assert change["now"].size > 2 * 4096  # more than one program, and the last one is not full
    assert change["now"].size % 4096
    body = checks.check_encode(CPU, **change, format=format)
    assert not codec.decode(to_body(body), gap.size, format=format).numpy()[gap].any()
    for dtype in DTYPES:
        target = statement.narrow(change["ref"], cases.NUMPY[dtype])
        checks.check_apply(CPU, target, body, format)
    left = torch.full((gap.size,), np.nan)
    kernels.encode(*(to_torch(change[name]) for name in ("now", "ref", "residual")), format=format, residual_out=left)
    assert not left.numpy()[gap].any()


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_vectors(case: str) -> None:
    checks.check_golden(CPU, case)


@pytest.mark.parametrize("residual", [False, True], ids=["fresh", "residual"])
@pytest.mark.parametrize(("now", "ref"), PAIRS)
@pytest.mark.parametrize("format", FORMATS)
def test_encode_of_every_kind_of_value(format: str, now: str, ref: str, residual: bool) -> None:
    kinds = list(KINDS)
    values = cases.pattern(kinds, 1, now)
    zeros = np.zeros(values.size, dtype=cases.NUMPY[ref])
    rest = cases.pattern(["zero" if kind in ("ties", "near_ties") else "subnormal" for kind in kinds], 2, "fp32")
    checks.check_encode_by_statement(CPU, values, zeros, rest if residual else None, format)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_encode_of_arbitrary_changes(format: str, data: st.DataObject) -> None:
    now_dtype, ref_dtype = data.draw(st.sampled_from(PAIRS))
    now, ref, residual = data.draw(cases.changes(now_dtype, ref_dtype))
    checks.check_encode_by_statement(CPU, now, ref, residual, format)


@pytest.mark.parametrize("format", FORMATS)
def test_special_values_wherever_they_are(format: str) -> None:
    x = checks.special_values_by_position()
    checks.check_encode_by_statement(CPU, x, np.zeros_like(x), None, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shift", [2, 4, 6, 8, 10, 12, 14])
def test_bodies_at_every_even_address(format: str, shift: int) -> None:
    if format == "fp32" and shift % 4:
        pytest.skip("fp32 codes need an address that is a multiple of 4")
    change, _ = checks.odd_sized_block(5, shift)
    body = checks.check_encode(CPU, **change, format=format, shift=shift)
    checks.check_decode(CPU, body, change["now"].size, format, shift)
    checks.check_apply(CPU, change["now"], body, format, shift)


def test_an_allocated_body_has_aligned_codes() -> None:
    for groups in range(1, 12):
        for format in FORMATS:
            body = kernels.empty_body(128 * groups, format=format, device=CPU)
            assert body.numel() == codec.body_bytes(128 * groups, format)
            assert (body.data_ptr() + codec.scale_bytes(128 * groups, format)) % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_decode_and_apply_of_every_kind_of_value(format: str, dtype: str) -> None:
    kinds = [kind for kind in KINDS for _ in range(3)]
    x = cases.pattern(kinds, 3, "fp32")
    body, _, _ = statement.encode(x, np.zeros_like(x), None, format)
    checks.check_decode(CPU, body, x.size, format)
    rng = np.random.default_rng(4)
    for seed in range(3):
        target = cases.pattern([str(rng.choice(list(KINDS))) for _ in kinds], seed, dtype)
        checks.check_apply(CPU, target, body, format)


@pytest.mark.parametrize("format", FORMATS)
def test_decode_of_bytes_that_no_encoder_makes(format: str) -> None:
    numel = 128 * 70
    body = np.random.default_rng(5).bytes(codec.body_bytes(numel, format))
    checks.check_decode(CPU, body, numel, format)
    checks.check_apply(CPU, cases.pattern(["gauss"] * 70, 6, "bf16"), body, format)


def test_int8_decodes_the_bad_group_mark_to_plus_zero() -> None:
    body = np.uint16(0x7FC0).tobytes() + bytes([0x81]) * 128
    decoded = kernels.decode(to_body(body), 128, format="int8")
    assert not statement.bits(decoded.numpy()).any()


def test_the_sum_is_that_of_the_native_accumulator_in_any_order() -> None:
    numel = 128 * 35
    parts = []
    for seed, format in enumerate(FORMATS * 2):
        x = np.random.default_rng(seed).standard_normal(numel).astype(np.float32) * np.float32(10.0 ** (seed - 6))
        body, _, _ = statement.encode(x, np.zeros_like(x), None, format)
        parts.append((body, [0.1, 3.0, 1.0 / 3.0, 4095.7][seed % 4], format))
    checks.check_accumulate(CPU, numel, parts)


@pytest.mark.parametrize("words", [1, 3, 8191, 8192, 8193, 3 * 8192])
def test_fingerprint(words: int) -> None:
    values = torch.from_numpy(np.random.default_rng(words).integers(0, 1 << 32, words, dtype=np.uint32).view(np.int32))
    assert kernels.fingerprint(values) == codec.fingerprint(values) == statement.fingerprint(values.numpy().tobytes())


def test_fingerprint_of_sixteen_bit_weights_and_of_nothing() -> None:
    weights = to_torch(cases.pattern(["raw"] * 3, 8, "bf16"))
    assert kernels.fingerprint(weights) == codec.fingerprint(weights)
    assert kernels.fingerprint(torch.empty(0)) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_repeated_runs_give_the_same_bytes_and_counts(format: str) -> None:
    x = cases.pattern(["gauss", "one_nan", "one_inf", "huge"] * 20, 9, "fp32")
    runs = [kernels.encode(to_torch(x), torch.zeros(x.size), format=format) for _ in range(3)]
    assert runs[0].bad_groups == runs[1].bad_groups == runs[2].bad_groups > 0
    assert torch.equal(runs[0].body, runs[1].body)
    assert torch.equal(runs[0].body, runs[2].body)


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_block(format: str) -> None:
    packed = kernels.encode(torch.empty(0), torch.empty(0), format=format)
    assert packed.body.numel() == 0
    assert packed.bad_groups == 0
    assert kernels.decode(packed.body, 0, format=format).numel() == 0
    kernels.apply_(torch.empty(0), packed.body, format=format)


def test_trained_parameters_need_no_detaching() -> None:
    now, ref = torch.ones(128, requires_grad=True), torch.zeros(128, requires_grad=True)
    body = kernels.encode(now, ref, format="int8").body
    assert kernels.apply_(ref, body, format="int8") is ref
    assert torch.equal(ref.detach(), kernels.decode(body, 128, format="int8"))


def test_what_does_not_fit_is_refused() -> None:
    block, body = torch.zeros(128), torch.zeros(130, dtype=torch.uint8)
    limb = torch.zeros(128, dtype=torch.int64)
    with pytest.raises(ValueError, match="out of fp32, bf16, int8, int4"):
        kernels.encode(block, block, format="fp8")
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.encode(torch.zeros(100), torch.zeros(100))
    with pytest.raises(ValueError, match="128 elements like the other"):
        kernels.encode(block, torch.zeros(256))
    with pytest.raises(ValueError, match="dtype"):
        kernels.encode(block.double(), block)
    with pytest.raises(ValueError, match="residual: expected a dtype"):
        kernels.encode(block, block, block.bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.encode(torch.zeros(256)[::2], block)
    with pytest.raises(ValueError, match="one dimension"):
        kernels.apply_(torch.zeros(1, 128), body)
    with pytest.raises(ValueError, match="130 bytes for 128 elements"):
        kernels.decode(torch.zeros(129, dtype=torch.uint8), 128)
    with pytest.raises(ValueError, match="multiple of 2"):
        kernels.decode(torch.zeros(131, dtype=torch.uint8)[1:], 128)  # torch allocates at even addresses
    with pytest.raises(ValueError, match="lo: expected a dtype"):
        kernels.accumulate(limb, limb.int(), body, 1.0)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        kernels.fingerprint(torch.zeros(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS)
def test_apply_to_several_tensors_of_one_block(format: str) -> None:
    checks.check_apply_to_parts(CPU, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_encoded_in_slices_has_the_same_planes_count_and_residual(format: str) -> None:
    checks.check_encode_in_slices(CPU, format)


@pytest.mark.parametrize("format", FORMATS)
def test_the_codec_gives_the_same_through_the_kernels(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `parablock_rt.codec` does with tensors on a GPU, here with the kernels interpreted."""
    numel = 128 * 5
    now, ref, residual = (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    now[3] = torch.inf

    def everything() -> list[torch.Tensor | int]:
        rest, targets = residual.clone(), [ref[:256].clone(), ref[256:].to(torch.bfloat16)]
        packed = codec.encode(now, ref, rest, format=format)
        applied = codec.apply_(targets, packed.body, format=format)
        assert applied is targets
        change = codec.decode(packed.body, numel, format=format)
        return [packed.body, packed.bad_groups, rest, change, *targets, codec.fingerprint(ref)]

    expected = everything()
    monkeypatch.setattr(codec, "_gpu_codec", lambda tensor: kernels)
    for found, wanted in zip(everything(), expected, strict=True):
        if isinstance(wanted, int):
            assert found == wanted
        else:
            assert isinstance(found, torch.Tensor)
            checks.assert_same_bits(found, wanted, format)
    with pytest.raises(CodecError, match="found 3; pad the flat block"):
        codec.encode(now[:3], ref[:3], format=format)
    with pytest.raises(CodecError, match="expected contiguous memory"):
        codec.encode(now[::2], ref[::2], format=format)
    with pytest.raises(CodecError, match=r"expected a dtype out of .*found torch\.float64"):
        codec.encode(now.double(), ref, format=format)
    with pytest.raises(CodecError, match=r"multiple of 2; allocate it with empty_body|multiple of 4; allocate it"):
        codec.decode(torch.zeros(codec.body_bytes(numel, format) + 1, dtype=torch.uint8)[1:], numel, format=format)
