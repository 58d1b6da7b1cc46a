"""The block that trains now: fp32 masters where the model is 16-bit, gradients and optimiser state for it alone.

Everything else of the model is frozen meanwhile, so full-parameter training needs the optimiser memory of one block.
The training thread alone uses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from parablock_rt.blocks.flat import FlatBlock

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class RoundOptimizerFactory(Protocol):
    """An optimiser factory that wants to know the round, to choose a learning rate by it."""

    def __call__(self, parameters: list[nn.Parameter], /, *, round: int) -> torch.optim.Optimizer: ...


def at_round(factory: OptimizerFactory | RoundOptimizerFactory, round: int) -> OptimizerFactory:
    """What makes a round's optimiser: the factory itself, or told the round if it has an argument of that name."""
    try:
        wants_round = "round" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable in C that does not say
        wants_round = False
    if wants_round:
        return partial(cast(RoundOptimizerFactory, factory), round=round)
    return cast(OptimizerFactory, factory)


class ActiveBlock:
    """One block made trainable from construction to `close`."""

    def __init__(self, flat: FlatBlock, optimizer: OptimizerFactory, master: Tensor | None) -> None:
        """`master`: fp32 [flat_numel] to hold the masters of a block that is not all fp32; None: train in place."""
        self.flat = flat
        self._model_params = flat.params
        self._master_params: list[nn.Parameter] | None = None
        if master is None:
            trained = flat.params
        else:
            # With the gaps between parameters, which are zero in the flats and have to be here.
            for segment, weights in zip(flat.block.segments, flat.flats, strict=True):
                master[segment.start : segment.start + segment.length].copy_(weights)
            self._master_params = trained = [nn.Parameter(view) for view in flat.views(master)]
        self._master = master
        for parameter in flat.params:
            parameter.requires_grad_(True)
        self.optimizer = optimizer(trained)

    def step(self) -> None:
        """One optimiser step from the gradients that the backward pass left; then the gradients are gone."""
        if self._master_params is None:
            self.optimizer.step()
        else:
            self._widen_gradients(self._master_params)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_([*self._model_params], [*self._master_params])
        self.clear_gradients()

    def _widen_gradients(self, masters: list[nn.Parameter]) -> None:
        """Hands the gradients on to the masters in fp32, one at a time: each is there twice for a moment.

        The largest goes first, before the fp32 ones have added up; `memory.predict` counts on that.
        """
        pairs = zip(masters, self._model_params, strict=True)
        for master, parameter in sorted(pairs, key=lambda pair: pair[0].numel(), reverse=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def clear_gradients(self) -> None:
        """Forgets the gradients of the block and of its masters."""
        for parameter in (*self._model_params, *(self._master_params or ())):
            parameter.grad = None

    def now(self) -> list[Tensor]:
        """The trained weights, one 1-D tensor a segment: fp32 masters if there are any, else the parameters' flats."""
        if self._master is None:
            return self.flat.flats
        return [self._master[s.start : s.start + s.length] for s in self.flat.block.segments]

    def holdings(self) -> dict[str, list[Tensor]]:
        """The tensors that are held now beside the model's parameters, by the items of `memory.predict`."""
        parameters = (*self._model_params, *(self._master_params or ()))
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return {
            "master": [] if self._master is None else [self._master],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimiser state": [value for value in state if isinstance(value, Tensor)],
        }

    def close(self) -> None:
        """Freezes the block again and lets the optimiser go."""
        self.clear_gradients()
        freeze(self._model_params)
        del self.optimizer


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """No gradients for these parameters from now on, and none left over."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
