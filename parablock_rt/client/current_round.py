"""The round that a client trains now: its block, and what its steps have added up to.

Plain state with its arithmetic; knows neither the network nor the next round. Only the training thread may use it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from parablock_rt.client.active import ActiveBlock
from parablock_rt.client.exchange import Wait
from parablock_rt.observe.timeline import Stage, Timeline


@dataclass
class CurrentRound:
    """One round from its beginning to its hand-over. `ref`: what its change is measured from, a tensor per segment."""

    index: int
    block: int
    active: ActiveBlock
    ref: list[Tensor]
    began_ns: int
    steps: int = 0
    weight: float | Tensor = 0.0  # sum over the steps so far; on the GPU if a step's weight was
    loss_sum: float | Tensor = 0.0
    had_gradients: bool = False

    def add_step(self, weight: float | Tensor, loss: float | Tensor) -> None:
        """Counts a step that was taken."""
        self.steps += 1
        self.weight = self.weight + weight
        self.loss_sum = self.loss_sum + loss

    def without_gradient(self) -> list[str]:
        """The names of the block's parameters without a gradient; notes whether any parameter has one."""
        missing = self.active.without_gradient()
        self.had_gradients |= len(missing) < len(self.active.flat.params)
        return missing

    def note_compute(self, timeline: Timeline, waits: list[Wait]) -> float:
        """Notes the round's computation, which ends now, and returns its seconds: the time since the round began,
        without the `waits`, which are in order and may have ended before the round began."""
        at_ns, now_ns, computed_ns = self.began_ns, time.monotonic_ns(), 0
        for wait in (*waits, Wait(now_ns, now_ns)):
            if wait.start_ns > at_ns:
                timeline.add(Stage.COMPUTE, at_ns, wait.start_ns, round=self.index, block=self.block)
                computed_ns += wait.start_ns - at_ns
            at_ns = max(at_ns, wait.end_ns)
        return computed_ns / 1e9
