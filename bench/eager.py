"""The codec's arithmetic in plain torch, as the baseline for the fused kernels.

Gives the codec's own bytes (a test checks that), so that the comparison is of equal work: non-finite groups are sent as
zeros, scales are rounded away from zero. For host or GPU, eager or torch.compile. Only for benchmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parablock_rt import codec

_BAD = 0x7FC0
_SIGN = -(2**63)


def encode(now: Tensor, ref: Tensor, residual: Tensor, format: str, out: Tensor) -> Tensor:
    """Packs `now - ref + residual` into `out` as int8 or int4; `residual` becomes the error of the packing."""
    group = codec.group_size(format)
    assert group is not None
    x = ((now.float() - ref.float()) + residual).view(-1, group)
    if format == "int8":
        largest = x.abs().amax(1, keepdim=True)
        step, low, high = largest / 127, -127, 127
    else:
        top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
        largest = torch.maximum(top, -bottom)
        step, low, high = torch.where(top >= -bottom, top, bottom) / -8, -8, 7
    bad = ~largest.isfinite()
    scale_bits = (step.view(torch.int32) + 0xFFFF) & -0x10000
    scale_bits = scale_bits.masked_fill(bad | (largest <= 2.0**-100), 0)
    scale = scale_bits.view(torch.float32)
    x.masked_fill_(bad, 0)
    code = (x * torch.where(scale == 0, 0, 1 / scale)).round_().clamp_(low, high)
    residual.view(-1, group).copy_(x - code * scale)
    packed = code.to(torch.int8)
    if format == "int4":
        packed = (packed[:, 0::2] & 15) | (packed[:, 1::2] << 4)
    scales = (scale_bits >> 16).masked_fill(bad, _BAD).to(torch.int16)
    return torch.cat((scales.view(-1).view(torch.uint8), packed.view(-1).view(torch.uint8)), out=out)


def decode(body: Tensor, numel: int, format: str) -> Tensor:
    """The change that a body of `numel` elements holds, fp32."""
    code, scale = _unpacked(body, numel, format)
    return (code.float() * scale).view(-1)


def apply_(target: Tensor, body: Tensor, format: str) -> Tensor:
    """Adds the change in `body` to `target`."""
    return target.copy_(target.float() + decode(body, target.numel(), format))


def accumulate(hi: Tensor, lo: Tensor, body: Tensor, weight: float, format: str) -> None:
    """Adds `weight` times the change in `body` to a sum of 128 bits per element, in units of 2^-72, held in halves."""
    code, scale = _unpacked(body, hi.numel(), format)
    factor = scale.double() * weight
    coarse = (factor * 2.0**20).round()
    fine = ((factor - coarse * 2.0**-20) * 2.0**72).round()
    code = code.long()
    upper, lower = (code * coarse.long()).view(-1), (code * fine.long()).view(-1)
    carried = torch.zeros_like(lo)
    for part in (upper << 52, lower):
        lo += part
        carried += (lo ^ _SIGN) < (part ^ _SIGN)  # an unsigned comparison: whether the addition has carried
    hi += (upper >> 12) + (lower >> 63) + carried


def _unpacked(body: Tensor, numel: int, format: str) -> tuple[Tensor, Tensor]:
    """Codes (int8, a row per group) and scales (fp32, a column; 0 for a scale that is not finite)."""
    group = codec.group_size(format)
    assert group is not None
    split = codec.scale_bytes(numel, format)
    scale = body[:split].view(torch.bfloat16).float().unsqueeze(1)
    scale = torch.where(scale.isfinite(), scale, 0)
    code = body[split:].view(torch.int8)
    if format == "int4":
        code = torch.stack(((code << 4) >> 4, code >> 4), dim=1).view(-1)
    return code.view(-1, group), scale
