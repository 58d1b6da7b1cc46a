"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner

import parablock_rt as pb
from parablock_rt.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
SERVER_CODE, CLIENT_CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_the_custom_loop_has_fewer_than_twenty_lines() -> None:
    assert len(CLIENT_CODE.strip().splitlines()) < 20


def test_the_custom_loop_trains_two_clients_to_the_server_s_bits() -> None:
    torch.set_num_threads(1)
    served: dict[str, Any] = {"make_model": Stack}
    exec(SERVER_CODE, served)
    server: pb.Server = served["server"]
    clients: list[dict[str, Any]] = []

    def take_part(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(64, 16, generator=generator)
        loader = [(part, part.flip(1)) for part in inputs.split(8)]
        namespace = {"server": server, "model": Stack(), "loader": loader}
        clients.append(namespace)
        exec(CLIENT_CODE, namespace)

    threads = [threading.Thread(target=take_part, args=(index,), daemon=True) for index in range(2)]
    with server:
        for thread in threads:
            thread.start()
        outcome = server.wait(timeout=60)
        for thread in threads:
            thread.join(60)
    losses = [closed.loss for closed in outcome.rounds]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert set(outcome.client_digests.values()) == {outcome.digest}
    assert len(outcome.client_digests) == 2
    for namespace in clients:
        for name, value in server.state_dict().items():
            assert torch.equal(namespace["model"].state_dict()[name], value)


def test_every_parablock_command_and_flag_it_mentions_exists() -> None:
    runner = CliRunner()
    lines = re.findall(r"^parablock .*$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        _, command, *words = line.split()
        help_text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for flag in (word for word in words if word.startswith("--")):
            assert flag in help_text, f"{line}: {flag}"
