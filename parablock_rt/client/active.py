"""The active block: the one that trains in the current round, with its fp32 masters, gradients and optimiser state.

The rest of the model is frozen meanwhile, so full-parameter training needs the optimiser memory of one block only.
Only the training thread may use this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.errors import ConfigError, ParaBlockError, PlanError

# Called with the parameters to train and, if it has arguments for them, `round` and `names`: see `with_context`.
OptimizerFactory = Callable[..., torch.optim.Optimizer]


def with_context(factory: OptimizerFactory, *, round: int, names: Sequence[str]) -> OptimizerFactory:
    """The factory with `round` and `names` (the parameters' names, in their order) bound to its arguments of these
    names; arguments that it lacks, or that are bound already, are left alone."""
    try:
        wanted = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable in C without a signature
        return factory
    bound = factory.keywords if isinstance(factory, partial) else {}
    facts = {"round": round, "names": list(names)}
    return partial(factory, **{name: fact for name, fact in facts.items() if name in wanted and name not in bound})


class ActiveBlock:
    """One block that is trainable from construction to `close`."""

    def __init__(self, flat: FlatBlock, optimizer: OptimizerFactory) -> None:
        """A block that is all fp32 trains in place, any other in fp32 masters, which are made here.

        Raises ConfigError when `optimizer` does not return an optimiser, or one of other parameters.
        """
        self.flat = flat
        self._model_params = flat.params
        self._master_params: list[nn.Parameter] | None = None
        master: Tensor | None = None
        trained = flat.params
        if flat.block.needs_master:
            master = torch.empty(flat.block.flat_numel, dtype=torch.float32, device=flat.flats[0].device)
            # Whole segments: the gaps between parameters must be zero in the master, too, as they are in the flats.
            for segment, weights in zip(flat.block.segments, flat.flats, strict=True):
                master[segment.start : segment.start + segment.length].copy_(weights)
            self._master_params = trained = [nn.Parameter(view) for view in flat.views(master)]
            for copy, parameter in zip(trained, flat.params, strict=True):
                copy.__dict__.update(parameter.__dict__)  # marks such as `_no_weight_decay`
        self._master = master
        self._versions = _versions(flat.params)
        for parameter in flat.params:
            parameter.grad = None
            parameter.requires_grad_(True)
        self.optimizer = optimizer(trained)
        _check_optimizer(self.optimizer, trained, in_place=master is None)
        self._stepping = False
        self._step_hook = None
        if hasattr(self.optimizer, "_optimizer_step_pre_hooks"):  # a wrapper may be an Optimizer without its state
            self._step_hook = self.optimizer.register_step_pre_hook(self._refuse_foreign_step)

    def check_homed(self, model: nn.Module) -> None:
        """Raises PlanError when a trained parameter has left the memory that the hand-over reads."""
        self.flat.check_homed(model)
        if self._master_params is None or self._master is None:
            return
        for slot, master, view in zip(
            self.flat.block.slots, self._master_params, self.flat.views(self._master), strict=True
        ):
            if master.data_ptr() != view.data_ptr() or master.dtype != view.dtype:
                raise PlanError(
                    f"the fp32 master of parameter {slot.name!r} has left its buffer: the optimiser has put another "
                    "tensor into its .data; change it in place"
                )

    def without_gradient(self) -> list[str]:
        """The names of the block's parameters without a gradient."""
        return [
            slot.name
            for slot, parameter in zip(self.flat.block.slots, self._model_params, strict=True)
            if parameter.grad is None
        ]

    def require_change(self, ref: list[Tensor]) -> None:
        """Raises ParaBlockError when the weights still equal `ref`, a tensor per segment.

        Checks a round in which no step saw a gradient: an optimiser that steps during the backward pass trains then.
        """
        if all(torch.equal(now, start) for now, start in zip(self.flat.flats, ref, strict=True)):
            raise ParaBlockError(
                f"no parameter of block {self.flat.block.name!r} had a gradient in the whole round: call "
                "loss.backward() before each step, on a loss of this run's own model (not of a copy), outside of "
                "torch.no_grad"
            )

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """One optimiser step with the gradients of the backward pass; clears them, also when it raises.

        `scaler`: the one that scaled the loss; it skips the step if a gradient is not finite.
        """
        self._stepping = True
        try:
            if self._master_params is not None:
                self._follow_model(self._master_params)
                self._widen_gradients(self._master_params)
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
            if self._master_params is not None:
                with torch.no_grad():
                    torch._foreach_copy_([*self._model_params], [*self._master_params])
                self._versions = _versions(self._model_params)
        finally:
            self._stepping = False
            self.clear_gradients()

    def _refuse_foreign_step(self, *_: Any) -> None:
        if not self._stepping:
            raise ParaBlockError(
                "run.step() takes the optimiser's step: do not call run.optimizer.step() yourself, and pass a "
                "GradScaler to run.step(scaler=...)"
            )

    def _follow_model(self, masters: list[nn.Parameter]) -> None:
        """Copies to the masters what a program has changed in the 16-bit weights since the last step (a mask, a
        projection). Where nothing changed, the masters keep their precision."""
        for master, parameter, version in zip(masters, self._model_params, self._versions, strict=True):
            if _version(parameter) != version:
                with torch.no_grad():
                    same = parameter == master.to(parameter.dtype)
                    master.copy_(torch.where(same, master, parameter.float()))

    def _widen_gradients(self, masters: list[nn.Parameter]) -> None:
        """Moves the gradients to the masters in fp32, one at a time: only one exists twice at any moment.

        The largest goes first, while few fp32 gradients exist; `memory.predict` relies on this order.
        """
        pairs = zip(masters, self._model_params, strict=True)
        for master, parameter in sorted(pairs, key=lambda pair: pair[0].numel(), reverse=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def clear_gradients(self) -> None:
        """Drops the gradients of the block, of its masters, and of what else its optimiser moves: a loss may have
        parameters of its own."""
        for parameter in (*self._model_params, *(self._master_params or ()), *_moved_by(self.optimizer)):
            parameter.grad = None

    def now(self) -> list[Tensor]:
        """The trained weights, one 1-D tensor per segment: the fp32 masters if the block has them, else the flats."""
        if self._master is None:
            return self.flat.flats
        return [self._master[s.start : s.start + s.length] for s in self.flat.block.segments]

    def holdings(self) -> dict[str, list[Tensor]]:
        """The tensors held now in addition to the model's parameters, by the item names of `memory.predict`."""
        parameters = (*self._model_params, *(self._master_params or ()))
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return {
            "master": [] if self._master is None else [self._master],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimiser state": [value for value in state if isinstance(value, Tensor)],
        }

    def close(self) -> None:
        """Freezes the block again and drops the optimiser."""
        self.clear_gradients()
        freeze(self._model_params)
        if self._step_hook is not None:
            self._step_hook.remove()
        del self.optimizer


def retire(optimizer: torch.optim.Optimizer) -> None:
    """Makes any further use of a former round's optimiser raise, for example by a learning-rate scheduler that kept it;
    frees its state."""
    optimizer.state.clear()
    optimizer.param_groups = _EndedGroups()


class _EndedGroups(list[dict[str, Any]]):
    """The parameter groups of an optimiser whose round is over."""

    def _refuse(self, *_: Any) -> Any:
        raise ParaBlockError(
            "this optimiser belongs to a round that is over, and each round has a new one: make the learning-rate "
            "scheduler in the optimizer function, or set the rate there, from its argument `round`"
        )

    __iter__ = __getitem__ = __len__ = _refuse


def _version(parameter: nn.Parameter) -> int:
    """A number that changes with every in-place change, except through `.data`; 0 for an inference tensor."""
    return 0 if parameter.is_inference() else parameter._version


def _versions(parameters: Iterable[nn.Parameter]) -> list[int]:
    return [_version(parameter) for parameter in parameters]


def _step_of_class(optimizer: Any) -> Any:
    """The optimiser's own `step`, without the wrapper that a learning-rate scheduler has put around it."""
    own = getattr(type(optimizer), "step", None)
    return optimizer.step if own is None else partial(own, optimizer)


def _moved_by(optimizer: Any) -> Iterator[nn.Parameter]:
    """The parameters in an optimiser's groups."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check_optimizer(made: Any, wanted: list[nn.Parameter], *, in_place: bool) -> None:
    """Raises ConfigError unless `made` is an optimiser of the parameters `wanted`.

    `in_place`: the model's own parameters are trained; then others may be in the optimiser, too. Those of the model are
    frozen, and any that are not of the model train on this client alone.
    """
    if not all(hasattr(made, name) for name in ("step", "param_groups", "state")):
        raise ConfigError(
            f"expected the optimizer function to return an optimiser like torch's, with step, param_groups and state, "
            f"found a {type(made).__name__}; return one, such as torch.optim.AdamW(params)"
        )
    try:
        inspect.signature(_step_of_class(made)).bind()
    except TypeError:
        raise ConfigError(
            f"expected an optimiser whose step() needs no closure, found {type(made).__name__}, which evaluates the "
            "loss several times per step; choose another"
        ) from None
    except ValueError:  # a callable in C without a signature
        pass
    found = {id(parameter) for parameter in _moved_by(made)}
    ours = {id(parameter) for parameter in wanted}
    if not found & ours or not (in_place or found <= ours):
        raise ConfigError(
            "the optimizer function made an optimiser of other parameters than those it was given: use these, not "
            "model.parameters() or an optimiser of an earlier round. For a 16-bit model they are fp32 copies; add an "
            "argument `names` to the function to get their names in the model"
        )


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Clears `requires_grad` and the gradients of these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
