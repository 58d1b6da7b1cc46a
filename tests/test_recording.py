"""The record that a program leaves which embeds the runtime: the same files as the command line's."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from leftovers import settles
from test_client import Net, one_step, serve, sgd, to_the_end

import parablock_rt as pb
from parablock_rt.errors import ConfigError, StoppedError
from parablock_rt.report import figures, folder
from parablock_rt.report.verdict import verdict
from parablock_rt.server.outcome import ClosedRound

ROUNDS = 6
PROMISED = (  # of every run's summary
    *("staleness", "format", "schedule", "rounds", "clients", "blocks", "local_steps", "wall_s", "compute_s"),
    *("serial_comm_s", "exposed_comm_s", "overlap_efficiency", "bytes_up", "bytes_down", "bad_groups", "digest"),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def summary_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


@pytest.mark.parametrize("staleness", [0, 1])
def test_both_sides_of_a_run_leave_what_a_report_is_made_of(staleness: int, tmp_path: Path) -> None:
    here, there = tmp_path / "client", tmp_path / "server"
    with serve(staleness=staleness) as server, pb.record(server, there):
        with pb.join(server.address, Net(), sgd) as run, pb.record(run, here):
            to_the_end(run)
        server.wait(60.0)
    for path, name in ((here, "client 0"), (there, "server")):
        files = {file.name for file in path.iterdir()}
        assert files >= {"metrics.jsonl", "summary.json", "telemetry.jsonl", "trace.json", "report.html"}
        assert lines_of(path) == list(range(ROUNDS))
        summary = summary_of(path)
        assert summary["complete"]
        assert set(PROMISED) <= summary.keys()
        assert (summary["rounds"], summary["blocks"], summary["clients"]) == (ROUNDS, 2, 1)
        assert summary["rounds_trained"] == ROUNDS
        (loaded,) = folder.load(path)
        assert verdict(loaded)
        assert name in (path / "trace.json").read_text()
    assert summary_of(here)["digest"] == server.outcome.digest
    own = summary_of(here)
    spent = own["compute_s"] + own["exposed_comm_s"] + own["waited_for_others_s"]
    assert 0 < spent <= own["wall_s"]
    assert (own["serial_comm_s"] is None) == (staleness == 1)


def test_a_loop_that_fails_leaves_the_record_of_what_it_did_and_the_reason_goes_to_the_server(tmp_path: Path) -> None:
    def fail_after_two_steps(server: pb.Server) -> None:
        with pb.join(server.address, Net(), sgd) as run, pb.record(run, tmp_path, period=0):
            one_step(run)
            one_step(run)
            raise ZeroDivisionError

    with serve() as server:
        with pytest.raises(ZeroDivisionError):
            fail_after_two_steps(server)
        assert settles(lambda: bool(server.outcome.left))
    assert lines_of(tmp_path) == [0, 1]
    assert not summary_of(tmp_path)["complete"]
    assert not (tmp_path / "telemetry.jsonl").exists()
    assert server.outcome.left == ["client 0: stopped by ZeroDivisionError"]


def test_rounds_that_closed_before_the_record_began_are_in_it_once(tmp_path: Path) -> None:
    closed, recorded = threading.Event(), threading.Event()

    def hold(done: object) -> None:
        closed.set()
        assert recorded.wait(60.0)

    with serve(on_round=hold) as server:
        client = threading.Thread(target=take_part, args=(server,))
        client.start()
        assert closed.wait(60.0)
        with pb.record(server, tmp_path):
            recorded.set()
            server.wait(60.0)
        client.join()
    assert lines_of(tmp_path) == list(range(ROUNDS))


def test_a_round_whose_own_listener_raises_is_in_the_record(tmp_path: Path) -> None:
    def fail_in_round_2(done: pb.RoundReport) -> None:
        if done.round == 2:
            raise ZeroDivisionError

    def train(server: pb.Server) -> None:
        with (
            pb.join(server.address, Net(), sgd, on_round=fail_in_round_2) as run,
            pb.record(run, tmp_path, period=0),
        ):
            to_the_end(run)

    with serve() as server, pytest.raises(ZeroDivisionError):
        train(server)
    assert lines_of(tmp_path) == [0, 1, 2]


def test_the_record_of_a_resumed_server_goes_on_with_that_of_the_earlier_one(tmp_path: Path) -> None:
    state, here = tmp_path / "state", tmp_path / "record"

    def stop(closed: ClosedRound) -> None:
        if closed.round == 2:
            first.close()

    with serve(durable=state, on_round=stop) as first, pb.record(first, here):
        client = threading.Thread(target=take_part, args=(first,))
        client.start()
        with pytest.raises(StoppedError):
            first.wait(60.0)
    sampled = (here / "telemetry.jsonl").read_text()
    assert sampled
    with pb.serve(Net(), resume=state) as second, pb.record(second, here):
        second.wait(60.0)
        client.join()
    assert (here / "telemetry.jsonl").read_text().startswith(sampled)
    assert lines_of(here) == list(range(ROUNDS))


@pytest.mark.parametrize(
    "wrong",
    [
        {"period": -1.0},
        {"period": "often"},
        {"report_to": "mlflow"},
        {"report_to": ["tensorboard"]},
        {"prometheus": 70_000},
        {"folder": ""},
        {"folder": 3},
    ],
)
def test_an_argument_that_is_refused_leaves_the_run_as_it_is(wrong: dict[str, Any], tmp_path: Path) -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        with pytest.raises(ConfigError), pb.record(run, **({"folder": tmp_path / "new" / "folder"} | wrong)):
            pass
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot be written"), pb.record(run, tmp_path / "file"):
            pass
        to_the_end(run)
        assert run.listeners == []


@pytest.mark.parametrize("wrong", [Net(), "127.0.0.1:7070", None])
def test_what_is_neither_run_nor_server_is_not_recorded(wrong: Any, tmp_path: Path) -> None:
    found = type(wrong).__name__
    with pytest.raises(ConfigError, match=rf"found a {found}; pass what pb\.join"), pb.record(wrong, tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_folder_takes_one_record_at_a_time(tmp_path: Path) -> None:
    with serve() as server, pb.record(server, tmp_path):
        with pb.join(server.address, Net(), sgd) as run:
            with pytest.raises(ConfigError, match="another run is using the run folder"), pb.record(run, tmp_path):
                pass
            to_the_end(run)
        server.wait(60.0)
    assert lines_of(tmp_path) == list(range(ROUNDS))
    assert "clients" in summary_of(tmp_path)
    with serve(rounds=2) as server, pb.join(server.address, Net(), sgd) as run, pb.record(run, tmp_path):
        to_the_end(run)
    assert lines_of(tmp_path) == [0, 1]


def test_a_client_that_trains_in_some_rounds_has_its_exchanges_counted_by_those(tmp_path: Path) -> None:
    """It is sent the aggregates of all rounds."""
    with serve(clients=3, fraction=0.3, rounds=12, staleness=0) as server:
        others = [threading.Thread(target=take_part, args=(server,)) for _ in range(2)]
        for other in others:
            other.start()
        with pb.join(server.address, Net(), sgd) as run, pb.record(run, tmp_path, period=0):
            to_the_end(run)
        for other in others:
            other.join()
        server.wait(60.0)
    summary = summary_of(tmp_path)
    assert (summary["rounds"], summary["rounds_trained"]) == (12, run.rounds)
    assert 0 < run.rounds < 12
    (loaded,) = folder.load(tmp_path)
    ahead = figures.forecast(loaded)
    assert ahead is not None
    assert not ahead.measured  # what it waited includes the rounds of the others
    assert ahead.send_s == pytest.approx(summary["stages"]["send"] / run.rounds)
    assert ahead.receive_s >= summary["stages"]["receive"] / 12


def take_part(server: pb.Server) -> None:
    with pb.join(server.address, Net(), sgd) as run:
        to_the_end(run)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serve() as server, pytest.raises(ConfigError, match="cannot be written"), pb.record(server, tmp_path / "file"):
        pass
    assert server.listeners == []
