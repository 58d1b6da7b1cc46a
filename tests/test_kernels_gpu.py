"""The kernels on a GPU against the native codec, bit for bit, and what only shows there: launches, streams, waiting."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import codec_cases as cases
import codec_golden as golden
import codec_statement as statement
import kernel_checks as checks
import numpy as np
import pytest
import torch
from codec_cases import DTYPES, FORMATS, KINDS

from parablock_rt import codec, kernels
from parablock_rt.errors import CodecError

DEVICE = "cuda"
PAIRS = [(now, ref) for now in DTYPES for ref in DTYPES]
BLOCK_OF_135M = 3_540_096  # elements of one flat block of a 135 M model, with gaps; its codes would be misaligned
LONG = (1 << 26) + 128

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def weights(numel: int, dtype: torch.dtype, seed: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(dtype)


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_vectors(case: str) -> None:
    checks.check_golden(DEVICE, case)


@pytest.mark.parametrize("residual", [False, True], ids=["fresh", "residual"])
@pytest.mark.parametrize(("now", "ref"), PAIRS)
@pytest.mark.parametrize("format", FORMATS)
def test_encode_of_every_kind_of_value(format: str, now: str, ref: str, residual: bool) -> None:
    kinds = list(KINDS) * 40
    values = cases.pattern(kinds, 1, now)
    zeros = np.zeros(values.size, dtype=cases.NUMPY[ref])
    rest = cases.pattern(["subnormal"] * len(kinds), 2, "fp32")
    checks.check_encode_by_statement(DEVICE, values, zeros, rest if residual else None, format)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("format", FORMATS)
def test_encode_of_arbitrary_bits(format: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    now, ref, residual = (
        cases.pattern([str(rng.choice(list(KINDS))) for _ in range(500)], seed * 3 + i, "fp32") for i in range(3)
    )
    checks.check_encode_by_statement(DEVICE, now, ref, residual, format)


@pytest.mark.parametrize("format", FORMATS)
def test_special_values_wherever_they_are(format: str) -> None:
    x = checks.special_values_by_position()
    checks.check_encode_by_statement(DEVICE, x, np.zeros_like(x), None, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shift", [0, 2, 4, 6, 8, 10, 12, 14])
def test_bodies_at_every_even_address(format: str, shift: int) -> None:
    if format == "fp32" and shift % 4:
        pytest.skip("fp32 codes need an address that is a multiple of 4")
    change, _ = checks.odd_sized_block(5, shift)
    body = checks.check_encode(DEVICE, **change, format=format, shift=shift)
    checks.check_decode(DEVICE, body, change["now"].size, format, shift)
    checks.check_apply(DEVICE, change["now"], body, format, shift)


@pytest.mark.parametrize("format", FORMATS)
def test_sixty_odd_sized_parameters_in_one_block(format: str) -> None:
    change, gap = checks.odd_sized_block(60, 7)
    body = checks.check_encode(DEVICE, **change, format=format)
    assert not kernels.decode(cases.to_body(body).to(DEVICE), gap.size, format=format).cpu().numpy()[gap].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_decode_and_apply_of_every_kind_of_value(format: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    kinds = list(KINDS) * 40
    x = cases.pattern(kinds, 3, "fp32")
    body, _, _ = statement.encode(x, np.zeros_like(x), None, format)
    checks.check_decode(DEVICE, body, x.size, format)
    for seed in range(3):
        target = cases.pattern([str(rng.choice(list(KINDS))) for _ in kinds], seed, dtype)
        checks.check_apply(DEVICE, target, body, format)


@pytest.mark.parametrize("format", FORMATS)
def test_apply_to_several_tensors_of_one_block(format: str) -> None:
    checks.check_apply_to_parts(DEVICE, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_encoded_in_slices_has_the_same_planes_count_and_residual(format: str) -> None:
    checks.check_encode_in_slices(DEVICE, format)


@pytest.mark.parametrize("format", FORMATS)
def test_the_codec_takes_tensors_of_the_gpu(format: str) -> None:
    now, ref = weights(4096, torch.float32, 0), weights(4096, torch.bfloat16, 1)
    packed, expected = (
        codec.encode(now.to(DEVICE), ref.to(DEVICE), format=format),
        codec.encode(now, ref, format=format),
    )
    assert packed.bad_groups == expected.bad_groups == 0
    checks.assert_same_bits(packed.body, expected.body, "body")
    checks.assert_same_bits(
        codec.decode(packed.body, 4096, format=format), codec.decode(expected.body, 4096, format=format), "change"
    )
    there = [ref[:1024].to(DEVICE), now[1024:].to(DEVICE)]
    here = [ref[:1024].clone(), now[1024:].clone()]
    codec.apply_(there, packed.body, format=format)
    codec.apply_(here, expected.body, format=format)
    for found, wanted in zip(there, here, strict=True):
        checks.assert_same_bits(found, wanted, "applied")
        assert codec.fingerprint(found) == codec.fingerprint(wanted)
    with pytest.raises(CodecError, match="ref: expected a CUDA tensor, found one on cpu"):
        codec.encode(now.to(DEVICE), ref, format=format)
    with pytest.raises(CodecError, match="host memory"):
        codec.apply_(now.to(DEVICE), expected.body, format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_decode_of_bytes_that_no_encoder_makes(format: str) -> None:
    numel = 128 * 700
    checks.check_decode(DEVICE, np.random.default_rng(5).bytes(codec.body_bytes(numel, format)), numel, format)


def test_the_sum_is_that_of_the_native_accumulator_in_any_order() -> None:
    numel = 128 * 350
    parts = []
    for seed, format in enumerate(FORMATS * 2):
        x = np.random.default_rng(seed).standard_normal(numel).astype(np.float32) * np.float32(10.0 ** (seed - 6))
        body, _, _ = statement.encode(x, np.zeros_like(x), None, format)
        parts.append((body, [0.1, 3.0, 1.0 / 3.0, 4095.7][seed % 4], format))
    checks.check_accumulate(DEVICE, numel, parts)


@pytest.mark.parametrize("words", [1, 8191, 8192, 8193, 1_000_003])
def test_fingerprint(words: int) -> None:
    values = torch.from_numpy(np.random.default_rng(words).integers(0, 1 << 32, words, dtype=np.uint32).view(np.int32))
    assert kernels.fingerprint(values.to(DEVICE)) == codec.fingerprint(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("numel", [BLOCK_OF_135M, LONG])
def test_rounds_of_encode_and_apply_on_real_sizes(numel: int, format: str, dtype: torch.dtype) -> None:
    """Three rounds with error feedback, so that residuals and weights of one round enter the next."""
    ref, residual = weights(numel, dtype, 0), torch.zeros(numel)
    gpu_ref, gpu_residual = ref.to(DEVICE, copy=True), residual.to(DEVICE, copy=True)
    for round_ in range(3 if numel < LONG else 1):
        now = (ref.float() + weights(numel, torch.float32, round_ + 1, 1e-4)).to(dtype)
        expected = codec.encode(now, ref, residual, format=format)
        packed = kernels.encode(now.to(DEVICE), gpu_ref, gpu_residual, format=format)
        checks.assert_same_bits(packed.body, expected.body, "body")
        checks.assert_same_bits(gpu_residual, residual, "residual")
        codec.apply_(ref, expected.body, format=format)
        kernels.apply_(gpu_ref, packed.body, format=format)
        checks.assert_same_bits(gpu_ref, ref, "weights")
    assert kernels.fingerprint(gpu_ref) == codec.fingerprint(ref)


def test_a_block_of_more_than_2_to_the_31_elements() -> None:
    numel, tail = (1 << 31) + 128 * 33, 1 << 20
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    now, ref = (torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    edges = {"first": slice(0, tail), "last": slice(numel - tail, numel)}
    for seed, edge in enumerate(edges.values()):
        now[edge] = weights(tail, torch.bfloat16, seed).to(DEVICE)
    body = kernels.encode(now, ref, format="int8").body
    scales = body[: codec.scale_bytes(numel, "int8")].view(torch.int16)
    codes = body[codec.scale_bytes(numel, "int8") :]
    for name, edge in edges.items():
        alone = codec.encode(now[edge].cpu(), ref[edge].cpu(), format="int8").body
        groups = slice(edge.start // 128, edge.stop // 128)
        found = torch.cat([scales[groups].contiguous().view(torch.uint8), codes[edge]])
        checks.assert_same_bits(found, alone, f"the {name} elements")
    assert not codes[tail : numel - tail].any()
    kernels.apply_(ref, body, format="int8")
    for edge in edges.values():
        alone = codec.encode(now[edge].cpu(), torch.zeros(tail, dtype=torch.bfloat16), format="int8").body
        applied = codec.apply_(torch.zeros(tail, dtype=torch.bfloat16), alone, format="int8")
        assert isinstance(applied, torch.Tensor)
        checks.assert_same_bits(ref[edge], applied, "applied")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
def test_nothing_waits_for_the_device_until_the_count_is_asked_for() -> None:
    now, ref = torch.ones(4096, device=DEVICE), torch.zeros(4096, device=DEVICE)
    hi, lo = (torch.zeros(4096, dtype=torch.int64, device=DEVICE) for _ in range(2))
    packed = kernels.encode(now, ref, format="int8")
    kernels.apply_(ref, packed.body, format="int8")
    kernels.accumulate(hi, lo, packed.body, 0.5, format="int8")
    kernels.decode(packed.body, 4096, format="int8")
    kernels.fingerprint_on_device(ref)


def test_each_operation_is_one_launch() -> None:
    now, ref = torch.ones(1 << 20, device=DEVICE), torch.zeros(1 << 20, device=DEVICE)
    residual = torch.zeros(1 << 20, device=DEVICE)
    hi, lo = (torch.zeros(1 << 20, dtype=torch.int64, device=DEVICE) for _ in range(2))
    body = kernels.encode(now, ref, residual, format="int8").body
    operations = {
        "encode": lambda: kernels.encode(now, ref, residual, format="int8", out=body),
        "decode": lambda: kernels.decode(body, now.numel(), format="int8"),
        "apply": lambda: kernels.apply_(ref, body, format="int8"),
        "accumulate": lambda: kernels.accumulate(hi, lo, body, 0.5, format="int8"),
        "fingerprint": lambda: kernels.fingerprint_on_device(ref),
    }
    # A pool that runs out of counters in the second call would be filled there, with a launch of its own.
    kernels.common.drop_counters(torch.cuda.current_stream().cuda_stream)
    for name, operation in operations.items():
        operation()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            operation()
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if not on_device:
            pytest.skip("the profiler sees nothing of this device")
        assert len(on_device) == 1, f"{name}: {on_device}"


def test_counts_are_right_on_several_streams() -> None:
    now = torch.ones(1 << 16, device=DEVICE)
    now[::128] = torch.nan
    ref = torch.zeros(1 << 16, device=DEVICE)
    torch.cuda.synchronize()
    packed = []
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            packed += [kernels.encode(now, ref, format="int8") for _ in range(200)]
    torch.cuda.synchronize()
    assert {p.bad_groups for p in packed} == {512}
