"""The report on runs: what it reads, what it computes, what it says, and that nothing in a folder can break it."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import EXCHANGE_MS, write_run

from parablock_rt import cli
from parablock_rt.errors import ConfigError
from parablock_rt.report import figures, folder, render, write
from parablock_rt.report.figures import covered, length
from parablock_rt.report.folder import Span
from parablock_rt.report.page import _timeline, embeddable
from parablock_rt.report.verdict import percent, verdict

Main = Any
NBSP = "\N{NO-BREAK SPACE}"


def data_of(page: str) -> Any:
    """What the page's scripts read."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "night-run"
    write_run(path)
    return path


# ---- Figures


def test_the_report_s_figures_are_those_of_the_summary(run: Path) -> None:
    (shown,) = data_of(render([run]))["runs"]
    assert shown["summary"] == json.loads((run / "summary.json").read_text())
    assert shown["notes"] == []


def test_the_verdict_quotes_the_summary_and_what_would_still_be_hidden(run: Path) -> None:
    (loaded,) = folder.load(run)
    # Six exchanges of 0.3 s with 0.06 s of waiting; a step takes 0.1 s, so three hide an exchange as four do.
    assert verdict(loaded) == (
        f"97{NBSP}% of the communication was hidden: "
        "the training thread waited 0.1 s in addition to 2.4 s of computing. "
        f"The link was idle 33{NBSP}% of the time. "
        "With 3 local steps instead of 4 it would still be hidden: an exchange takes 0.30 s. "
        "Held-out loss went from 2.5000 to 1.2500."
    )


def test_without_overlap_the_verdict_says_what_would_hide_it(tmp_path: Path) -> None:
    write_run(tmp_path / "r", staleness=0, overlap_efficiency=0.0)
    (loaded,) = folder.load(tmp_path / "r")
    assert "Nothing was hidden, as expected at staleness 0: the training thread waited 1.8 s" in verdict(loaded)
    assert "With staleness 1, 3 local steps per round would hide it" in verdict(loaded)


def test_when_the_exchange_is_longer_than_the_round_the_verdict_says_how_many_steps_hide_it(tmp_path: Path) -> None:
    write_run(tmp_path / "r", serial_comm_s=6 * 0.85, overlap_efficiency=0.5)
    (loaded,) = folder.load(tmp_path / "r")
    assert "9 local steps per round instead of 4 would hide the rest: an exchange takes 0.85 s." in verdict(loaded)


def test_what_an_uneven_run_did_not_hide_is_not_called_hidden(tmp_path: Path) -> None:
    write_run(tmp_path / "r", overlap_efficiency=0.86)
    (loaded,) = folder.load(tmp_path / "r")
    assert "An exchange takes 0.30 s, which 3 of the 4 local steps would hide." in verdict(loaded)
    assert "still be hidden" not in verdict(loaded)


def test_the_tracks_of_a_process_stand_in_the_order_of_the_stages(run: Path) -> None:
    rows = data_of(render([run]))["runs"][0]["timeline"]["rows"]
    link = ["pb-transport: to server", "pb-transport: from server"]
    assert [track for process, track in rows if process == "client 0"] == ["training", "pb-encode", *link]
    uploads = [f"pb-transport: from client {seat}" for seat in range(2)]
    assert [track for process, track in rows if process == "server"] == [*uploads, "pb-server"]


def test_what_was_not_measured_is_called_an_estimate(tmp_path: Path) -> None:
    write_run(tmp_path / "r", serial_comm_s=None, overlap_efficiency=None)
    (loaded,) = folder.load(tmp_path / "r")
    ahead = figures.forecast(loaded)
    assert ahead is not None
    assert not ahead.measured
    assert ahead.exchange_s == pytest.approx(EXCHANGE_MS / 1e3)
    assert "an exchange takes about 0.30 s" in verdict(loaded)
    # Six exchanges of 0.3 s and 0.06 s of waiting.
    assert figures.hidden(loaded) == figures.Hidden(pytest.approx(1 - 0.06 / 1.8), measured=False)
    assert verdict(loaded).startswith(
        f"About 97{NBSP}% of the communication was hidden, by the length of its transfers"
    )
    assert "With 3 local steps instead of 4 it would still be hidden" in verdict(loaded)


def test_what_was_measured_and_is_nothing_is_not_called_hidden(tmp_path: Path) -> None:
    write_run(tmp_path / "r", overlap_efficiency=0.0)
    (loaded,) = folder.load(tmp_path / "r")
    assert "An exchange takes 0.30 s, which 3 of the 4 local steps would hide." in verdict(loaded)


def test_a_round_s_bars_are_the_figures_of_its_line_whatever_round_a_span_of_waiting_names(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"compute_s": 0.5, "exposed_s": 0.25 * line["round"]}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    trace = json.loads((run / "client-0" / "trace.json").read_text())
    waited = {"name": "exposed round 1", "ph": "X", "pid": 1, "tid": 1, "ts": 1e6, "dur": 7e5, "args": {"round": 1}}
    trace["traceEvents"].append(waited)
    (run / "client-0" / "trace.json").write_text(json.dumps(trace))
    (loaded,) = folder.load(run)
    assert [span.round for span in loaded.spans if figures.stage_of(span) == "exposed"] == [1]
    for entry in figures.rounds(loaded):
        assert (entry["stages"]["compute"], entry["stages"]["exposed"]) == (0.5, 0.25 * entry["round"])


def test_a_link_whose_sender_is_not_in_the_folder_is_not_called_idle_against_what_the_clients_said(run: Path) -> None:
    for seat in range(2):
        shutil.rmtree(run / f"client-{seat}")
    trace = json.loads((run / "trace.json").read_text())
    for seat in range(2):
        at = {"pid": 1, "tid": 90 + seat}
        trace["traceEvents"] += [
            at | {"ph": "M", "name": "thread_name", "args": {"name": f"pb-transport: to client {seat}"}},
            at | {"ph": "X", "name": "send round 0", "ts": 6e5, "dur": 1e5, "args": {"round": 0}},
        ]
    (run / "trace.json").write_text(json.dumps(trace))
    (alone,) = folder.load(run)
    known = figures.activity(alone)
    assert known is not None
    assert known.idle_link is not None  # the server saw the uploads for nearly as long as they took
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["stages"] = {"send": 0.9}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (slowed,) = folder.load(run)
    busy = figures.activity(slowed)
    assert busy is not None
    assert busy.idle_link is None
    assert "link up" not in busy.series
    assert "idle" not in verdict(slowed)


def test_a_client_that_the_round_waits_for_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["parts"][1]["late_s"] = 0.2
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (loaded,) = folder.load(tmp_path / "r")
    assert f"Client 1 comes last: its uploads are 0.20 s behind the first, 49{NBSP}% of a round." in verdict(loaded)
    assert [entry["client"] for entry in figures.clients(loaded)] == [1, 0]


def test_stages_are_means_over_clients_and_chunks_that_overlap_count_once(tmp_path: Path) -> None:
    write_run(tmp_path / "r", chunks=5)
    (loaded,) = folder.load(tmp_path / "r")
    stages = figures.rounds(loaded)[2]["stages"]
    expected = {"compute": 0.4, "encode": 0.01, "send": 0.15, "receive": 0.15, "wait": 0.0, "exposed": 0.01}
    assert stages == pytest.approx(expected, abs=1e-6)


def test_the_stages_that_the_run_itself_recorded_win_over_those_of_the_trace_but_for_transfers(run: Path) -> None:
    """A round's line has the transfers that ended since the last one; the trace knows which round they belong to."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["stages"] = {"send": 0.125, "encode": 0.25, "copy": 0.5, "nonsense": 1.0, "fold": None}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (loaded,) = folder.load(run)
    stages = figures.rounds(loaded)[0]["stages"]
    assert (stages["encode"], stages["copy"]) == (0.25, 0.5)
    assert stages["send"] == pytest.approx(0.15)
    assert stages.keys().isdisjoint({"nonsense", "fold"})


def rewrite_lines(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line | change(line)) for line in lines))


def test_a_transfer_that_had_not_ended_yet_is_not_taken_for_one_of_no_length(tmp_path: Path) -> None:
    """The first lines say 0 of exchanges that end in later rounds: the trace knows, and without it they count for
    nothing."""
    write_run(tmp_path / "r", rounds=3, serial_comm_s=None, overlap_efficiency=None)

    def stages(line: dict[str, Any]) -> dict[str, Any]:
        seconds = 0.15 if line["round"] == 2 else 0.0
        return {"stages": {"compute": 0.4, "send": seconds, "receive": seconds, "fold": 0.0}}

    rewrite_lines(tmp_path / "r", stages)
    for traces in ("there", "gone"):
        (loaded,) = folder.load(tmp_path / "r")
        ahead = figures.forecast(loaded)
        assert ahead is not None
        assert ahead.exchange_s == pytest.approx(0.3)
        if traces == "there":
            assert [entry["stages"]["send"] for entry in figures.rounds(loaded)] == pytest.approx([0.15] * 3)
            for path in (tmp_path / "r").rglob("trace.json"):
                path.unlink()


def test_a_direction_that_is_slower_than_the_other_is_not_hidden_by_more_staleness(tmp_path: Path) -> None:
    """0.25 s up and 0.05 s down: two rounds have room for 0.3 s in three steps of 0.1 s, not in two."""
    write_run(tmp_path / "r", staleness=2)
    rewrite_lines(tmp_path / "r", lambda _: {"stages": {"send": 0.25, "receive": 0.05}})
    for path in (tmp_path / "r").rglob("trace.json"):
        path.unlink()
    (loaded,) = folder.load(tmp_path / "r")
    ahead = figures.forecast(loaded)
    assert ahead is not None
    assert (ahead.exchange_s, ahead.send_s, ahead.receive_s) == pytest.approx((0.3, 0.25, 0.05))
    assert [ahead.steps_to_hide(staleness) for staleness in (1, 2, 9)] == [3, 3, 3]


def test_what_was_waited_for_other_clients_is_named_and_no_link_blamed_for_it(tmp_path: Path) -> None:
    write_run(tmp_path / "r", waited_for_others_s=2.0)
    (loaded,) = folder.load(tmp_path / "r")
    assert "waited 2.1 s, 2.0 s of it for other clients, in addition to 2.4 s of computing" in verdict(loaded)
    assert verdict(loaded).startswith(f"97{NBSP}% of the communication was hidden")


def test_where_more_was_waited_for_than_all_transfers_there_is_no_advice(tmp_path: Path) -> None:
    write_run(tmp_path / "r", overlap_efficiency=-0.5, exposed_comm_s=2.7)
    (loaded,) = folder.load(tmp_path / "r")
    assert "the wait for communication is longer than all transfers take one after another" in verdict(loaded)
    assert "local step" not in verdict(loaded)


def test_of_a_run_that_was_resumed_no_share_is_claimed_and_a_note_says_what_its_times_contain(tmp_path: Path) -> None:
    write_run(tmp_path / "r", resumed_from=4, serial_comm_s=None, overlap_efficiency=None)
    (shown,) = data_of(render([tmp_path / "r"]))["runs"]
    assert "closed the rounds from 5 on" in shown["notes"][0]
    assert "of computing, including the time without a server (" in shown["verdict"]
    assert "which 3 of the 4 local steps would hide." in shown["verdict"]
    assert "was hidden" not in shown["verdict"]
    assert "still be hidden" not in shown["verdict"]


def test_whole_blocks_are_no_part_of_a_round_s_exchange(run: Path) -> None:
    trace = json.loads((run / "client-0" / "trace.json").read_text())
    lanes = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] == "receive"]
    trace["traceEvents"].append(lanes[0] | {"ts": 0.0, "dur": 9e6, "args": {"kind": "snapshot", "round": 0}})
    (run / "client-0" / "trace.json").write_text(json.dumps(trace))
    (loaded,) = folder.load(run)
    assert [span.kind for span in loaded.spans].count("snapshot") == 1
    assert figures.rounds(loaded)[0]["stages"]["receive"] == pytest.approx(0.15)


def test_curves_of_processes_that_began_at_different_times_stand_over_the_same_time(run: Path) -> None:
    (loaded,) = folder.load(run)
    origin_ns = int(figures.origin_us(loaded) * 1e3)
    for part, began_s in ((run, -2.0), (run / "client-0", 1.0)):
        line = {"process": part.name, "t_s": 0.5, "at_ns": origin_ns + int((began_s + 0.5) * 1e9)}
        (part / "telemetry.jsonl").write_text(json.dumps(line | {"link.x.bytes_in_rate": 1e6}))
    (loaded,) = folder.load(run)
    points = {each["name"]: each["points"] for each in figures.telemetry(loaded)}
    assert points == {"night-run: in": [(-1.5, 1.0)], "client-0: in": [(1.5, 1.0)]}


def test_activity_is_the_share_of_each_bin_that_was_busy(run: Path) -> None:
    (loaded,) = folder.load(run)
    busy = figures.activity(loaded)
    assert busy is not None
    total_s = 6 * 0.4 + 0.3
    assert busy.bin_us * figures.BINS == pytest.approx(total_s * 1e6)
    assert busy.busy == pytest.approx({"compute": 2.4 / total_s, "link up": 0.9 / total_s, "link down": 0.9 / total_s})
    assert busy.idle_link == pytest.approx(1 - 1.8 / total_s)


intervals = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)).map(lambda p: (p[0], p[0] + p[1])))


@given(intervals)
def test_the_union_of_intervals_covers_each_point_once(found: list[tuple[int, int]]) -> None:
    points = {at for start, end in found for at in range(start, end)}
    assert length(found) == len(points)
    union = covered(found)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(union))


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.9996, "100.0 %"), (0.97, "97 %"), (0.0, "0 %"), (0.001, "0.1 %")]
)
def test_only_what_is_all_or_nothing_reads_as_such(share: float, text: str) -> None:
    assert percent(share) == text.replace(" ", NBSP)


# ---- Folders that are partial, damaged or from elsewhere


def test_a_folder_of_several_runs_shows_them_all_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        write_run(tmp_path / day / "sequential", staleness=0)
        write_run(tmp_path / day / "parallel")
    names = [r["name"] for r in data_of(render([tmp_path / "monday", tmp_path / "tuesday"]))["runs"]]
    assert sorted(names) == ["monday/parallel", "monday/sequential", "tuesday/parallel", "tuesday/sequential"]


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "trace.json"])
def test_a_missing_file_is_named_and_the_rest_is_shown(run: Path, missing: str) -> None:
    (run / missing).unlink()
    (shown,) = data_of(render([run]))["runs"]
    assert shown["notes"] == [f"{missing} is missing."]
    assert shown["rounds"]
    assert shown["verdict"]


def test_lines_that_are_cut_off_are_counted_and_the_others_shown(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    (shown,) = data_of(render([run]))["runs"]
    assert shown["notes"] == ["metrics.jsonl: 1 of 6 lines are damaged and left out (line 6)."]
    assert len([r for r in shown["rounds"] if "loss" in r]) == 5


def test_a_trace_cut_off_in_the_middle_is_left_out_and_named(run: Path) -> None:
    text = (run / "client-1" / "trace.json").read_text()
    (run / "client-1" / "trace.json").write_text(text[: len(text) // 2])
    (shown,) = data_of(render([run]))["runs"]
    (note,) = shown["notes"]
    assert note.startswith("client-1/trace.json is damaged and left out")
    assert {process for process, _ in shown["timeline"]["rows"]} == {"server", "client 0"}


def test_a_trace_of_another_boot_is_left_out_and_named(run: Path) -> None:
    trace = json.loads((run / "client-1" / "trace.json").read_text())
    trace["otherData"]["boot"] = "another"
    (run / "client-1" / "trace.json").write_text(json.dumps(trace))
    (run / "client-1" / "telemetry.jsonl").write_text('{"process": "client 1", "at_ns": 1}')
    (loaded,) = folder.load(run)
    assert {span.process for span in loaded.spans} == {"server", "client 0"}
    assert loaded.samples == {}
    (note,) = loaded.notes
    assert note.startswith("client-1/trace.json was recorded on another machine or boot")


def test_records_that_a_trace_lacks_are_told(run: Path) -> None:
    trace = json.loads((run / "client-1" / "trace.json").read_text())
    trace["otherData"]["lost_records"] = 1234
    (run / "client-1" / "trace.json").write_text(json.dumps(trace))
    (loaded,) = folder.load(run)
    (note,) = loaded.notes
    assert note.startswith("client-1/trace.json lacks 1,234 records that its process could not keep")


def test_the_tracks_of_many_clients_stand_in_the_order_of_their_numbers() -> None:
    spans = [Span(f"client {seat}", f"lane {lane}", "x", 0.0, 1.0, 0) for seat in (10, 2, 1) for lane in (11, 3)]
    rows = [f"{process}, {track}" for process, track in _timeline(spans, 0.0)["rows"]]
    assert rows == [f"client {seat}, lane {lane}" for seat in (1, 2, 10) for lane in (3, 11)]


def test_numbers_that_are_none_become_gaps(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"loss": float("nan"), "bytes_up": None, "compute_s": "fast", "open_s": True}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    summary = json.loads((run / "summary.json").read_text()) | {"wall_s": float("inf"), "overlap_efficiency": None}
    (run / "summary.json").write_text(json.dumps(summary))
    (shown,) = data_of(render([run]))["runs"]
    assert [shown["rounds"][1][name] for name in ("loss", "bytes_up", "compute_s", "open_s")] == [None] * 4
    assert shown["rounds"][2]["loss"] == 1.0
    assert shown["summary"]["wall_s"] is None
    assert "waited 0.1 s in addition to 2.4 s of computing" in shown["verdict"]


@pytest.mark.parametrize(
    ("version", "note"),
    [
        (7, "summary.json has version 7, this release reads version 2"),
        (None, "summary.json has no version"),
        ("x", "summary.json has version 'x'"),
    ],
)
def test_a_summary_of_another_version_is_said_to_be_one(run: Path, version: object, note: str) -> None:
    summary = json.loads((run / "summary.json").read_text()) | {"version": version}
    (run / "summary.json").write_text(json.dumps(summary))
    (shown,) = data_of(render([run]))["runs"]
    assert shown["notes"][0].startswith(note)
    assert len(shown["rounds"]) == 6


def test_a_run_that_was_cut_short_is_said_to_be_one(tmp_path: Path) -> None:
    write_run(tmp_path / "r", complete=False)
    (shown,) = data_of(render([tmp_path / "r"]))["runs"]
    assert shown["notes"] == ["The run did not end as planned: summary.json says that it is not complete."]


def test_what_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected summary\.json, metrics\.jsonl or trace\.json in .* found none"):
        render([tmp_path])
    with pytest.raises(ConfigError, match="expected the folder of a run, found nothing at"):
        render([tmp_path / "nowhere"])


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_overwritten_in_a_folder_there_is_a_report(run: Path, seed: int) -> None:
    """Values of other types, bytes turned over, files cut: 40 ways to damage each file of the folder at once."""
    noise = random.Random(seed)
    junk = [None, float("nan"), -1, 1e300, 10**400, "x", [], {}, [1], {"a": 1}, True]
    for path in (path for path in sorted(run.rglob("*.json*")) if path.stat().st_size > 0):
        kind = noise.choice(("values", "bytes", "cut", "keep"))
        if kind == "values":
            damaged = [json.dumps(scramble(json.loads(part), noise, junk)) for part in parts_of(path)]
            path.write_text("\n".join(damaged))
        elif kind == "bytes":
            content = bytearray(path.read_bytes())
            for _ in range(5):
                content[noise.randrange(len(content))] = noise.randrange(256)
            path.write_bytes(content)
        elif kind == "cut":
            content = path.read_bytes()
            path.write_bytes(content[: noise.randrange(len(content))])
    page = render([run])
    assert data_of(page)["runs"][0]["verdict"]


MANY = "9" * 5000


def a_slice(**changes: Any) -> dict[str, Any]:
    return {"ph": "X", "name": "compute", "pid": 1, "tid": 1, "ts": 0, "dur": 1} | changes


def a_name(of: str) -> dict[str, Any]:
    return {"ph": "M", "name": of, "pid": 1, "tid": 1, "args": {"name": f"client {MANY}"}}


@pytest.mark.parametrize(
    "events",
    [
        [a_name("process_name"), a_slice()],
        [a_name("thread_name"), a_slice()],
        [a_slice(name=f"compute round {MANY}")],
        [a_slice(dur=5e-324)],
    ],
    ids=["process", "track", "round", "length"],
)
def test_a_trace_with_numbers_of_no_run_is_shown(run: Path, events: list[dict[str, Any]]) -> None:
    for seat in range(2):
        shutil.rmtree(run / f"client-{seat}")
    (run / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert data_of(render([run]))["runs"][0]["verdict"]


def test_a_summary_with_figures_of_no_run_is_shown(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"rounds": 1e-300, "rounds_trained": 1e-300, "serial_comm_s": 1e18}
    (run / "summary.json").write_text(json.dumps(summary))
    assert data_of(render([run]))["runs"][0]["verdict"]


def test_a_summary_that_is_nested_deeper_than_any_is_shown(run: Path) -> None:
    summary = (run / "summary.json").read_text()
    (run / "summary.json").write_text(summary.replace("{", '{"x": ' + "[" * 600 + "]" * 600 + ",", 1))
    (shown,) = data_of(render([run]))["runs"]
    assert shown["summary"]["overlap_efficiency"] is not None


@pytest.mark.parametrize(
    "changes",
    [
        lambda line: {"open_s": 0.0},
        lambda line: {"open_s": (-1.0) ** line["round"]},
        lambda line: {"compute_s": 1e-310},
    ],
    ids=["zero", "balanced", "step"],
)
def test_lines_with_times_of_no_run_are_shown(run: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rewrite_lines(run, changes)
    assert data_of(render([run]))["runs"][0]["verdict"]


def parts_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def scramble(value: Any, noise: random.Random, junk: list[Any]) -> Any:
    if noise.random() < 0.1:
        return noise.choice(junk)
    if isinstance(value, dict):
        return {key: scramble(inner, noise, junk) for key, inner in value.items()}
    if isinstance(value, list):
        return [scramble(inner, noise, junk) for inner in value]
    return value


# ---- The file


def test_the_page_needs_nothing_from_anywhere_else(run: Path) -> None:
    page = render([run])
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\((?!#)|@import|fetch\(|XMLHttp|import\(""", page)
    assert outside == []
    assert "default-src 'none'" in page


def test_nothing_in_the_data_can_become_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "r", format="</script><script>alert(1)</script><!--", schedule="<!-- script -->&amp;")
    page = render([tmp_path / "r"])
    assert page.count("<script") == 2
    assert data_of(page)["runs"][0]["summary"]["format"] == "</script><script>alert(1)</script><!--"
    assert data_of(page)["runs"][0]["summary"]["schedule"] == "<!-- script -->&amp;"


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_embedded_json_means_the_same_and_has_no_angle_brackets(content: Any) -> None:
    text = embeddable(json.dumps(content))
    assert json.loads(text) == content
    assert not set("<>&") & set(text)


def test_leaving_a_report_never_fails_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "nowhere")
    assert "could not write the report" in caplog.text
    write_run(tmp_path / "r")
    write(tmp_path / "r")
    assert "97" in data_of((tmp_path / "r" / "report.html").read_text())["runs"][0]["verdict"]


def test_the_command_writes_the_report(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["parablock", "report", str(run), "-o", str(tmp_path / "out.html")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert data_of((tmp_path / "out.html").read_text())["runs"][0]["name"] == "night-run"


@pytest.mark.parametrize("arguments", [["report"], ["report", "nowhere"]])
def test_a_report_on_nothing_is_wrong_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["parablock", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
