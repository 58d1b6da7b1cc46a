"""A model on loan to a run: taken when the client joins, and given back as it was.

Knows nothing of rounds or of the network. Only the training thread may use it, except where a docstring says "any
thread".
"""

from __future__ import annotations

import logging

from torch import nn

from parablock_rt.blocks.claims import Claim
from parablock_rt.blocks.plan import BlockPlan

log = logging.getLogger("parablock")


class Lease:
    """A run's hold on a model, of which nobody else may make use meanwhile."""

    def __init__(self, model: nn.Module, plan: BlockPlan) -> None:
        """Raises ConfigError when a server or another client is using the model."""
        self._claim = Claim(model, "client")
        self._model = model
        self._plan = plan
        self._was_trainable = {p: p.requires_grad for p in model.parameters()}
        self.frozen = plan.frozen_digests(model)
        """The digests of the tensors that the plan does not train, by name, at the start of the run."""

    def warn_of_drift(self) -> None:
        """Warns of changed tensors that the plan does not train: they are not exchanged, so no other client has the
        change."""
        now = self._plan.frozen_digests(self._model)
        moved = [name for name, found in now.items() if self.frozen.get(name) != found]
        if moved:
            log.warning(
                "%d tensors that the plan does not train, such as %s, have changed during the run: they are not "
                "averaged, so server and clients now differ in them. Keep them fixed, or copy them from one side",
                *(len(moved), moved[0]),
            )

    def give_back(self) -> None:
        """Ends the loan: the parameters get their original `requires_grad`. Idempotent. Any thread, if no other is
        using the model."""
        for parameter, trainable in self._was_trainable.items():
            parameter.requires_grad_(trainable)
        self._claim.release()
