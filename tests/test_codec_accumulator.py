"""The server's sum: the same bits whatever the order of arrival, exact where it promises it, closed to bad bodies."""

from __future__ import annotations

import math

import codec_statement as statement
import numpy as np
import pytest
import torch
from codec_cases import BLOCK, DTYPES, FORMATS, NUMPY, Array, blocks, pattern, to_body, to_numpy, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock_rt import _C, codec
from parablock_rt.errors import CodecError

Contribution = tuple[bytes, float, str]

NUMEL = 2 * BLOCK
pytestmark = pytest.mark.usefixtures("instruction_set")


def body_of(values: Array | list[float], format: str = "fp32") -> bytes:
    x = np.resize(np.asarray(values, dtype=np.float32), BLOCK)
    return statement.encode(x, np.zeros_like(x), None, format)[0]


def weights() -> st.SearchStrategy[float]:
    """Counts of tokens, and weights whose float sum depends on the order."""
    return st.one_of(st.integers(1, 1 << 20).map(float), st.floats(2.0**-10, 2.0**20, exclude_min=True))


@st.composite
def contributions(draw: st.DrawFn) -> Contribution:
    """A body whose values stay below 2**10 in magnitude and may be as small as a subnormal, and a weight."""
    format = draw(st.sampled_from(FORMATS))
    kinds = draw(st.lists(st.sampled_from(["gauss", "wide", "subnormal", "zero", "one_nan"]), min_size=2, max_size=2))
    x = pattern(kinds, draw(st.integers(0, 1 << 32)), "fp32")
    x = np.where(np.abs(x) > 1024, np.float32(-1.25), x)  # a NaN stays and becomes a bad group or element
    return statement.encode(x, np.zeros_like(x), None, format)[0], draw(weights()), format


def summed(adds: list[Contribution], numel: int = NUMEL) -> codec.Accumulator:
    accumulator = codec.Accumulator(numel)
    for body, weight, format in adds:
        accumulator.add(to_body(body), weight, format=format)
    return accumulator


def summed_at_once(adds: list[Contribution], numel: int = NUMEL, parts: int = 1) -> codec.Accumulator:
    """As `summed`, in this many passes."""
    accumulator = codec.Accumulator(numel)
    for part in range(parts):
        hold(accumulator, adds[part::parts])
        accumulator.fold()
    return accumulator


def hold(accumulator: codec.Accumulator, adds: list[Contribution]) -> None:
    for body, weight, format in adds:
        accumulator.hold(accumulator.check(to_body(body), weight, format))


def mean_bits(accumulator: codec.Accumulator) -> list[int]:
    return statement.bits(to_numpy(accumulator.mean())).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(contributions(), min_size=2, max_size=8), st.randoms())
def test_the_mean_has_the_same_bits_in_any_order_of_arrival(adds: list[Contribution], random: object) -> None:
    shuffled = list(adds)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = summed(adds), summed(shuffled)
    assert mean_bits(first) == mean_bits(second)
    assert first.total_weight == second.total_weight
    assert first.contributions == second.contributions == len(adds)


@settings(max_examples=40, deadline=None)
@given(st.lists(contributions(), min_size=1, max_size=8), st.integers(1, 3))
def test_what_is_added_in_one_pass_gives_the_bits_of_one_by_one(adds: list[Contribution], parts: int) -> None:
    """Contributions of several formats, too; a part may be empty."""
    one_by_one, at_once = summed(adds), summed_at_once(adds, parts=parts)
    assert mean_bits(one_by_one) == mean_bits(at_once)
    assert one_by_one.total_weight == at_once.total_weight
    assert one_by_one.contributions == at_once.contributions == len(adds)
    assert one_by_one.bad_groups == at_once.bad_groups


@settings(max_examples=40, deadline=None)
@given(st.lists(contributions(), min_size=1, max_size=8), st.data())
def test_what_is_held_until_the_mean_gives_the_bits_of_what_was_added(
    adds: list[Contribution], data: st.DataObject
) -> None:
    """Of a block longer than what the mean takes at a time, too; and the sum stays as it was."""
    before = data.draw(st.integers(0, len(adds)))
    longer = data.draw(st.sampled_from([1, 9]))
    adds = [(repeated(body, format, longer), weight, format) for body, weight, format in adds]
    added, partly_held = summed(adds, longer * NUMEL), summed(adds[:before], longer * NUMEL)
    hold(partly_held, adds[before:])
    assert partly_held.contributions == len(adds)
    assert partly_held.total_weight == added.total_weight
    assert partly_held.bad_groups == added.bad_groups
    assert mean_bits(partly_held) == mean_bits(partly_held) == mean_bits(added)
    partly_held.fold()
    assert mean_bits(partly_held) == mean_bits(added)


def repeated(body: bytes, format: str, times: int) -> bytes:
    """The body of so many copies of the block, one after the other."""
    scales = codec.scale_bytes(NUMEL, format)
    return body[:scales] * times + body[scales:] * times


def test_a_sum_whose_contributions_are_held_until_its_mean_takes_no_memory() -> None:
    accumulator = codec.Accumulator(NUMEL)
    hold(accumulator, [(body_of([2.0]) * 2, 1.0, "fp32")])
    assert (to_numpy(accumulator.mean()) == 2.0).all()
    assert accumulator._halves == ()
    accumulator.fold()
    assert len(accumulator._halves) == 2


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 3, 64, 67])
def test_factors_of_any_length_and_size_add_up_exactly(format: str, count: int) -> None:
    """Weights of 53 bits from 2**-64 on and scales down to 2**-90: the bits of all of them together are over a hundred,
    with gaps, and some lie below the sum's unit."""
    rng = np.random.default_rng(count)
    adds: list[Contribution] = []
    for weight in rng.uniform(1, 2, count) * np.exp2(rng.integers(-64, 20, count)):
        x = rng.standard_normal(NUMEL) * np.exp2(rng.uniform(-90, 6, NUMEL // 64)).repeat(64)
        body, _, _ = statement.encode(x.astype(np.float32), np.zeros(NUMEL, np.float32), None, format)
        adds.append((body, float(weight), format))
    expected = statement.Accumulator(NUMEL)
    for body, weight, _ in adds:
        expected.add(body, weight, format)
    held = codec.Accumulator(NUMEL)
    hold(held, adds)
    for accumulator in (summed(adds), summed_at_once(adds), summed_at_once(adds, parts=2)):
        assert accumulator._halves[0].tolist() == expected.hi
        assert accumulator._halves[1].tolist() == expected.lo
        assert mean_bits(held) == mean_bits(accumulator)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 2, 16, 65])
def test_a_long_block_adds_up_exactly_whatever_its_groups_have_in_common(format: str, count: int) -> None:
    """Groups whose factors differ by nothing, by a few binades, by more than any window has, or reach below the sum's
    unit; groups of zeros, in all contributions and in some; and more groups than are looked at together."""
    numel = 21 * BLOCK
    rng = np.random.default_rng(count)
    groups = numel // 64
    middle = rng.choice([-60.0, -30.0, -20.0], groups)
    spread = rng.choice([0.0, 2.0, 12.0, 60.0], groups)
    zeros = rng.random(groups) < 0.1
    apart = rng.random(groups) < 0.3  # by more than 64 bits, with nothing in between
    adds: list[Contribution] = []
    expected = statement.Accumulator(numel)
    for _ in range(count):
        exponents = middle + spread * (rng.random(groups) - 0.5)
        exponents[apart] = rng.choice([-64.0, 4.0], groups)[apart]
        exponents[zeros | (rng.random(groups) < 0.1)] = -np.inf
        x = rng.standard_normal(numel) * np.exp2(exponents).repeat(64)
        body, _, _ = statement.encode(x.astype(np.float32), np.zeros(numel, np.float32), None, format)
        adds.append((body, float(rng.choice([1.0, 3.0, 2048.0, rng.uniform(1, 2)])), format))
        expected.add(*adds[-1])
    once, twice = summed_at_once(adds, numel), summed_at_once(adds, numel, parts=2)
    held = codec.Accumulator(numel)
    hold(held, adds)
    for accumulator in (once, twice):
        assert accumulator._halves[0].tolist() == expected.hi
        assert accumulator._halves[1].tolist() == expected.lo
        assert mean_bits(accumulator) == mean_bits(held)


@pytest.mark.parametrize("weights", [(1, 48), (3, 100), (1, 196)])
def test_a_mean_halfway_between_two_fp32_values_is_rounded_to_even(weights: tuple[int, int]) -> None:
    """These totals have reciprocals such that a product with them is off by a bit where the division is exact."""
    numel, shift, unit = 2**17, 19, -20
    rng = np.random.default_rng(1)
    codes = [rng.integers(-127, 127, numel, endpoint=True) for _ in weights]
    held = codec.Accumulator(numel)
    for exponent, weight, values in zip((unit, unit + shift), weights, codes, strict=True):
        scale = ((exponent + 127) << 7).to_bytes(2, "little")
        body = scale * (codec.scale_bytes(numel, "int8") // 2) + values.astype(np.int8).tobytes()
        hold(held, [(body, float(weight), "int8")])
    sums = weights[0] * codes[0] + (weights[1] * codes[1] << shift)
    exact, product = sums / sum(weights), sums * (1 / sum(weights))
    assert (exact.astype(np.float32) != product.astype(np.float32)).sum() > 10
    assert mean_bits(held) == statement.bits((exact * 2.0**unit).astype(np.float32)).tolist()


def test_a_factor_beyond_all_bounds_counts_nothing_where_all_codes_are_0() -> None:
    largest_scale = (0x7F7F).to_bytes(2, "little")
    adds = [(largest_scale + bytes(BLOCK), 2.0**64, "int8"), (int8_body(0x3F80), 3.0, "int8")]
    assert (to_numpy(summed_at_once(adds, BLOCK).mean()) == np.float32(3.0 / (2.0**64 + 3.0))).all()


@pytest.mark.parametrize("scale", [0x8000, 0x0000, 0x8001, 0x0001], ids=["-0", "0", "-subnormal", "subnormal"])
def test_a_scale_that_no_encoder_makes_counts_what_its_number_says(scale: int) -> None:
    adds = [(int4_body(scale), 3.0, "int4"), (int8_body(0x3F80), 2.0, "int8")]
    expected = statement.Accumulator(BLOCK)
    for body, weight, format in adds:
        expected.add(body, weight, format)
    for accumulator in (summed(adds, BLOCK), summed_at_once(adds, BLOCK)):
        assert accumulator._halves[0].tolist() == expected.hi
        assert accumulator._halves[1].tolist() == expected.lo


def test_more_than_a_sum_can_hold_changes_nothing() -> None:
    accumulator = codec.Accumulator(BLOCK, threads=1)
    one = accumulator.check(to_body(body_of([2.0])), 1.0, "fp32")
    for _ in range(codec.MAX_CONTRIBUTIONS - 1):
        accumulator.hold(one)
    accumulator.fold()
    accumulator.hold(one)
    before = mean_bits(accumulator)
    with pytest.raises(CodecError, match="at most 4095"):
        accumulator.hold(one)
    assert accumulator.contributions == codec.MAX_CONTRIBUTIONS
    assert mean_bits(accumulator) == before


def test_the_mean_goes_where_it_is_wanted() -> None:
    accumulator = summed([(body_of([3.0]), 2.0, "fp32")], BLOCK)
    out = torch.full((BLOCK,), 9.0)
    assert accumulator.mean(out) is out
    assert (out == 3.0).all()
    for wrong in (torch.zeros(BLOCK + 128), torch.zeros(BLOCK, dtype=torch.float64), torch.zeros(2 * BLOCK)[::2]):
        with pytest.raises(CodecError, match="out: expected"):
            accumulator.mean(wrong)


@settings(max_examples=30, deadline=None)
@given(st.lists(contributions(), min_size=1, max_size=5))
def test_the_mean_equals_the_statement(adds: list[Contribution]) -> None:
    expected = statement.Accumulator(NUMEL)
    for body, weight, format in adds:
        expected.add(body, weight, format)
    np.testing.assert_array_equal(to_numpy(summed(adds).mean()), expected.mean())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 1 << 20))
def test_the_mean_of_one_fp32_contribution_is_that_contribution(seed: int, weight: int) -> None:
    """For values whose last bit is at least 2**-72: every fp32 value from 2**-49 on, to 2**31 / weight."""
    rng = np.random.default_rng(seed)
    x = (rng.choice([-1, 1], NUMEL) * np.exp2(rng.uniform(-49, 10.9, NUMEL))).astype(np.float32)
    accumulator = codec.Accumulator(NUMEL)
    accumulator.add(to_body(x.tobytes()), float(weight), format="fp32")
    np.testing.assert_array_equal(to_numpy(accumulator.mean()), x)


def test_the_mean_resolves_2_to_the_minus_72_and_no_less() -> None:
    x = [2.0**-72, -(2.0**-72), 3 * 2.0**-73, 2.0**-73, 2.0**-74]
    mean = to_numpy(summed([(body_of(x), 1.0, "fp32")], BLOCK).mean())
    # Half a unit goes to the even count of units: 1.5 -> 2, 0.5 -> 0.
    assert mean[:5].tolist() == [2.0**-72, -(2.0**-72), 2.0**-71, 0.0, 0.0]


def test_large_contributions_cancel_without_harm_to_small_ones() -> None:
    values = [(2.0**30, 1.0), (2.0**-40, 1.0), (-(2.0**29), 3.0), (2.0**29, 1.0)]
    adds = [(body_of([value]), weight, "fp32") for value, weight in values]
    assert (to_numpy(summed(adds, BLOCK).mean()) == np.float32(2.0**-40 / 6)).all()


def test_the_mean_is_weighted_by_tokens() -> None:
    accumulator = summed([(body_of([1.0]), 3.0, "fp32"), (body_of([-1.0], "bf16"), 1.0, "bf16")], BLOCK)
    assert (to_numpy(accumulator.mean()) == 0.5).all()
    assert accumulator.total_weight == 4.0
    assert accumulator.contributions == 2


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(2.0**31 - 128, id="upper half"),
        pytest.param(-(2.0**31) + 128, id="upper half, negative"),
        # Half of a coarse unit is a tie that goes to 0: all of it lands in the finer step, 2**51 units each time.
        pytest.param(2.0**-21, id="finer step"),
        pytest.param(-(2.0**-21), id="finer step, negative"),
    ],
)
def test_a_full_sum_of_the_worst_values_does_not_overflow_and_takes_no_more(value: float) -> None:
    body = to_body(body_of([value]))
    accumulator = codec.Accumulator(BLOCK, threads=1)
    for _ in range(codec.MAX_CONTRIBUTIONS):
        accumulator.add(body, 1.0, format="fp32")
    assert (to_numpy(accumulator.mean()) == value).all()
    with pytest.raises(CodecError):
        accumulator.add(body, 1.0, format="fp32")
    assert accumulator.contributions == accumulator.total_weight == codec.MAX_CONTRIBUTIONS
    assert (to_numpy(accumulator.mean()) == value).all()


def test_the_total_weight_does_not_depend_on_the_order() -> None:
    body = body_of([1.0])
    totals = {
        summed([(body, weight, "fp32") for weight in order], BLOCK).total_weight
        for order in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1])
    }
    assert totals == {math.fsum([0.1, 0.2, 0.3])}


@pytest.mark.parametrize("format", FORMATS)
def test_the_mean_of_a_large_block_does_not_depend_on_the_threads(format: str) -> None:
    numel = BLOCK * 2049
    generator = torch.Generator().manual_seed(11)
    packed = [
        codec.encode(torch.randn(numel, generator=generator), torch.zeros(numel), format=format).body for _ in range(3)
    ]
    means = []
    for threads in (1, 2, 3):
        accumulator = codec.Accumulator(numel, threads=threads)
        for weight, body in enumerate(packed, start=1):
            accumulator.add(body, weight, format=format)
        means.append(accumulator.mean())
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    exact = sum(w * codec.decode(body, numel, format=format).double() for w, body in enumerate(packed, start=1)) / 6
    assert torch.equal(means[0], exact.float())


def test_a_bad_group_contributes_zero_and_its_weight() -> None:
    hurt = np.ones(BLOCK, dtype=np.float32)
    hurt[7] = np.nan
    adds = [(body_of([1.0], "fp32"), 1.0, "fp32"), (body_of(hurt, "int8"), 1.0, "int8")]
    assert (to_numpy(summed(adds, BLOCK).mean()) == 0.5).all()


def test_reset_forgets_everything() -> None:
    accumulator = summed([(body_of([3.0]), 2.0, "fp32")], BLOCK)
    accumulator.reset()
    assert accumulator.contributions == 0
    assert accumulator.total_weight == 0.0
    accumulator.add(to_body(body_of([5.0])), 7.0, format="fp32")
    assert (to_numpy(accumulator.mean()) == 5.0).all()


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(CodecError):
        codec.Accumulator(BLOCK).mean()


def int8_body(scale: int, code: int = 1) -> bytes:
    codes = np.ones(BLOCK, dtype=np.int8)
    codes[100] = code
    return scale.to_bytes(2, "little") + codes.tobytes()


def int4_body(scale: int) -> bytes:
    return bytes.fromhex("803F") + scale.to_bytes(2, "little") + bytes([0x11]) * 64


def elements(value: int, width: int) -> bytes:
    values = np.zeros(BLOCK, dtype=f"<u{width}")
    values[77] = value
    return values.tobytes()


REFUSED = [
    pytest.param(int8_body(0x7F80), 1.0, "int8", id="int8 infinite scale"),
    pytest.param(int8_body(0xFF80), 1.0, "int8", id="int8 scale minus infinity"),
    pytest.param(int8_body(0x7FC1), 1.0, "int8", id="int8 scale another NaN"),
    pytest.param(int8_body(0x7F81), 1.0, "int8", id="int8 scale a signalling NaN"),
    pytest.param(int8_body(0xFFC0), 1.0, "int8", id="int8 scale a negative NaN"),
    pytest.param(int8_body(0xBF80), 1.0, "int8", id="int8 negative scale"),
    pytest.param(int8_body(0x3F80, -128), 1.0, "int8", id="int8 code -128"),
    pytest.param(int8_body(0x7F00, 127), 1.0, "int8", id="int8 finite scale, infinite product"),
    pytest.param(int8_body(0x4F00, 2), 1.0, "int8", id="int8 product 2**32"),
    pytest.param(int4_body(0x7F80), 1.0, "int4", id="int4 infinite scale"),
    pytest.param(int4_body(0xFF80), 1.0, "int4", id="int4 scale minus infinity"),
    pytest.param(int4_body(0x7FFF), 1.0, "int4", id="int4 scale another NaN"),
    pytest.param(int4_body(0xFFC0), 1.0, "int4", id="int4 scale a negative NaN"),
    pytest.param(int4_body(0x7F00)[:4] + bytes([0x77]) * 64, 1.0, "int4", id="int4 finite scale, infinite product"),
    pytest.param(elements(0x7F800000, 4), 1.0, "fp32", id="fp32 infinity"),
    pytest.param(elements(0xFF800000, 4), 1.0, "fp32", id="fp32 minus infinity"),
    pytest.param(elements(0x7F800001, 4), 1.0, "fp32", id="fp32 NaN"),
    pytest.param(elements(0x7F80, 2), 1.0, "bf16", id="bf16 infinity"),
    pytest.param(elements(0xFFC0, 2), 1.0, "bf16", id="bf16 NaN"),
    pytest.param(body_of([2.0**31]), 1.0, "fp32", id="a value of 2**31"),
    pytest.param(body_of([-(2.0**31)]), 1.0, "fp32", id="a value of -2**31"),
    pytest.param(body_of([1.5]), 2.0**31, "fp32", id="weight times value above 2**31"),
    pytest.param(body_of([1e30], "int8"), 1.0, "int8", id="int8 too large"),
    pytest.param(body_of([-1e30], "int4"), 1.0, "int4", id="int4 too large"),
    pytest.param(body_of([1.0]), 0.0, "fp32", id="weight 0"),
    pytest.param(body_of([1.0]), -1.0, "fp32", id="weight -1"),
    pytest.param(body_of([1.0]), float("nan"), "fp32", id="weight NaN"),
    pytest.param(body_of([0.0]), 2.0**65, "fp32", id="weight above 2**64, values zero"),
    pytest.param(body_of([2.55e38]), 5e-61, "fp32", id="weight below 2**-64: the mean could be infinite"),
    pytest.param(body_of([1.0]), float("inf"), "fp32", id="weight infinite"),
    pytest.param(body_of([0.0]), float("inf"), "fp32", id="weight infinite, values zero"),
    pytest.param(body_of([1.0])[:-4], 1.0, "fp32", id="body too short"),
]


@pytest.mark.parametrize(("body", "weight", "format"), REFUSED)
def test_a_refused_contribution_leaves_no_trace(body: bytes, weight: float, format: str) -> None:
    accumulator = summed([(body_of([0.75]), 2.0, "fp32")], BLOCK)
    before = mean_bits(accumulator)
    with pytest.raises(CodecError):
        accumulator.add(to_body(body), weight, format=format)
    assert accumulator.contributions == 1
    assert accumulator.total_weight == 2.0
    assert mean_bits(accumulator) == before


@pytest.mark.parametrize(
    ("body", "weight", "format"),
    [
        pytest.param(int8_body(0x3F80, -127), 1.0, "int8", id="int8 code -127"),
        pytest.param(int8_body(0x7FC0, 0), 1.0, "int8", id="a bad group"),
        pytest.param(int4_body(0xBF80), 1.0, "int4", id="int4 negative scale"),
        pytest.param(int4_body(0x3F80)[:4] + bytes([0x88]) * 64, 1.0, "int4", id="int4 code -8"),
        pytest.param(body_of([2.0**31 - 128]), 1.0, "fp32", id="a value just below 2**31"),
        pytest.param(body_of([2.0**-24 - 0.5]), 2.0**32, "fp32", id="weight times value just above -2**31"),
    ],
)
def test_what_an_encoder_can_send_is_accepted(body: bytes, weight: float, format: str) -> None:
    expected = statement.Accumulator(BLOCK)
    expected.add(body, weight, format)
    np.testing.assert_array_equal(to_numpy(summed([(body, weight, format)], BLOCK).mean()), expected.mean())


# --- fingerprint ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(blocks("fp32"), st.sampled_from(DTYPES))
def test_fingerprint_equals_the_statement(block: Array, dtype: str) -> None:
    tensor = to_torch(block.view(NUMPY[dtype]) if dtype != "fp32" else block)
    assert codec.fingerprint(tensor) == statement.fingerprint(block.tobytes())


def test_fingerprint_of_one_word_worked_by_hand() -> None:
    # Word 0 at index 0: z = 0x9E3779B97F4A7C15 * 0xBF58476D1CE4E5B9 mod 2**64, then z ^ (z >> 29).
    z = 0x9E3779B97F4A7C15 * 0xBF58476D1CE4E5B9 % 2**64
    assert codec.fingerprint(torch.zeros(1)) == z ^ (z >> 29)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_fingerprint_of_every_dtype_is_that_of_its_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(4096).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert codec.fingerprint(tensor) == statement.fingerprint(data)


def test_fingerprint_finds_any_flipped_bit() -> None:
    data = np.random.default_rng(2).integers(0, 1 << 32, 64, dtype=np.uint32)
    seen = {codec.fingerprint(to_torch(data.view(np.float32)))}
    for word in range(data.size):
        for bit in range(32):
            flipped = data.copy()
            flipped[word] ^= np.uint32(1 << bit)
            seen.add(codec.fingerprint(to_torch(flipped.view(np.float32))))
    assert len(seen) == 64 * 32 + 1


def test_fingerprint_finds_swapped_words_and_added_zeros() -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0, 4.0])
    prints = {
        codec.fingerprint(tensor),
        codec.fingerprint(tensor.flip(0).contiguous()),
        codec.fingerprint(torch.cat([tensor, torch.zeros(1)])),
    }
    assert len(prints) == 3


def test_fingerprint_of_a_million_words_equals_the_statement_for_any_number_of_threads() -> None:
    data = np.random.default_rng(4).integers(0, 1 << 32, (1 << 20) + 17, dtype=np.uint32)
    tensor = to_torch(data.view(np.float32))
    expected = statement.fingerprint(data.tobytes())
    assert codec.fingerprint(tensor) == expected
    assert {_C.fingerprint(tensor.data_ptr(), data.nbytes, threads) for threads in (1, 2, 3)} == {expected}


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.uint8), torch.zeros(8)[::2]], ids=["3 bytes", "gaps"])
def test_fingerprint_refuses(tensor: torch.Tensor) -> None:
    with pytest.raises(CodecError):
        codec.fingerprint(tensor)
