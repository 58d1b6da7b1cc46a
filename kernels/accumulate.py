"""Accumulate: fold a weighted packed body into a sum whose bits do not depend on the order of arrival.

    units += code * rint(weight * scale * 2^72)    int8, int4; the product in fp64
    units += rint(weight * value * 2^72)           fp32, bf16

Source: fixed-point accumulation in the manner of Demmel and Nguyen 2015, "Parallel Reproducible Summation". The sum is
one integer of 128 bits, hi * 2^64 + lo, and integer addition is associative. A number is rounded to units in two steps:
first to multiples of 2^52 units, then the rest to units. Each step adds 1.5 * 2^52, which leaves the rounded integer in
the low bits of the sum, for magnitudes up to 2^51. Codes multiply both parts; the products fit into 64 bits.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from . import common
from .common import jit, kernel, load_change, load_codes

TILE = 2048  # elements per program
WARPS = 4

_ROUNDER = tl.constexpr(1.5 * 2.0**52)
_ROUNDER_BITS = tl.constexpr(0x4338000000000000)
_PER_COARSE = tl.constexpr(2.0**20)
_COARSE_UNIT = tl.constexpr(2.0**-20)
_COARSE_BITS = tl.constexpr(52)
_PER_UNIT = tl.constexpr(2.0**72)
_FACTOR_LIMIT = tl.constexpr(2.0**31)  # a group with a factor this large has only codes that are 0


@jit
def to_units(value: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """rint(value * 2^72) as coarse * 2^52 + fine, for magnitudes below 2^31; int64."""
    coarse = value * _PER_COARSE + _ROUNDER
    rest = value - (coarse - _ROUNDER) * _COARSE_UNIT
    fine = rest * _PER_UNIT + _ROUNDER
    return coarse.to(tl.int64, bitcast=True) - _ROUNDER_BITS, fine.to(tl.int64, bitcast=True) - _ROUNDER_BITS


@jit
def is_below(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """int64 1 where a < b as unsigned numbers: a sum that is below a summand has carried."""
    return (a.to(tl.uint64, bitcast=True) < b.to(tl.uint64, bitcast=True)).to(tl.int64)


@kernel("groups", "weight_bits")
def accumulate_kernel(
    hi_ptr: tl.tensor,
    lo_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    groups: tl.tensor,
    weight_bits: tl.tensor,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """hi, lo += weight * d. Takes the bits of the weight as a double: Triton would round a float argument to fp32."""
    GROUP: tl.constexpr = 64 if FORMAT == "int4" else 128
    ROWS: tl.constexpr = TILE // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = first + rows < groups
    mask = inside[:, None]
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if FORMAT == "int8" or FORMAT == "int4":
        code, scale = load_codes(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
        factor = scale.to(tl.float64) * weight
        coarse, fine = to_units(tl.where(tl.abs(factor) < _FACTOR_LIMIT, factor, 0.0))
        coarse = code.to(tl.int64) * coarse[:, None]
        fine = code.to(tl.int64) * fine[:, None]
    else:
        change = load_change(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
        coarse, fine = to_units(change.to(tl.float64) * weight)
    hi = hi_ptr + first * GROUP + at
    lo = lo_ptr + first * GROUP + at
    more = coarse << _COARSE_BITS
    sum = tl.load(lo, mask=mask, other=0) + more
    carried = is_below(sum, more)
    sum += fine
    carried += is_below(sum, fine)
    upper = (coarse >> (64 - _COARSE_BITS)) + (fine >> 63) + carried
    tl.store(hi, tl.load(hi, mask=mask, other=0) + upper, mask=mask)
    tl.store(lo, sum, mask=mask)


def accumulate(hi: torch.Tensor, lo: torch.Tensor, body: torch.Tensor, weight: float, *, format: str = "int8") -> None:
    """Add `weight` times the change in `body` (uint8, [body_bytes]) to the 128-bit sum whose upper and lower halves are
    `hi` and `lo` (int64, [numel]).

    The caller keeps `weight * |value|` below 2^31 and adds at most 4095 contributions. Raises ValueError if an argument
    does not fit.
    """
    common.check_format(format)
    numel = common.check_block(hi, "hi", (torch.int64,))
    common.check_block(lo, "lo", (torch.int64,), numel)
    common.check_device(hi, lo=lo, body=body)
    scales, codes, word = common.planes(body, "body", numel, format)
    weight_bits = struct.unpack("<q", struct.pack("<d", weight))[0]
    if numel > 0:
        groups = numel // common.group_of(format)
        constants = {"FORMAT": format, "WORD": word, "TILE": TILE}
        with common.on_device_of(hi):
            accumulate_kernel[(triton.cdiv(numel, TILE),)](
                hi, lo, scales, codes, groups, weight_bits, **constants, num_warps=WARPS, **common.OPTIONS
            )
