"""What a run comes to when its processes are killed, leave or come late. Real processes, real signals."""

from __future__ import annotations

import queue
import re
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from deadlines import do_not_wait_for_the_gone
from processes import WAIT_S, Process, client, make_model, server, start_server, starter

import parablock_rt as pb
from parablock_rt.errors import ConnectError, HandshakeError, RoundError, TransportError
from parablock_rt.observe.run_folder import to_json
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.summary import summarise
from parablock_rt.wire.transport import Transport

Start = Callable[..., Process]

GONE = "(the peer closed the connection|reading failed: Connection reset by peer)"  # the kernel chooses


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


def solo_digest(start: Start, **settings: Any) -> str:
    """What a run with one client, which trains on data 0, comes to."""
    with start_server(clients=1, **settings) as alone:
        digest = start(client, alone.address, data=0).expect("done")["digest"]
        assert alone.wait(WAIT_S).digest == digest
    return digest


def wait_until_closed(closed: queue.Queue[ClosedRound], round: int) -> None:
    while closed.get(timeout=WAIT_S).round < round:
        pass


# ---- Clients that are killed


def test_after_a_client_is_killed_the_others_go_on_after_the_deadline_and_end_with_equal_digests(start: Start) -> None:
    closed: queue.Queue[ClosedRound] = queue.Queue()
    with start_server(clients=3, rounds=7, on_round=closed.put) as running:
        do_not_wait_for_the_gone(running)
        victim = start(client, running.address, stop_before=[2])
        others = [start(client, running.address) for _ in range(2)]
        victim.expect("stopped")
        wait_until_closed(closed, 1)
        assert len(running.outcome.rounds) == 2  # of 7
        victim.kill()
        digests = [other.expect("done")["digest"] for other in others]
        outcome = running.wait(WAIT_S)
    assert digests == [outcome.digest] * 2
    assert [closed.contributions for closed in outcome.rounds] == [3, 3] + [2] * 5
    assert len(outcome.left) == 1
    assert re.fullmatch(f"client [0-2]: {GONE}", outcome.left[0])


def test_a_half_sent_upload_of_a_killed_client_leaves_no_trace(start: Start) -> None:
    """The survivor's run comes to the bits of a run in which the other never was."""
    settings = {"format": "fp32", "rounds": 5, "chunk": 256}
    with start_server(quorum=1, **settings) as running:
        do_not_wait_for_the_gone(running)
        survivor = start(client, running.address, data=0)
        victim = start(client, running.address, rate=1000.0)  # a block takes more than 16 s
        seat = victim.expect("joined")
        while not running.link_stats()[f"client-{seat}"].moved_bytes:
            victim.pause(0.02)
        victim.kill()
        digest = survivor.expect("done")["digest"]
        outcome = running.wait(WAIT_S)
    assert [closed.contributions for closed in outcome.rounds] == [1] * 5
    assert digest == outcome.digest == solo_digest(start, **settings)


def test_when_the_quorum_is_lost_the_run_fails_and_everybody_hears_the_same_reason(start: Start) -> None:
    closed: queue.Queue[ClosedRound] = queue.Queue()
    with start_server(quorum=2, on_round=closed.put) as running:
        do_not_wait_for_the_gone(running)
        victim = start(client, running.address, stop_before=[2])
        other = start(client, running.address)
        victim.expect("stopped")
        wait_until_closed(closed, 1)
        victim.kill()
        kind, reason = other.expect("error")
        with pytest.raises(RoundError) as failure:
            running.wait(WAIT_S)
    assert (kind, reason) == ("RoundError", str(failure.value))
    assert re.search(
        r"round 2 cannot be closed: 1 of 2 clients delivered in the [0-9.]+ s it was open, at least 2", reason
    )
    assert re.search(rf"missing: \[[01]\]; gone: client [01]: {GONE}", reason)
    assert "restart them, or set a lower --quorum or a longer --deadline" in reason


def test_a_latecomer_takes_the_seat_of_a_killed_client_and_ends_on_the_same_bits(start: Start) -> None:
    """Both clients are needed in every round: without the newcomer the run could not go on."""
    closed: queue.Queue[ClosedRound] = queue.Queue()
    with start_server(quorum=2, rounds=8, deadline=60.0, on_round=closed.put) as running:
        victim = start(client, running.address, stop_before=[3])
        other = start(client, running.address)
        victim.expect("stopped")
        wait_until_closed(closed, 2)
        victim.kill()
        newcomer = start(client, running.address, model_seed=5)
        assert newcomer.expect("round") == 3
        digests = [process.expect("done")["digest"] for process in (other, newcomer)]
        outcome = running.wait(WAIT_S)
    assert digests == [outcome.digest] * 2
    assert [closed.contributions for closed in outcome.rounds] == [2] * 8


def test_a_run_whose_only_client_was_killed_goes_on_with_a_newcomer(start: Start) -> None:
    with start_server(clients=1, deadline=60.0) as running:
        victim = start(client, running.address, stop_before=[2])
        victim.expect("stopped")
        victim.kill()
        digest = start(client, running.address, model_seed=5).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


def test_a_run_without_clients_ends_with_an_error(start: Start) -> None:
    with start_server(clients=1) as running:
        do_not_wait_for_the_gone(running)
        victim = start(client, running.address, stop_before=[1])
        victim.expect("stopped")
        victim.kill()
        with pytest.raises(RoundError, match=r"0 of 1 clients delivered in the|no client is left"):
            running.wait(WAIT_S)


# ---- A server that is killed


def test_when_the_server_is_killed_its_clients_end_with_the_address_and_the_round(start: Start) -> None:
    """Long before the limit of an idle link: the kernel closes the sockets of a dead process. They try to come back for
    as long as they were told to."""
    host = start(server, {"rounds": 100_000})
    address = host.expect("address")
    clients = [start(client, address, reconnect=2.0) for _ in range(2)]
    while host.expect("round") < 3:
        pass
    host.kill()
    for process in clients:
        kind, message = process.expect("error")
        assert kind == "PeerLostError"
        assert f"lost the server at {address} while waiting for the aggregate of round " in message
        assert process.wait() == 0


# ---- Leaving


def test_the_server_hears_why_a_client_leaves(start: Start) -> None:
    with start_server(clients=4, quorum=1) as running:
        do_not_wait_for_the_gone(running)
        leaver = start(client, running.address, leave_before=1)
        breaker = start(client, running.address, raise_before=1)
        stopped = start(client, running.address, stop_before=[1])
        stayer = start(client, running.address)
        stopped.expect("stopped")
        stopped.signal(signal.SIGINT)
        assert stopped.expect("error")[0] == "KeyboardInterrupt"
        assert breaker.expect("error") == ("ValueError", "a bug in the user's loop")
        assert leaver.expect("done")["digest"] is None
        digest = stayer.expect("done")["digest"]
        outcome = running.wait(WAIT_S)
    assert digest == outcome.digest
    assert sorted(left.partition(": ")[2] for left in outcome.left) == [
        "left before the last round",
        "stopped by KeyboardInterrupt",
        "stopped by ValueError",
    ]
    assert summarise(running._coordinator.config, outcome, blocks=4)["left_early"] == outcome.left


def test_a_client_too_many_is_told_so_and_the_others_finish(start: Start) -> None:
    with start_server() as running:
        members = [start(client, running.address, stop_before=[1]) for _ in range(2)]
        for member in members:
            member.expect("stopped")
        with pytest.raises(
            HandshakeError,
            match=r"all 2 seats of this run are taken\. The seat of a client whose network broke is free",
        ):
            pb.join(running.address, make_model(), torch.optim.SGD)
        for member in members:
            member.let_go()
        digests = [member.expect("done")["digest"] for member in members]
        assert digests == [running.wait(WAIT_S).digest] * 2


# ---- Updates that are not finite


def test_a_client_whose_loss_is_nan_is_counted_and_does_no_harm(start: Start) -> None:
    """Its groups count as no change. A round with it has no loss that a strict reader of JSON could take."""
    with start_server(rounds=8) as running:
        clients = [start(client, running.address), start(client, running.address, nan_in=1)]
        ends = [process.expect("done") for process in clients]
        outcome = running.wait(WAIT_S)
        state = running.state_dict()
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert all(end["finite"] for end in ends)
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert [closed.bad_groups for closed in outcome.rounds][:2] == [0, 33]  # 64 · 64 weights and 64 biases, by 128
    summary = summarise(running._coordinator.config, outcome, blocks=4)
    assert summary["bad_groups"] == ends[0]["bad_groups"] + ends[1]["bad_groups"]
    assert ends[0]["bad_groups"] == 0
    assert outcome.rounds[1].loss != outcome.rounds[1].loss
    assert "NaN" not in to_json(asdict(outcome.rounds[1]))


# ---- Servers that are not there


def test_a_port_in_use_is_a_clear_error_until_it_is_free() -> None:
    with start_server() as running, pytest.raises(TransportError) as failure:
        start_server(address=running.address)
    assert re.match(f"cannot listen on {running.address}: .*Address already in use", str(failure.value))
    assert "is another server running there?" in str(failure.value)
    with start_server(address=running.address) as second:
        assert second.address == running.address


def test_a_refused_connection_is_tried_again_and_then_an_error_with_the_address() -> None:
    with socket.socket() as reserved:  # bound but not listening: nobody else can take the port meanwhile
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with Transport() as transport, pytest.raises(ConnectError) as failure:
            transport.connect(address, tries=2)
    assert re.match(rf"no server at {address} after 2 tries \(.*Connection refused\)", str(failure.value))
    assert "is `parablock serve` running" in str(failure.value)
