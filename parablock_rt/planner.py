"""The cost of a plan and what would hide its transfers: arithmetic on sizes, rates and one measured step time.

Predictions only; nothing here talks to a network. client/memory.py predicts the memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parablock_rt.blocks.layout import Block
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.active import ActiveBlock
from parablock_rt.client.memory import Predictor
from parablock_rt.codec import FORMATS
from parablock_rt.stages import steps_to_hide


@dataclass(frozen=True)
class Link:
    """A client's link: bytes per second up and down, and seconds one way."""

    up: float
    down: float
    delay: float

    def exchange_s(self, block: Block, format: str) -> float:
        """Seconds from hand-over to arrived aggregate without overlap: the body up and down, and the delay twice."""
        nbytes = block.wire_bytes(format)
        return nbytes / self.up + nbytes / self.down + 2 * self.delay

    def steps_to_hide(self, block: Block, format: str, step_s: float, staleness: int) -> int | None:
        """The fewest local steps of `step_s` seconds that hide an exchange; None at staleness 0, where nothing can."""
        if staleness == 0:
            return None
        nbytes = block.wire_bytes(format)
        return steps_to_hide(self.exchange_s(block, format), nbytes / self.up, nbytes / self.down, step_s, staleness)


def forecast(
    plan: BlockPlan, memory: Predictor, rate: float, delay: float, step_s: float | None, staleness: int
) -> dict[str, Any]:
    """The plan in figures.

    With `rate` (bytes per second, each way) and `step_s` (seconds per step), also how long an exchange takes
    (`exchange_s`) and how many local steps hide it: None at staleness 0, where no number of steps does. `delay`:
    seconds one way.
    """
    link = Link(rate, rate, delay)
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
            entry["exchange_s"] = {format: link.exchange_s(block, format) for format in FORMATS}
            entry["local_steps_to_hide"] = {
                format: link.steps_to_hide(block, format, step_s, staleness) for format in FORMATS
            }
        blocks.append(entry)
    return {
        "digest": plan.digest,
        "step_s": step_s,
        "rate_bytes_per_s": rate,
        "delay_s": delay,
        "staleness": staleness,
        "memory": memory.peak().to_dict(),
        "blocks": blocks,
    }


def measure_step(model: nn.Module, plan: BlockPlan, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward, backward and AdamW step on the middle block: the median of three after a warm-up step.

    Restores the model's weights and `requires_grad` afterwards.
    """
    flat = plan.materialise(model)[len(plan.blocks) // 2]
    before = [part.clone() for part in flat.flats]
    trainable = {p: p.requires_grad for p in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(False)
    active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=1e-5))
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


def verdict(plan: BlockPlan, format: str, staleness: int, local_steps: int, link: Link, step_s: float) -> str:
    """Whether rounds of `local_steps` steps of `step_s` seconds hide the exchange of the heaviest block."""
    heaviest = max(plan.blocks, key=lambda block: block.numel)
    needed, compute_s = link.steps_to_hide(heaviest, format, step_s, staleness), local_steps * step_s
    needs = f"{heaviest.name} needs {link.exchange_s(heaviest, format):.2f} s up and down in {format}"
    if needed is None:
        enough = link.steps_to_hide(heaviest, format, step_s, 1)
        return (
            f"not hidden: at staleness 0 training waits for every exchange. {needs}; --staleness 1 with "
            f"--local-steps {enough} would hide it"
        )
    if needed <= local_steps:
        return f"hidden at staleness {staleness}: {needs}, and {local_steps} local steps take {compute_s:.2f} s"
    return (
        f"not hidden at staleness {staleness}: {needs}, but {local_steps} local steps take only {compute_s:.2f} s; "
        f"--local-steps {needed} would hide it"
    )


def render(plan: BlockPlan, memory: Predictor, figures: dict[str, Any]) -> str:
    """The forecast as text."""
    heaviest = max(figures["blocks"], key=lambda entry: entry["parameters"])
    lines = [plan.describe(), "", memory.peak().render()]
    if "exchange_s" in heaviest:
        lines.append("")
        link = (
            f"{figures['rate_bytes_per_s'] * 8 / 1e6:g} Mbit/s each way, {figures['delay_s'] * 1e3:g} ms one-way delay"
        )
        lines.append(f"at {link} and {figures['step_s']:.3f} s per local step, {heaviest['name']} needs:")
        for format in FORMATS:
            seconds, steps = heaviest["exchange_s"][format], heaviest["local_steps_to_hide"][format]
            if steps is None:
                effect = "not hidden, as expected at staleness 0"
            else:
                effect = f"hidden by {steps} local steps or more at staleness {figures['staleness']}"
            lines.append(f"  {format:>5}: {seconds:8.2f} s up and down, {effect}")
    return "\n".join(lines)
