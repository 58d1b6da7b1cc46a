"""Which parameters get gradients in a round, and which should: looked at before every step.

Only the training thread may use it.
"""

from __future__ import annotations

import logging

from torch import nn

from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.current_round import CurrentRound

log = logging.getLogger("parablock")


class GradientWatch:
    """Keeps the gradients of a model's blocks apart. Each of its warnings is logged once."""

    def __init__(self, model: nn.Module, plan: BlockPlan) -> None:
        self._blocks = [[(name, model.get_parameter(name)) for name in block.parameters] for block in plan.blocks]
        self._told: set[str] = set()

    def look(self, round: CurrentRound) -> None:
        """Drops gradients outside of the round's block, and warns of parameters in it that have none."""
        self._freeze_others(round.block)
        if missing := round.without_gradient():
            self._warn(
                "block %d trains without %d of its parameters, such as %s, which got no gradient: the loss does not "
                "depend on them, or they are behind a reentrant checkpoint, or a hook has used their gradients up in "
                "the backward pass (logged once)",
                *(round.block, len(missing), missing[0]),
            )

    def _freeze_others(self, active: int) -> None:
        """Freezes the blocks again that somebody has made trainable. Their gradients would count in the norm by which
        gradients are clipped."""
        for block, parameters in enumerate(self._blocks):
            for name, parameter in parameters if block != active else ():
                if parameter.grad is not None:
                    self._warn(
                        "parameter %s had a gradient in a round that does not train it: something has set its "
                        "requires_grad, as PEFT does when it switches adapters. The gradient is dropped; to clip "
                        "gradients before a step, use run.block_parameters(), not model.parameters() (logged once)",
                        name,
                    )
                if parameter.requires_grad or parameter.grad is not None:
                    parameter.requires_grad_(False)
                    parameter.grad = None

    def _warn(self, text: str, *arguments: object) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning(text, *arguments)
