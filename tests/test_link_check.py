"""`parablock doctor --peer`: what it measures, for whom the server answers, and how little that may cost it."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import WAIT_S, client, make_model, start_server, starter
from test_top import status
from tls_cases import deployment, needs_tls, server_tls
from typer.testing import CliRunner

import parablock_rt as pb
from parablock_rt import link_check, top
from parablock_rt.cli import app
from parablock_rt.errors import HandshakeError
from parablock_rt.link_check import check_link
from parablock_rt.server import probe
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection
from parablock_rt.wire.transport import Transport

TOKEN = "correct-horse-battery-staple"


def test_a_measurement_sees_the_link_s_delay_and_rate_and_takes_no_seat() -> None:
    with starter() as start, start_server(clients=1, token=TOKEN, rate=2e6, delay=0.05) as running:
        report = check_link(running.address, token=TOKEN)
        assert report.round_trip_s >= 0.05
        assert report.round_trip_p99_s >= report.round_trip_s
        assert (
            0.5e6 < report.down < 4e6
        )  # the server's side alone is slowed down; when it was read moves it by that much
        assert report.up > report.down
        assert abs(report.clock_offset_s) <= 0.05 + report.clock_error_s  # the same clock, seen over one-sided delay
        assert report.congestion_control == "reno"  # on loopback, whatever the system's choice is
        assert report.tls is None
        digest = start(client, running.address, token=TOKEN).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


def test_strangers_are_not_served() -> None:
    with start_server(token=TOKEN) as running:
        with pytest.raises(HandshakeError, match="wrong token"):
            check_link(running.address, token=TOKEN + "x")
        with pytest.raises(HandshakeError, match="asks for a token"):
            check_link(running.address)


class Prober:
    """A client that measures as it likes."""

    def __init__(self, address: str) -> None:
        self.transport = Transport()
        self.link = Connection(self.transport, address)
        self.welcome = self.link.introduce_probe(None)

    def ask(self, **fields: object) -> protocol.Message:
        self.link.send(protocol.Measure(**fields))  # type: ignore[arg-type]
        return self.link.next_message("an answer")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"index": 1, "nbytes": probe.MAX_BYTES + 256}, "at most 8388608; found 8388864"),
        ({"index": 1, "nbytes": 100}, "expected a multiple of 256 bytes"),
        ({"index": 1, "nbytes": -256}, "found -256"),
        ({"index": 0}, "expected an index from 1 to 1024, found 0"),
        ({"index": 1025}, "expected an index from 1 to 1024, found 1025"),
    ],
)
def test_what_a_measurement_may_not_ask_ends_it(fields: dict[str, object], reason: str) -> None:
    with start_server() as running:
        prober = Prober(running.address)
        with pytest.raises(HandshakeError, match=reason):
            prober.ask(**fields)
        prober.transport.close()
        Prober(running.address).transport.close()  # the desk is free again


def test_a_measurement_moves_no_more_than_its_allowance() -> None:
    with start_server() as running:
        prober = Prober(running.address)
        count = probe.MAX_TOTAL // probe.MAX_BYTES
        for index in range(1, count + 1):
            assert isinstance(prober.ask(index=index, nbytes=probe.MAX_BYTES), protocol.Measured)
        with pytest.raises(HandshakeError, match="at most 0; found 256"):
            prober.ask(index=count + 1, nbytes=256)
        prober.transport.close()


def test_one_client_measures_at_a_time_and_the_next_when_it_is_gone() -> None:
    with start_server() as running:
        first = Prober(running.address)
        with pytest.raises(HandshakeError, match="another client is measuring"):
            Prober(running.address)
        first.transport.close()
        refused = "not yet tried"
        while refused:  # until the server has seen the end of the first
            try:
                Prober(running.address).transport.close()
                refused = ""
            except HandshakeError as error:
                refused = str(error)
            assert not refused or "another client is measuring" in refused


def test_a_measurement_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server() as running:
        prober = Prober(running.address)
        monkeypatch.setattr(probe, "_MAX_S", 0.0)
        with pytest.raises(HandshakeError, match="measuring this link took longer than the server allows"):
            prober.link.next_message("the end")
        prober.transport.close()


def test_a_client_that_measures_cannot_say_what_members_say() -> None:
    with start_server(clients=1) as running:
        prober = Prober(running.address)
        prober.link.send(protocol.Ready(plan_digest="", frozen="", fingerprints=[]))
        with pytest.raises(HandshakeError, match="Ready has no place in a measurement"):
            prober.link.next_message("an answer")
        prober.transport.close()
        pb.join(running.address, make_model(), torch.optim.SGD).close()


@pytest.mark.parametrize("name", ["MAX_BYTES", "MAX_TOTAL"])
@pytest.mark.parametrize("allowed", [0, -1])
def test_a_server_that_lets_nothing_be_measured_is_told_of(
    monkeypatch: pytest.MonkeyPatch, name: str, allowed: int
) -> None:
    monkeypatch.setattr(probe, name, allowed)
    with start_server() as running, pytest.raises(HandshakeError, match=rf"of 262144 bytes, found {allowed};"):
        check_link(running.address)


def test_a_client_transfers_no_more_than_it_promises_whatever_the_server_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = {"up": 0, "down": 0}
    serve = probe.ProbeDesk._move

    def move(desk: probe.ProbeDesk, visit: Any, message: protocol.Measure) -> None:
        moved[message.direction] += message.nbytes
        serve(desk, visit, message)

    monkeypatch.setattr(probe.ProbeDesk, "_move", move)
    monkeypatch.setattr(probe, "MAX_BYTES", 2**27)
    monkeypatch.setattr(probe, "MAX_TOTAL", 2**27)
    monkeypatch.setattr(link_check, "_LONG_ENOUGH_S", math.inf)
    with start_server() as running:
        check_link(running.address)
    assert 2**25 < min(moved.values()) <= max(moved.values()) <= 2**26


@pytest.mark.parametrize("clock_ns", [0, 2**63 - 1, -(2**63)])
def test_a_clock_that_is_not_set_has_no_offset(monkeypatch: pytest.MonkeyPatch, clock_ns: int) -> None:
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: clock_ns))
    with start_server() as running:
        report = check_link(running.address)
    assert report.clock_offset_s is None
    assert "clock           one of the two is not set" in link_check.render(report)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"staleness": -1}, "expected staleness to be 0 .* found -1"),
        ({"staleness": 2**62}, "expected staleness to be .* at most 64, found"),
        ({"local_steps": 0}, "expected local_steps to be at least 1, found 0"),
        ({"local_steps": 2**62}, "expected local_steps to be at most"),
        ({"format": "\x1b[31m"}, r"expected a format .* found '\\x1b\[31m'"),
    ],
)
def test_a_server_that_reports_what_no_run_has_is_not_believed(changes: dict[str, Any], found: str) -> None:
    assert link_check.settings(status()) == {"staleness": 1, "local_steps": 4, "format": "int8"}
    with pytest.raises(HandshakeError, match=f"the server reports a setting that no run has: {found}"):
        link_check.settings(status(**changes))


def test_the_command_does_not_compute_with_settings_that_no_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "look_once", lambda *_, **__: status(staleness=-1))
    with start_server() as running:
        asked = ["doctor", "--peer", running.address, "--model", "tiny", "--step-time", "1"]
        with pytest.raises(HandshakeError, match="expected staleness to be 0"):
            CliRunner().invoke(app, asked, catch_exceptions=False)


@needs_tls
def test_the_command_shows_the_link_its_tls_and_whether_a_model_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with start_server(token=TOKEN, tls=server_tls()) as running:
        ca = str(deployment().ca.certificate_file)
        common = ["doctor", "--peer", running.address, "--token-file", str(tmp_path / "token"), "--tls-ca", ca]
        text = CliRunner().invoke(app, common, catch_exceptions=False).output
        for part in ("round trip", "up ", "down ", "clock", "TLSv1.3", "TLS_AES_128_GCM_SHA256", "parablock server"):
            assert part in text
        assert deployment().server.fingerprint in text
        model = ["--model", "tiny", "--json"]
        slow = CliRunner().invoke(app, [*common, *model, "--step-time", "1"], catch_exceptions=False)
        assert re.match(r"hidden at .* 2 local steps take 2\.00 s", json.loads(slow.output)["overlap"])
        fast = CliRunner().invoke(app, [*common, *model, "--step-time", "0.0000001"], catch_exceptions=False)
        verdict = json.loads(fast.output)
        assert re.match(r"not hidden at .* --local-steps \d+ would hide it", verdict["overlap"])
        assert verdict["up"] > 0


@pytest.mark.parametrize(
    ("flags", "verdict"),
    [
        ([], r"not hidden: at staleness 0 .* in int4; "),
        (
            ["--staleness", "2", "--local-steps", "5", "--format", "bf16"],
            r"hidden at staleness 2: .* in bf16, and 5 local",
        ),
    ],
)
def test_the_command_asks_the_server_for_its_settings_and_flags_win(flags: list[str], verdict: str) -> None:
    with start_server(clients=1, staleness=0, local_steps=3, format="int4") as running:
        common = ["doctor", "--peer", running.address, "--model", "tiny", "--step-time", "100"]
        result = CliRunner().invoke(app, [*common, *flags], catch_exceptions=False)
        assert re.match(verdict, result.output.splitlines()[-1])
