"""Who is there, away, on the way back, given up or replaced: what the server waits for, and what it tells them.

The clients here say what they like; what they would be waited for in time is put right before the test begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from deadlines import _WithoutSeats, do_not_wait_for
from leftovers import settles
from processes import WAIT_S, start_server
from test_bad_input import RawClient, announcement, good_body
from test_replay import Returning

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.errors import RoundError
from parablock_rt.schedule import cohort_of
from parablock_rt.server.progress import Progress
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import raw_layout

LEAVES = protocol.Goodbye(digest="", reason="enough", compute_s=0.0, exposed_s=0.0)
Clients: TypeAlias = dict[int, tuple[RawClient, protocol.Welcome]]


def loop_turns(running: pb.Server) -> None:
    """Returns when the server has looked at its clock after this call."""
    coordinator = running._coordinator
    for _ in range(2):
        before = coordinator._clock_at
        assert settles(lambda before=before: coordinator._clock_at > before or not running.running)


@contextlib.contextmanager
def begun(
    running: pb.Server, count: int, given_up: Callable[[int], Collection[int]] | None = None
) -> Iterator[Clients]:
    """So many clients in their first round, by seat. `given_up` of a round: as for `do_not_wait_for`."""
    with contextlib.ExitStack() as stack:
        clients = {}
        for _ in range(count):
            each = stack.enter_context(RawClient(running.address))
            welcome = each.take_seat()
            clients[welcome.client] = each, welcome
        if given_up is not None:
            do_not_wait_for(running, given_up)
        for each, welcome in clients.values():
            each.say(each.ready(welcome))
        for each, _ in clients.values():
            each.hear(protocol.Begin)
        yield clients


def come_back(client: Returning, welcome: protocol.Welcome, **stands: Any) -> None:
    """Has a client take its seat up again and say where it stands."""
    client.claim(welcome.client, welcome.secret)
    client.hear(protocol.WelcomeBack)
    client.say(protocol.Rejoin(**{"applied": -1, "handed_over": -1, "held": [], "undecided": []} | stands))


def deliver(client: RawClient, index: int) -> None:
    """Announces and sends an upload."""
    client.say(announcement(index))
    client.send_body(index, good_body())


def close_alone(client: RawClient, rounds: range) -> None:
    """Has a client deliver to rounds that wait for nobody else, and apply them."""
    for index in rounds:
        deliver(client, index)
        update = client.hear(protocol.Update)
        assert update.round == index
        client.say(protocol.Applied(round=index, fingerprint=update.fingerprint))


def verdict_on(client: RawClient, index: int) -> protocol.Verdict:
    """What a client hears about its upload for a round."""
    while (verdict := client.hear(protocol.Verdict)).round != index:
        pass
    return verdict


# ---- On the way back


def test_a_run_does_not_end_while_its_only_client_is_on_its_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for longer than a server waits with nobody to come; between its proof and its Rejoin it is neither
    here nor away."""
    monkeypatch.setattr("parablock_rt.server.progress._NOBODY_LEFT_S", 0.0)
    with start_server(clients=1) as running:
        with RawClient(running.address) as holder:
            welcome = holder.begin()
        with Returning(running.address) as returning:
            returning.claim(welcome.client, welcome.secret)
            returning.hear(protocol.WelcomeBack)
            loop_turns(running)
            assert running.running
            returning.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[]))
            assert returning.hear(protocol.RejoinAnswer).updates_from == 0


@pytest.mark.parametrize("deadline", [60.0, None], ids=["fixed", "adaptive"])
def test_a_slow_close_neither_prolongs_the_next_round_nor_makes_it_begin_later(
    monkeypatch: pytest.MonkeyPatch, deadline: float | None
) -> None:
    """The close takes the seconds from 3 to 21, in a turn of the loop that begins at 2."""
    clock = [0.0]
    monkeypatch.setattr("parablock_rt.server.progress.time.monotonic", lambda: clock[0])
    progress = Progress(pb.RunConfig(rounds=9, clients=2, deadline=deadline))
    progress.start()
    clock[0] = 2.0
    progress.turn(0.05)
    clock[0] = 21.0
    progress.close_oldest(3.0, complete=True)
    clock[0] = 22.0
    progress.turn(0.05)
    assert (progress.oldest_since, progress.open_s) == (22.0, 0.0)
    clock[0] = 40.0  # the process was stopped
    progress.turn(0.05)
    assert progress.open_s == 0.0
    clock[0] = 41.0
    progress.turn(0.05)
    assert progress.open_s == 1.0


def test_time_in_which_the_server_was_stopped_does_not_count_as_time_without_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("parablock_rt.server.progress.time.monotonic", lambda: clock[0])
    progress = Progress(pb.RunConfig(rounds=9, clients=2))
    progress.start()
    for clock[0] in (1.0, 1000.0):
        progress.turn(0.05)
        assert not progress.deserted(anybody=False, may_return=False)
    clock[0] = 1031.0
    assert progress.deserted(anybody=False, may_return=False)


# ---- Verdicts


def test_an_upload_that_counts_is_not_called_refused_because_many_rounds_closed_before_its_verdict_was_heard() -> None:
    """The client's connection is dead and nobody knows it: rounds close without it, and each time it is told so."""
    settings = {"clients": 2, "quorum": 1, "rounds": 12, "staleness": 0}
    with (
        start_server(**settings) as running,
        begun(running, 2, lambda index: {0} if index > 0 else ()) as clients,
        Returning(running.address) as returning,
    ):
        (deaf, welcome), (other, _) = clients[0], clients[1]
        deliver(deaf, 0)
        for index in range(10):
            deliver(other, index)
            assert other.hear(protocol.Update).round == index
        come_back(returning, welcome, handed_over=0, undecided=[0])
        verdict = returning.hear(protocol.Verdict)
        assert (verdict.round, verdict.accepted, verdict.reason) == (0, True, "")
    assert running.outcome.rounds[0].contributions == 2


def test_of_a_round_that_was_closed_without_it_a_client_hears_that_it_was_late() -> None:
    with (
        start_server(clients=2, quorum=1, staleness=0) as running,
        begun(running, 2, lambda index: {0}) as clients,
        Returning(running.address) as returning,
    ):
        deliver(clients[1][0], 0)
        assert clients[1][0].hear(protocol.Update).contributions == 1
        assert "closed at its deadline" in clients[0][0].hear(protocol.Verdict).reason
        come_back(returning, clients[0][1], handed_over=0, undecided=[0])
        assert "closed at its deadline" in returning.hear(protocol.Verdict).reason


# ---- Quorum


class PatientDeadline(_WithoutSeats):
    """Passes like that of `do_not_wait_for`, but a round without a quorum waits for those whose connection broke."""

    @property
    def without_quorum(self) -> float:
        return 300.0


@pytest.mark.parametrize("away", [False, True], ids=["silent", "away"])
def test_a_round_below_its_quorum_waits_for_clients_that_were_given_up(away: bool) -> None:
    """Each of two clients has missed a round, and together they are the cohort of the third: only they can deliver.
    One of them does so in the end, if need be on a new connection after the deadline."""
    seed = next(seed for seed in range(1000) if third_is_of_the_first_two([cohort_of(seed, t, 4, 2) for t in range(3)]))
    cohorts = [cohort_of(seed, index, 4, 2) for index in range(3)]
    gone = cohorts[2]
    settings = {"clients": 4, "rounds": 3, "fraction": 0.5, "staleness": 0, "seed": seed}
    with (
        start_server(**settings) as running,
        begun(running, 4, lambda index: gone if away or index < 2 else ()) as clients,
        Returning(running.address) as returning,
    ):
        if away:
            running._coordinator._progress.deadline = PatientDeadline(running, lambda index: gone)
            for seat in gone:
                clients[seat][0].__exit__()
        for index in range(2):
            (seat,) = cohorts[index] - gone
            deliver(clients[seat][0], index)
            assert clients[seat][0].hear(protocol.Update).contributions == 1
        loop_turns(running)
        assert running.running
        last, welcome = clients[min(gone)]
        if away:
            last = returning
            come_back(returning, welcome)
            returning.hear(protocol.RejoinAnswer)
        deliver(last, 2)
        assert verdict_on(last, 2).accepted
        assert settles(lambda: len(running.outcome.rounds) == 3)
        assert running._coordinator._progress.deadline._seen == []


@pytest.mark.parametrize("stopped", [False, True])
def test_a_client_that_comes_back_after_the_deadline_has_time_to_deliver_what_the_quorum_needs(stopped: bool) -> None:
    """Also if the server's process was stopped meanwhile."""
    gone: set[int] = set()
    with start_server(clients=1) as running:
        running._coordinator._progress.deadline = PatientDeadline(running, lambda index: gone)
        with begun(running, 1) as clients, Returning(running.address) as returning:
            holder, welcome = clients[0]
            holder.__exit__()
            assert settles(lambda: bool(running._coordinator._participants.attendance.lost))
            gone.add(0)
            come_back(returning, welcome)
            returning.hear(protocol.RejoinAnswer)
            if stopped:
                seem_stopped(running)
            loop_turns(running)
            deliver(returning, 0)
            assert returning.hear(protocol.Update).contributions == 1


def seem_stopped(running: pb.Server) -> None:
    """Returns when the server has found that its last turn took an hour."""
    progress = running._coordinator._progress
    before = progress.oldest_since

    def has_noticed() -> bool:
        progress._turn_at -= 3600.0  # again, because the server's thread may have written at the same time
        return progress.oldest_since > before

    assert settles(has_noticed)


def third_is_of_the_first_two(cohorts: list[frozenset[int]]) -> bool:
    """Whether the third cohort has one of the first and one of the second, which have nobody in common."""
    first, second, third = cohorts
    return not first & second and len(first & third) == len(second & third) == 1


def test_a_round_whose_whole_cohort_was_refused_ends_the_run_at_once() -> None:
    with start_server(clients=1) as running, begun(running, 1) as clients:
        only = clients[0][0]
        assert not only.upload(0, good_body(), announcement(0, weight=-1.0)).accepted
        with pytest.raises(RoundError, match="round 0 cannot be closed: 0 of 1 clients delivered"):
            running.wait(WAIT_S)


# ---- After a restart


def test_a_resumed_run_does_not_ask_for_uploads_that_went_with_the_earlier_server(tmp_path: Path) -> None:
    """A client delivered a round and left, and a newcomer took its seat from the next round on. Then the server ended:
    the upload is gone, and so is the only one who had it."""
    settings = {"clients": 2, "quorum": 2, "staleness": 1, "durable": tmp_path / "state"}
    with start_server(**settings) as running, begun(running, 2) as clients, RawClient(running.address) as newcomer:
        deliver(clients[0][0], 0)
        assert settles(lambda: 0 in running._coordinator._run.rounds.uploads_of(0))
        clients[0][0].say(LEAVES)
        assert settles(lambda: len(running.outcome.left) == 1)
        welcome = newcomer.take_seat()
        newcomer.say(newcomer.ready(welcome))
        assert newcomer.hear(protocol.Begin).first_round == 1
        running.close("the machine is restarted")
    with (
        start_server(resume=tmp_path / "state") as running,
        Returning(running.address) as first,
        Returning(running.address) as second,
    ):
        for each, seat in ((first, welcome), (second, clients[1][1])):
            come_back(each, seat)
            each.hear(protocol.RejoinAnswer)
        deliver(second, 0)
        assert second.hear(protocol.Update).contributions == 1
        for each in (first, second):
            deliver(each, 1)
        assert second.hear(protocol.Update).contributions == 2
        attendance, rounds = running._coordinator._participants.attendance, running._coordinator._run.rounds
        assert attendance.quorum(rounds[2]) == 2


def test_a_resumed_run_knows_who_was_given_up_and_how_long_its_rounds_took(tmp_path: Path) -> None:
    settings = {"clients": 2, "quorum": 1, "staleness": 0, "durable": tmp_path / "state"}
    with (
        start_server(**settings) as running,
        begun(running, 2, lambda index: {0} if index == 0 else ()) as clients,
    ):
        other, welcome = clients[1]
        for index in range(3):
            deliver(other, index)
            assert other.hear(protocol.Update).round == index
        took = [closed.open_s for closed in running.outcome.rounds]
    with start_server(resume=tmp_path / "state") as running, Returning(running.address) as returning:
        deadline = running._coordinator._progress.deadline
        assert deadline._seen == took[1:]  # the first one ran to its deadline
        come_back(returning, welcome, applied=2, handed_over=2)
        returning.hear(protocol.RejoinAnswer)
        attendance, rounds = running._coordinator._participants.attendance, running._coordinator._run.rounds
        assert attendance.expected(rounds[3]) == {1}
        deliver(returning, 3)
        assert returning.hear(protocol.Update).round == 3


def test_a_vacant_seat_that_the_quorum_needs_is_waited_for_after_a_restart(tmp_path: Path) -> None:
    settings = {"clients": 2, "quorum": 2, "staleness": 0, "durable": tmp_path / "state"}
    with start_server(**settings) as running, begun(running, 2) as clients:
        clients[0][0].say(LEAVES)
        assert settles(lambda: len(running.outcome.left) == 1)
        running.close("the machine is restarted")
    with (
        start_server(resume=tmp_path / "state") as running,
        Returning(running.address) as returning,
        RawClient(running.address) as newcomer,
    ):
        come_back(returning, clients[1][1])
        returning.hear(protocol.RejoinAnswer)
        deliver(returning, 0)
        assert settles(lambda: 1 in running._coordinator._run.rounds.uploads_of(0) or not running.running)
        loop_turns(running)
        newcomer.begin()
        deliver(newcomer, 0)
        assert returning.hear(protocol.Update).contributions == 2


def test_a_resumed_run_that_ends_without_a_quorum_does_not_advise_what_a_resume_refuses(tmp_path: Path) -> None:
    with start_server(clients=1, durable=tmp_path / "state") as running, begun(running, 1) as clients:
        clients[0][0].say(announcement(0, weight=-1.0))
        clients[0][0].send_body(0, good_body())
        with pytest.raises(RoundError) as failure:
            running.wait(WAIT_S)
    assert "resume the run and restart them" in str(failure.value)
    assert "--quorum" not in str(failure.value)


# ---- Catching up


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may leave more lying than the newest rounds, and no round beyond them; while catching up, a snapshot."""
    monkeypatch.setattr("parablock_rt.server.eviction.UPDATE_BUDGET", 0)
    monkeypatch.setattr("parablock_rt.server.eviction.MAX_LAG", 3)


@pytest.mark.usefixtures("no_room")
def test_a_newcomer_is_not_dismissed_as_it_begins_for_what_gathered_while_it_took_its_snapshot() -> None:
    settings = {"clients": 2, "quorum": 1, "staleness": 0, "rounds": 20}
    with (
        start_server(**settings) as running,
        begun(running, 2, lambda index: {0}) as clients,
        RawClient(running.address) as newcomer,
    ):
        other, _ = clients[1]
        clients[0][0].say(LEAVES)
        assert settles(lambda: len(running.outcome.left) == 1)
        welcome = newcomer.take_seat()
        lacks_one = newcomer.ready(welcome)
        newcomer.say(msgspec.structs.replace(lacks_one, fingerprints=[1, *lacks_one.fingerprints[1:]]))
        newcomer.hear(protocol.Snapshot)
        close_alone(other, range(8))
        block_bytes = running._coordinator._participants._downlink.snapshot_bytes // 4
        layout = raw_layout(block_bytes, welcome.config.chunk)
        newcomer._transport.native.receive(newcomer._link, Kind.SNAPSHOT, 0, 0, _C.Buffer(block_bytes), layout)
        assert newcomer.hear(protocol.Begin).first_round == 9
        loop_turns(running)
        assert running._coordinator._roster.holder(0) is not None


@pytest.mark.usefixtures("no_room")
def test_a_client_is_not_dismissed_while_it_is_sent_what_it_missed_nor_for_what_gathered_meanwhile() -> None:
    settings = {"clients": 2, "quorum": 1, "staleness": 0, "rounds": 40}
    with (
        start_server(**settings) as running,
        begun(running, 2, lambda index: {0}) as clients,
        Returning(running.address) as returning,
    ):
        other, _ = clients[1]
        clients[0][0].__exit__()
        assert settles(lambda: bool(running._coordinator._participants.attendance.lost))
        close_alone(other, range(8))
        come_back(returning, clients[0][1])
        assert returning.hear(protocol.RejoinAnswer).updates_from == 8
        close_alone(other, range(8, 16))
        member = running._coordinator._roster.holder(0)
        assert member is not None
        assert member.catching_up
        fingerprint = running.outcome.rounds[8].fingerprint
        returning.say(protocol.Applied(round=8, fingerprint=fingerprint))
        assert settles(lambda: not member.catching_up)
        close_alone(other, range(16, 17))
        loop_turns(running)
        assert running._coordinator._roster.holder(0) is member
        close_alone(other, range(17, 20))  # from here on it is slow
        assert "rounds behind" in returning.hear(protocol.Failure).reason


# ---- Changing hands, and the end


def test_who_leaves_before_it_begins_leaves_neither_a_connection_nor_a_trace_of_itself() -> None:
    with start_server(clients=2) as running:
        for number in range(3):
            with RawClient(running.address) as restless:
                restless.take_seat()
                restless.say(LEAVES)
                restless.hear_closed()
                assert len(running.outcome.left) == number + 1
        assert running.timeline.seats == {}


@pytest.mark.parametrize("trace", [True, False])
def test_whose_link_it_was_is_known_as_long_as_a_trace_may_ask(trace: bool) -> None:
    with start_server(clients=1, trace=trace) as running, begun(running, 1) as clients:
        client, _ = clients[0]
        deliver(client, 0)
        client.hear(protocol.Update)
        assert list(running.timeline.seats.values()) == [0]
        client.say(LEAVES)
        client.hear_closed()
        assert settles(lambda: bool(running.timeline.seats) == trace)


def test_a_newcomer_begins_behind_all_that_the_former_holder_of_its_seat_has_delivered() -> None:
    """What that delivered to the oldest round was refused, but not what it delivered to the next one."""
    settings = {"clients": 2, "quorum": 1, "staleness": 1, "deadline": 300.0}
    with start_server(**settings) as running, begun(running, 2) as clients, RawClient(running.address) as newcomer:
        leaver, _ = clients[0]
        assert not leaver.upload(0, good_body(), announcement(0, weight=-1.0)).accepted
        assert leaver.upload(1, good_body(), announcement(1)).accepted
        leaver.say(LEAVES)
        leaver.hear_closed()
        welcome = newcomer.take_seat()
        newcomer.say(newcomer.ready(welcome))
        assert (welcome.client, newcomer.hear(protocol.Begin).first_round) == (0, 2)


def test_a_newcomer_does_not_inherit_that_an_upload_of_its_seat_was_refused() -> None:
    with (
        start_server(clients=2, quorum=2, staleness=0, deadline=300.0) as running,
        begun(running, 2) as clients,
        RawClient(running.address) as newcomer,
    ):
        leaver, other = clients[0][0], clients[1][0]
        assert not leaver.upload(0, good_body(), announcement(0, weight=-1.0)).accepted
        leaver.say(LEAVES)
        leaver.hear_closed()
        newcomer.begin()
        assert other.upload(0, good_body(), announcement(0)).accepted
        loop_turns(running)
        assert newcomer.upload(0, good_body(), announcement(0)).accepted
        assert other.hear(protocol.Update).contributions == 2


def test_at_the_end_a_client_that_was_given_up_and_is_on_its_way_back_is_waited_for() -> None:
    with (
        start_server(clients=2, quorum=1, staleness=0, rounds=1) as running,
        begun(running, 2, lambda index: {0}) as clients,
        Returning(running.address) as returning,
    ):
        (away, welcome), (other, _) = clients[0], clients[1]
        away.__exit__()
        returning.claim(welcome.client, welcome.secret)
        returning.hear(protocol.WelcomeBack)
        deliver(other, 0)
        assert other.hear(protocol.Update).round == 0
        other.say(LEAVES)
        other.hear_closed()
        loop_turns(running)
        assert running.running
        returning.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[]))
        assert returning.hear(protocol.RejoinAnswer).updates_from == 1
