"""Apply: add the change of a packed body to weights in place, without storing the decoded change.

    target = round(float(target) + code * scale)   to the dtype of the target, nearest even

Source: decode and add of `decode`, fused. A sum that is not a number is stored as the dtype's quiet positive NaN.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import common
from .common import kernel, load_change, narrow, widen

TILE = 4096  # elements per program
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


def apply_(
    target: torch.Tensor | Sequence[torch.Tensor], body: torch.Tensor, *, format: str = "int8"
) -> torch.Tensor | Sequence[torch.Tensor]:
    """Add the change in `body` (uint8, [body_bytes]) to `target` in place and return `target`.

    `target` is [numel] in fp32, bf16 or fp16, or several such tensors that follow one another in the block: one launch
    per tensor. Raises ValueError if an argument does not fit.
    """
    common.check_format(format)
    parts = [target] if isinstance(target, torch.Tensor) else target
    sizes = [common.check_block(part, "target", common.WEIGHT_DTYPES) for part in parts]
    common.check_device(body, **{f"target[{i}]": part for i, part in enumerate(parts)})
    scales, codes, word = common.planes(body, "body", sum(sizes), format)
    group = common.group_of(format)
    for part, numel in zip(parts, sizes, strict=True):
        if numel > 0:
            constants = {"KIND": common.kind_of(part), "FORMAT": format, "WORD": word, "TILE": TILE}
            with common.on_device_of(part):
                apply_kernel[(triton.cdiv(numel, TILE),)](
                    common.as_bits(part), scales, codes, numel // group, **constants, num_warps=WARPS, **common.OPTIONS
                )
            scales = None if scales is None else scales[numel // group :]
            codes = codes[numel // word :]
    return target
