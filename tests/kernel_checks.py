"""Comparisons of the kernels with the native codec, bit for bit, for any device: the interpreter's CPU or a GPU.

Every output lies between guard bytes that a kernel must leave alone. Import it only where the kernels can run.
"""

from __future__ import annotations

import codec_cases as cases
import codec_golden as golden
import codec_statement as statement
import numpy as np
import torch
from codec_cases import Array, to_bytes, to_torch

from parablock_rt import codec, kernels

GUARD = 0xA5
GUARD_BYTES = 1 << 15  # more than a whole tile of any kernel writes


class Guarded:
    """`size` bytes at an address of `shift` modulo 16, with guard bytes on both sides."""

    def __init__(self, size: int, device: str, shift: int = 0) -> None:
        self.whole = torch.full((size + 2 * GUARD_BYTES + 16,), GUARD, dtype=torch.uint8, device=device)
        self.start = GUARD_BYTES + (shift - self.whole.data_ptr() - GUARD_BYTES) % 16
        self.inner = self.whole[self.start : self.start + size]

    def holding(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in here."""
        inner = self.inner.view(tensor.dtype)
        inner.copy_(tensor)
        return inner

    def check(self) -> None:
        before, after = self.whole[: self.start], self.whole[self.start + self.inner.numel() :]
        assert bool((before == GUARD).all()), "bytes before an output were written"
        assert bool((after == GUARD).all()), "bytes after an output were written"


def guarded_copy(tensor: torch.Tensor, device: str, shift: int = 0) -> tuple[torch.Tensor, Guarded]:
    memory = Guarded(tensor.numel() * tensor.element_size(), device, shift)
    return memory.holding(tensor), memory


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    left, right = found.cpu().view(torch.uint8), expected.view(torch.uint8)
    assert found.dtype == expected.dtype, what
    if not torch.equal(left, right):
        size = expected.element_size()
        at = (left != right).view(-1, size).any(1).nonzero().view(-1)
        words = [(int(i), bytes(left[i * size : (i + 1) * size].tolist()).hex()) for i in at[:5]]
        raise AssertionError(f"{what}: {at.numel()} of {expected.numel()} elements differ, first {words}")


def check_encode(device: str, now: Array, ref: Array, residual: Array | None, format: str, shift: int = 0) -> bytes:
    """Body, residual and count, into given buffers (the body at address `shift` modulo 16) and in place."""
    inputs = to_torch(now), to_torch(ref)
    rest = None if residual is None else to_torch(residual)
    left = torch.empty(now.size)
    expected = codec.encode(*inputs, rest, format=format, residual_out=left)

    there = [tensor.to(device, copy=True) for tensor in inputs]
    there_rest = None if rest is None else rest.to(device, copy=True)
    body = Guarded(codec.body_bytes(now.size, format), device, shift)
    kept = Guarded(now.size * 4, device)
    packed = kernels.encode(
        *there, there_rest, format=format, residual_out=kept.inner.view(torch.float32), out=body.inner
    )
    assert packed.body is body.inner
    assert_same_bits(packed.body, expected.body, f"{format} body")
    assert_same_bits(kept.inner.view(torch.float32), left, f"{format} residual")
    assert packed.bad_groups == expected.bad_groups
    body.check()
    kept.check()
    for tensor, before in zip(there, inputs, strict=True):
        assert_same_bits(tensor, before, "an input")

    if rest is not None and there_rest is not None:
        assert_same_bits(there_rest, rest, "a residual that is only to be read")
        again = kernels.encode(*there, there_rest, format=format)
        assert_same_bits(there_rest, left, f"{format} residual in place")
    else:
        again = kernels.encode(*there, format=format)
    assert_same_bits(again.body, expected.body, f"{format} body, allocated")
    assert again.bad_groups == expected.bad_groups
    return to_bytes(expected.body)


def check_encode_by_statement(device: str, now: Array, ref: Array, residual: Array | None, format: str) -> None:
    """As `check_encode`, and the native codec's bytes are those of the statement."""
    body, _, bad = statement.encode(now, ref, residual, format)
    packed = kernels.encode(
        to_torch(now).to(device, copy=True),
        to_torch(ref).to(device, copy=True),
        None if residual is None else to_torch(residual).to(device, copy=True),
        format=format,
    )
    assert to_bytes(packed.body.cpu()) == body
    assert packed.bad_groups == bad
    assert check_encode(device, now, ref, residual, format) == body


def check_decode(device: str, body: bytes, numel: int, format: str, shift: int = 0) -> None:
    here = cases.to_body(body)
    there, _ = guarded_copy(here, device, shift)
    found = kernels.decode(there, numel, format=format)
    assert_same_bits(found, codec.decode(here, numel, format=format), f"{format} decoded")


def check_apply(device: str, target: Array, body: bytes, format: str, shift: int = 0) -> None:
    here = cases.to_body(body)
    expected = codec.apply_(to_torch(target), here, format=format)
    found, memory = guarded_copy(to_torch(target), device)
    there, _ = guarded_copy(here, device, shift)
    assert kernels.apply_(found, there, format=format) is found
    assert isinstance(expected, torch.Tensor)
    assert_same_bits(found, expected, f"{format} applied")
    memory.check()


def check_apply_to_parts(device: str, format: str) -> None:
    """Several targets of different dtypes, one behind the other in the block, each between guards."""
    sizes = (128, 128 * 37, 128 * 2)
    change, _ = odd_sized_block(60, 9)
    numel = sum(sizes)
    here = codec.encode(to_torch(change["now"][:numel]), to_torch(change["ref"][:numel]), format=format).body
    parts = [
        torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        for size, dtype in zip(sizes, (torch.bfloat16, torch.float32, torch.float16), strict=True)
    ]
    there = [guarded_copy(part, device) for part in parts]
    expected = codec.apply_([part.clone() for part in parts], here, format=format)
    found = kernels.apply_([inner for inner, _ in there], here.to(device), format=format)
    for one, wanted, (_, memory) in zip(found, expected, there, strict=True):
        assert_same_bits(one, wanted, f"{format} applied to {wanted.dtype}")
        memory.check()


def check_encode_in_slices(device: str, format: str) -> None:
    """A block packed by several calls into several bodies, with one count and the residual in place."""
    change, _ = odd_sized_block(60, 9)
    now, ref, residual = (to_torch(change[name]).clone() for name in ("now", "ref", "residual"))
    now[[5, 128 * 40]] = torch.nan
    expected_residual = residual.clone()
    expected = codec.encode(now, ref, expected_residual, format=format)
    there = [tensor.to(device, copy=True) for tensor in (now, ref, residual)]
    bad = torch.full((1,), 7, dtype=torch.int64, device=device)
    scales, codes = [], []
    for start in range(0, now.numel(), 128 * 33):
        part = [tensor[start : start + 128 * 33] for tensor in there]
        body = kernels.encode(*part, format=format, bad=bad).body
        split = codec.scale_bytes(part[0].numel(), format)
        scales.append(body[:split])
        codes.append(body[split:])
    assert_same_bits(torch.cat(scales + codes), expected.body, f"{format} in slices")
    assert_same_bits(there[2], expected_residual, f"{format} residual in slices")
    assert int(bad) == 7 + expected.bad_groups


def check_accumulate(device: str, numel: int, parts: list[tuple[bytes, float, str]]) -> None:
    """The limbs after all parts, in the order given and in the reverse."""
    expected = codec.Accumulator(numel)
    for body, weight, format in parts:
        expected.add(cases.to_body(body), weight, format)
    for order in (parts, parts[::-1]):
        hi, hi_memory = guarded_copy(torch.zeros(numel, dtype=torch.int64), device)
        lo, lo_memory = guarded_copy(torch.zeros(numel, dtype=torch.int64), device)
        for body, weight, format in order:
            there, _ = guarded_copy(cases.to_body(body), device)
            kernels.accumulate(hi, lo, there, weight, format=format)
        assert_same_bits(hi, expected._halves[0], "hi")
        assert_same_bits(lo, expected._halves[1], "lo")
        hi_memory.check()
        lo_memory.check()


def odd_sized_block(count: int, seed: int) -> tuple[dict[str, Array], Array]:
    """now, ref and residual of `count` parameters of odd sizes, zeros between them, and a mask of the gaps."""
    rng = np.random.default_rng(seed)
    sizes = [int(size) * 2 + 1 for size in rng.integers(0, 200, count)]
    starts = np.cumsum([0] + [-(-size // 128) * 128 for size in sizes])
    gap = np.ones(starts[-1], dtype=bool)
    for start, size in zip(starts, sizes, strict=False):
        gap[start : start + size] = False
    ref = rng.standard_normal(gap.size).astype(np.float32) * np.float32(0.02)
    now = ref + rng.standard_normal(gap.size).astype(np.float32) * np.float32(1e-4)
    residual = rng.standard_normal(gap.size).astype(np.float32) * np.float32(1e-6)
    for values in (now, ref, residual):
        values[gap] = 0
    return {"now": now, "ref": ref, "residual": residual}, gap


def special_values_by_position() -> Array:
    """One group of 128 a special value and position: the value among ordinary ones of both signs."""
    specials = np.array(
        [0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000],
        dtype=np.uint32,
    )
    ordinary = np.random.default_rng(11).standard_normal(128).astype(np.float32)
    pattern = np.tile(statement.bits(ordinary), (specials.size, 128, 1))
    pattern[:, np.arange(128), np.arange(128)] = specials[:, None]
    return statement.floats(pattern.reshape(-1))


def check_golden(device: str, case: str) -> None:
    """The kernels make the bytes that are in the repository."""
    vectors = {name.removeprefix(f"{case}."): v for name, v in golden.load().items() if name.startswith(f"{case}.")}
    made = {name: vectors[name] for name in ("now", "ref", "residual") if name in vectors}
    given = {name: to_torch(value).to(device, copy=True) for name, value in made.items()}
    hi, lo = (torch.zeros(golden.NUMEL, dtype=torch.int64, device=device) for _ in range(2))
    for format in golden.FORMATS:
        left = torch.full((golden.NUMEL,), np.nan, device=device)
        packed = kernels.encode(**given, format=format, residual_out=left)
        made[f"{format}.body"] = cases.to_numpy(packed.body.cpu())
        made[f"{format}.residual"] = cases.to_numpy(left.cpu())
        made[f"{format}.bad"] = np.array([packed.bad_groups])
        if case != "plain":
            continue
        kernels.accumulate(hi, lo, packed.body, golden.WEIGHTS[format], format=format)
        for dtype in golden.TARGETS if format in golden.SCALED else ():
            target = to_torch(golden.target(dtype)).to(device, copy=True)
            made[f"{format}.applied.{dtype}"] = cases.to_numpy(kernels.apply_(target, packed.body, format=format).cpu())
    if case == "plain":
        made["sum.hi"], made["sum.lo"] = cases.to_numpy(hi.cpu()), cases.to_numpy(lo.cpu())
    assert golden.differences(made, vectors) == []
