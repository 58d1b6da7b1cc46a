"""`parablock top`: an observer sees a running server, proves itself as a client does, and takes no seat."""

from __future__ import annotations

import io
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import WAIT_S, Process, client, make_model, start_server, starter
from relay import relay
from rich.console import Console
from tls_cases import client_tls, deployment, needs_tls, server_tls

from parablock_rt import cli, top
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError, PeerLostError
from parablock_rt.server import watch
from parablock_rt.server.members import Candidate, Identity
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.stages import StageSeconds
from parablock_rt.top import hidden, look_once, render
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.connection import Connection
from parablock_rt.wire.protocol import ClientStatus, Status
from parablock_rt.wire.transport import Transport

TOKEN = "a token of sixteen characters"


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    with starter() as start:
        yield start


def status(**changes: Any) -> Status:
    fields: dict[str, Any] = {
        **{"round": 3, "rounds": 8, "staleness": 1, "local_steps": 4, "format": "int8", "wall_s": 12.0, "open_s": 0.5},
        **{"round_s": 2.0, "loss": 1.5, "compute_s": 1.9, "exposed_s": 0.1, "exchange_s": 1.0, "bytes_up": 4_000_000},
        **{"bytes_down": 2_000_000, "seats": 2, "present": 2, "left": 0, "clients": []},
    }
    return Status(**fields | changes)


def text(renderable: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_an_observer_sees_the_run_before_and_while_it_goes_on(
    start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "YOUNG_S", -1.0)  # every look is a fresh one
    with start_server(token=TOKEN, clients=2, rounds=6) as server:
        empty = look_once(server.address, TOKEN)
        assert (empty.round, empty.rounds, empty.wall_s, empty.present, empty.clients) == (0, 6, None, 0, [])
        clients = [start(client, server.address, token=TOKEN, stop_before=[3]) for _ in range(2)]
        for process in clients:
            process.expect("stopped")
        seen = look_once(server.address, TOKEN)
        assert 2 <= seen.round <= 3
        assert (seen.present, seen.left) == (2, 0)
        assert seen.wall_s is not None
        assert seen.wall_s > 0
        assert sorted(each.client for each in seen.clients) == [0, 1]
        assert seen.bytes_up == server.outcome.rounds[seen.round - 1].bytes_up > 0
        assert seen.exchange_s is not None
        for process in clients:
            process.let_go()
        assert len(server.wait(WAIT_S).rounds) == 6
        assert server.outcome.left == []


def test_an_observer_takes_no_seat_and_none_away(start: Callable[..., Process]) -> None:
    with start_server(clients=1, rounds=2) as server, Transport() as transport:
        link = Connection(transport, server.address)
        for _ in range(3):
            assert link.observe(None).present == 0
        process = start(client, server.address)
        assert process.expect("joined") == 0
        process.expect("done")
        assert server.wait(WAIT_S).client_digests.keys() == {0}


@pytest.mark.parametrize("token", [None, "another token, long enough"])
def test_an_observer_without_the_token_sees_nothing(token: str | None) -> None:
    with start_server(token=TOKEN) as server:
        with pytest.raises(HandshakeError, match=r"asks for a token|does not know the token"):
            look_once(server.address, token)
        assert look_once(server.address, TOKEN).left == 0


@pytest.mark.parametrize(("purpose", "other"), [("observe", "join"), ("join", "observe"), ("probe", "observe")])
def test_a_proof_serves_one_purpose_only(purpose: protocol.Purpose, other: protocol.Purpose) -> None:
    plan = BlockPlan.from_model(make_model(), 4)
    config = RunConfig(rounds=1, clients=1)
    identity = Identity(run=1, token=TOKEN, config=config, plan=plan.spec(), plan_digest=plan.digest, frozen="")
    candidate, nonce = Candidate(link=1, address="", now=0.0), handshake.nonce()
    hello = protocol.Hello(version=protocol.VERSION, release="", nonce=nonce, purpose=purpose)
    challenge = candidate.challenge(hello, identity, None)
    conversation = handshake.Conversation(1, nonce, challenge.nonce)
    with pytest.raises(HandshakeError, match="does not know the token"):
        candidate.prove(protocol.Proof(mac=handshake.proof(TOKEN, other, conversation)))
    candidate.prove(protocol.Proof(mac=handshake.proof(TOKEN, purpose, conversation)))
    assert candidate.proved


def test_there_are_only_so_many_observers_and_a_seat_is_free_when_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_OBSERVERS", 2)
    with start_server() as server, Transport() as first, Transport() as second:
        for transport in (first, second):
            Connection(transport, server.address).observe(None)
        with pytest.raises(HandshakeError, match="2 observers are watching already"):
            look_once(server.address, None)
        second.close()
        deadline = 50
        while deadline:  # the server learns of the end by an event of its own
            try:
                look_once(server.address, None)
                break
            except HandshakeError:
                deadline -= 1
        assert deadline > 0


def test_an_observer_that_says_anything_else_is_dismissed() -> None:
    with start_server() as server, Transport() as transport:
        link = Connection(transport, server.address)
        link.observe(None)
        link.send(protocol.Goodbye(digest="", reason="x", compute_s=0.0, exposed_s=0.0))
        with pytest.raises(HandshakeError, match="expected Observe from an observer, found Goodbye"):
            link.observe(None)
        assert server.outcome.left == []


def test_looking_often_gives_the_same_status_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "YOUNG_S", 1e9)
    with start_server() as server:
        assert look_once(server.address, None).open_s == look_once(server.address, None).open_s


def test_the_hidden_share_is_what_was_not_waited_for() -> None:
    assert hidden(status()) == pytest.approx(0.9)
    assert hidden(status(staleness=0)) == 0.0
    assert hidden(status(exposed_s=3.0)) == 0.0
    assert hidden(status(exchange_s=None)) is None
    assert hidden(status(exposed_s=None)) is None
    assert hidden(status(exposed_s=3.0, others_s=2.75)) == pytest.approx(0.75)  # what others were waited for is no part
    assert top.figures(status())["hidden"] == pytest.approx(0.9)


def test_rounds_before_which_no_aggregate_is_due_are_no_part_of_the_mean_wait() -> None:
    common = {"block": 0, "loss": 1.0, "contributions": 1, "weight": 1.0, "bad_groups": 0, "compute_s": 1.0}
    common |= {"open_s": 1.0, "skew_s": 0.0, "bytes_up": 1, "bytes_down": 1, "fingerprint": 0}
    waited = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (4.0, 3.0), (2.0, 5.0))  # before the round, and for other clients
    rounds = [
        ClosedRound(round=i, exposed_s=exposed, stages=StageSeconds(wait=wait), **common)  # type: ignore[arg-type]
        for i, (exposed, wait) in enumerate(waited)
    ]
    watching = watch.Watch(RunConfig(rounds=9, clients=1, staleness=2))
    before = watching._look([], Outcome(rounds=rounds[:3]), wall_s=1.0, open_s=0.0)
    assert (before.exposed_s, before.others_s, before.compute_s) == (None, None, 1.0)
    seen = watching._look([], Outcome(rounds=rounds), wall_s=1.0, open_s=0.0)
    assert (seen.exposed_s, seen.others_s, seen.compute_s) == (3.0, 2.5, 1.0)


def test_the_view_names_the_slow_client_and_the_rates() -> None:
    slow = ClientStatus(client=7, state="training", behind=1, compute_s=1.9, exposed_s=0.1, late_s=0.9)
    quick = ClientStatus(client=2, state="delivered", behind=0, compute_s=1.0, exposed_s=0.9, late_s=0.0)
    shown = text(render(status(clients=[slow, quick], present=70), (status(bytes_up=3_000_000), 2.0)))
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "0.90 s  slow" in lines["7"]
    assert "slow" not in lines["2"]
    assert "up 4.0 MB (4.0 Mbit/s)" in shown
    assert "hidden 90% of the last exchanges" in shown
    assert "and 68 faster ones" in shown


def test_what_a_server_writes_is_shown_as_text_and_commands_no_terminal() -> None:
    named = ClientStatus(client=7, state="[/b]\x1b]0;x\x07", behind=0, compute_s=1.0, exposed_s=0.1, late_s=0.0)
    shown = text(render(status(clients=[named], format="[red]\x1b[2J")))
    assert "\x1b" not in shown
    assert "4 local steps, [red]?[2J" in shown
    assert "[/b]?]0;x?" in shown


def test_the_command_speaks_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with start_server(rounds=5) as server:
        monkeypatch.setattr(sys, "argv", ["parablock", "top", server.address, "--once", "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["round"], shown["rounds"], shown["clients"], shown["hidden"]) == (0, 5, [], None)
    assert "mac" not in shown


class Watching:
    """`top.watch` in a thread of its own. `looks` and `lost`: the connections that showed the server, or broke."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._console = Console(width=160, record=True, file=io.StringIO())
        looks, lost = self.looks, self.lost

        class Looking(Connection):
            def observe(self, token: str | None) -> Status:
                try:
                    seen = super().observe(token)
                except PeerLostError:
                    lost.put(self)
                    raise
                looks.put(self)
                return seen

        monkeypatch.setattr(top, "Connection", Looking)

    def begin(self, address: str) -> Connection:
        """Returns the connection that saw the server first."""
        self._thread = threading.Thread(target=top.watch, args=(address, None, 0.05, self._console), daemon=True)
        self._thread.start()
        return self.looks.get(timeout=WAIT_S)

    def shown(self) -> str:
        """What it has shown, once it is over."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self._console.export_text()


def test_watching_ends_when_the_server_does(start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    with start_server(rounds=4) as server:
        watching.begin(server.address)
        for _ in range(2):
            start(client, server.address)
        server.wait(WAIT_S)
    assert f"The server at {server.address} has ended" in watching.shown()


def test_a_connection_that_breaks_does_not_end_the_watching(
    start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = Watching(monkeypatch)
    looks, lost = watching.looks, watching.lost
    monkeypatch.setattr(top, "_COME_BACK_S", WAIT_S)
    with start_server() as server:
        network = start(relay, server.address)
        address = network.expect("address")
        first = watching.begin(address)
        network.tell(("down", 0, "reset"))
        network.expect("fired")
        assert lost.get(timeout=WAIT_S) is first
        assert lost.get(timeout=WAIT_S) is not first  # the first that came back broke, too
        network.tell(("mend",))
        network.expect("mended")
        while looks.get(timeout=WAIT_S) is first:
            pass
        monkeypatch.setattr(top, "_COME_BACK_S", 0.0)
    network.destroy()
    assert f"The server at {address} has ended or cannot be reached any more" in watching.shown()


@needs_tls
def test_a_server_that_speaks_tls_is_watched_over_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    ca = str(deployment().ca.certificate_file)
    with start_server(token=TOKEN, rounds=5, tls=server_tls()) as server:
        with pytest.raises(HandshakeError, match="found one that uses TLS"):
            look_once(server.address, TOKEN)
        with pytest.raises(HandshakeError, match="certificate"):
            look_once(server.address, TOKEN, tls=client_tls(ca=deployment("theirs").ca.certificate_file))
        flags = ["--tls-ca", ca, "--token-file", str(tmp_path / "token"), "--once", "--json"]
        monkeypatch.setattr(sys, "argv", ["parablock", "top", server.address, *flags])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 5
