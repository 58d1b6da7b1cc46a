"""Traces that a viewer can open: of one process, of several joined, and of torch's profiler beside them."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trace_schema
from federations import take_spy
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import WAIT_S, loss_fn, make_batches, make_model, sgd, start_server

import parablock_rt as pb
from parablock_rt.client.run import Run
from parablock_rt.errors import TraceError
from parablock_rt.observe import profiling, trace, trace_merge
from parablock_rt.observe.run_folder import to_json
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.wire.protocol import Kind

DOCUMENT = Path(__file__).parent.parent / "docs" / "telemetry.md"
ROUNDS, CLIENTS, CHUNK = 5, 2, 1024
CHUNKS = -(-(64 * 64 + 128) // CHUNK)  # of a block: the weights and the padded bias


@dataclass
class Federation:
    """The traces of a server and its clients, joined; the profile of client 0's thread; its run."""

    joined: dict[str, Any]
    files: dict[str, Path]
    profile: Path
    runs: dict[int, Run]
    server: pb.Server


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("traces")
    runs: dict[int, Run] = {}
    profile = folder / "profile.json"
    with start_server(rounds=ROUNDS, clients=CLIENTS, chunk=CHUNK) as server:

        def client(model: torch.nn.Module, profiler: contextlib.AbstractContextManager[Any]) -> None:
            with pb.join(server.address, model, sgd) as run, profiler:
                runs[run.client] = run
                for batch in run.stream(make_batches(run.client)):
                    run.train_step(batch, loss_fn)

        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        threads = [
            threading.Thread(target=client, args=(make_model(), p)) for p in (profiler, contextlib.nullcontext())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        server.wait(WAIT_S)
    profiler.export_chrome_trace(str(profile))
    timelines = {"server": server.timeline, **{f"client {seat}": run.timeline for seat, run in runs.items()}}
    files = {}
    for name, timeline in timelines.items():
        files[name] = folder / f"{name}.json"
        trace.write(files[name], timeline)
    joined = trace_merge.merge([("", trace_merge.read(path)) for path in files.values()])
    return Federation(joined, files, profile, runs, server)


# ---- One process


def test_the_trace_of_every_process_keeps_the_rules_of_the_format(federation: Federation) -> None:
    for path in federation.files.values():
        trace_schema.check(json.loads(path.read_text()))


def test_every_stage_of_every_chunk_of_an_upload_and_of_an_update_is_there(federation: Federation) -> None:
    counts: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for name, path in federation.files.items():
        for event in json.loads(path.read_text())["traceEvents"]:
            if event["ph"] == "X" and "chunk" in event["args"]:
                counts.setdefault((name, event["cat"]), set()).add((event["args"]["round"], event["args"]["chunk"]))
    every = {(round, chunk) for round in range(ROUNDS) for chunk in range(CHUNKS)}
    for name in federation.files:
        for stage in ("encode", "checksum", "send", "receive", "verify"):
            assert counts[name, stage] == every, (name, stage)


def test_each_thread_and_each_direction_of_a_link_has_a_track(federation: Federation) -> None:
    tracks = {
        name: {
            event["args"]["name"]
            for event in json.loads(path.read_text())["traceEvents"]
            if event["name"] == "thread_name"
        }
        for name, path in federation.files.items()
    }
    links = {f"pb-transport: {way} client {seat}" for way in ("to", "from") for seat in range(CLIENTS)}
    assert tracks["server"] == {"pb-server", "pb-encode", *links}
    for seat in range(CLIENTS):
        links = {"pb-transport: to server", "pb-transport: from server"}
        assert tracks[f"client {seat}"] == {"training", "pb-encode", *links}


def test_counters_end_where_they_began(federation: Federation) -> None:
    last: dict[tuple[int, str], float] = {}
    highest: dict[str, float] = {}
    for event in federation.joined["traceEvents"]:
        if event["ph"] == "C":
            value = event["args"]["value"]
            assert value >= 0
            last[event["pid"], event["name"]] = value
            highest[event["name"]] = max(highest.get(event["name"], 0), value)
    assert set(last.values()) == {0}
    for name in ("bytes in flight to server", "bytes in flight to client 1", "Mbit/s to server", "Mbit/s from server"):
        assert highest[name] > 0
    body = 64 * 64 + 128 + (64 * 64 + 128) // 128 * 2
    assert highest["bytes in flight to server"] <= 2 * body
    # With a staleness of one a round may close while the aggregate of the one before it still waits for the socket.
    assert 1 <= highest["chunks encoded, not sent"] <= 2 * CHUNKS * CLIENTS


def test_every_counter_that_is_drawn_is_documented_and_the_other_way_round(federation: Federation) -> None:
    _, _, section = DOCUMENT.read_text().partition("## Counters of the trace")
    written = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    patterns = [re.compile(re.sub(r"<peer>", r"(server|client \\d+)", re.escape(name))) for name in written]
    drawn = {event["name"] for event in federation.joined["traceEvents"] if event["ph"] == "C"}
    assert [name for name in drawn if not any(pattern.fullmatch(name) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(map(pattern.fullmatch, drawn))] == []
    assert len(patterns) == 4


def test_what_the_telemetry_measured_becomes_counters(tmp_path: Path) -> None:
    samples = [
        trace.CounterSample(1_500, {"gpu.0.utilization": 0.5}),
        trace.CounterSample(2_000, {"gpu.0.utilization": 1.0}),
    ]
    assert trace.write(tmp_path / "t.json", Timeline("p", "main"), samples) == 3
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [(e["name"], e["ts"], e["args"]["value"]) for e in events if e["ph"] == "C"] == [
        ("gpu.0.utilization", 1.5, 0.5),
        ("gpu.0.utilization", 2.0, 1.0),
    ]


def test_a_timeline_that_was_off_gives_a_trace_without_events_of_its_own(tmp_path: Path) -> None:
    assert trace.write(tmp_path / "t.json", Timeline("p", "main", on=False)) == 1
    found = json.loads((tmp_path / "t.json").read_text())
    assert [event["name"] for event in found["traceEvents"]] == ["process_name"]
    assert found["otherData"]["lost_records"] == 0


def test_a_slice_names_what_is_transferred(federation: Federation) -> None:
    kinds: dict[str, set[str]] = {}
    for event in json.loads(federation.files["server"].read_text())["traceEvents"]:
        if event["ph"] == "X":
            kinds.setdefault(event["cat"], set()).add(event["args"]["kind"])
    assert (kinds["receive"], kinds["send"], kinds["close"]) == ({"upload"}, {"update"}, {"round"})


def test_times_keep_their_nanoseconds(tmp_path: Path) -> None:
    made = Timeline("p", "main")
    made.add(Stage.COMPUTE, 10**15 + 1, 10**15 + 1002, round=7, block=3)
    trace.write(tmp_path / "t.json", made)
    text = (tmp_path / "t.json").read_text()
    assert '"ts":1000000000000.001,"dur":1.001,' in text


def test_every_lane_of_a_link_has_its_tracks_and_a_snapshot_is_there_too(tmp_path: Path) -> None:
    lanes: set[int] = set()
    while len(lanes) < 2:  # which lane takes a chunk is nobody's promise; the test's own limit ends it
        with start_server(rounds=6, clients=1, chunk=128, lanes=3) as server:
            with pb.join(server.address, make_model(seed=1), sgd, lanes=3) as run:
                for batch in run.stream(make_batches(0)):
                    run.train_step(batch, loss_fn)
            server.wait(WAIT_S)
        lanes = {int(lane) for _, r in run.timeline.threads() for lane in r["lane"][r["stage"] == Stage.SEND]}
    assert lanes <= {0, 1, 2}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, timeline in (("server", server.timeline), ("client", run.timeline)):
        trace.write(tmp_path / name, timeline)
        content = json.loads((tmp_path / name).read_text())
        trace_schema.check(content)
        found[name] = content["traceEvents"]
    for name, track in (("client", "to server"), ("server", "from client 0")):
        tracks = {event["args"]["name"] for event in found[name] if event["name"] == "thread_name"}
        assert {f"pb-transport{f' lane {lane}' if lane else ''}: {track}" for lane in lanes} <= tracks
    assert {"checksum", "send"} <= {event.get("cat") for event in found["server"]}
    snapshots = [r for _, records in run.timeline.threads() for r in records if r["kind"] == Kind.SNAPSHOT]
    assert {Stage(int(record["stage"])) for record in snapshots} == {Stage.RECEIVE, Stage.VERIFY}
    received = [event["args"]["kind"] for event in found["client"] if event.get("cat") == "receive"]
    assert received.count("snapshot") == len(snapshots) // 2
    assert server.outcome.rounds[-1].snapshot_bytes == sum(int(r["bytes"]) for r in snapshots) // 2


# ---- Several processes


def test_a_flow_ties_a_chunk_together_from_client_to_server_and_back(federation: Federation) -> None:
    trace_schema.check(federation.joined)
    found = trace_schema.flows(federation.joined)
    for name, last in (("upload", "fold"), ("update", "apply")):
        of_name = [stages for (flow, _), stages in found.items() if flow == name]
        assert of_name == [["encode", "send", "receive", last]] * (ROUNDS * CHUNKS * CLIENTS)


def test_joined_traces_keep_every_event_and_no_two_processes_share_a_number(federation: Federation) -> None:
    parts = {name: json.loads(path.read_text()) for name, path in federation.files.items()}
    joined = trace_merge.merge([(run, part) for run in ("first", "second") for part in parts.values()])
    events = joined["traceEvents"]
    assert len(events) == 2 * sum(len(part["traceEvents"]) for part in parts.values())
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(processes.values()) == [f"{run}: {name}" for run in ("first", "second") for name in parts]
    before = json.loads(federation.files["server"].read_text())
    assert parts["server"] == before  # what was given is left alone


def test_traces_of_different_machines_are_not_joined(federation: Federation) -> None:
    here = trace_merge.read(federation.files["server"])
    there = {**here, "otherData": {**here["otherData"], "boot": "another"}}
    with pytest.raises(TraceError, match="different machines or boots") as failure:
        trace_merge.merge([("a", here), ("b", there)])
    assert "(a, b)" in str(failure.value)


# ---- torch's profiler


def test_a_profile_is_put_on_the_clock_of_the_trace(federation: Federation) -> None:
    profile = trace_merge.read(federation.profile)
    ours = json.loads(next(path.read_text() for path in federation.files.values() if "client" in path.name))
    assert ours["otherData"]["clock"] == "CLOCK_MONOTONIC"
    annotated = [e for e in profile["traceEvents"] if e.get("name") == "parablock.apply"]
    seats = [json.loads(federation.files[f"client {seat}"].read_text()) for seat in range(CLIENTS)]
    applied = [sorted(e["ts"] for e in seat["traceEvents"] if e["ph"] == "X" and e["cat"] == "apply") for seat in seats]
    found = sorted(e["ts"] for e in annotated)
    assert len(found) == ROUNDS
    # Of one client, and within a second, on a clock that is years away from the profiler's.
    assert any(max(abs(a - b) for a, b in zip(found, times, strict=True)) < 1_000_000 for times in applied)


def test_a_profile_and_traces_become_one_file(federation: Federation) -> None:
    paths = [*federation.files.values(), federation.profile]
    merged = trace_merge.merge([(path.stem, trace_merge.read(path)) for path in paths])
    names = {event["name"] for event in merged["traceEvents"]}
    assert {"aten::linear", "compute round 0"} <= names
    flows = trace_schema.flows({"traceEvents": [e for e in merged["traceEvents"] if e.get("cat") != "fwdbwd"]})
    assert sum(len(stages) == 4 for stages in flows.values()) == 2 * ROUNDS * CHUNKS * CLIENTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected a Chrome trace"),
        ('{"traceEvents": [1]}', "expected a Chrome trace"),
        ('{"traceEvents": []}', "expected clock marks of the runtime"),
        ('{"traceEvents": [{"ph": "X", "name": "parablock.clock x", "ts": 1}]}', "expected clock marks of the runtime"),
        ('{"traceEvents": [{"ph": "X", "name": "parablock.clock 1"}]}', "expected clock marks of the runtime"),
        (None, "cannot read the trace"),
    ],
)
def test_a_file_that_cannot_be_merged_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TraceError, match=message):
        trace_merge.read(path)


OURS = {"clock": "CLOCK_MONOTONIC"}


@pytest.mark.parametrize(
    ("event", "about", "place"),
    [
        (None, [], "$.otherData"),
        (None, None, "$.otherData"),
        (None, {"boot": [1]}, "$.otherData.boot"),
        ({"name": "process_name", "ph": "M"}, OURS, "$.traceEvents[0]"),
        ({"name": "process_name", "ph": "M", "args": {"name": 1}}, OURS, "$.traceEvents[0]"),
        ({"pid": [1]}, OURS, "$.traceEvents[0].pid"),
        ({"cat": trace.FLOW, "ts": 1}, OURS, "$.traceEvents[0]"),
        ({"cat": trace.FLOW, "id": "1"}, OURS, "$.traceEvents[0]"),
        ({"cat": trace.FLOW, "id": [1], "ts": 1}, OURS, "$.traceEvents[0].id"),
        ({"cat": trace.FLOW, "id": "1", "ts": "x"}, OURS, "$.traceEvents[0].ts"),
        ({"ts": None}, {}, "$.traceEvents[0].ts"),
        ({"ts": 10**400}, {}, "$.traceEvents[0].ts"),
    ],
)
def test_a_damaged_trace_is_refused_with_the_file_and_the_place(
    tmp_path: Path, event: dict[str, Any] | None, about: object, place: str
) -> None:
    mark = {"ph": "X", "name": f"{profiling.CLOCK_MARK}12", "ts": 1}
    events = [mark] if event is None else [{"ph": "X"} | event, mark]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events, "otherData": about}))
    with pytest.raises(TraceError, match=rf"t\.json, found a damaged one or none \(.* - at `{re.escape(place)}`\)"):
        trace_merge.read(tmp_path / "t.json")


junk = st.none() | st.integers() | st.floats() | st.sampled_from(["", "1", "X", "M", "s", trace.FLOW, "process_name"])
junk = st.recursive(junk, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["name", "a"]), inner))


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(["ph", "name", "cat", "pid", "id", "ts", "args"]), junk), max_size=4),
    st.dictionaries(st.sampled_from(["clock", "boot"]), st.just("CLOCK_MONOTONIC") | junk),
)
def test_whatever_a_trace_holds_it_is_merged_or_refused(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]], about: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "t.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "X"} | event for event in events], "otherData": OURS | about}))
    with contextlib.suppress(TraceError):
        merged = trace_merge.merge([(name, trace_merge.read(path)) for name in ("a", "b")])
        assert len(json.loads(to_json(merged))["traceEvents"]) == 2 * len(events)


def test_without_a_profiler_nothing_is_annotated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no profiler is attached")

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    monkeypatch.setattr(torch.cuda.nvtx, "range", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    profiling.mark_clock()
    with profiling.annotation("x"):
        pass


def test_a_tool_for_nvtx_is_shown_the_ranges_where_torch_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    @contextlib.contextmanager
    def nvtx_range(name: str) -> Iterator[None]:
        shown.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "tool.so")
    made = Timeline("p", "main")
    for cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with made.span(Stage.APPLY):
            pass
    assert shown == ["parablock.apply"]


# ---- What the seconds say


def test_every_side_knows_how_long_its_stages_took(federation: Federation) -> None:
    outcome = federation.server.outcome
    for seat, run in federation.runs.items():
        of_client = outcome.goodbyes[seat].stages
        assert of_client == run.stages
        assert outcome.goodbyes[seat].rounds == ROUNDS
        for stage in ("compute", "encode", "send", "fold", "wait", "apply"):
            assert getattr(of_client, stage) > 0, stage
        assert of_client.receive >= 0  # what comes whole in one turn of the transport's loop takes no time
        assert of_client.copy == 0
        assert of_client.compute == pytest.approx(run.compute_s)
    for stage in ("compute", "encode", "send", "fold", "wait", "apply"):
        assert getattr(outcome.server_stages, stage) > 0, stage
    # The server folds for one client after the other.
    folds = sum(run.stages.fold for run in federation.runs.values())
    assert outcome.server_stages.fold == pytest.approx(folds)


def test_the_windows_of_the_rounds_add_up_to_no_more_than_the_run(federation: Federation) -> None:
    outcome = federation.server.outcome
    for stage in ("compute", "send", "apply"):
        mean = sum(getattr(g.stages, stage) for g in outcome.goodbyes.values()) / CLIENTS
        assert 0 < sum(getattr(closed.stages, stage) for closed in outcome.rounds) <= mean * (1 + 1e-9)
    assert sum(closed.server_stages.fold for closed in outcome.rounds) == pytest.approx(outcome.server_stages.fold)


def test_a_client_that_is_last_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to deliver waits for the second, which is held back until the first one's upload is there."""
    first_taken, go_on = threading.Event(), threading.Event()
    taken_ns: list[int] = []

    def note(*_: object) -> None:
        taken_ns.append(time.monotonic_ns())
        first_taken.set()

    take_spy(monkeypatch, note)
    waits: dict[int, float] = {}
    with start_server(rounds=1, clients=2, local_steps=1, deadline=WAIT_S) as server:

        def client(model: torch.nn.Module, wait_for: threading.Event | None) -> None:
            with pb.join(server.address, model, sgd) as run:
                for batch in run.stream(make_batches(0)):
                    if wait_for is not None:
                        assert wait_for.wait(WAIT_S)
                    run.train_step(batch, loss_fn)
            waits[0 if wait_for is None else 1] = run.stages.wait

        threads = [threading.Thread(target=client, args=(make_model(), event)) for event in (None, go_on)]
        for thread in threads:
            thread.start()
        assert first_taken.wait(WAIT_S)
        held_until = time.monotonic_ns()
        go_on.set()
        for thread in threads:
            thread.join(WAIT_S)
        server.wait(WAIT_S)
    assert waits[0] >= (held_until - taken_ns[0]) / 1e9 > 0
    assert waits[1] < waits[0]


def test_the_uploads_of_two_rounds_that_wait_at_the_same_time_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With staleness 1, two uploads of the first client lie there until the second one begins."""
    both_taken, taken_ns = threading.Event(), []
    held_s = 0.5  # what would be counted twice

    def note(*_: object) -> None:
        taken_ns.append(time.monotonic_ns())
        if len(taken_ns) == 2:
            both_taken.set()

    take_spy(monkeypatch, note)
    waits: dict[int, float] = {}
    with start_server(rounds=2, clients=2, local_steps=1, staleness=1, deadline=WAIT_S) as server:

        def client(seat: int, first_step: Callable[[], object]) -> None:
            with pb.join(server.address, make_model(), sgd) as run:
                for batch in run.stream(make_batches(0)):
                    if run.round == 0:
                        first_step()
                    run.train_step(batch, loss_fn)
            waits[seat] = run.stages.wait

        def hold_back() -> None:
            assert both_taken.wait(WAIT_S)
            threading.Event().wait(held_s)

        threads = [threading.Thread(target=client, args=each) for each in enumerate((lambda: None, hold_back))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        server.wait(WAIT_S)
        ended_ns = time.monotonic_ns()
    assert held_s < waits[0] <= (ended_ns - taken_ns[0]) / 1e9
