"""What counts in a round: each upload wholly or not at all; and when the server folds what waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
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
from parablock_rt.server.uplink import Uplink
from parablock_rt.stages import NO_TIME
from parablock_rt.wire.protocol import Upload

NUMEL = 256
ROUND, BLOCK = 4, 2
BODY_BYTES = codec.body_bytes(64 * 64 + 128, "int8")  # of a block of `make_model`'s
OF_THE_SERVER = {"open_s": 1.0, "bytes_up": 1, "bytes_down": 1, "fingerprint": 1, "server_stages": NO_TIME}


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


def test_each_upload_is_judged_alone_and_the_mean_is_of_those_that_fit() -> None:
    round = open_round({0, 1, 2, 3, 4})
    one_after_the_other = [
        delivery(0, 1.0, weight=1.0),
        delivery(1, 5.0, spoilt=True),
        delivery(2, 5.0, block=BLOCK + 1),
        delivery(7, 5.0),
        delivery(3, 2.0, weight=3.0),
        delivery(0, 9.0),
    ]
    reasons = [round.take(one, "int8") for one in one_after_the_other]
    assert [bool(reason) for reason in reasons] == [False, True, True, True, False, True]
    for reason, why in zip(
        (reasons[1], reasons[2], reasons[3], reasons[5]),
        ("impossible values", "trains block 2, not 3", "not in the cohort", "already delivered"),
        strict=True,
    ):
        assert why in reason
    assert set(round.uploads) == set(round.arrived_at) == {0, 3}
    assert set(round.refused) == {1, 2, 7}, "the second upload of one who has delivered takes nothing from the first"
    expected = Accumulator(NUMEL)
    for one in (one_after_the_other[0], one_after_the_other[4]):
        expected.add(one.body, one.upload.weight, "int8")
    assert torch.equal(round.mean(torch.empty(NUMEL)), expected.mean())
    assert set(round.fold_span_ns) == {0, 3}


@pytest.mark.parametrize("before", range(4), ids=lambda count: f"{count} before")
def test_what_was_folded_before_and_what_waits_for_the_mean_count_alike(before: int) -> None:
    round, expected = open_round({0, 1, 2}), Accumulator(NUMEL)
    for client, value in enumerate((1.0, 4.0, -2.0)):
        if client == before:
            round.fold()
        one = delivery(client, value, weight=client + 1.0)
        assert not round.take(one, "int8")
        expected.add(one.body, one.upload.weight, "int8")
    assert round.waiting == list(range(before % 3, 3))
    assert torch.equal(round.mean(torch.empty(NUMEL)), expected.mean())
    assert round.waiting == []
    assert round.closed(bad_groups=0, **OF_THE_SERVER).weight == 6.0


def test_what_is_folded_together_takes_the_time_of_the_pass_in_equal_shares_that_follow_each_other() -> None:
    round = open_round({0, 1, 2})
    for client in (2, 0, 1):
        round.take(delivery(client), "int8")
    before = time.monotonic_ns()
    round.fold()
    spans = [round.fold_span_ns[client] for client in (2, 0, 1)]
    assert before <= spans[0][0] < spans[-1][1] <= time.monotonic_ns()
    assert spans[0][1] == spans[1][0]
    assert spans[1][1] == spans[2][0]
    assert len({end - start for start, end in spans}) == 1
    assert round.fold_s(0) == (spans[1][1] - spans[1][0]) / 1e9


def test_an_upload_waits_from_its_arrival_until_the_round_closes_but_for_the_time_of_its_folding() -> None:
    round = open_round({0, 1, 2})
    round.take(delivery(0), "int8")
    round.fold()
    round.take(delivery(1), "int8")
    closing_ns = time.monotonic_ns()
    round.mean(torch.empty(NUMEL))
    assert round.waited_s(0, closing_ns) == pytest.approx(closing_ns / 1e9 - round.fold_s(0))
    assert round.waited_s(1, closing_ns) == pytest.approx(closing_ns / 1e9 - 1.0), "it was folded afterwards"
    assert round.waited_s(2, closing_ns) == 0.0


class Gathering:
    """After round 0 the server's thread takes events until so many uploads of round 1 have arrived, and folds none.

    `due`: whether that many of them would be folded; first by a server that has something else to do.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uploads: int) -> None:
        self.due: dict[int, tuple[bool, bool]] = {}
        settle = Coordinator._after_events

        def settle_then_gather(server: Coordinator, *, idle: bool = False) -> None:
            settle(server, idle=idle)
            uplink, intake = server._participants.uplink, server._participants.intake
            while server._progress.oldest == 1 and len(server._run.rounds[1].uploads) < uploads:
                intake.let_in(1)
                event = server._transport.next_event(WAIT_S)
                assert event is not None
                server._take(event)
                if waiting := server._run.rounds[1].waiting:
                    self.due[len(waiting)] = (
                        uplink.is_worth_a_pass(1, idle=False),
                        uplink.is_worth_a_pass(1, idle=True),
                    )

        monkeypatch.setattr(Coordinator, "_after_events", settle_then_gather)


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


def test_a_round_that_can_be_held_whole_is_never_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server has to do: its uploads wait for the mean."""
    gathering = Gathering(monkeypatch, 3)
    monkeypatch.setattr(Round, "fold", lambda round: pytest.fail("a pass over the sum"))
    outcome = federate(3)
    assert gathering.due == {1: (False, False), 2: (False, False), 3: (False, False)}
    assert [closed.contributions for closed in outcome.rounds] == [3, 3]


def test_uploads_wait_for_sixteen_where_there_is_no_room_for_all_unless_there_is_nothing_else_to_do() -> None:
    intake: Any = SimpleNamespace(is_short=False, budget=2**30, taken_bytes=0, holds_all=lambda round: round == 2)
    anything: Any = None
    uplink = Uplink(intake, anything, anything, "int8")
    for waiting in range(1, 18):
        uplink._held = {1: [anything] * waiting, 2: [anything] * waiting}
        assert uplink.is_worth_a_pass(1, idle=False) == (waiting >= 16)
        assert uplink.is_worth_a_pass(1, idle=True)
        assert not uplink.is_worth_a_pass(2, idle=True)


def test_uploads_that_take_half_of_the_budget_do_not_wait_while_others_want_their_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is room for four, and for one that is ready whenever none of those is: of twelve some are left out."""
    gathering = Gathering(monkeypatch, 4)
    federate(12, upload_budget=4 * BODY_BYTES)
    assert gathering.due[1][0] is False
    assert gathering.due[2][0] is True


@pytest.mark.parametrize("clients", [1, 8, 16, 17, 64])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_by_default_the_sum_and_the_uploads_that_wait_take_no_more_memory_with_more_clients(
    clients: int, format: str
) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 64)).to("meta")
    plan = pb.BlockPlan.from_model(layers, ["0", "1"])
    config = pb.RunConfig(rounds=1, clients=clients, format=format)
    largest = max(block.flat_numel for block in plan.blocks)
    round = clients * codec.body_bytes(largest, format)
    budget = default_upload_budget(plan, config)
    sum_ = 0 if round <= budget else 16 * largest
    assert 9 * largest <= budget + sum_ <= (16.25 + 9) * largest
    assert (sum_ == 0) == (clients <= {"fp32": 4, "bf16": 8, "int8": 16, "int4": 30}[format])


def test_the_default_has_room_for_all_of_many_tiny_uploads_at_once() -> None:
    plan = pb.BlockPlan.from_model(torch.nn.Linear(128, 128, bias=False, device="meta"), [["weight"]])
    config = pb.RunConfig(rounds=1, clients=256)
    assert default_upload_budget(plan, config) >= 2 * 256 * codec.body_bytes(128 * 128, "int8")


def test_the_default_has_an_upper_bound_for_what_comes_ahead() -> None:
    huge = pb.BlockPlan.from_model(torch.nn.Linear(2**15, 2**15, bias=False, device="meta"), [["weight"]])
    numel, many = 2**30, pb.RunConfig(rounds=1, clients=100)
    assert default_upload_budget(huge, many) == 2**30
    two = pb.RunConfig(rounds=1, clients=2)
    assert default_upload_budget(huge, two) == 2**30 + 2 * codec.body_bytes(numel, "int8")


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
