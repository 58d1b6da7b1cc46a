"""What a plan costs and what would hide its transfers: arithmetic on sizes, rates and one measured step time.

Predictions only; nothing here talks to a network. Memory is what the runtime and AdamW hold for the block that trains,
beside the model itself and its activations.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from parablock_rt.active import ActiveBlock
from parablock_rt.blocks import Block, BlockPlan
from parablock_rt.codec import FORMATS

_ADAM_BYTES = 8  # two fp32 moments a parameter


def training_bytes(block: Block) -> int:
    """Bytes held while `block` trains: reference, gradients, AdamW's moments and, for 16-bit parameters, masters."""
    wide = all(segment.dtype == torch.float32 for segment in block.segments)
    own = sum(segment.length * segment.dtype.itemsize for segment in block.segments)
    masters_and_their_gradients = 0 if wide else 8 * block.flat_numel
    return own + own + masters_and_their_gradients + _ADAM_BYTES * block.flat_numel


def communication_s(block: Block, format: str, rate: float, delay: float) -> float:
    """Seconds from hand-over to applied aggregate when nothing hides them: the body up and down, and both delays."""
    return 2 * (block.wire_bytes(format) / rate + delay)


def forecast(plan: BlockPlan, rate: float, delay: float, step_s: float | None) -> dict[str, Any]:
    """The plan in figures. With a `rate` (bytes a second) and a step time (seconds) also what hides the transfers."""
    blocks = []
    for block in plan.blocks:
        entry: dict[str, Any] = {
            "name": block.name,
            "parameters": block.numel,
            "wire_bytes": {format: block.wire_bytes(format) for format in FORMATS},
            "training_bytes": training_bytes(block),
            "residual_bytes": 4 * block.flat_numel,
        }
        if rate and step_s:
            seconds = {format: communication_s(block, format, rate, delay) for format in FORMATS}
            entry["communication_s"] = seconds
            entry["local_steps_to_hide"] = {format: math.ceil(value / step_s) for format, value in seconds.items()}
        blocks.append(entry)
    return {"digest": plan.digest, "step_s": step_s, "rate_bytes_per_s": rate, "delay_s": delay, "blocks": blocks}


def measure_step(model: nn.Module, plan: BlockPlan, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward, backward and AdamW step on the middle block: the median of three after one to warm up.

    The model's weights are put back as they were.
    """
    flat = plan.materialise(model)[len(plan.blocks) // 2]
    before = [part.clone() for part in flat.flats]
    trainable = {p: p.requires_grad for p in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(False)
    master = torch.empty(flat.block.flat_numel) if ActiveBlock.needs_master(flat) else None
    active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=1e-5), master)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model(**batch).loss.backward()
        active.step()
        times.append(time.perf_counter() - start)
    active.close()
    for part, old in zip(flat.flats, before, strict=True):
        part.copy_(old)
    for parameter, wanted in trainable.items():
        parameter.requires_grad_(wanted)
    return sorted(times[1:])[1]


def render(plan: BlockPlan, figures: dict[str, Any]) -> str:
    """The forecast for a reader."""
    heaviest = max(figures["blocks"], key=lambda entry: entry["parameters"])
    residuals = sum(entry["residual_bytes"] for entry in figures["blocks"])
    lines = [
        plan.describe(),
        "",
        f"training the largest block ({heaviest['name']}) takes {heaviest['training_bytes'] / 1e6:.1f} MB",
        "beside the model and its activations; the error feedback of all blocks takes "
        f"{residuals / 1e6:.1f} MB of host memory",
    ]
    if "communication_s" in heaviest:
        link = (
            f"{figures['rate_bytes_per_s'] * 8 / 1e6:g} Mbit/s each way, {figures['delay_s'] * 1e3:g} ms one-way delay"
        )
        lines.append(f"at {link} and {figures['step_s']:.3f} s a local step, {heaviest['name']} needs:")
        for format in FORMATS:
            seconds, steps = heaviest["communication_s"][format], heaviest["local_steps_to_hide"][format]
            lines.append(f"  {format:>5}: {seconds:8.2f} s up and down, hidden by {steps} local steps or more")
    return "\n".join(lines)
