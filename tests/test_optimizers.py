"""What optimisers are said to hold, against what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from parablock_rt.client import optimizers
from parablock_rt.errors import ConfigError

SHAPES = [(64, 32), (100,), (3, 5, 7)]
NUMEL = 64 * 32 + 100 + 3 * 5 * 7

MORE: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters),
    "two groups": lambda parameters: torch.optim.SGD(
        [{"params": parameters[:1], "momentum": 0.9}, {"params": parameters[1:]}], lr=0.1
    ),
}


def real_state(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> int:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made = optimizer(parameters)
    made.step()
    tensors = [v for values in made.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)  # the step counters are on the host


@pytest.mark.parametrize("name", [*optimizers.NAMES, *MORE])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_state_is_what_a_real_step_leaves(name: str, device: str) -> None:
    optimizer = MORE[name] if name in MORE else optimizers.by_name(name)
    found = optimizers.footprint(optimizer, SHAPES, device)
    assert found is not None
    assert found.state == real_state(optimizer)


def test_adamw_needs_a_copy_of_the_block_in_multi_tensor_steps_alone() -> None:
    def scratch(name: str, device: str) -> int:
        found = optimizers.footprint(optimizers.by_name(name), SHAPES, device)
        assert found is not None
        return found.scratch

    assert scratch("adamw", "cuda") == 4 * NUMEL
    assert scratch("adamw-fused", "cuda") == 0
    assert scratch("adamw", "cpu") == 2 * 4 * 64 * 32  # one parameter at a time, twice
    assert scratch("sgd", "cuda") == 0


def test_nothing_is_allocated_to_find_out() -> None:
    seen: list[Any] = []

    def watched(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.extend(parameters)
        return torch.optim.AdamW(parameters)

    assert optimizers.footprint(watched, [(2**20, 2**20)], "cuda") is not None  # 4 TiB
    assert all(parameter.is_meta for parameter in seen)


def test_an_optimiser_that_looks_at_values_cannot_be_foreseen() -> None:
    assert optimizers.footprint(lambda parameters: torch.optim.Adafactor(parameters), SHAPES, "cuda") is None


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"adamw, .*sgd.*, found 'lion'"):
        optimizers.by_name("lion")
