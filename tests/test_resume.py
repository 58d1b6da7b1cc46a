"""Connections that break and servers that are killed: the run goes on and comes to the bits that it would have had.

Real processes, sockets and signals; each test asserts that its fault has fired.
"""

from __future__ import annotations

import functools
import json
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_cases import join, serve
from deadlines import do_not_wait_for_the_gone
from deaths import PLACES
from processes import (
    WAIT_S,
    Process,
    client,
    command,
    loss_fn,
    make_batches,
    make_model,
    server,
    sgd,
    start_server,
    starter,
)
from relay import relay
from test_device_rounds import on_a_late_gpu  # noqa: F401 - a fixture

import parablock_rt as pb
from parablock_rt import codec
from parablock_rt.client.server_link import ServerLink
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.staging.stager import Landing

Start = Callable[..., Process]

# A block has 66 kB in int8 and 65 chunks, so that most places are in the middle of one.
WIDE: dict[str, Any] = {"width": 256, "chunk": 1024}
MIDDLE = 40_000
BODY = codec.body_bytes(256 * 256 + 256, "int8")


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


@functools.cache
def undisturbed_digest(**settings: Any) -> str:
    """What two clients, on data 0 and 1, come to when nothing happens."""
    with starter() as start, start_server(**settings) as running:
        width = settings.get("width", 64)
        clients = [start(client, running.address, data=data, width=width) for data in (0, 1)]
        digests = [process.expect("done")["digest"] for process in clients]
        assert digests == [running.wait(WAIT_S).digest] * 2
    return digests[0]


def through(start: Start, address: str) -> tuple[Process, str]:
    """A relay to a server, and the address to go through it."""
    bad = start(relay, address)
    return bad, bad.expect("address")


def arm(bad: Process, *harm: Any) -> None:
    """Has a relay do a harm, which can only be where it is to be when the bytes are still to come."""
    bad.tell(harm)
    bad.expect("armed")


# ---- Connections that break


@pytest.mark.parametrize("harm", ["cut", "reset", "hold"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_transfer_that_breaks_off_goes_on_where_it_was(start: Start, way: str, harm: str) -> None:
    """`hold` is a network that swallows everything: both sides notice by the silence alone."""
    idle = {"idle_timeout": 5.0} if harm == "hold" else {}
    with start_server(**WIDE, **idle) as running:
        bad, address = through(start, running.address)
        arm(bad, way, MIDDLE, harm)
        victim = start(client, address, data=0, width=256, **idle)
        other = start(client, running.address, data=1, width=256)
        assert bad.expect("fired") == harm
        if harm == "hold":
            running_lost(running, 1)
        bad.tell(("reroute",))
        ends = [process.expect("done") for process in (victim, other)]
        outcome = running.wait(WAIT_S)
        bad.tell(("count",))
        passed = bad.expect("passed")
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**WIDE)
    assert ends[0]["reconnects"] == outcome.reconnects == 1
    assert ends[0]["resumed_bytes"] > MIDDLE / 2
    assert passed[way] < 6 * BODY + 3 * MIDDLE / 4  # with all headers and messages: nothing has travelled twice
    assert outcome.left == []
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6


def running_lost(running: Any, count: int) -> None:
    """Waits until the server has noticed that so many connections are broken."""
    deadline = time.monotonic() + WAIT_S
    while len(running._coordinator._participants.attendance.lost) < count:
        assert time.monotonic() < deadline, "the server noticed nothing"
        running._ended.wait(0.02)


def test_one_flipped_bit_costs_a_chunk_and_changes_nothing(start: Start) -> None:
    """A block is one chunk here, so that the bit is one of its payload. Its checksum fails, and it is sent again."""
    settings = {"width": 256, "chunk": 2**18}
    caught: list[int] = []

    def note(closed: ClosedRound) -> None:
        caught.append(sum(stats.corrupt_chunks for stats in running.link_stats().values()))

    with start_server(**settings, on_round=note) as running:
        bad, address = through(start, running.address)
        arm(bad, "up", MIDDLE, "flip")
        clients = [
            start(client, address, data=0, width=256),
            start(client, running.address, data=1, width=256),
        ]
        assert bad.expect("fired") == "flip"
        bad.tell(("mend",))
        ends = [process.expect("done") for process in clients]
        outcome = running.wait(WAIT_S)
        bad.tell(("count",))
        passed = bad.expect("passed")
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**settings)
    assert max(caught) == 1
    assert outcome.reconnects == 0
    assert 7 * BODY < passed["up"] < 8 * BODY  # of six rounds


@pytest.mark.parametrize("format", ["int8", "fp32"])
def test_a_client_that_is_away_for_many_rounds_comes_back_and_ends_on_the_same_bits(
    start: Start, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    """The others go on without it. It has missed every block more than once, so that blocks come whole."""
    closed: queue.Queue[ClosedRound] = queue.Queue()
    rounds = 24
    with (
        caplog.at_level(logging.WARNING, "parablock"),
        start_server(rounds=rounds, quorum=1, format=format, on_round=closed.put, **WIDE) as running,
    ):
        do_not_wait_for_the_gone(running)
        bad, address = through(start, running.address)
        arm(bad, "up", 3 * MIDDLE, "cut")
        away = start(client, address, data=0, width=256)
        other = start(client, running.address, data=1, width=256, stop_before=[18])
        assert bad.expect("fired") == "cut"
        other.expect("stopped")
        while closed.get(timeout=WAIT_S).round < 16:
            pass
        bad.tell(("mend",))
        while not running.outcome.reconnects:
            away.pause(0.02)
        other.let_go()
        ends = [process.expect("done") for process in (away, other)]
        outcome = running.wait(WAIT_S)
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert ends[0]["reconnects"] == outcome.reconnects == 1
    contributions = [closed.contributions for closed in outcome.rounds]
    assert contributions[4:16] == [1] * 12
    assert 2 in contributions[16:]
    back = next(record.message for record in caplog.records if "is back" in record.message)
    assert "4 whole blocks" in back
    assert outcome.left == []


def test_a_client_that_stays_away_too_long_is_told_that_its_seat_is_gone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer has taken it."""
    monkeypatch.setattr("parablock_rt.server.roster.SEAT_KEPT_S", 0.5)
    with start_server(quorum=2, deadline=60.0, **WIDE) as running:
        bad, address = through(start, running.address)
        arm(bad, "up", MIDDLE, "cut")
        away = start(client, address, data=0, width=256)
        other = start(client, running.address, data=1, width=256)
        assert bad.expect("fired") == "cut"
        running_lost(running, 1)
        newcomer = start(client, running.address, data=0, width=256, stop_before=[4])
        newcomer.expect("stopped")
        bad.tell(("mend",))
        kind, reason = away.expect("error")
        newcomer.let_go()
        assert (kind, "Join again to get a snapshot" in reason) == ("HandshakeError", True)
        digests = [process.expect("done")["digest"] for process in (newcomer, other)]
        outcome = running.wait(WAIT_S)
    assert digests == [outcome.digest] * 2
    assert len(outcome.left) == 1
    assert "a newcomer has taken the seat" in outcome.left[0]


def test_a_client_that_is_killed_in_a_download_is_replaced_by_a_newcomer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parablock_rt.server.roster.SEAT_KEPT_S", 0.5)
    with start_server(quorum=2, deadline=60.0, **WIDE) as running:
        bad, address = through(start, running.address)
        arm(bad, "down", MIDDLE, "hold")
        victim = start(client, address, data=0, width=256)
        other = start(client, running.address, data=1, width=256)
        assert bad.expect("fired") == "hold"
        victim.kill()
        bad.tell(("mend",))
        bad.expect("mended")
        running_lost(running, 1)
        newcomer = start(client, running.address, data=0, width=256, model_seed=5)
        digests = [process.expect("done")["digest"] for process in (newcomer, other)]
        outcome = running.wait(WAIT_S)
    assert digests == [outcome.digest] * 2
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6


def test_a_client_whose_network_does_not_come_back_gives_up_with_an_error(start: Start) -> None:
    with start_server(quorum=1, **WIDE) as running:
        do_not_wait_for_the_gone(running)
        bad, address = through(start, running.address)
        arm(bad, "up", MIDDLE, "cut")
        away = start(client, address, data=0, width=256, reconnect=1.0)
        other = start(client, running.address, data=1, width=256)
        assert bad.expect("fired") == "cut"
        kind, reason = away.expect("error")
        assert kind == "PeerLostError"
        assert "it did not come back within 1 s" in reason
        assert other.expect("done")["digest"] == running.wait(WAIT_S).digest
        assert len(running.outcome.left) == 1


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_process_that_is_stopped_for_longer_than_the_idle_time_goes_on(start: Start, who: str) -> None:
    """And with the connection broken on one side only: it is the stopped one that has not noticed."""
    idle = {"idle_timeout": 1.0}
    host = start(server, {**WIDE, **idle})
    address = host.expect("address")
    clients = [start(client, address, data=data, width=256, stop_before=[2], **idle) for data in (0, 1)]
    for process in clients:
        process.expect("stopped")
    stopped, awake = (clients[0], host) if who == "client" else (host, clients[0])
    stopped.signal(signal.SIGSTOP)
    awake.pause(3.0)
    stopped.signal(signal.SIGCONT)
    for process in clients:
        process.let_go()
    ends = [process.expect("done") for process in clients]
    assert host.expect("outcome")["reconnects"] >= 1
    assert [end["digest"] for end in ends] == [host.expect("ended")] * 2
    assert ends[0]["digest"] == undisturbed_digest(**WIDE)
    assert ends[0]["reconnects"] >= 1


# ---- Servers that are killed


def start_durable(
    start: Start, folder: Path, die: tuple[str, int] | None = None, **settings: Any
) -> tuple[Process, str]:
    host = start(server, {**WIDE, **settings, "durable": folder}, die)
    return host, host.expect("address")


def resume(start: Start, folder: Path, **settings: Any) -> Process:
    host = start(server, {"width": 256, "resume": folder, **settings})
    host.expect("address")
    return host


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("where", PLACES)
def test_a_server_that_is_killed_anywhere_is_resumed_to_the_same_digest(
    start: Start, tmp_path: Path, where: str, staleness: int
) -> None:
    host, address = start_durable(start, tmp_path / "state", (where, 3), staleness=staleness)
    clients = [start(client, address, data=data, width=256) for data in (0, 1)]
    assert host.expect("dying") == where
    assert host.wait() == -signal.SIGKILL
    host = resume(start, tmp_path / "state")
    ends = [process.expect("done") for process in clients]
    assert host.expect("outcome")["reconnects"] == 2
    assert [end["digest"] for end in ends] == [host.expect("ended")] * 2
    assert ends[0]["digest"] == undisturbed_digest(**WIDE, staleness=staleness)
    assert [end["reconnects"] for end in ends] == [1, 1]


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_server_that_is_killed_in_the_middle_of_a_transfer_is_resumed_to_the_same_digest(
    start: Start, tmp_path: Path, way: str
) -> None:
    host, address = start_durable(start, tmp_path / "state")
    bad, detour = through(start, address)
    arm(bad, way, MIDDLE, "hold")
    clients = [
        start(client, detour, data=0, width=256),
        start(client, address, data=1, width=256),
    ]
    assert bad.expect("fired") == "hold"
    host.kill()
    host = resume(start, tmp_path / "state")
    bad.tell(("mend",))
    ends = [process.expect("done") for process in clients]
    assert [end["digest"] for end in ends] == [host.expect("ended")] * 2
    assert ends[0]["digest"] == undisturbed_digest(**WIDE)


def test_a_server_is_killed_and_resumed_again_and_again(start: Start, tmp_path: Path) -> None:
    """With an optimiser that has a state, and a client that is away for one of its lives."""
    settings = {"server_optimizer": "adam", "server_lr": 0.01}
    host, address = start_durable(start, tmp_path / "state", ("after the first upload", 1), **settings)
    clients = [start(client, address, data=data, width=256) for data in (0, 1)]
    for where, round in [("before the record", 2), ("in the broadcast", 4)]:
        assert host.expect("dying")
        assert host.wait() == -signal.SIGKILL
        host = start(server, {"width": 256, "resume": tmp_path / "state"}, (where, round))
        host.expect("address")
    assert host.expect("dying") == "in the broadcast"
    assert host.wait() == -signal.SIGKILL
    host = resume(start, tmp_path / "state")
    digests = [process.expect("done")["digest"] for process in clients]
    assert digests == [host.expect("ended")] * 2
    assert digests[0] == undisturbed_digest(**WIDE, **settings)


def test_a_server_that_is_killed_after_the_end_is_resumed_to_its_result(start: Start, tmp_path: Path) -> None:
    host, address = start_durable(start, tmp_path / "state")
    clients = [start(client, address, data=data, width=256) for data in (0, 1)]
    digests = [process.expect("done")["digest"] for process in clients]
    assert digests == [host.expect("ended")] * 2
    host = resume(start, tmp_path / "state")
    assert host.expect("outcome")["clients"] == {0: digests[0], 1: digests[0]}
    assert host.expect("ended") == digests[0]


def test_without_a_durable_state_a_server_started_anew_is_not_taken_for_the_old_one(start: Start) -> None:
    host = start(server, {**WIDE, "rounds": 1000})
    address = host.expect("address")
    clients = [start(client, address, data=data, width=256) for data in (0, 1)]
    host.expect("round")
    host.kill()
    start(server, {**WIDE, "address": address}).expect("address")
    for process in clients:
        kind, reason = process.expect("error")
        assert kind == "HandshakeError"
        assert "has another run than before: it was started anew instead of resumed" in reason


def test_parablock_serve_is_resumed_from_its_run_folder_alone(start: Start, tmp_path: Path) -> None:
    flags = "--rounds 12 --clients 2 --local-steps 1 --format int4 --eval-examples 0"
    host, address = serve(start, tmp_path / "server", *flags.split(), die=("after the record", 4))
    clients = [join(start, tmp_path / f"client{i}", address, "--json") for i in range(2)]
    assert host.expect("dying") == "after the record"
    assert host.wait() == -signal.SIGKILL
    telemetry = tmp_path / "server" / "run" / "telemetry.jsonl"
    with telemetry.open("a") as file:  # whatever it had sampled by then
        file.write('{"t_s": 0.25}\n')
    sampled = telemetry.read_text()
    again = start(command, ["serve", "--resume", "run", "--json"], str(tmp_path / "server"))
    assert [process.wait() for process in (again, *clients)] == [0, 0, 0], (tmp_path / "server" / "errors").read_text()
    summary = json.loads((tmp_path / "server" / "output").read_text())
    assert (summary["complete"], summary["rounds"], summary["format"]) == (True, 12, "int4")
    assert summary["resumed_from"] == 5
    assert summary["overlap_efficiency"] is None
    assert summary["digest"]["clients"] == [summary["digest"]["server"]] * 2
    assert summary["reconnects"] == 2
    ends = [json.loads((tmp_path / f"client{i}" / "output").read_text()) for i in range(2)]
    assert [end["reconnects"] for end in ends] == [1, 1]
    metrics = [json.loads(line) for line in (tmp_path / "server" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in metrics] == list(range(12))
    assert summary["wall_s"] >= sum(line["open_s"] for line in metrics) * (1 - 1e-9)  # of both servers
    for stage, seconds in summary["stages_of"]["server"].items():
        assert seconds >= sum(line["server_stages"][stage] for line in metrics) * (1 - 1e-9)
    assert telemetry.read_text().startswith(sampled), "the second server goes on with the first one's samples"


def test_a_new_run_in_the_folder_of_one_that_can_be_resumed_is_refused_and_takes_nothing_away(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    left = {"state/journal": "of the run", "settings.json": "{}", "summary.json": "{}", "metrics.jsonl": "{}"}
    for name, text in left.items():
        (folder / name).write_text(text)
    process = start(command, ["serve", "--model", "tiny", "--run-dir", "run"], str(tmp_path))
    assert process.wait() != 0
    assert "holds the state of a run already: go on with that by --resume" in (tmp_path / "errors").read_text()
    assert {name: (folder / name).read_text() for name in left} == left


def test_resuming_where_there_is_no_run_says_so(start: Start, tmp_path: Path) -> None:
    process = start(command, ["serve", "--resume", "nowhere"], str(tmp_path))
    assert process.wait() == 2
    assert "there is no run to resume in nowhere" in (tmp_path / "errors").read_text()


@pytest.mark.usefixtures("on_a_late_gpu")
@pytest.mark.parametrize("where", ["with half a record", "in the broadcast"])
def test_what_a_killed_server_had_sent_to_a_gpu_is_replaced_by_what_its_successor_sends(
    start: Start, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of an aggregate that was never announced have gone on to the device already."""
    renewed: list[int] = []
    renew = ServerLink.renew

    def note(self: ServerLink, round: int, landing: Landing) -> Landing:
        renewed.append(round)
        return renew(self, round, landing)

    monkeypatch.setattr(ServerLink, "renew", note)
    host, address = start_durable(start, tmp_path / "state", (where, 3))
    digests: list[str | None] = []

    def take_part(data: int) -> None:
        with pb.join(address, make_model(width=256), sgd) as run:
            for batch in run.stream(make_batches(data, 256)):
                run.train_step(batch, loss_fn)
        digests.append(run.digest)

    threads = [threading.Thread(target=take_part, args=(data,), daemon=True) for data in (0, 1)]
    for thread in threads:
        thread.start()
    assert host.expect("dying") == where
    assert host.wait() == -signal.SIGKILL
    host = resume(start, tmp_path / "state")
    for thread in threads:
        thread.join(WAIT_S)
    assert digests == [host.expect("ended")] * 2
    assert digests[0] == undisturbed_digest(**WIDE)
    assert where == "in the broadcast" or 3 in renewed
