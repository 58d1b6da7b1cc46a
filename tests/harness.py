"""A whole federation in one process, for tests: a server and its clients, over real loopback sockets.

Each client has a thread of its own and drives `parablock_rt.join` as a user would. Nothing can hang: after `limit_s`
seconds everything is stopped and the stacks of whoever was still running are in the error.

Everything that makes a client itself (its batches, its weights in the mean) goes by its seat, `run.client`, because
the order in which threads get their seats is not determined.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import parablock_rt as pb
from parablock_rt.client.run import Run
from parablock_rt.server.outcome import ClosedRound, Outcome

MakeModel = Callable[[], nn.Module]
MakeBatches = Callable[[int], Sequence[Any]]  # of a seat; used again and again
LossFunction = Callable[[nn.Module, Any], Tensor]
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Blocks = Sequence[Sequence[str]]  # the name prefixes of each block
Weight = Callable[[int, int], float]  # of a seat and its count of steps so far


class Leave(Exception):  # noqa: N818 - no error: a client that raises it in `before_step` leaves the run
    """Raise it in `before_step`: the client leaves the run early, as if its user had closed it."""


@dataclass
class ClientResult:
    """What a client came to. `trained`: the rounds it handed over. `error`: what ended it, if anything did."""

    model: nn.Module
    run: Run | None = None  # closed
    seat: int = -1
    digest: str | None = None
    trained: list[int] = field(default_factory=list)
    error: BaseException | None = None


@dataclass
class FederationResult:
    """`clients` in the order of their threads, latecomers last; `by_seat` finds the last one that held a seat."""

    outcome: Outcome
    model: nn.Module
    plan: pb.BlockPlan
    clients: list[ClientResult]
    error: BaseException | None  # the server's

    def by_seat(self, seat: int) -> ClientResult:
        return [client for client in self.clients if client.seat == seat][-1]

    @property
    def fingerprints(self) -> list[int]:
        """The fingerprint of each round's block once the round was closed."""
        return [closed.fingerprint for closed in self.outcome.rounds]


def run_federation(
    make_model: MakeModel,
    make_batches: MakeBatches,
    loss_fn: LossFunction,
    optimizer: Optimizer,
    *,
    plan_blocks: Blocks,
    clients: int,
    weight: Weight = lambda seat, step: 1.0,
    before_step: Callable[[Run, int], None] | None = None,
    on_round: Callable[[ClosedRound], None] | None = None,
    client_models: Sequence[MakeModel] = (),
    latecomers: Sequence[threading.Event] = (),
    links: Sequence[dict[str, float]] = (),
    server_link: dict[str, float] | None = None,
    prepare: Callable[[pb.Server], None] | None = None,
    check: bool = True,
    limit_s: float = 120.0,
    **settings: Any,
) -> FederationResult:
    """Runs a federation to its end and returns what came of it.

    Args:
        plan_blocks: the name prefixes of each block's parameters.
        clients: how many seats; as many clients start at once.
        weight: what a step counts in the mean.
        before_step: called on a client's thread before each step, with its count of steps so far. It may wait for
            events (with a timeout), raise `Leave`, or do harm.
        on_round: called on the server's thread after each closed round.
        client_models: makes the model of client thread i where given, instead of `make_model`.
        latecomers: for each, a further client that joins once the event is set.
        links, server_link: `rate` and `delay` of client thread i and of the server.
        prepare: called with the server before any client starts.
        check: stop at the first client's error and raise it, or the server's. Otherwise errors are in the result.
        limit_s: seconds for everything.
        settings: the fields of `RunConfig`.
    """
    torch.set_num_threads(1)
    _warm_up()
    deadline = time.monotonic() + limit_s
    model = make_model()
    plan = pb.BlockPlan.from_model(model, plan_blocks)
    makers = [client_models[i] if i < len(client_models) else make_model for i in range(clients + len(latecomers))]
    results = [ClientResult(make()) for make in makers]
    starts = [None] * clients + list(latecomers)
    ended: queue.Queue[ClientResult] = queue.Queue()
    server = pb.serve(
        model, plan=plan, clients=clients, on_round=on_round, **{"chunk": 256, **settings}, **(server_link or {})
    )
    if prepare is not None:
        prepare(server)

    def client(index: int) -> None:
        result, start = results[index], starts[index]
        try:
            torch.set_num_threads(1)
            if start is not None and not start.wait(limit_s):
                raise TimeoutError("a latecomer was never called")
            link = links[index] if index < len(links) else {}
            _take_part(server.address, result, make_batches, loss_fn, optimizer, weight, before_step, limit_s, link)
        except BaseException as error:
            result.error = error
        ended.put(result)

    threads = [threading.Thread(target=client, args=(i,), daemon=True, name=f"client {i}") for i in range(len(results))]
    for thread in threads:
        thread.start()
    error: BaseException | None = None
    try:
        for _ in threads:
            result = ended.get(timeout=max(0.0, deadline - time.monotonic()))
            if check and result.error is not None:
                raise result.error
        try:
            server.wait(max(0.0, deadline - time.monotonic()))
        except pb.ParaBlockError as caught:
            if check:
                raise
            error = caught
    except queue.Empty:
        raise TimeoutError(f"the federation did not end within {limit_s:g} s\n{_stacks()}") from None
    finally:
        closing = threading.Thread(target=server.close, daemon=True)  # were it stuck, the test must still end
        closing.start()
        closing.join(10.0)
    return FederationResult(server.outcome, model, plan, results, error)


@functools.cache
def _warm_up() -> None:
    """Uses torch's math library once, in one thread.

    When several threads make the first call of a process to its vector functions (tanh is one) at the same time, some
    of them now and then get a less accurate result. The first optimiser step also imports for more than a second.
    """
    x = torch.linspace(-2.0, 2.0, 64).reshape(8, 8).requires_grad_()
    for function in (torch.tanh, torch.exp, torch.sigmoid, torch.erf, torch.sin, torch.cos):
        function(x @ x).sum().backward()
    torch.log(x.abs() + 1).sum().backward()
    torch.optim.SGD([x], lr=0.0).step()


def _take_part(
    address: str,
    result: ClientResult,
    make_batches: MakeBatches,
    loss_fn: LossFunction,
    optimizer: Optimizer,
    weight: Weight,
    before_step: Callable[[Run, int], None] | None,
    patience: float,
    link: dict[str, float],
) -> None:
    with pb.join(
        address,
        result.model,
        optimizer,
        patience=patience,
        on_round=lambda report: result.trained.append(report.round),
        **link,
    ) as run:
        result.run, result.seat = run, run.client
        try:
            for step, batch in enumerate(run.stream(make_batches(run.client))):
                if before_step is not None:
                    before_step(run, step)
                run.train_step(batch, loss_fn, weight=weight(run.client, step))
        except Leave:
            pass
        result.digest = run.digest


def _stacks() -> str:
    frames = sys._current_frames()
    return "\n".join(
        f"--- {thread.name}\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.ident in frames and thread is not threading.current_thread()
    )
