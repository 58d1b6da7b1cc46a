"""What the algorithm promises when uploads are refused, clients come and go, and models are borrowed for a run."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from deadlines import do_not_wait_for
from federations import (
    ONE,
    THREE,
    WAIT_S,
    Case,
    assert_equal,
    mlp,
    regression,
    squared_error,
    take_spy,
    uneven,
)
from harness import Leave, run_federation
from torch import Tensor, nn

from parablock_rt.client.run import Run
from parablock_rt.client.server_link import ServerLink
from parablock_rt.server.catch_up import CatchUp
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member
from parablock_rt.server.outcome import ClosedRound

# ---- Uploads that are not accepted


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("blocks", [ONE, THREE], ids=["1", "3"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_rejected_upload_changes_neither_model_nor_residual(
    staleness: int, blocks: list[list[str]], format: str
) -> None:
    """Client 1's steps of rounds 2, 3 and 9 weigh too much together. The rejected change itself is gone
    with the next overwrite; what the residual held before goes up with the next upload that counts."""
    rejected = {(2, 1), (3, 1), (9, 1)}

    def weight(seat: int, step: int) -> float:
        return 2.0**60 if (step // 2, seat) in rejected else uneven(seat, step)

    case = Case(blocks, settings={"staleness": staleness, "format": format})
    result = case.run(weight=weight)
    expected = case.simulate(weight=weight, accepted=lambda round, seat: (round, seat) not in rejected)
    assert [c.contributions for c in result.outcome.rounds] == [3, 3, 2, 2, 3, 3, 3, 3, 3, 2]
    assert_equal(result, expected)
    assert any(residual is not None and residual.any() for residual in expected.residuals[1])


@pytest.mark.parametrize(("blocks", "staleness"), [(THREE, 0), (THREE, 1), (ONE, 1)], ids=["3-S0", "3-S1", "1-S1"])
def test_an_upload_that_comes_after_the_deadline_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, blocks: list[list[str]], staleness: int
) -> None:
    """Client 1 is held in round 3 until the server has closed it. Whatever else a slow machine makes late is taken
    from what happened, so that the comparison holds."""
    held = 3
    taken: set[tuple[int, int]] = set()
    trains, closed = threading.Event(), threading.Event()
    take_spy(monkeypatch, lambda round, seat, reason: taken.add((round, seat)) if not reason else None)

    def hold(run: Run, step: int) -> None:
        if run.client == 1 and run._round is not None and run._round.index == held:
            trains.set()
            assert closed.wait(WAIT_S)

    case = Case(blocks, clients=2, settings={"staleness": staleness, "format": "int4", "local_steps": 1, "rounds": 8})
    result = case.run(
        before_step=hold,
        on_round=lambda report: closed.set() if report.round == held else None,
        prepare=lambda server: do_not_wait_for(server, lambda round: {1} if round == held and trains.is_set() else ()),
        quorum=1,
    )
    assert (held, 0) in taken
    assert (held, 1) not in taken
    assert held in result.by_seat(1).trained
    expected = case.simulate(
        takes_part=lambda round, seat: round in result.by_seat(seat).trained,
        accepted=lambda round, seat: (round, seat) in taken,
    )
    assert_equal(result, expected)


# ---- Coming and going


def test_clients_that_start_from_other_weights_get_the_servers_first() -> None:
    case = Case()
    result = case.run(client_models=[lambda: mlp(seed=7), mlp, lambda: mlp(seed=8)])
    assert_equal(result, case.simulate())


def test_a_client_whose_snapshot_is_on_its_way_when_the_others_are_ready_begins_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Client 0 takes the last block of its snapshot only when the server knows that client 1 has all of its own."""
    other_is_ready = threading.Event()
    began: list[int] = []
    make_room, send_snapshot = ServerLink._make_room_for_snapshot, CatchUp.send_snapshot
    let_begin = CatchUp._let_begin

    def hold(self: ServerLink) -> None:
        if self._seat == 0 and any(message.block == 2 for message in self._transit._announced):
            assert other_is_ready.wait(WAIT_S)
        make_room(self)

    def note_ready(self: CatchUp, member: Any) -> None:
        complete = not member.to_send
        send_snapshot(self, member)
        if member.seat == 1 and complete:
            other_is_ready.set()

    def note_begin(self: CatchUp, member: Any, **rest: Any) -> None:
        began.append(member.seat)
        let_begin(self, member, **rest)

    monkeypatch.setattr(ServerLink, "_make_room_for_snapshot", hold)
    monkeypatch.setattr(CatchUp, "send_snapshot", note_ready)
    monkeypatch.setattr(CatchUp, "_let_begin", note_begin)
    case = Case(clients=2)
    result = case.run(client_models=[lambda: mlp(seed=7), lambda: mlp(seed=8)])
    assert sorted(began) == [0, 1]
    assert_equal(result, case.simulate())


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_latecomer_gets_the_reference_and_ends_on_the_same_bits(
    staleness: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client leaves once round 3 is closed. While the other trains round 4, a latecomer takes the vacant seat. It
    trains from round 5 on, with weights of its own to begin with that the snapshot replaces."""
    last = 3
    closed, vacant, taken = threading.Event(), threading.Event(), threading.Event()
    gone: list[int] = []
    let_begin = CatchUp._let_begin

    def note_begin(self: CatchUp, member: Member, *, first_round: int) -> None:
        let_begin(self, member, first_round=first_round)
        if gone:
            taken.set()

    def leave(run: Run, step: int) -> None:
        if run.client == 0 and step == 2 * (last + 1) + 1:
            assert taken.wait(WAIT_S)
        if run.client == 1 and not gone and step == 2 * (last + 1):
            assert closed.wait(WAIT_S)
            gone.append(run.client)
            run.close()
            vacant.set()
            raise Leave

    monkeypatch.setattr(CatchUp, "_let_begin", note_begin)

    case = Case(dtype=dtype, clients=2, settings={"staleness": staleness, "rounds": 12})
    result = case.run(
        before_step=leave,
        on_round=lambda report: closed.set() if report.round == last else None,
        latecomers=[vacant],
        client_models=[lambda: mlp(dtype), lambda: mlp(dtype), lambda: mlp(dtype, seed=9)],
        quorum=1,
    )
    assert [c.contributions for c in result.outcome.rounds] == [2] * (last + 1) + [1] + [2] * (11 - last - 1)
    assert result.clients[2].trained == list(range(last + 2, 12))
    expected = case.simulate(
        takes_part=lambda round, seat: not (round == last + 1 and seat == 1), newcomers={last + 2: 1}
    )
    assert_equal(result, expected)


# ---- Memory and manners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_the_active_block_has_gradients_and_an_optimizer(dtype: torch.dtype) -> None:
    """And at most one optimiser lives at a time; with a 16-bit model it moves fp32 masters."""
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    shapes: list[list[torch.Size]] = []

    def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        gc.collect()
        assert all(earlier() is None for earlier in made)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in params)
        shapes.append([p.shape for p in params])
        adam = torch.optim.AdamW(params, lr=1e-3)
        made.append(weakref.ref(adam))
        return adam

    def watched(model: nn.Module, batch: Any) -> Tensor:
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert [p.shape for p in trainable] == shapes[-1]
        assert all(p.grad is None for p in model.parameters())
        return squared_error(model, batch)

    model = mlp(dtype)
    model[0].bias.requires_grad_(False)  # not in the plan, and to be left so
    before = [p.requires_grad for p in model.parameters()]

    def make_model() -> nn.Module:
        copy = mlp(dtype)
        copy[0].bias.requires_grad_(False)
        return copy

    result = run_federation(
        make_model, regression(dtype), watched, optimizer, plan_blocks=THREE, clients=1, rounds=7, local_steps=2
    )
    layers = [[p.shape for p in mlp()[i].parameters()] for i in (0, 2, 4)]
    layers[0] = layers[0][:1]
    assert shapes == [layers[t % 3] for t in range(7)]
    client = result.clients[0].model
    assert [p.requires_grad for p in client.parameters()] == before
    assert all(p.grad is None for p in client.parameters())


def test_a_client_that_leaves_in_the_middle_gets_its_model_back_trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parablock_rt.server.progress._NOBODY_LEFT_S", 0.0)
    flags: list[list[bool]] = []

    def leave(run: Run, step: int) -> None:
        if step == 3:
            flags.append([p.requires_grad for p in run.model.parameters()])
            run.close()
            flags.append([p.requires_grad for p in run.model.parameters()])
            raise Leave

    with pytest.raises(Exception, match="no client is left"):
        Case(clients=1, settings={"deadline": 300.0}).run(before_step=leave)
    assert flags == [[False, False, True, True, False, False], [True] * 6]


@pytest.mark.parametrize(("blocks", "staleness"), [(THREE, 0), (THREE, 1), (ONE, 1), (THREE, 2)])
def test_a_round_that_goes_nan_spoils_no_later_round_of_that_client(blocks: list[list[str]], staleness: int) -> None:
    spoiled = 2

    def spoil(run: Run, step: int) -> None:
        if run.client == 1 and run._round is not None and run._round.index == spoiled:
            with torch.no_grad():
                run.block_parameters()[0].view(-1)[0] = float("nan")

    case = Case(blocks, clients=2, settings={"staleness": staleness, "format": "int8", "rounds": 8})
    result = case.run(before_step=spoil)
    assert [closed.round for closed in result.outcome.rounds if closed.bad_groups > 0] == [spoiled]
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())


@pytest.mark.parametrize("budget", [700, 1000, 1500, 2000])
def test_a_client_s_uploads_are_let_in_in_order_also_when_a_later_block_is_smaller(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Blocks of about 400, 600 and 200 bytes: the last one fits where the one before it does not."""
    posted: dict[int, list[int]] = {0: [], 1: [], 2: []}
    original = Intake._post

    def post(self: Intake, member: Member, index: int) -> None:
        posted[member.seat].append(index)
        original(self, member, index)

    monkeypatch.setattr(Intake, "_post", post)
    case = Case(THREE, clients=3, settings={"staleness": 2, "rounds": 9, "local_steps": 1})
    result = case.run(upload_budget=budget)
    assert posted == {seat: list(range(9)) for seat in range(3)}
    assert set(result.outcome.client_digests.values()) == {result.outcome.digest}


@pytest.mark.parametrize("blocks", [ONE, THREE], ids=["1", "3"])
def test_a_full_upload_budget_lets_in_one_ready_upload_after_the_other(
    monkeypatch: pytest.MonkeyPatch, blocks: list[list[str]]
) -> None:
    """There is no room for any upload. Client 0 is held in round 2 until it has closed, so that what it might hold
    must not keep client 1 out."""
    held = 2
    closed = threading.Event()
    most: list[int] = []
    original = Intake.let_in

    def without_room(self: Intake, oldest: int) -> None:
        self.budget = 0
        original(self, oldest)
        most.append(sum(len(member.posted) for member in self._roster.members))

    monkeypatch.setattr(Intake, "let_in", without_room)

    def hold(run: Run, step: int) -> None:
        if run.client == 0 and run._round is not None and run._round.index == held:
            assert closed.wait(WAIT_S)

    result = Case(blocks, clients=2, settings={"staleness": 1, "local_steps": 1, "rounds": 6}).run(
        before_step=hold,
        on_round=lambda report: closed.set() if report.round == held else None,
        prepare=lambda server: do_not_wait_for(server, lambda round: {0} if round == held else ()),
        quorum=1,
    )
    assert closed.is_set()
    assert max(most) == 1
    assert len(result.outcome.rounds) == 6
    assert set(result.outcome.client_digests.values()) == {result.outcome.digest}


def test_a_client_that_leaves_more_aggregates_lying_than_the_budget_is_dismissed_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parablock_rt.server.eviction.UPDATE_BUDGET", 0)
    held, ended = threading.Event(), threading.Event()

    def hold(run: Run, step: int) -> None:
        if run.client == 0 and run._round is not None and run._round.index == 1:
            held.set()
            assert ended.wait(WAIT_S)

    def look(report: ClosedRound) -> None:
        if report.round == 7:
            ended.set()

    result = Case(THREE, clients=2, settings={"staleness": 0, "local_steps": 1, "rounds": 8}).run(
        before_step=hold,
        on_round=look,
        prepare=lambda server: do_not_wait_for(server, lambda round: {0} if held.is_set() else ()),
        check=False,
        quorum=1,
    )
    assert ended.is_set()
    assert len(result.outcome.rounds) == 8
    assert [reason for reason in result.outcome.left if "rounds behind" in reason] == [
        "client 0: this client fell 3 rounds behind; join again for a snapshot"
    ]
