"""What a run tells a training loop of each step and each round. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parablock_rt.stages import StageSeconds


@dataclass(frozen=True)
class StepReport:
    """One local step.

    `exposed_s`: seconds for which communication blocked this call, usually 0 except at a round boundary.
    `round_ended`: this step was the last of its round. `finished`: this step was the last of the run.
    """

    loss_on_device: Tensor | float
    round: int
    block: int
    exposed_s: float
    round_ended: bool
    finished: bool

    @property
    def loss(self) -> float:
        """The loss. If it is on a GPU, reading it waits until the GPU has computed the step."""
        return float(self.loss_on_device)


@dataclass(frozen=True)
class RoundReport:
    """One round on this client; times in seconds.

    `exposed_s`: how long communication has blocked the training thread since the previous report, mostly before the
    round began. `bytes_up`, `bytes_down` (payload) and `reconnects` (broken connections that were replaced) count from
    the start of the run. `stages`: the time in each stage that has ended since the previous report, that is, this
    round's compute and the transfers during it.
    """

    round: int
    block: int
    loss: float
    compute_s: float
    exposed_s: float
    bytes_up: int
    bytes_down: int
    reconnects: int
    stages: StageSeconds
