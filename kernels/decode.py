"""Decode: the change that a packed body stands for, in fp32.

    d = code * scale,   +0 in a group whose scale is not finite

Source: the inverse of `encode`. A code and a bf16 scale have at most 8 significant bits each, so the product is exact.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common
from .common import kernel, load_change

TILE = 4096  # elements per program
WARPS = 4


@kernel("groups")
def decode_kernel(
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    groups: tl.tensor,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """out = d. One row of a tile is one group."""
    GROUP: tl.constexpr = 64 if FORMAT == "int4" else 128
    ROWS: tl.constexpr = TILE // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = first + rows < groups
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    change = load_change(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
    tl.store(out_ptr + first * GROUP + at, change, mask=inside[:, None])


def decode(body: torch.Tensor, numel: int, *, format: str = "int8") -> torch.Tensor:
    """Return the change that `body` (uint8, [body_bytes]) holds, as a new fp32 tensor [numel] on the same device.

    Raises ValueError if the body does not fit or the format is unknown.
    """
    common.check_format(format)
    common.check_length(numel)
    scales, codes, word = common.planes(body, "body", numel, format)
    out = torch.empty(numel, dtype=torch.float32, device=body.device)
    if numel > 0:
        groups = numel // common.group_of(format)
        with common.on_device_of(body):
            decode_kernel[(triton.cdiv(numel, TILE),)](
                out, scales, codes, groups, FORMAT=format, WORD=word, TILE=TILE, num_warps=WARPS, **common.OPTIONS
            )
    return out
