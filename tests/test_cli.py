"""The command line as a user or a program meets it: flags, files, exit codes, what is printed and what is left behind.

Whatever needs no process of its own calls `main` here. One demonstration runs as an installed program would; `serve`
and `join` are forked with their imports done, which changes nothing but the seconds they take to start.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trace_schema
import transformers
from cli_cases import Main, Start, join, make_main, make_start, read, serve, wait_for
from processes import WAIT_S, command, start_server

from parablock_rt import _C, cli, codec, demo
from parablock_rt.blocks.fingerprint import digest, fingerprint
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError, PeerLostError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.wire import handshake

main = pytest.fixture(make_main)
start = pytest.fixture(make_start)

TINY_BLOCK = 172_288  # elements of each of the six decoder layers of the tiny model, padding included
RUN_KEYS = {
    *("staleness", "format", "schedule", "rounds", "clients", "blocks", "local_steps", "wall_s", "compute_s"),
    *("serial_comm_s", "exposed_comm_s", "overlap_efficiency", "bytes_up", "bytes_down", "bad_groups"),
    *("eval_loss_before", "eval_loss_after", "digest"),
}


# ---- Help, usage, exit codes


@pytest.mark.parametrize("name", ["demo", "serve", "join", "plan", "report", "top", "doctor"])
def test_every_command_explains_itself_with_an_example(main: Main, name: str) -> None:
    result = main(name, "--help")
    assert result.code == 0
    assert "Usage: parablock " + name in result.out
    assert f"Example: parablock {name}" in result.out


def test_the_program_lists_its_commands_and_its_version(main: Main) -> None:
    result = main("--help")
    assert result.code == 0
    names = ("demo", "serve", "join", "plan", "bench", "report", "top", "trace", "doctor")
    assert all(name in result.out for name in names)
    assert main("--version").out == f"{cli.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["demo", "--colour", "red"],
        ["demo", "--rounds", "many"],
        ["serve", "--blocks", "0"],
        ["join"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(main: Main, arguments: list[str]) -> None:
    result = main(*arguments)
    assert result.code == 2
    assert "Usage: parablock" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--format", "int2"], "expected a format out of fp32, bf16, int8, int4, found 'int2'"),
        (["demo", "--schedule", "random"], "schedule to be one of cyclic, reshuffled, reverse, found 'random'"),
        (["demo", "--rounds", "0"], "expected rounds to be at least 1, found 0"),
        (["demo", "--clients", "0"], "expected clients to be at least 1, found 0"),
        (["demo", "--local-steps", "0"], "expected local_steps to be at least 1, found 0"),
        (["demo", "--rate", "fast"], "expected a rate such as 50mbit, 1gbit or 800kbit, found 'fast'"),
        (["demo", "--delay", "soon"], "expected a delay of at most 5s, such as 40ms or 0.5s, found 'soon'"),
        (["demo", "--batch-size", "0"], "batch_size must be at least 1; found 0"),
        (["demo", "--dtype", "int8"], "dtype must be one of bf16, fp16, fp32; found 'int8'"),
        (["serve", "--staleness", "-1"], "staleness to be 0 (no overlap), 1 (ParaBlock) or more, at most 64, found -1"),
        (["serve", "--quorum", "3"], "quorum to be from 1 to the number of clients that train in a round (2), found"),
        (["serve", "--deadline", "0"], "expected deadline to be a positive number, found 0.0"),
        (["serve", "--local-view", "mine"], "expected local_view to be one of own, reference, found 'mine'"),
        (["serve", "--server-optimizer", "sgd"], "server_optimizer to be one of average, momentum, adam, yogi"),
        (["serve", "--address", "nowhere"], "expected an address such as host:7070 or [::1]:7070, found 'nowhere'"),
        (["serve", "--rate", "fast"], "expected a rate such as"),
        (["serve", "--token-file", "absent"], "cannot read the token file absent: No such file or directory"),
        (["join", "nowhere"], "expected an address such as host:7070 or [::1]:7070, found 'nowhere'"),
        (["join", "host:1", "--delay", "soon"], "expected a delay of at most 5s"),
        (["join", "host:1", "--lr", "0"], "lr must be positive; found 0.0"),
        (["plan", "--rate", "fast"], "expected a rate such as"),
        (["plan", "--step-time", "0"], "step-time must be a positive number of seconds; found 0.0"),
        (["plan", "--optimizer", "lion"], "expected optimizer to be one of adamw,"),
        (["plan", "--device", "tpu"], "expected device to be one of cuda, cpu, found 'tpu'"),
        (["plan", "--row-limit", "0"], "row_limit must be at least 1 element; found 0"),
        (["demo", "--run-dir", "file"], "the run folder file cannot be written"),
        (["serve", "--run-dir", "file/below"], "the run folder file/below cannot be written"),
        (["demo", "--config", "absent"], "cannot read the configuration absent: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_no_run_can_use_ends_with_2_before_any_model_is_loaded(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    def load(workload: Workload) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(finetune, "load", load)
    (tmp_path / "file").write_text("in its place")
    result = main(*arguments, "--model", "tiny")
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_a_run_that_fails_ends_with_1_and_the_reason(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: object, **options: object) -> None:
        raise PeerLostError("lost the server at [b]:1")  # what looks like markup is shown as it is

    monkeypatch.setattr(finetune, "train", train)
    result = main("join", "host:1", "--model", "tiny")
    assert result.code == 1
    assert "error: lost the server at [b]:1" in result.err


def test_a_server_that_cannot_listen_ends_before_anybody_is_served(main: Main) -> None:
    with start_server() as running:
        taken = main("serve", "--model", "tiny", "--eval-examples", 0, "--address", running.address)
    assert taken.code == 1
    assert f"cannot listen on {running.address}" in taken.err
    exposed = main("serve", "--model", "tiny", "--eval-examples", 0, "--address", "0.0.0.0:0")
    assert exposed.code == 2
    assert "refusing to listen on 0.0.0.0:0 without protection" in exposed.err
    assert "--insecure" in exposed.err


def test_a_server_raises_its_limit_of_open_files_and_never_lowers_it(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise ConfigError("far enough")

    monkeypatch.setattr(cli.run, "start_server", refuse)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 2**20 if before[1] == resource.RLIM_INFINITY else before[1]
    try:
        for soft, expected in ((1000, min(hard, 8192)), (hard, hard)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
            result = main("serve", "--model", "tiny", "--eval-examples", 0, "--address", "127.0.0.1:0")
            assert "far enough" in result.err
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---- Configuration files


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[demo.Demo]:
    """The demonstrations that the program would have run."""
    seen: list[demo.Demo] = []

    def run(plan: demo.Demo, console: object) -> dict[str, Any]:
        seen.append(plan)
        return {"ran": True}

    monkeypatch.setattr(demo, "run", run)
    return seen


def test_a_file_sets_what_the_flags_set_and_flags_win(main: Main, planned: list[demo.Demo], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "tiny"\nlocal-steps = 3\nbatch_size = 5\nrounds = 7\nrate = "8mbit"\nblocks = 2\njson = true\n'
        'format = "int4"\nrun-dir = "here"\nsummary = "made/summary.json"\n'
    )
    result = main("demo", "--config", file, "--rounds", 9, "--delay", "1ms")
    assert result.code == 0, result.err
    (plan,) = planned
    assert plan.settings | {"rounds": 9, "local_steps": 3, "format": "int4", "seed": 0} == plan.settings
    assert (plan.workload.model, plan.workload.batch_size, plan.blocks) == ("tiny", 5, 2)
    assert (plan.rate, plan.delay, plan.folder.path) == (1e6, 0.001, Path("here"))
    assert json.loads(result.out) == read(tmp_path / "made" / "summary.json") == {"ran": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rounds = 1\ncolour = 1\nshape = 2\n", "does not know: colour, shape; it knows batch_size, blocks, clients,"),
        ("[demo]\nrounds = 1\n", "does not know: demo;"),
        ("as_json = true\n", "does not know: as_json;"),
        ("config = 'x'\n", "does not know: config;"),
        ("rounds = 0\n", "expected rounds to be at least 1, found 0"),
        ("rounds = 'many'\n", "Invalid value for '--rounds': "),
        ("rounds =\n", "is not valid TOML"),
    ],
)
def test_a_file_with_what_is_no_setting_ends_with_2(
    main: Main, planned: list[demo.Demo], tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    result = main("demo", "--config", file, "--model", "tiny")
    assert result.code == 2
    assert message in result.err
    assert planned == []


# ---- Commands that only look


def test_the_doctor_speaks_json_and_names_what_each_finding_means(main: Main) -> None:
    findings = json.loads(main("doctor", "--json").out)
    assert findings["tls"]["found"] == (_C.TLS_LIBRARY or None)
    assert all(set(fact) == {"found", "effect"} and fact["effect"] for fact in findings.values())
    text = main("doctor").out
    assert all(name in text for name in findings)


def test_the_plan_shows_blocks_bytes_and_what_hides_them(main: Main) -> None:
    arguments = ("plan", "--model", "tiny", "--rate", "8mbit", "--delay", "10ms")
    plan = json.loads(main(*arguments, "--step-time", "0.25", "--json").out)
    assert len(plan["blocks"]) == 6
    for block in plan["blocks"]:
        nbytes = {format: codec.body_bytes(TINY_BLOCK, format) for format in codec.FORMATS}
        assert block["wire_bytes"] == nbytes
        assert block["exchange_s"]["int8"] == pytest.approx(2 * (nbytes["int8"] / 1e6 + 0.01))
        assert block["local_steps_to_hide"]["int8"] == 2
    measured = main(*arguments, "--blocks", "2")
    assert measured.code == 0
    assert "total: 2 blocks" in measured.out
    assert "local steps or more" in measured.out


def test_the_plan_predicts_memory_for_the_run_that_is_meant(main: Main) -> None:
    def memory(*flags: str) -> dict[str, Any]:
        arguments = ("plan", "--model", "tiny", "--dtype", "bf16", "--device", "cuda", *flags)
        predicted = json.loads(main(*arguments, "--json").out)["memory"]
        return {item["name"]: max(item["bytes"]) for item in predicted["items"]}

    default = memory()
    sgd = memory("--optimizer", "sgd")
    assert sgd.keys() == default.keys() - {"optimiser state"}
    assert sgd["step scratch"] < default["step scratch"]
    assert memory("--staleness", "0")["references"] == default["references"] / 2
    assert memory("--format", "int4")["arriving bodies"] < default["arriving bodies"]
    assert "residuals" not in memory("--format", "fp32")
    table = main("plan", "--model", "tiny", "--outer", "train", "--row-limit", "20000").out
    assert "embeddings.1" in table
    assert "host total" in table


# ---- The demonstration


@dataclass
class Demonstration:
    folder: Path
    code: int
    out: str
    err: str
    tokens: set[str]
    command_lines: list[str]


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """One whole demonstration, started as the installed program is, and watched from outside."""
    folder = tmp_path_factory.mktemp("demonstration")
    (folder / "run.toml").write_text('seed = 3\nlocal-steps = 2\nschedule = "reverse"\n')
    flags = "--model tiny --rounds 5 --blocks 3 --format int4 --rate 20mbit --delay 5ms --eval-examples 8"
    arguments = [*flags.split(), "--config", "run.toml", "--run-dir", "run", "--summary", "all.json", "--json"]
    tokens: set[str] = set()
    command_lines: set[str] = set()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = psutil.Popen(
            [sys.executable, "-m", "parablock_rt", "demo", *arguments], stdout=out, stderr=err, cwd=folder
        )
    try:
        deadline = time.monotonic() + 400.0
        while process.poll() is None:
            assert time.monotonic() < deadline
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    command_lines.add(" ".join(one.cmdline()))
                    tokens |= {value for name, value in one.environ().items() if name == handshake.TOKEN_VARIABLE}
            with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
                process.wait(0.1)
    finally:
        destroy(process)
    texts = [(folder / name).read_text() for name in ("out", "err")]
    return Demonstration(folder, process.returncode, *texts, tokens, sorted(command_lines))


def destroy(process: psutil.Popen) -> None:
    if process.poll() is None:
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(WAIT_S)


def test_the_demonstration_runs_both_ways_and_ends_well(demonstration: Demonstration) -> None:
    assert demonstration.code == 0, demonstration.err
    plan = BlockPlan.from_model(finetune.load(Workload.for_model("tiny"))[0], 3)
    nbytes = 2 * sum(plan.blocks[block].wire_bytes("int4") for block in (2, 1, 0, 2, 1))
    result = json.loads(demonstration.out)  # nothing else is on standard output
    assert result == read(demonstration.folder / "all.json") == read(demonstration.folder / "run" / "summary.json")
    assert set(result) == {"sequential", "parallel", "speedup"}
    assert result["speedup"] == result["sequential"]["wall_s"] / result["parallel"]["wall_s"]
    for name, staleness in (("sequential", 0), ("parallel", 1)):
        summary = result[name]
        assert summary.keys() >= RUN_KEYS
        assert summary["complete"] is True
        settings = {"format": "int4", "schedule": "reverse", "seed": 3, "rounds": 5, "clients": 2, "local_steps": 2}
        assert summary | settings | {"staleness": staleness, "blocks": 3} == summary
        assert summary["digest"]["clients"] == [summary["digest"]["server"]] * 2
        assert summary["bytes_up"] == summary["bytes_down"] == nbytes
        assert summary["bad_groups"] == 0
        assert summary["eval_loss_after"] < summary["eval_loss_before"]
        assert summary["wall_s"] > summary["compute_s"] > 0
        assert summary == read(demonstration.folder / "run" / name / "summary.json")
    shown = re.findall(r'id="data">(.*?)</script>', (demonstration.folder / "run" / "report.html").read_text())
    assert [run["summary"] for run in json.loads(*shown)["runs"]] == [result["sequential"], result["parallel"]]
    sequential, parallel = result["sequential"], result["parallel"]
    assert sequential["serial_comm_s"] == sequential["exposed_comm_s"] == parallel["serial_comm_s"]
    assert parallel["overlap_efficiency"] == 1 - parallel["exposed_comm_s"] / parallel["serial_comm_s"]
    assert "speed-up" in demonstration.err
    assert "same bits on server and clients" in demonstration.err


def test_the_demonstration_leaves_a_line_for_every_round(demonstration: Demonstration) -> None:
    folder = demonstration.folder / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["round"]) for line in lines] == [
        (n, t) for n in ("sequential", "parallel") for t in range(5)
    ]
    assert [line["block"] for line in lines] == [2, 1, 0, 2, 1] * 2
    for name in ("sequential", "parallel"):
        own = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert own == [line for line in lines if line["run"] == name]
        for index in range(2):
            rounds = (folder / name / f"client-{index}" / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["round"] for line in rounds] == list(range(5))


def test_the_demonstration_leaves_a_trace_that_a_viewer_can_read(demonstration: Demonstration) -> None:
    trace = read(demonstration.folder / "run" / "trace.json")
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert sorted(processes.values()) == sorted(
        f"{run}: {who}" for run in ("sequential", "parallel") for who in ("server", "client 0", "client 1")
    )
    trace_schema.check(trace)
    stages = Counter((processes[event["pid"]], event["cat"]) for event in events if event["ph"] == "X")
    for run in ("sequential", "parallel"):
        assert all(stages[f"{run}: server", stage] for stage in ("fold", "close", "encode", "send", "receive"))
        assert all(stages[f"{run}: client 1", stage] for stage in ("encode", "send", "receive", "apply"))
        assert all(stages[f"{run}: client {seat}", "compute"] >= 5 for seat in range(2))
    # Every chunk of every round, from each client to the server and from the server to each client, in both runs.
    chunks = -(-2 * TINY_BLOCK // RunConfig(rounds=1, clients=1).chunk)
    whole = Counter(tuple(passed) for passed in trace_schema.flows(trace).values())
    assert whole == {("encode", "send", "receive", last): 2 * 2 * 5 * chunks for last in ("fold", "apply")}


def test_the_demonstrations_token_is_in_no_argument_and_no_file(demonstration: Demonstration) -> None:
    assert (
        len(demonstration.tokens) == 2
    )  # one per run; from the processes' environment, which only their owner can read
    assert any("join 127.0.0.1:" in line for line in demonstration.command_lines)
    for token in demonstration.tokens:
        assert len(token) == 32
        assert all(token not in line for line in demonstration.command_lines)
        for path in demonstration.folder.rglob("*"):
            assert path.is_dir() or token.encode() not in path.read_bytes(), path


def test_ctrl_c_ends_a_demonstration_with_a_partial_summary_and_no_process_left(start: Start, tmp_path: Path) -> None:
    arguments = "demo --model tiny --rounds 100000 --blocks 2 --rate none --delay 0ms --eval-examples 0 --run-dir run"
    process = start(command, arguments.split(), str(tmp_path))
    metrics = tmp_path / "run" / "sequential" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, process.pause)
    clients = psutil.Process(process.pid).children(recursive=True)
    assert len(clients) == 2
    process.signal(signal.SIGINT)
    assert process.wait() > 0
    assert psutil.wait_procs(clients, timeout=0)[1] == []
    summary = read(tmp_path / "run" / "summary.json")
    assert list(summary) == ["sequential"]
    assert summary["sequential"]["complete"] is False
    assert 1 <= summary["sequential"]["rounds"] < 100_000
    assert "Stopped before the end. What there is of it is in run" in (tmp_path / "errors").read_text()
    assert "Traceback" not in (tmp_path / "errors").read_text()


# ---- Server and clients by hand


def test_serve_and_three_joins_end_with_a_model_that_has_the_digests_bits(start: Start, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-from-a-file\n")
    flags = "--rounds 4 --clients 3 --local-steps 2 --format bf16 --schedule reshuffled --eval-examples 8 --json"
    server, address = serve(start, tmp_path / "server", *flags.split(), "--token-file", token, "--summary", "x/s.json")
    clients = [join(start, tmp_path / f"c{i}", address, "--token-file", token, "--json") for i in range(3)]
    assert [process.wait() for process in (server, *clients)] == [0] * 4
    summary = json.loads((tmp_path / "server" / "output").read_text())
    assert summary == read(tmp_path / "server" / "x" / "s.json") == read(tmp_path / "server" / "run" / "summary.json")
    assert summary["complete"] is True
    assert summary["clients"] == 3
    assert summary["bytes_up"] == 4 * 3 * codec.body_bytes(TINY_BLOCK, "bf16")
    ends_on = summary["digest"]["server"]
    assert summary["digest"]["clients"] == [ends_on] * 3
    ends = [json.loads((tmp_path / f"c{i}" / "output").read_text()) for i in range(3)]
    assert [end["digest"] for end in ends] == [ends_on] * 3
    assert sorted(end["client"] for end in ends) == [0, 1, 2]
    for i in range(3):
        assert read(tmp_path / f"c{i}" / "run" / "summary.json")["complete"] is True
        assert len((tmp_path / f"c{i}" / "run" / "metrics.jsonl").read_text().splitlines()) == 4
        assert (tmp_path / f"c{i}" / "run" / "report.html").exists()
    assert len((tmp_path / "server" / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "server" / "run" / "report.html").exists()

    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "server" / "run" / "model", dtype=torch.float32)
    plan = BlockPlan.from_model(net)
    assert digest(plan, [fingerprint(block) for block in plan.materialise(net)]) == ends_on
    workload = Workload.for_model("tiny", eval_examples=8)
    after = finetune.evaluate(net, finetune.load(workload)[2], workload)
    assert after == pytest.approx(summary["eval_loss_after"], rel=1e-6)


def test_a_run_leaves_telemetry_traces_and_seconds_a_stage_unless_told_not_to(
    main: Main, start: Start, tmp_path: Path
) -> None:
    server, address = serve(start, tmp_path / "server", "--rounds", 3, "--eval-examples", 0, "--telemetry", 0.05)
    clients = [
        join(start, tmp_path / "watched", address, "--telemetry", 0.05),
        join(start, tmp_path / "quiet", address, "--telemetry", 0, "--no-trace"),
    ]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0]
    for name in ("server", "watched"):
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "telemetry.jsonl").read_text().splitlines()]
        assert lines[0]["process"].startswith("server" if name == "server" else "client ")
        assert any("thread.pb-transport.cpu" in line for line in lines)
        assert any(".lane.0.rtt_s" in key for line in lines for key in line)
        events = read(tmp_path / name / "run" / "trace.json")["traceEvents"]
        assert {event["name"] for event in events if event["ph"] == "C"} >= {"process.cpu", "process.rss_bytes"}
    assert not (tmp_path / "quiet" / "run" / "telemetry.jsonl").exists()
    assert len(read(tmp_path / "quiet" / "run" / "trace.json")["traceEvents"]) == 1
    seconds = read(tmp_path / "server" / "run" / "summary.json")
    assert seconds["stages_of"]["server"]["fold"] > 0
    for name in ("watched", "quiet"):
        own = read(tmp_path / name / "run" / "summary.json")
        assert own["stages"] == seconds["stages_of"][f"client {own['client']}"]
        assert own["stages"]["compute"] > 0

    files = [tmp_path / name / "run" / "trace.json" for name in ("server", "watched", "quiet")]
    result = main("trace", "merge", *files, "-o", "all.json")
    assert result.code == 0, result.err
    merged = read(tmp_path / "all.json")
    trace_schema.check(merged)
    assert sum(passed == ["encode", "send", "receive", "fold"] for passed in trace_schema.flows(merged).values()) == 3
    assert main("trace", "merge", tmp_path / "none.json", "-o", "all.json").code == 1
    assert main("trace", "merge", *files, "-o", "no/such/folder.json").code == 2


@pytest.mark.parametrize("name", ["serve", "join"])
def test_telemetry_that_cannot_be_sent_is_refused_before_a_model_is_loaded(
    main: Main, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetune, "load", refuse)
    address = ["127.0.0.1:1"] if name == "join" else []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = main(name, *address, "--model", "tiny", "--prometheus", port)
        assert result.code == 2
        assert f"cannot serve Prometheus on 127.0.0.1:{port} (" in result.err
    result = main(name, *address, "--model", "tiny", "--report-to", "mlflow")
    assert result.code == 2
    assert "expected report_to (--report-to) to name tensorboard or wandb, found 'mlflow'" in result.err
    assert "seconds between two samples" in main(name, *address, "--model", "tiny", "--telemetry", "-1").err


def test_ctrl_c_ends_a_client_and_sigterm_the_server_with_partial_summaries(start: Start, tmp_path: Path) -> None:
    flags = "--rounds 100000 --blocks 2 --quorum 1 --deadline 60 --eval-examples 0"
    server, address = serve(start, tmp_path / "server", *flags.split())
    leaver = join(start, tmp_path / "leaver", address)
    stayer = join(start, tmp_path / "stayer", address, "--reconnect", "1")
    metrics = tmp_path / "leaver" / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, leaver.pause)
    leaver.signal(signal.SIGINT)
    assert leaver.wait() > 0
    summary = read(tmp_path / "leaver" / "run" / "summary.json")
    assert (summary["complete"], summary["digest"]) == (False, None)

    said = tmp_path / "server" / "errors"
    wait_for(lambda: "is gone: stopped by KeyboardInterrupt" in said.read_text(), server.pause)
    wait_for((tmp_path / "server" / "run" / "metrics.jsonl").read_text, server.pause)
    server.signal(signal.SIGTERM)
    assert server.wait() > 0
    summary = read(tmp_path / "server" / "run" / "summary.json")
    assert summary["complete"] is False
    assert 1 <= summary["rounds"] < 100_000
    assert [left.partition(": ")[2] for left in summary["left_early"]] == ["stopped by KeyboardInterrupt"]
    assert (
        "Stopped before the end. What there is of it is in run; `parablock serve --resume run` goes" in said.read_text()
    )
    assert stayer.wait() == 1
    said_last = (tmp_path / "stayer" / "errors").read_text()
    assert "may be resumed in the 1 s that this client waits for it: the server was stopped: " in said_last
    assert re.search(
        "error: lost the server .*: it did not come back within 1 s .*; it had said: the server was", said_last
    )
    assert read(tmp_path / "stayer" / "run" / "summary.json")["complete"] is False
    for name in ("server", "leaver", "stayer"):
        shown = (tmp_path / name / "errors").read_text()
        assert "Stopped before the end. What there is of it is in run" in shown
        assert "Traceback" not in shown
