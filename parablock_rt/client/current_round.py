"""The round that a client trains now: its block, and what its steps have added up to.

Plain state with its arithmetic; knows neither the network nor the next round. Only the training thread may use it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from parablock_rt.client.active import ActiveBlock
from parablock_rt.observe.timeline import Stage, Timeline


@dataclass
class CurrentRound:
    """One round from its beginning to its hand-over. `ref`: what its change is measured from, a tensor per segment;
    `exposed_s`: how long training waited before it."""

    index: int
    block: int
    active: ActiveBlock
    ref: list[Tensor]
    began_ns: int
    exposed_s: float
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

    def note_compute(self, timeline: Timeline, steps_ended_ns: int, waited_s: float) -> float:
        """Notes the round's computation, which ends now, and returns its seconds. `waited_s`: how long the training
        thread waited after its last step, which ended at `steps_ended_ns`; that is no computation."""
        key = {"round": self.index, "block": self.block}
        ended_ns = time.monotonic_ns()
        if waited_s > 0:
            timeline.add(Stage.COMPUTE, self.began_ns, steps_ended_ns, **key)
            timeline.add(Stage.COMPUTE, min(ended_ns, steps_ended_ns + int(waited_s * 1e9)), ended_ns, **key)
        else:
            timeline.add(Stage.COMPUTE, self.began_ns, ended_ns, **key)
        return (ended_ns - self.began_ns) / 1e9 - waited_s
