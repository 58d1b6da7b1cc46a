"""What one client, or one that is none, can cost the server and the others: each was once without a bound.

The clients here say what they like; the honest ones are real.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import do_not_wait_for
from leftovers import settles
from processes import WAIT_S, Process, client, make_model, start_server, starter
from test_bad_input import BLOCK, RawClient, announcement, answer, good_body
from test_replay import Returning

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.blocks.plan import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import CheckpointError
from parablock_rt.schedule import Schedule
from parablock_rt.server import journal
from parablock_rt.server.catch_up import CatchUp
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Identity, UploadSlot
from parablock_rt.server.progress import Progress
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import new_run
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import BufferPool, body_layout, inspector

Start = Callable[..., Process]
WIDE = 256
WIDE_NUMEL = WIDE * WIDE + WIDE


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


def seated(clients: list[RawClient], width: int = 64, **changes: Any) -> None:
    """Has all of them take a seat and say that they hold the server's weights, or what `changes` say."""
    welcomes = [each.take_seat() for each in clients]
    model = make_model(width=width)
    plan = pb.BlockPlan.from_spec(model, welcomes[0].plan)
    here = clients[0].ready(welcomes[0]).fingerprints if width == 64 else [1] * len(plan.blocks)
    truth = {"plan_digest": plan.digest, "frozen": plan.frozen_fingerprint(model), "fingerprints": here}
    for each in clients:
        each.say(protocol.Ready(**truth | changes))


# ---- Time


def test_a_round_that_ran_to_its_deadline_does_not_make_the_next_deadline_longer() -> None:
    progress = Progress(RunConfig(rounds=9, clients=2))
    progress.start()
    progress.close_oldest(5.0, complete=True)
    assert progress.deadline.seconds == 50.0
    for _ in range(3):
        progress.close_oldest(50.0, complete=False)
    assert (progress.deadline.seconds, progress.oldest) == (50.0, 4)


def test_a_client_that_missed_a_deadline_is_waited_for_again_only_when_it_has_trained(start: Start) -> None:
    """It stays connected all the time. Only round 0 has a deadline that passes: round 1 would hang if it waited."""
    with start_server(quorum=1, deadline=300.0) as running, RawClient(running.address) as silent:
        welcome = silent.take_seat()
        seat = welcome.client
        do_not_wait_for(running, lambda index: {seat} if index == 0 or running.outcome.left else ())
        honest = start(client, running.address, data=0, stop_before=[2])
        silent.say(silent.ready(welcome))
        silent.hear(protocol.Begin)
        honest.expect("stopped")
        assert settles(lambda: len(running.outcome.rounds) == 2), "the end of round 1 without the silent client"
        attendance, rounds = running._coordinator._participants.attendance, running._coordinator._run.rounds
        assert seat not in attendance.expected(rounds[2])
        silent.say(announcement(0))  # too late, but it has trained
        assert settles(lambda: seat in attendance.expected(rounds[2])), "the silent client's return"
        silent.say(protocol.Goodbye(digest="", reason="enough", compute_s=0.0, exposed_s=0.0))
        honest.let_go()
        assert honest.expect("done")["digest"] == running.wait(WAIT_S).digest
    assert [closed.contributions for closed in running.outcome.rounds] == [1] * 6


def test_a_client_that_never_says_what_it_holds_loses_its_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parablock_rt.server.eviction._LEAST_READY_S", 0.0)
    with start_server(clients=1, join_timeout=0.2) as running:
        with RawClient(running.address) as mute:
            mute.take_seat()
            monkeypatch.setattr(CatchUp, "start_if_complete", lambda self, **at_deadline: None)
            assert "to say what its model holds" in mute.hear(protocol.Failure).reason
        with RawClient(running.address) as other:
            other.take_seat()


def test_a_client_that_comes_back_and_never_says_where_it_stands_may_come_back_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parablock_rt.server.roster.HANDSHAKE_S", 0.5)
    with start_server(clients=1) as running, RawClient(running.address) as holder:
        welcome = holder.begin()
        with Returning(running.address) as mute:
            mute.claim(welcome.client, welcome.secret)
            mute.hear(protocol.WelcomeBack)
            mute.hear_closed()
        monkeypatch.setattr("parablock_rt.server.roster.HANDSHAKE_S", 20.0)
        with Returning(running.address) as better:
            better.claim(welcome.client, welcome.secret)
            better.hear(protocol.WelcomeBack)
            better.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[]))
            better.hear(protocol.RejoinAnswer)
        assert running.outcome.left == []


def test_a_server_that_was_stopped_takes_nobody_for_silent() -> None:
    """Nor does the time count in which nobody waited for room."""
    posted = UploadSlot(0, 0, _C.Buffer(1), 1, inspector("int8", body_layout("int8", 128, 128)))
    holder = SimpleNamespace(link=1, announced={0: None}, posted={0: posted})
    waits = SimpleNamespace(link=2, announced={0: None}, posted={})
    roster: Any = SimpleNamespace(here=[holder, waits])
    transport: Any = SimpleNamespace(native=SimpleNamespace(stats=lambda link: SimpleNamespace(moved_bytes=7)))
    config = RunConfig(rounds=1, clients=2)
    identity = Identity(1, None, config, PlanSpec(()), "", "")
    intake = Intake(transport, BufferPool(), roster, new_run(identity, [128], trace=False), budget=2**30)
    assert [intake.silent(0, now, 10.0) for now in (100.0, 105.0)] == [[], []]
    assert intake.silent(0, 140.0, 10.0) == []
    assert [intake.silent(0, now, 10.0) for now in (145.0, 149.0)] == [[], []]
    assert intake.silent(0, 151.0, 10.0) == [holder]


# ---- The end


def test_a_client_whose_farewell_is_lost_with_its_connection_comes_back_for_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other client is busy still, so the server is there, and knows of the goodbye already."""
    cut: list[int] = []
    say = Roster.say

    def lose_the_first(self: Roster, member: Any, message: protocol.Message) -> None:
        if isinstance(message, protocol.Farewell) and not cut:
            cut.append(member.seat)
            self._transport.native.close_link(member.link, "cut by the test", 0.0)
        else:
            say(self, member, message)

    monkeypatch.setattr(Roster, "say", lose_the_first)
    with start_server() as running, RawClient(running.address) as busy:
        quick = start(client, running.address, data=0)
        busy.begin()
        for index in range(6):
            assert busy.upload(index, good_body(), announcement(index)).accepted
            busy.hear(protocol.Update)
        end = quick.expect("done")
        assert cut
        busy.say(protocol.Goodbye(digest="", reason="done", compute_s=0.0, exposed_s=0.0))
        assert running.wait(WAIT_S).digest == end["digest"]
    assert list(running.outcome.client_digests.values()) == [end["digest"]]


def test_clients_of_a_durable_server_that_is_stopped_in_good_order_wait_for_the_one_that_goes_on(
    start: Start, tmp_path: Path
) -> None:
    with start_server(durable=tmp_path / "state") as running:
        clients = [start(client, running.address, data=data, stop_before=[3]) for data in (0, 1)]
        for process in clients:
            process.expect("stopped")
        assert settles(lambda: len(running.outcome.rounds) >= 2), "the first rounds"
        running.close("the machine is restarted")
    for process in clients:
        process.let_go()
    with start_server(resume=tmp_path / "state") as running:
        ends = [process.expect("done") for process in clients]
        outcome = running.wait(WAIT_S)
    assert {end["digest"] for end in ends} == {outcome.digest}
    assert [end["reconnects"] for end in ends] == [1, 1]
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6


def test_a_client_that_had_not_begun_joins_the_server_that_goes_on_anew(start: Start, tmp_path: Path) -> None:
    with start_server(durable=tmp_path / "state") as running:
        early = start(client, running.address, data=0)
        assert settles(lambda: any(m.synced for m in running._coordinator._roster.members)), "the first client"
        running.close("the machine is restarted")
    with start_server(resume=tmp_path / "state") as running:
        late = start(client, running.address, data=1)
        ends = [process.expect("done") for process in (early, late)]
        assert {end["digest"] for end in ends} == {running.wait(WAIT_S).digest}


# ---- Memory


def test_a_client_in_an_endless_snapshot_is_dismissed_when_the_aggregates_it_lacks_weigh_more_than_the_model(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parablock_rt.server.eviction.UPDATE_BUDGET", 0)
    with start_server(quorum=1, rounds=40, deadline=300.0) as running:
        do_not_wait_for(running, lambda index: {0})
        with RawClient(running.address) as former:
            welcome = former.take_seat()
            honest = start(client, running.address, data=0, stop_before=[1])
            former.say(former.ready(welcome))
            former.hear(protocol.Begin)
            former.say(protocol.Goodbye(digest="", reason="makes room", compute_s=0.0, exposed_s=0.0))
            assert settles(lambda: bool(running.outcome.left)), "a vacant seat"
        honest.expect("stopped")
        with RawClient(running.address) as endless:
            seated([endless], fingerprints=[1] * 4)
            endless.hear(protocol.Snapshot)
            honest.let_go()
            reason = endless.hear(protocol.Failure).reason
            weight = running._coordinator._participants._downlink.snapshot_bytes
            rounds = weight // len(good_body()) + 1 + 3  # beyond the newest three
            assert rounds < 40
            found = re.match(r"(\d+) rounds have closed while this client took its snapshot", reason)
            assert found is not None, reason
            assert rounds <= int(found[1]) <= rounds + 2  # as many may close between two looks
        assert honest.expect("done")["digest"] == running.wait(WAIT_S).digest


def test_newcomers_who_lack_the_same_block_are_sent_one_copy_of_it() -> None:
    with start_server(clients=6, width=WIDE) as running, contextlib.ExitStack() as stack:
        newcomers = [stack.enter_context(RawClient(running.address)) for _ in range(5)]
        seated(newcomers, width=WIDE)
        for each in newcomers:
            each.hear(protocol.Snapshot)
        downlink = running._coordinator._participants._downlink
        assert downlink.buffers.allocated_bytes == downlink.snapshot_bytes // 4
        stack.close()
        assert settles(lambda: not downlink._copies), "copies that nobody is sent any more are let go"


def test_what_a_client_says_as_it_leaves_is_bounded_and_shown_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with start_server(clients=3) as running:
        with RawClient(running.address) as verbose:
            verbose.take_seat()
            verbose.say(protocol.Goodbye(digest="", reason="x" * 501, compute_s=0.0, exposed_s=0.0))
            assert "does not understand" in verbose.hear(protocol.Failure).reason
        with RawClient(running.address) as sly:
            sly.take_seat()
            sly.say(protocol.Goodbye(digest="", reason="bye\n\x1b[2Jall is well", compute_s=0.0, exposed_s=0.0))
            assert settles(lambda: len(running.outcome.left) == 2), "both departures"
    assert running.outcome.left[1].endswith("bye??[2Jall is well")
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_of_those_who_left_only_the_last_are_listed() -> None:
    past = journal.Past(
        journal.Begin(
            format=1,
            release="",
            run=1,
            config=RunConfig(rounds=1, clients=1),
            plan_digest="",
            frozen="",
            fingerprints=[],
        )
    )
    for number in range(150):
        past.take(journal.Seated(seat=0, secret=b""))
        past.take(journal.Vacated(seat=0, reason=f"time {number}"))
    assert past.left == [f"client 0: time {number}" for number in range(50, 150)]


# ---- Room


def test_an_upload_that_is_announced_and_never_sent_loses_its_room_to_one_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One client holds all the room there is. Nobody need wait for the deadline, which is far away."""
    monkeypatch.setattr("parablock_rt.server.eviction._SILENT_S", 0.3)
    settings = {"clients": 2, "rounds": 1, "quorum": 1, "deadline": 300.0, "upload_budget": len(good_body())}
    with start_server(**settings) as running, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.address)) for _ in range(2)]
        seated(clients)
        for each in clients:
            each.hear(protocol.Begin)
        members = sorted(running._coordinator._roster.members, key=lambda member: member.seat)
        assert settles(lambda: any(0 in member.posted for member in members))
        seat = next(member.seat for member in members if 0 in member.posted)
        holder, other = clients[seat], clients[1 - seat]
        holder.say(announcement(0))
        assert settles(lambda: 0 in members[seat].announced)
        other.say(announcement(0))
        other.send_body(0, good_body())
        assert "nothing of it came" in holder.hear(protocol.Verdict).reason
        assert other.hear(protocol.Verdict).accepted
        assert other.hear(protocol.Update).contributions == 1


def test_an_upload_for_a_round_in_which_the_client_does_not_train_ends_its_link() -> None:
    """It would be waited for without end: no buffer is ever posted for it."""
    with start_server(clients=2, fraction=0.5, rounds=8) as running, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.address)) for _ in range(2)]
        welcomes = [each.take_seat() for each in clients]
        for each, welcome in zip(clients, welcomes, strict=True):
            each.say(each.ready(welcome))
        for each in clients:
            each.hear(protocol.Begin)
        trains = Schedule(running.config, [BLOCK] * 4).cohort(0)
        (idle,) = [i for i, welcome in enumerate(welcomes) if welcome.client not in trains]
        clients[idle].say(announcement(0))
        seat = welcomes[idle].client
        assert answer(clients[idle]).reason == f"client {seat} does not train in round 0"


def test_a_round_that_closes_without_those_who_wait_for_room_takes_no_memory_for_them() -> None:
    """Two of twelve have room; the others are told that their round is closed, and need none for that."""
    room = 2 * len(good_body())
    settings = {"clients": 12, "rounds": 4, "quorum": 1, "deadline": 300.0, "upload_budget": room, "staleness": 0}
    with start_server(**settings) as running, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.address)) for _ in range(12)]
        seated(clients)
        for each in clients:
            each.hear(protocol.Begin)
        do_not_wait_for(running, lambda index: range(1, 12))
        pool = running._coordinator._participants._downlink.buffers
        for index in range(4):
            assert clients[0].upload(index, good_body(), announcement(index)).accepted
            assert clients[0].hear(protocol.Update).contributions == 1
        assert pool.allocated_bytes <= 8 * len(good_body()), f"{pool.allocated_bytes / len(good_body()):.1f} uploads"


# ---- Strangers


def test_what_a_dismissed_stranger_had_sent_before_is_neither_read_nor_logged(caplog: pytest.LogCaptureFixture) -> None:
    def frame(payload: bytes) -> bytes:
        header = struct.pack(
            "<IBBBBQIIQII", 0x4B4C4250, _C.PROTOCOL_VERSION, 1, 0, 0, 0, 0, 0, 0, len(payload), _C.crc32c(payload)
        )
        return header + struct.pack("<I", _C.crc32c(header)) + payload

    with start_server(token="t" * 32) as running:
        host, port = running.address.split(":")
        with socket.create_connection((host, int(port))) as stranger, contextlib.suppress(OSError):
            stranger.sendall(frame(b"\x01") * 2000)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    about = [record.getMessage() for record in caplog.records if "does not understand" in record.getMessage()]
    assert len(about) == 1


# ---- What is written down


BEGIN = journal.Begin(
    format=1, release="", run=1, config=RunConfig(rounds=1, clients=1), plan_digest="", frozen="", fingerprints=[]
)


@pytest.mark.parametrize("left", ["nothing", "three bytes", "half of it", "all but a byte", "zeros"])
def test_a_folder_whose_journal_was_never_begun_takes_a_new_run(left: str, tmp_path: Path) -> None:
    """As a server leaves it that dies, or whose disk is full, before its first record is whole."""
    Checkpoint.create(tmp_path / "whole", BEGIN).close()
    whole = (tmp_path / "whole" / "journal").read_bytes()
    kept = {"nothing": 0, "three bytes": 3, "half of it": len(whole) // 2, "all but a byte": len(whole) - 1}
    (tmp_path / "journal").write_bytes(bytes(4096) if left == "zeros" else whole[: kept[left]])
    begin = BEGIN
    Checkpoint.create(tmp_path, begin).close()
    with pytest.raises(CheckpointError, match="holds the state of a run already"):
        Checkpoint.create(tmp_path, begin)
    state, past = Checkpoint.open(tmp_path)
    state.close()
    assert past.begin == begin
