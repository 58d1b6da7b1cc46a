"""What the server takes into a round's sum: each upload wholly or not at all, and all that wait in one pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from deadlines import do_not_wait_for
from processes import WAIT_S, loss_fn, make_batches, make_model, sgd, start_server

import parablock_rt as pb
from parablock_rt import codec
from parablock_rt.codec import Accumulator
from parablock_rt.server.coordinator import Coordinator
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.server.rounds import Delivery, Round
from parablock_rt.server.server import default_upload_budget
from parablock_rt.wire.protocol import Upload

NUMEL = 256
ROUND, BLOCK = 4, 2


def delivery(
    client: int, value: float = 1.0, *, block: int = BLOCK, weight: float = 1.0, spoilt: bool = False
) -> Delivery:
    body = codec.encode(torch.full((NUMEL,), value), torch.zeros(NUMEL), None, format="int8").body
    if spoilt:
        body[0:2] = torch.tensor([0x80, 0x7F], dtype=torch.uint8)  # an infinite scale
    upload = Upload(round=ROUND, block=block, weight=weight, loss=0.5, compute_s=0.0, exposed_s=0.0)
    return Delivery(client, upload, body, at=float(client))


def open_round(cohort: set[int]) -> Round:
    return Round(ROUND, BLOCK, frozenset(cohort), Accumulator(NUMEL))


def test_of_uploads_that_come_together_each_is_judged_alone() -> None:
    round = open_round({0, 1, 2, 3, 4})
    together = [
        delivery(0, 1.0, weight=1.0),
        delivery(1, 5.0, spoilt=True),
        delivery(2, 5.0, block=BLOCK + 1),
        delivery(7, 5.0),
        delivery(3, 2.0, weight=3.0),
        delivery(0, 9.0),
    ]
    reasons = round.fold(together, "int8")
    assert [bool(reason) for reason in reasons] == [False, True, True, True, False, True]
    for reason, why in zip(
        (reasons[1], reasons[2], reasons[3], reasons[5]),
        ("impossible values", "trains block 2, not 3", "not in the cohort", "already delivered"),
        strict=True,
    ):
        assert why in reason
    assert set(round.uploads) == set(round.folded_at) == set(round.fold_span_ns) == {0, 3}
    assert set(round.refused) == {1, 2, 7}, "the second upload of one who has delivered takes nothing from the first"
    expected = Accumulator(NUMEL)
    for one in (together[0], together[4]):
        expected.add(one.body, one.upload.weight, "int8")
    assert torch.equal(round.accumulator.mean(), expected.mean())


def test_what_comes_together_takes_the_time_of_the_pass_in_equal_shares_that_follow_each_other() -> None:
    round = open_round({0, 1, 2})
    before = time.monotonic_ns()
    round.fold([delivery(client) for client in (2, 0, 1)], "int8")
    spans = [round.fold_span_ns[client] for client in (2, 0, 1)]
    assert before <= spans[0][0] < spans[-1][1] <= time.monotonic_ns()
    assert spans[0][1] == spans[1][0]
    assert spans[1][1] == spans[2][0]
    assert len({end - start for start, end in spans}) == 1
    assert round.fold_s(0) == (spans[1][1] - spans[1][0]) / 1e9


class Gathering:
    """After round 0 the server's thread takes events until all uploads of round 1 have arrived, and folds none.

    `due`: whether that many of them would have been folded at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clients: int) -> None:
        self.due: dict[int, bool] = {}
        self.passes: dict[int, list[int]] = {}
        fold, settle = Round.fold, Coordinator._settle

        def count(round: Round, deliveries: Sequence[Delivery], format: str) -> list[str]:
            self.passes.setdefault(round.index, []).append(len(deliveries))
            return fold(round, deliveries, format)

        def settle_then_gather(server: Coordinator, *, idle: bool = False) -> None:
            settle(server, idle=idle)
            uplink, intake = server._participants.uplink, server._participants.intake
            while server._progress.oldest == 1 and 1 not in self.passes and len(uplink.waiting(1)) < clients:
                intake.let_in(1)
                event = server._transport.next_event(WAIT_S)
                assert event is not None
                server._take(event)
                if waiting := uplink.waiting(1):
                    self.due[len(waiting)] = uplink.is_worth_a_pass(1)

        monkeypatch.setattr(Round, "fold", count)
        monkeypatch.setattr(Coordinator, "_settle", settle_then_gather)


def federate(
    clients: int,
    before_step: Callable[[pb.Run], None] = lambda run: None,
    prepare: Callable[[pb.Server], None] = lambda server: None,
    **settings: Any,
) -> Outcome:
    with start_server(rounds=2, clients=clients, local_steps=1, staleness=0, **settings) as server:
        prepare(server)

        def client(model: torch.nn.Module) -> None:
            with pb.join(server.address, model, sgd) as run:
                for batch in run.stream(make_batches(run.client)):
                    before_step(run)
                    run.train_step(batch, loss_fn)

        threads = [threading.Thread(target=client, args=(make_model(),)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        return server.wait(WAIT_S)


def test_the_server_folds_all_uploads_that_wait_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gathering = Gathering(monkeypatch, 3)
    outcome = federate(3)
    assert gathering.passes[1] == [3]
    assert [closed.contributions for closed in outcome.rounds] == [3, 3]


@pytest.mark.parametrize(("clients", "enough"), [(5, 5), (18, 16)])
def test_uploads_wait_until_sixteen_are_here_or_none_is_to_come(
    monkeypatch: pytest.MonkeyPatch, clients: int, enough: int
) -> None:
    gathering = Gathering(monkeypatch, clients)
    federate(clients, upload_budget=2**30)
    assert gathering.due == {waiting: waiting >= enough for waiting in range(1, clients + 1)}


def test_a_server_that_has_nothing_else_to_do_folds_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second client sends nothing before the first one's upload is in the sum."""
    folded = threading.Event()
    passes: list[int] = []
    fold = Round.fold

    def note(round: Round, deliveries: Sequence[Delivery], format: str) -> list[str]:
        if round.index == 0:
            passes.append(len(deliveries))
            folded.set()
        return fold(round, deliveries, format)

    def hold(run: pb.Run) -> None:
        assert run.client == 0 or folded.wait(WAIT_S)

    monkeypatch.setattr(Round, "fold", note)
    outcome = federate(2, hold)
    assert passes == [1, 1]
    assert [closed.contributions for closed in outcome.rounds] == [2, 2]


def test_uploads_that_take_half_of_the_budget_do_not_wait_while_others_want_their_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is room for four, and for one that is ready whenever none of those is: of twelve some are left out."""
    gathering = Gathering(monkeypatch, 12)
    federate(12, upload_budget=4 * codec.body_bytes(64 * 64 + 128, "int8"))
    assert gathering.due[1] is False
    assert gathering.due[2] is True


def test_uploads_wait_for_each_other_while_there_is_room_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little room is left."""
    gathering = Gathering(monkeypatch, 5)
    federate(5, upload_budget=5 * codec.body_bytes(64 * 64 + 128, "int8"))
    assert gathering.due == {waiting: waiting == 5 for waiting in range(1, 6)}


def test_a_server_holds_by_default_uploads_that_weigh_half_as_much_as_the_sum() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 64))
    plan = pb.BlockPlan.from_model(layers, ["0", "1"])
    assert default_upload_budget(plan) >= 8 * max(block.wire_bytes("int8") for block in plan.blocks)
    assert default_upload_budget(plan) <= 9 * max(block.flat_numel for block in plan.blocks)
    huge = pb.BlockPlan.from_model(torch.nn.Linear(2**15, 2**15, bias=False, device="meta"), [["weight"]])
    assert default_upload_budget(huge) == 2**30


def test_what_has_arrived_by_the_deadline_counts_though_nobody_else_comes() -> None:
    """One of four delivers in round 0; the others do when the server has closed it."""
    closed = threading.Event()

    def hold(run: pb.Run) -> None:
        if run.client != 2:
            assert closed.wait(WAIT_S)

    def note(done: ClosedRound) -> None:
        closed.set()

    def prepare(server: pb.Server) -> None:
        do_not_wait_for(server, lambda round: {0, 1, 3} if round == 0 else ())

    outcome = federate(4, hold, prepare, quorum=1, on_round=note)
    assert outcome.rounds[0].contributions == 1
    assert [part.client for part in outcome.rounds[0].parts] == [2]
