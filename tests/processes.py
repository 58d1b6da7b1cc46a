"""Real client and server processes for tests that kill, interrupt or watch them.

They are forked from one helper process that has imported everything once, so that each costs milliseconds instead of
seconds. Every one has a pipe to the test, over which it reports (kind, value) pairs, and every wait has a deadline.

The model is four small linear layers, a block each.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from deaths import prepare
from torch import Tensor, nn

import parablock_rt as pb

WAIT_S = 90.0  # what takes a second on an idle machine may take long on a busy one

_seeding = threading.Lock()

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["parablock_rt.cli", "transformers.models.llama.modeling_llama"])


def make_model(seed: int = 0, width: int = 64) -> nn.Module:
    """The same bits for the same seed, wherever it is called: torch's generator is shared by all threads."""
    torch.set_num_threads(1)
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(4)])


def make_batches(data: int, width: int = 64) -> list[tuple[Tensor, Tensor]]:
    """What a client trains on, again and again. `data`: which of many such lists."""
    generator = torch.Generator().manual_seed(data)
    return [tuple(torch.randn(8, width, generator=generator) for _ in range(2)) for _ in range(3)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def start_server(**settings: Any) -> pb.Server:
    """A server in this process, of the tests' model unless another is given with its plan. Close it."""
    model = settings.pop("model", None) or make_model(width=settings.pop("width", 64))
    defaults: dict[str, Any] = {"rounds": 6, "clients": 2, "local_steps": 2}
    if "resume" in settings:
        defaults = {}
    if "plan" not in settings:
        defaults["plan"] = pb.BlockPlan.from_model(model, blocks=4)
    return pb.serve(model, **defaults | settings)


class Process:
    """A process of a test. `seen`: what it has reported so far."""

    def __init__(self, body: Callable[..., None], *args: Any, **options: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=body, args=(theirs, *args), kwargs=options, daemon=True)
        self._process.start()
        theirs.close()
        self.seen: list[tuple[str, Any]] = []

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def expect(self, kind: str, timeout: float = WAIT_S) -> Any:
        """The value of the next report of this kind. Fails when the process ends or says nothing for too long."""
        deadline = time.monotonic() + timeout
        while True:
            assert self._pipe.poll(max(0.0, deadline - time.monotonic())), f"no {kind!r} in time after {self.seen}"
            try:
                report = self._pipe.recv()
            except EOFError:
                raise AssertionError(f"the process ended without {kind!r} after {self.seen}") from None
            self.seen.append(report)
            if report[0] == kind:
                return report[1]

    def take_reports(self) -> None:
        """Takes what was reported and nobody waits for: who is not listened to stops when the pipe is full."""
        while self._pipe.poll(0.0):
            self.seen.append(self._pipe.recv())

    def let_go(self) -> None:
        """Lets a process go on that has stopped to wait."""
        self.tell("go on")

    def tell(self, what: Any) -> None:
        """Sends something to a process that waits for it."""
        self._pipe.send(what)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and the proof that it was that which ended the process."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self, timeout: float = WAIT_S) -> int:
        """The exit code."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"the process did not end within {timeout:g} s after {self.seen}"
        return self._process.exitcode

    def pause(self, seconds: float) -> None:
        """Waits for something that the process does. Fails when it has ended."""
        self._process.join(seconds)
        assert self._process.exitcode is None, f"the process ended with {self._process.exitcode}"

    def destroy(self) -> None:
        """Nothing of it is left afterwards."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def starter() -> Iterator[Callable[..., Process]]:
    """Gives a function that starts processes (arguments as for `Process`), none of which outlives the context."""
    running: list[Process] = []

    def start(body: Callable[..., None], *args: Any, **options: Any) -> Process:
        running.append(Process(body, *args, **options))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.destroy()


def client(
    pipe: Connection,
    address: str,
    *,
    stop_before: Sequence[int] = (),
    leave_before: int | None = None,
    raise_before: int | None = None,
    nan_in: int | None = None,
    data: int | None = None,
    model_seed: int = 0,
    width: int = 64,
    **options: Any,
) -> None:
    """The body of a client process. Reports joined (its seat), round (after each hand-over), stopped (the round before
    which it waits to be let go), and at the end done or error (class name and message).

    `nan_in`: the round in which every loss is NaN. `data`: which batches; by default those of the seat. `options` are
    those of `join`.
    """
    model = make_model(model_seed, width)
    stops = list(stop_before)
    try:
        with pb.join(address, model, sgd, on_round=lambda report: pipe.send(("round", report.round)), **options) as run:
            pipe.send(("joined", run.client))
            for batch in run.stream(make_batches(run.client if data is None else data, width)):
                assert run._round is not None
                round = run._round.index
                if stops and round >= stops[0]:
                    pipe.send(("stopped", stops.pop(0)))
                    pipe.recv()
                if round == leave_before:
                    break
                if round == raise_before:
                    raise ValueError("a bug in the user's loop")
                scale = float("nan") if round == nan_in else 1.0
                run.train_step(batch, lambda model, batch, scale=scale: loss_fn(model, batch) * scale)
            finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        result = {"digest": run.digest, "bad_groups": run.bad_groups, "finite": finite}
        comeback = {name: getattr(run, name) for name in ("reconnects", "resumed_bytes", "resent_bytes")}
        pipe.send(("done", result | comeback))
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error))))


def server(pipe: Connection, settings: dict[str, Any], die: tuple[str, int] | None = None) -> None:
    """The body of a server process. Reports address, round (after each that is closed) and, if it comes, the end:
    ended (the digest) or error. `die`: where it kills itself (see deaths.py), and in which round."""
    if die is not None:
        prepare(*die, lambda: pipe.send(("dying", die[0])))
    try:
        with start_server(on_round=lambda closed: pipe.send(("round", closed.round)), **settings) as running:
            pipe.send(("address", running.address))
            outcome = running.wait()
        pipe.send(("outcome", {"reconnects": outcome.reconnects, "clients": outcome.client_digests}))
        pipe.send(("ended", outcome.digest))
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error))))


def command(pipe: Connection, arguments: list[str], folder: str, die: tuple[str, int] | None = None) -> None:
    """The body of a `parablock` process: what the installed script does, in a folder that gets its `output` and
    `errors`. Its exit code is the process's. `die`: as for a server."""
    from parablock_rt.cli import main

    if die is not None:
        prepare(*die, lambda: pipe.send(("dying", die[0])))
    os.chdir(folder)
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["parablock", *arguments]
    main()
