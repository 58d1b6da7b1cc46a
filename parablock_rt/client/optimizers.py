"""The memory of a torch optimiser, measured by one step on the meta device, which allocates nothing.

Measuring beats a table of state sizes, which would age with torch. Nothing here trains anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parablock_rt.client.active import OptimizerFactory
from parablock_rt.errors import ConfigError

_KINDS: dict[str, OptimizerFactory] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-5),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-5),
}


NAMES = tuple(_KINDS)


def by_name(name: str) -> OptimizerFactory:
    """The factory of an optimiser to predict memory for. Raises ConfigError for an unknown name."""
    if name not in _KINDS:
        raise ConfigError(f"expected optimizer to be one of {', '.join(_KINDS)}, found {name!r}")
    return _KINDS[name]


@dataclass(frozen=True)
class Footprint:
    """Bytes of an optimiser: `state` from its first step on, `scratch` only during each step."""

    state: int
    scratch: int


def footprint(optimizer: OptimizerFactory, shapes: Sequence[tuple[int, ...]], device: str) -> Footprint | None:
    """The memory of `optimizer` for fp32 parameters of these shapes on a `device` of the kind "cuda" or "cpu".

    The optimiser is made for parameters on the meta device and takes one step there; it chooses between a loop and
    multi-tensor operations as it would on `device`. None (unknown) if it cannot step on the meta device.
    """
    parameters = [nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        with _Live([*parameters, *(p.grad for p in parameters if p.grad is not None)]) as live:
            made = optimizer(parameters)
            fused = any(group.get("fused") for group in made.param_groups)
            for group in made.param_groups:
                if "fused" in group:  # fused steps need real memory; the state is the same without
                    group["fused"] = False
                if "foreach" in group and group["foreach"] is None:
                    group["foreach"] = device == "cuda" and not fused
            made.step()
    except Exception:  # a foreign optimiser may raise anything on tensors without values
        return None
    return Footprint(state=live.nbytes, scratch=0 if fused else live.peak - live.nbytes)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the meta tensors made in its `with` block: `nbytes` alive now, `peak` at most."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.nbytes += nbytes
            self.peak = max(self.peak, self.nbytes)
            weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.nbytes -= nbytes
