"""Small federations that several test modules run: the models and data, a case, and its comparison bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from harness import FederationResult, run_federation
from simulation import SimulationResult, simulate
from torch import Tensor, nn

from parablock_rt import _C
from parablock_rt.client.run import Run
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member
from parablock_rt.server.rounds import Delivery, Round

THREE = [["0"], ["2"], ["4"]]
TWO = [["0", "2"], ["4"]]
ONE = [["0", "2", "4"]]
WAIT_S = 90.0


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)


def bounded_mlp() -> nn.Module:
    """Weights in ±[0.5, 1]: a small step stays within a factor of two, so that differences are exact."""
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(torch.rand_like(p) < 0.5, -1.0, 1.0) * (0.5 + 0.5 * torch.rand_like(p)))
            p.clamp_(-0.99, 0.99).copy_(torch.where(p.abs() < 0.51, 0.51 * p.sign(), p))
    return model


def regression(dtype: torch.dtype = torch.float32) -> Callable[[int], Sequence[Any]]:
    def batches(seat: int) -> Sequence[Any]:
        generator = torch.Generator().manual_seed(100 + seat)
        pairs = [(torch.randn(4, 16, generator=generator), torch.randn(4, 8, generator=generator)) for _ in range(5)]
        return [(x.to(dtype), y.to(dtype)) for x, y in pairs]

    return batches


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def plain_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


def uneven(seat: int, step: int) -> float:
    """Weights that differ between clients and rounds and are not powers of two."""
    return (1.0, 3.7, 0.4, 2.9)[seat] + step % 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A federation: what to run, and the settings that the simulation knows too."""

    blocks: list[list[str]] = dataclasses.field(default_factory=lambda: THREE)
    dtype: torch.dtype = torch.float32
    clients: int = 3
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        common = {"plan_blocks": self.blocks, "clients": self.clients, "weight": uneven, "rounds": 10, "local_steps": 2}
        return (lambda: mlp(self.dtype), regression(self.dtype), squared_error, sgd), {**common, **self.settings}

    def run(self, **more: Any) -> FederationResult:
        positional, named = self.arguments
        return run_federation(*positional, **{**named, **more})

    def simulate(self, **more: Any) -> SimulationResult:
        positional, named = self.arguments
        return simulate(*positional, **{**named, **more})


def assert_equal(result: FederationResult, expected: SimulationResult) -> None:
    """Bit equality of everything that can be seen: every round, every final weight, every residual."""
    assert result.fingerprints == expected.fingerprints
    for name, value in expected.parameters.items():
        assert torch.equal(result.model.get_parameter(name), value), f"{name} on the server"
    for seat, residuals in expected.residuals.items():
        client = result.by_seat(seat)
        assert client.digest == result.outcome.digest
        for name, value in expected.parameters.items():
            assert torch.equal(client.model.get_parameter(name), value), f"{name} on client {seat}"
        for block, residual in enumerate(residuals):
            found = residual_of(client.run, block)
            want = np.zeros(1, np.float32) if residual is None else residual
            assert np.array_equal(np.zeros(1, np.float32) if found is None else found, want) or (
                found is None and not want.any()
            ), f"residual of block {block} on client {seat}"


def residual_of(run: Run | None, block: int) -> np.ndarray[Any, Any] | None:
    assert run is not None
    parts = run._replica._states[block].residual
    return None if parts is None else torch.cat(parts).numpy()


def take_spy(monkeypatch: pytest.MonkeyPatch, on_take: Callable[[int, int, str], None]) -> None:
    """Calls `on_take(round, seat, why not)` on the server's thread after each upload was accepted or refused."""
    take = Round.take

    def spy(self: Round, delivery: Delivery, format: str) -> str:
        reason = take(self, delivery, format)
        on_take(self.index, delivery.client, reason)
        return reason

    monkeypatch.setattr(Round, "take", spy)


def arrival_spy(monkeypatch: pytest.MonkeyPatch, on_arrival: Callable[[int, int], None]) -> None:
    """Calls `on_arrival(round, seat)` on the server's thread when all of an upload is there."""
    take = Intake.take

    def spy(self: Intake, member: Member, arrived: _C.Event) -> Any:
        taken = take(self, member, arrived)
        if taken is not None:
            on_arrival(taken[0].round, member.seat)
        return taken

    monkeypatch.setattr(Intake, "take", spy)
