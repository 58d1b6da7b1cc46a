"""A model on loan to a run: taken when the client joins, and given back as it was.

Knows nothing of rounds or of the network. Only the training thread may use it, except where a docstring says "any
thread".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from parablock_rt.blocks.claims import Claim
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import PlanMismatchError
from parablock_rt.units import printable
from parablock_rt.wire import protocol

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

    def check_frozen(self, theirs: Mapping[str, str]) -> None:
        """Raises PlanMismatchError, with names, when what the plan does not train differs from the server's. `theirs`:
        the beginnings of the server's digests; empty: of an earlier release, which compares them itself."""
        ours = {name: digest[: protocol.FROZEN_CHARS] for name, digest in self.frozen.items()}
        names = sorted(ours.keys() | theirs.keys())
        differ = [name for name in names if ours.get(name) != theirs.get(name)] if theirs else []
        if differ:
            name = differ[0]
            how = "has other bytes, another type or another shape than on the server"
            if name not in ours or name not in theirs:
                how = "is only on the server" if name not in ours else "is not on the server"
                how += ", or is tied to another there"
            raise PlanMismatchError(
                f"expected what is not trained to be equal on server and client, found a difference in {len(differ)} "
                f"of {len(names)} tensors: {printable(name)} {how}. Start both from the same checkpoint, in the same "
                "dtype; an earlier run may have changed a buffer"
            )

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
