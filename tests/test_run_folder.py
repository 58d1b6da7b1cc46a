"""What a run leaves behind: strict JSON, the folder, the summary's arithmetic."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError
from parablock_rt.observe import reporters, run_folder
from parablock_rt.observe.run_folder import RunFolder, to_json
from parablock_rt.observe.telemetry import Sample
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.stages import StageSeconds
from parablock_rt.summary import SUMMARY_VERSION, summarise
from parablock_rt.wire.protocol import Goodbye

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_what_is_written_can_be_read_by_a_strict_reader(content: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def expected(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        if isinstance(value, list):
            return [expected(item) for item in value]
        return (
            None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value
        )

    assert json.loads(to_json(content), parse_constant=refuse) == expected(content)


def test_what_only_a_damaged_file_can_hold_is_cut_off_where_no_reader_fails_at_it() -> None:
    content: Any = 1
    for _ in range(600):
        content = {"a": [content]}
    found, levels = json.loads(to_json(content)), 0
    while found is not None:
        found, levels = found["a"] if levels % 2 == 0 else found[0], levels + 1
    assert levels == 64


# ---- The folder


def test_a_run_folder_is_made_with_its_parents_and_has_the_metrics_of_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.append_metrics({"round": 0, "loss": float("nan")})
    folder.append_metrics({"round": 1, "loss": 0.5})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 0, "loss": None}, {"round": 1, "loss": 0.5}]
    again = RunFolder(folder.path)
    again.append_metrics({"round": 0})
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 0}\n'


def test_a_folder_that_is_used_again_keeps_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    for name in ("summary.json", "trace.json", "report.html", "telemetry.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("of an earlier run")
    (tmp_path / "notes.txt").write_text("of the user")
    RunFolder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "notes.txt"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_that_is_resumed_keeps_its_telemetry_and_adds_to_it(tmp_path: Path) -> None:
    for name in ("summary.json", "telemetry.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text('{"of": "the server before"}\n')
    lines = reporters.JsonLines(RunFolder(tmp_path, resumed=True))
    lines.sample("server", Sample(0.0, 1, 2.0, {}))
    assert [len((tmp_path / f).read_text().splitlines()) for f in ("telemetry.jsonl", "metrics.jsonl")] == [2, 0]
    assert (tmp_path / "summary.json").exists()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for content in ({"a": 1}, {"b": [1, 2]}):
        folder.write_json("summary.json", content)
        assert json.loads((tmp_path / "summary.json").read_text()) == content
    with pytest.raises(TypeError):
        folder.write_json("summary.json", {"c": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"b": [1, 2]}


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_run_folder_that_cannot_be_is_refused_with_a_way_out(tmp_path: Path, place: str) -> None:
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(ConfigError) as failure:
        RunFolder(tmp_path / place)
    assert f"the run folder {tmp_path / place} cannot be written (" in str(failure.value)
    assert "choose another folder (--run-dir, or the argument of pb.record)" in str(failure.value)


def test_a_run_goes_on_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with run_folder.held(tmp_path / "run"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


# ---- The summary


def closed(round: int, **changes: Any) -> ClosedRound:
    fields = {
        "round": round,
        "block": 0,
        "loss": 1.5,
        "contributions": 2,
        "weight": 2.0,
        "bad_groups": round,
        "compute_s": 1.0,
        "exposed_s": 0.25,
        "open_s": 2.0,
        "skew_s": 0.5,
        "bytes_up": 130 * (round + 1),
        "bytes_down": 260 * (round + 1),
        "fingerprint": 7,
    }
    return ClosedRound(**fields | changes)


def outcome(rounds: int) -> Outcome:
    goodbyes = {
        0: Goodbye(digest="d", reason="", compute_s=4.0, exposed_s=1.0, stages=StageSeconds(compute=4.0, wait=1.0)),
        1: Goodbye(digest="d", reason="", compute_s=6.0, exposed_s=2.0, stages=StageSeconds(compute=6.0)),
        2: Goodbye(digest="", reason="left", compute_s=100.0, exposed_s=100.0, stages=StageSeconds(send=50.0)),
    }
    return Outcome(
        rounds=[closed(round) for round in range(rounds)],
        wall_s=9.0,
        digest="d",
        server_stages=StageSeconds(fold=0.5),
        client_digests={1: "d1", 0: "d0"},
        goodbyes=goodbyes,
        left=["client 2: left"],
    )


def test_the_figures_of_a_summary() -> None:
    summary = summarise(
        RunConfig(rounds=3, clients=3),
        outcome(3),
        blocks=4,
        serial_comm_s=3.0,
        eval_loss_before=2.0,
        eval_loss_after=1.0,
    )
    assert summary["complete"] is True
    assert (summary["rounds"], summary["clients"], summary["blocks"], summary["local_steps"]) == (3, 3, 4, 4)
    assert (summary["staleness"], summary["format"], summary["schedule"], summary["seed"]) == (1, "int8", "cyclic", 0)
    assert (summary["wall_s"], summary["skew_s"], summary["bad_groups"]) == (9.0, 1.5, 3)
    assert (summary["compute_s"], summary["exposed_comm_s"]) == (5.0, 1.0)  # of those who stayed
    assert summary["waited_for_others_s"] == 0.5
    assert (summary["serial_comm_s"], summary["overlap_efficiency"]) == (3.0, 1 - 1 / 3)
    assert (summary["bytes_up"], summary["bytes_down"]) == (390, 780)
    assert summary["bytes_as_bf16"] == 1170 * 256 / 130
    assert (summary["eval_loss_before"], summary["eval_loss_after"]) == (2.0, 1.0)
    assert summary["digest"] == {"server": "d", "clients": ["d0", "d1"]}
    assert summary["left_early"] == ["client 2: left"]
    assert (summary["stages"]["compute"], summary["stages"]["wait"], summary["stages"]["send"]) == (5.0, 0.5, 0.0)
    assert list(summary["stages_of"]) == ["server", "client 0", "client 1", "client 2"]
    assert summary["stages_of"]["server"]["fold"] == 0.5
    assert summary["stages_of"]["client 2"]["send"] == 50.0


def test_without_overlap_all_communication_is_exposed() -> None:
    summary = summarise(RunConfig(rounds=3, clients=2, staleness=0), outcome(3), blocks=4)
    assert summary["serial_comm_s"] == summary["exposed_comm_s"] == 1.0
    assert summary["overlap_efficiency"] == 0.0


def test_a_run_that_was_cut_short_has_a_summary_that_says_so() -> None:
    config = RunConfig(rounds=3, clients=2)
    short = summarise(config, Outcome(rounds=[closed(0)]), blocks=4)
    assert (short["complete"], short["rounds"], short["compute_s"], short["exposed_comm_s"]) == (False, 1, 1.0, 0.25)
    assert (short["serial_comm_s"], short["overlap_efficiency"]) == (None, None)
    nothing = summarise(config, Outcome(), blocks=4)
    assert (nothing["complete"], nothing["rounds"], nothing["bytes_up"]) == (False, 0, 0)
    assert nothing["train_loss_last"] is None
    assert nothing["digest"] == {"server": "", "clients": []}


def test_waiting_for_other_clients_is_not_communication() -> None:
    """The first waited 1 s of its 3 s for the second, which was blocked for 1 s and waited for nobody."""
    both = {
        0: Goodbye(digest="d", reason="", compute_s=4.0, exposed_s=3.0, rounds=3, stages=StageSeconds(wait=1.0)),
        1: Goodbye(digest="d", reason="", compute_s=6.0, exposed_s=1.0, rounds=3, stages=StageSeconds()),
    }
    ended = Outcome(rounds=[closed(round) for round in range(3)], goodbyes=both)
    hidden = summarise(RunConfig(rounds=3, clients=2), ended, blocks=4, serial_comm_s=3.0)
    assert (hidden["exposed_comm_s"], hidden["waited_for_others_s"], hidden["overlap_efficiency"]) == (1.5, 0.5, 0.5)
    serial = summarise(RunConfig(rounds=3, clients=2, staleness=0), ended, blocks=4)
    assert (serial["serial_comm_s"], serial["exposed_comm_s"], serial["overlap_efficiency"]) == (1.5, 1.5, 0.0)


def test_a_client_that_waits_for_others_while_it_computes_was_not_blocked_by_them() -> None:
    goodbye = Goodbye(digest="d", reason="", compute_s=4.0, exposed_s=0.25, rounds=1, stages=StageSeconds(wait=3.0))
    summary = summarise(RunConfig(rounds=1, clients=1), Outcome(rounds=[closed(0)], goodbyes={0: goodbye}), blocks=4)
    assert (summary["exposed_comm_s"], summary["waited_for_others_s"]) == (0.0, 0.25)


def test_a_client_that_came_in_anothers_place_counts_for_the_rounds_that_it_took() -> None:
    """A whole run takes 1 s of computing and 0.5 s of waiting per round, whoever tells it."""
    stages = {rounds: StageSeconds(compute=1.0 * rounds, send=0.25 * rounds) for rounds in (12, 3)}
    whole, part = (
        Goodbye(digest="d", reason="", compute_s=1.0 * rounds, exposed_s=0.5 * rounds, rounds=rounds, stages=of)
        for rounds, of in stages.items()
    )
    ended = Outcome(rounds=[closed(round) for round in range(12)], goodbyes={0: whole, 1: part})
    summary = summarise(RunConfig(rounds=12, clients=2), ended, blocks=4, serial_comm_s=12.0)
    assert summary["compute_s"] == pytest.approx(12.0)
    assert summary["exposed_comm_s"] == pytest.approx(6.0)
    assert summary["overlap_efficiency"] == pytest.approx(0.5)
    assert (summary["stages"]["compute"], summary["stages"]["send"]) == pytest.approx((12.0, 3.0))


def test_whole_blocks_are_counted_apart_and_have_the_same_size_in_every_format() -> None:
    ended = Outcome(rounds=[closed(0, bytes_up=1300, bytes_down=1300 + 50_000, snapshot_bytes=50_000)])
    summary = summarise(RunConfig(rounds=1, clients=1), ended, blocks=4)
    assert (summary["bytes_down"], summary["snapshot_bytes"]) == (51_300, 50_000)
    assert summary["bytes_as_bf16"] == 2 * 2560 + 50_000


def test_a_run_that_was_resumed_says_so_and_claims_no_hidden_share() -> None:
    """Its clients have been blocked while there was no server, which is no communication."""
    ended = outcome(3)
    ended.resumed_from = 2
    for staleness in (0, 1):
        summary = summarise(RunConfig(rounds=3, clients=3, staleness=staleness), ended, blocks=4, serial_comm_s=3.0)
        assert (summary["resumed_from"], summary["version"]) == (2, SUMMARY_VERSION)
        assert (summary["serial_comm_s"], summary["overlap_efficiency"]) == (None, None)
    assert summarise(RunConfig(rounds=3, clients=3), outcome(3), blocks=4)["resumed_from"] is None
