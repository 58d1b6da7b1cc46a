"""Accumulate: fold a weighted packed body into a sum whose bits do not depend on the order of arrival.

    v = weight * code * scale                      in fp64
    hi += rint(v * 2^20)        lo += rint((v - rint(v * 2^20) * 2^-20) * 2^72)

Source: fixed-point accumulation in the manner of Demmel and Nguyen 2015, "Parallel Reproducible Summation", with two
limbs: value = hi * 2^-20 + lo * 2^-72. Integer addition is associative. `rint` is written as adding 1.5 * 2^52, whose
low bits then hold the integer, for magnitudes up to 2^51.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from . import common
from .common import kernel, load_change

TILE = 2048  # elements a program
WARPS = 4

_ROUNDER = tl.constexpr(1.5 * 2.0**52)
_ROUNDER_BITS = tl.constexpr(0x4338000000000000)
_PER_HI = tl.constexpr(2.0**20)
_HI_UNIT = tl.constexpr(2.0**-20)
_PER_LO = tl.constexpr(2.0**72)


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
    """hi, lo += weight * d. The weight comes as the bits of a double: a float argument would be rounded to fp32."""
    GROUP: tl.constexpr = 64 if FORMAT == "int4" else 128
    ROWS: tl.constexpr = TILE // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = first + rows < groups
    mask = inside[:, None]
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    change = load_change(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
    value = change.to(tl.float64) * weight
    coarse = value * _PER_HI + _ROUNDER
    rest = value - (coarse - _ROUNDER) * _HI_UNIT
    fine = rest * _PER_LO + _ROUNDER
    hi = hi_ptr + first * GROUP + at
    lo = lo_ptr + first * GROUP + at
    more_hi = coarse.to(tl.int64, bitcast=True) - _ROUNDER_BITS
    more_lo = fine.to(tl.int64, bitcast=True) - _ROUNDER_BITS
    tl.store(hi, tl.load(hi, mask=mask, other=0) + more_hi, mask=mask)
    tl.store(lo, tl.load(lo, mask=mask, other=0) + more_lo, mask=mask)


def accumulate(hi: torch.Tensor, lo: torch.Tensor, body: torch.Tensor, weight: float, *, format: str = "int8") -> None:
    """Add `weight` times the change in `body` (uint8, [body_bytes]) to the sum in `hi` and `lo` (int64, [numel]).

    The caller keeps `weight * |value|` below 2^31 and counts contributions (at most 4095). Raises ValueError if an
    argument does not fit.
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
