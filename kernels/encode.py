"""Encode: delta, residual, group scale, quantise, pack and the new residual in one pass over the block.

    x = (now - ref) + residual
    int8:   s = max|x| / 127                                 code = rint(x / bf16_up(s))           in -127..127
    int4:   s = x_m / -8, x_m the element of largest magnitude   code = min(rint(x / bf16_up(s)), 7)   in -8..7
    bf16:   code = bf16(x)        fp32:   code = x
    residual = x - code * scale

Source: group-wise absmax quantisation (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization") with error
feedback (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD"). The signed int4 scale puts the largest element on
the code -8. `rint` adds and subtracts 1.5 * 2^23, which is exact for |x| < 2^22.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from . import common
from .common import BAD_SCALE, bits_of, float_of, jit, kernel, rounded_to_bf16, widen

TILE = 4096  # elements per program
WARPS = 4

_INFINITY = tl.constexpr(0x7F800000)
_BF16_OVERFLOW = tl.constexpr(0x7F7F8000)  # the least magnitude that rounds to a bf16 infinity
_ZERO_GROUP = tl.constexpr((127 - 100) << 23)  # 2^-100
_ONE = tl.constexpr(0x3F800000)
_ROUNDER = tl.constexpr(12582912.0)


@dataclass(frozen=True)
class Packed:
    """One packed block: `body` (uint8, [body_bytes]) and, still on the device, the count of bad groups or elements."""

    body: torch.Tensor
    bad: torch.Tensor

    @cached_property
    def bad_groups(self) -> int:
        """Groups (int8, int4) or elements (fp32, bf16) that were not finite and were sent as zeros.

        The first access waits for the device.
        """
        return int(self.bad.item())


@jit
def load_x(
    now_ptr: tl.tensor,
    ref_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    base: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    NOW: tl.constexpr,
    REF: tl.constexpr,
) -> tl.tensor:
    """x = (now - ref) + residual at `base + at`; +0 outside the mask."""
    now = widen(tl.load(now_ptr + base + at, mask=mask, other=0), NOW)
    x = now - widen(tl.load(ref_ptr + base + at, mask=mask, other=0), REF)
    if residual_ptr is not None:
        x = x + tl.load(residual_ptr + base + at, mask=mask, other=0.0)
    return x


@kernel("groups")
def encode_groups_kernel(
    now_ptr: tl.tensor,
    ref_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    bad_ptr: tl.tensor,
    groups: tl.tensor,
    NOW: tl.constexpr,
    REF: tl.constexpr,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Encodes int8 and int4. One row of a tile is one group; WORD codes are shifted and summed into one word.

    Bad groups are encoded as zeros and then marked. In a zero group, scale and inverse are 0, so that every code is 0
    and the residual is x itself, sign of zero included.
    """
    GROUP: tl.constexpr = 64 if FORMAT == "int4" else 128
    BITS: tl.constexpr = 4 if FORMAT == "int4" else 8
    ROWS: tl.constexpr = TILE // GROUP
    WORDS: tl.constexpr = GROUP // WORD
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = first + rows < groups
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = load_x(now_ptr, ref_ptr, residual_ptr, first * GROUP, at, inside[:, None], NOW, REF)

    # Compare bits, because a maximum of floats would lose a NaN.
    bits = bits_of(x)
    if FORMAT == "int4":
        # Put the sign below the magnitude: one maximum finds both, and prefers the positive one of equal magnitudes.
        key = tl.max(((bits << 1) | ((bits >> 31) + 1)).to(tl.uint32, bitcast=True), axis=1)
        largest = (key >> 1).to(tl.int32, bitcast=True)
        sign = (key << 31).to(tl.int32, bitcast=True)  # positive: scale below 0
    else:
        largest = tl.max(bits & 0x7FFFFFFF, axis=1)
        sign = tl.zeros((ROWS,), tl.int32)
    bad = largest >= _INFINITY
    plain = (largest > _ZERO_GROUP) & (largest < _INFINITY)
    x = tl.where(bad[:, None], 0.0, x)

    # No operand or quotient is subnormal, so Triton before 3.6, which flushes subnormals, gives the same result.
    step = tl.div_rn(float_of(tl.where(plain, largest, _ONE)), 127.0 if FORMAT == "int8" else 8.0)
    up = sign | ((bits_of(step) + 0xFFFF) & -65536)  # magnitude up to bf16
    inverse = tl.where(plain, tl.div_rn(1.0, float_of(up)), 0.0)
    scale_bits = tl.where(plain, up, 0)
    code = (x * inverse[:, None] + _ROUNDER) - _ROUNDER
    if FORMAT == "int4":
        code = tl.minimum(code, 7.0)  # |x * inverse| <= 8 by the rounding up of the scale; int8 needs no clamp

    if kept_ptr is not None:
        tl.store(kept_ptr + first * GROUP + at, x - code * float_of(scale_bits)[:, None], mask=inside[:, None])
    shifted = (code.to(tl.int32) & ((1 << BITS) - 1)) << ((tl.arange(0, GROUP) % WORD) * BITS)[None, :]
    words = tl.sum(tl.reshape(shifted, (ROWS, WORDS, WORD)), axis=2)
    words_at = rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(codes_ptr + first * WORDS + words_at, words.to(codes_ptr.dtype.element_ty), mask=inside[:, None])
    half = tl.where(bad, BAD_SCALE, scale_bits >> 16)
    tl.store(scales_ptr + first + rows, half.to(tl.int16), mask=inside)
    count = tl.sum(bad.to(tl.int32), axis=0)
    tl.atomic_add(bad_ptr, count.to(tl.int64), mask=count > 0)


@kernel("groups")
def encode_elements_kernel(
    now_ptr: tl.tensor,
    ref_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    bad_ptr: tl.tensor,
    groups: tl.tensor,
    NOW: tl.constexpr,
    REF: tl.constexpr,
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Encodes fp32 and bf16, in rows of 128 elements. An element that is not finite, or does not round to a finite
    number, is sent as 0, is counted and leaves no residual.
    """
    ROWS: tl.constexpr = TILE // 128
    LIMIT: tl.constexpr = _BF16_OVERFLOW if FORMAT == "bf16" else _INFINITY
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = (first + rows < groups)[:, None]
    at = rows[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = load_x(now_ptr, ref_ptr, residual_ptr, first * 128, at, inside, NOW, REF)
    bits = bits_of(x)
    bad = (bits & 0x7FFFFFFF) >= LIMIT
    bits = tl.where(bad, 0, bits)
    sent = bits
    if FORMAT == "bf16":
        sent = rounded_to_bf16(bits)
    if kept_ptr is not None:
        tl.store(kept_ptr + first * 128 + at, float_of(bits) - float_of(sent), mask=inside)
    if FORMAT == "bf16":
        sent = (sent >> 16).to(tl.int16)
    tl.store(codes_ptr + first * 128 + at, sent, mask=inside)
    count = tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0)
    tl.atomic_add(bad_ptr, count.to(tl.int64), mask=count > 0)


def encode(
    now: torch.Tensor,
    ref: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    format: str = "int8",
    residual_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    bad: torch.Tensor | None = None,
) -> Packed:
    """Pack `(now - ref) + residual` and keep the error of the packing. One launch, on the current stream.

    Args:
        now: new weights, [numel], fp32, bf16 or fp16, on a GPU (on the CPU under the interpreter).
        ref: reference weights, [numel], fp32, bf16 or fp16 (not necessarily the dtype of `now`).
        residual: the error of earlier packings, [numel], fp32; None stands for zeros. Updated in place unless
            `residual_out` is given.
        format: "fp32", "bf16", "int8" or "int4".
        residual_out: fp32 [numel] that receives the new residual instead; `residual` is then only read.
        out: uint8 [body_bytes] to write into, preferably from `empty_body`; allocated if None.
        bad: int64 [1] to add the count of bad groups to, for a block that takes several calls; a new counter if None.

    Raises:
        ValueError: an argument has an unexpected format, dtype, shape, layout or device.
    """
    common.check_format(format)
    numel = common.check_block(now, "now", common.WEIGHT_DTYPES)
    common.check_block(ref, "ref", common.WEIGHT_DTYPES, numel)
    if residual is not None:
        common.check_block(residual, "residual", (torch.float32,), numel)
    if residual_out is not None:
        common.check_block(residual_out, "residual_out", (torch.float32,), numel)
    kept = residual if residual_out is None else residual_out
    body = common.empty_body(numel, format=format, device=now.device) if out is None else out
    if bad is not None and (bad.dtype != torch.int64 or bad.numel() != 1):
        raise ValueError(f"bad: expected an int64 tensor of one element, found {bad.dtype} of {bad.numel()}")
    common.check_device(now, ref=ref, residual=residual, residual_out=residual_out, out=body, bad=bad)
    scales, codes, word = common.planes(body, "out", numel, format)
    with common.on_device_of(now):
        count = common.zero_counter(now.device) if bad is None else bad
        groups = numel // common.group_of(format)
        grid = (triton.cdiv(numel, TILE),)
        inputs = (common.as_bits(now), common.as_bits(ref), residual, kept)
        kinds = {"NOW": common.kind_of(now), "REF": common.kind_of(ref), "FORMAT": format, "TILE": TILE}
        if numel == 0:
            pass
        elif scales is None:
            encode_elements_kernel[grid](*inputs, codes, count, groups, **kinds, num_warps=WARPS, **common.OPTIONS)
        else:
            encode_groups_kernel[grid](
                *inputs, scales, codes, count, groups, WORD=word, **kinds, num_warps=WARPS, **common.OPTIONS
            )
    return Packed(body=body, bad=count)
