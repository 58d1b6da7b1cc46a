"""What a plan costs and what would hide its transfers: arithmetic on sizes, rates and one measured step time.

Predictions only; nothing here talks to a network. What is held in memory is `memory`'s word.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from parablock_rt.blocks.layout import Block
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.active import ActiveBlock
from parablock_rt.client.memory import Predictor
from parablock_rt.codec import FORMATS


def communication_s(block: Block, format: str, rate: float, delay: float) -> float:
    """Seconds from hand-over to applied aggregate when nothing hides them: the body up and down, and both delays."""
    return 2 * (block.wire_bytes(format) / rate + delay)


def forecast(plan: BlockPlan, memory: Predictor, rate: float, delay: float, step_s: float | None) -> dict[str, Any]:
    """The plan in figures. With a `rate` (bytes a second) and a step time (seconds) also what hides the transfers."""
    blocks = []
    for block, held in zip(plan.blocks, memory.blocks, strict=True):
        entry: dict[str, Any] = {
            "name": block.name,
            "parameters": block.numel,
            "wire_bytes": {format: block.wire_bytes(format) for format in FORMATS},
            "training_bytes": held.training,
            "residual_bytes": held.residual,
        }
        if rate and step_s:
            seconds = {format: communication_s(block, format, rate, delay) for format in FORMATS}
            entry["communication_s"] = seconds
            entry["local_steps_to_hide"] = {format: math.ceil(value / step_s) for format, value in seconds.items()}
        blocks.append(entry)
    return {
        "digest": plan.digest,
        "step_s": step_s,
        "rate_bytes_per_s": rate,
        "delay_s": delay,
        "memory": memory.peak().to_dict(),
        "blocks": blocks,
    }


def measure_step(model: nn.Module, plan: BlockPlan, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward, backward and AdamW step on the middle block: the median of three after one to warm up.

    The model's weights are put back as they were.
    """
    flat = plan.materialise(model)[len(plan.blocks) // 2]
    before = [part.clone() for part in flat.flats]
    trainable = {p: p.requires_grad for p in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(False)
    master = torch.empty(flat.block.flat_numel, dtype=torch.float32) if flat.block.needs_master else None
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


def verdict(plan: BlockPlan, format: str, local_steps: int, rate: float, delay: float, step_s: float) -> str:
    """Whether rounds of `local_steps` steps hide the transfer of the heaviest block. Units as of `forecast`."""
    heaviest = max(plan.blocks, key=lambda block: block.numel)
    seconds = communication_s(heaviest, format, rate, delay)
    needed, compute_s = math.ceil(seconds / step_s), local_steps * step_s
    needs = f"{heaviest.name} needs {seconds:.2f} s up and down in {format}"
    if needed <= local_steps:
        return f"hidden: {needs}, and {local_steps} local steps take {compute_s:.2f} s"
    return (
        f"not hidden: {needs}, but {local_steps} local steps take only {compute_s:.2f} s; --local-steps {needed} "
        "would hide it"
    )


def render(plan: BlockPlan, memory: Predictor, figures: dict[str, Any]) -> str:
    """The forecast for a reader."""
    heaviest = max(figures["blocks"], key=lambda entry: entry["parameters"])
    lines = [plan.describe(), "", memory.peak().render()]
    if "communication_s" in heaviest:
        lines.append("")
        link = (
            f"{figures['rate_bytes_per_s'] * 8 / 1e6:g} Mbit/s each way, {figures['delay_s'] * 1e3:g} ms one-way delay"
        )
        lines.append(f"at {link} and {figures['step_s']:.3f} s a local step, {heaviest['name']} needs:")
        for format in FORMATS:
            seconds, steps = heaviest["communication_s"][format], heaviest["local_steps_to_hide"][format]
            lines.append(f"  {format:>5}: {seconds:8.2f} s up and down, hidden by {steps} local steps or more")
    return "\n".join(lines)
