"""Apply: add the change of a packed body to weights in place, without holding it in memory in between.

    target = round(float(target) + code * scale)   to the dtype of the target, nearest even

Source: decode and add of `decode`, fused. A sum that is not a number is stored as the dtype's quiet positive NaN.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common
from .common import kernel, load_change, narrow, widen

TILE = 4096  # elements a program
WARPS = 4


@kernel("groups")
def apply_kernel(
    target_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    groups: tl.tensor,
    KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """target = round(target + d), where `target_ptr` points to the bits. One row of a tile is one group."""
    GROUP: tl.constexpr = 64 if FORMAT == "int4" else 128
    ROWS: tl.constexpr = TILE // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = first + rows < groups
    target = target_ptr + first * GROUP + (rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    before = widen(tl.load(target, mask=inside[:, None], other=0), KIND)
    change = load_change(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
    tl.store(target, narrow(before + change, KIND), mask=inside[:, None])


def apply_(target: torch.Tensor, body: torch.Tensor, *, format: str = "int8") -> torch.Tensor:
    """Add the change in `body` (uint8, [body_bytes]) to `target` in place and return `target`.

    `target` is [numel] in fp32, bf16 or fp16. Raises ValueError if an argument does not fit.
    """
    common.check_format(format)
    numel = common.check_block(target, "target", common.WEIGHT_DTYPES)
    common.check_device(target, body=body)
    scales, codes, word = common.planes(body, "body", numel, format)
    if numel > 0:
        groups = numel // common.group_of(format)
        constants = {"KIND": common.kind_of(target), "FORMAT": format, "WORD": word, "TILE": TILE}
        with common.on_device_of(target):
            apply_kernel[(triton.cdiv(numel, TILE),)](
                common.as_bits(target), scales, codes, groups, **constants, num_warps=WARPS, **common.OPTIONS
            )
    return target
