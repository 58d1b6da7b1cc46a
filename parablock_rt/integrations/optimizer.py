"""A run in the shape of a torch optimiser, for trainers that own the training loop.

Must not import any trainer's library. Only the training thread may use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from parablock_rt.client import Run
from parablock_rt.errors import ConfigError
from parablock_rt.schedule import cohort_of

log = logging.getLogger("parablock")


class RunOptimizer(torch.optim.Optimizer):
    """A torch optimiser whose step is the run's step:

        optimizer = RunOptimizer(run, lr=1e-4)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=optimizer.steps)

    Its one group holds the model's parameters in all blocks, of which only the current block's get gradients: clipping,
    unscaling and `zero_grad` reach these, also in a 16-bit model. The group's learning rate replaces that of the
    round's optimiser before every step. Everything else, such as weight decay, is as the function given to `join` sets
    it.

    Once the run has finished it is closed, and the model can train without it; further steps change nothing, so that a
    trainer may take some more. `state_dict` has the learning rate and nothing of the run, which no checkpoint can
    restore.

    `steps`: from the start of the round in which this was made to the end of the run, if no round closes without this
    client. `loss`, `weight`: of the next step, as `Run.step` takes them; a step resets them.
    """

    def __init__(self, run: Run, lr: float | Tensor) -> None:
        """Raises ConfigError between two rounds and after the run."""
        if run.round is None:
            raise ConfigError(
                "expected a run that is in a round, found one between two rounds or over; make it earlier"
            )
        self.run = run
        config = run.config
        rounds = range(run.round, config.rounds)
        cohorts = (cohort_of(config.seed, index, config.clients, config.cohort_size) for index in rounds)
        self.steps = config.local_steps * sum(run.client in cohort for cohort in cohorts)
        self.loss: Tensor | float | None = None
        self.weight: Tensor | float = 1.0
        self._seen_round: int | None = None  # the last one whose optimiser was looked at
        self._told_of_end = False
        names = [name for block in run.plan.blocks for name in block.parameters]
        super().__init__([run.model.get_parameter(name) for name in names], {"lr": lr})

    # torch declares two overloads, of which mypy sees no common form.
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes the run's step and returns the closure's loss, which is reported if `loss` is None.

        Raises ConfigError when the round's optimiser has several learning rates, and what `Run.step` raises.
        """
        result = None if closure is None else closure()
        loss, weight = result if self.loss is None else self.loss, self.weight
        self.loss, self.weight = None, 1.0
        if self.run.finished:
            self.zero_grad()
            if not self._told_of_end:
                self._told_of_end = True
                log.warning("the run has finished, and further steps change nothing: end the training (logged once)")
            return result
        self._pass_rate_on()
        if self.run.step(weight=weight, loss=loss).finished:
            self.run.close()  # frozen until then, the model would fail in a trainer's next backward pass
        return result

    def _pass_rate_on(self) -> None:
        groups = self.run.optimizer.param_groups
        if self.run.round != self._seen_round:
            self._seen_round = self.run.round
            rates = {float(group["lr"]) for group in groups if "lr" in group}
            if len(rates) > 1:
                raise ConfigError(
                    f"expected one learning rate in the optimiser of a round, found {sorted(rates)}: a RunOptimizer "
                    "puts its own in place of it; make groups with the same rate, or call run.step in a loop of yours"
                )
        for group in groups:
            group["lr"] = self.param_groups[0]["lr"]
