"""The benchmarks of the GPU data path: where there is no GPU they run to their end in a reduced form and state nothing,
and what they measured elsewhere is shown as it was measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fake_device import FakeDevice, control
from rich.table import Table
from torch.overrides import TorchFunctionMode

from bench import cli, gpu_overlap, kernels, page, staging
from bench.result import keep, notes
from parablock_rt import codec
from parablock_rt.errors import ParaBlockError
from parablock_rt.staging import pinned

GPU_FIGURES = {
    "kernels": kernels.FIGURES,
    "staging": (*staging.FIGURES, *staging.HAND_OVER),
    "gpu-overlap": (*gpu_overlap.BOUNDARY, *gpu_overlap.BESIDE),
}


def cells(table: Table) -> list[list[str]]:
    """The rows of a table."""
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


@pytest.mark.parametrize("name", GPU_FIGURES)
def test_without_a_gpu_it_runs_to_its_end_and_states_no_figure(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parablock_rt", "bench", name, "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert not (tmp_path / f"{name}.partial.json").exists()
    assert "gpu" not in result["machine"]
    assert result["rows"]
    for row in result["rows"]:
        assert all(row[figure] is None for figure in GPU_FIGURES[name] if figure in row)
        assert row["note"]
    benchmark = cli.load(name)
    assert all(table.row_count == 0 for table in benchmark.tables(result))
    assert benchmark.metrics(result) == {}


class SimulatedGpu:
    """One host and one stream of a GPU in the place of `torch.cuda`, each with a time of its own. The stream takes so
    much work ahead of time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, depth: int = 10_000) -> None:
        self.host_s = self.stream_s = 0.0
        self._queued: deque[float] = deque([0.0] * depth, depth)  # when each piece of work ends
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimulatedEvent(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def launch(self, seconds: float) -> None:
        """Queues work that takes the stream so long, which takes the host 20 microseconds."""
        self.host_s = max(self.host_s, self._queued[0]) + 20e-6
        self.stream_s = max(self.stream_s, self.host_s) + seconds
        self._queued.append(self.stream_s)

    def synchronize(self) -> None:
        self.host_s = max(self.host_s, self.stream_s)


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self._at_s = 0.0

    def record(self, stream: object = None) -> None:
        self._gpu.launch(0.0)
        self._at_s = self._gpu.stream_s

    def query(self) -> bool:
        return self._at_s <= self._gpu.host_s

    def synchronize(self) -> None:
        self._gpu.host_s = max(self._gpu.host_s, self._at_s)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return (end._at_s - self._at_s) * 1e3


@pytest.mark.parametrize("pieces", [1, 10, 400])
def test_a_copy_is_timed_without_the_launches_of_its_pieces(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu(monkeypatch)
    timer = staging.Timer(torch.cuda.current_stream())
    for _ in range(3):
        assert timer(lambda: [gpu.launch(5e-6) for _ in range(pieces)]) == pytest.approx(pieces * 5e-6)


@pytest.mark.parametrize("launches", [1, 30])
def test_a_kernel_is_timed_without_its_launch(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu(monkeypatch)
    case = SimpleNamespace(sets=1, run=lambda i: [gpu.launch(5e-6) for _ in range(launches)])
    seconds, note = kernels.measure(case, 50)
    assert seconds == pytest.approx([launches * 5e-6] * 50)
    assert note == ""


@pytest.mark.parametrize(("by", "launches"), [("kernel", 1), ("eager", 50)])
def test_a_stream_takes_what_is_timed_on_it_ahead_of_time(
    by: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu(monkeypatch, depth=1000)
    monkeypatch.setattr(kernels, "GPU", True)
    case: Any = SimpleNamespace(
        name="encode", by=by, sets=1, bytes_per_param=8, run=lambda i: [gpu.launch(5e-6) for _ in range(launches)]
    )
    found = kernels.measured(case, 128, 30)
    assert found["note"] == ""
    assert found["seconds_max"] == pytest.approx(launches * 5e-6)


def test_work_that_the_host_waits_for_is_timed_all_the_same_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu(monkeypatch)

    def waited_for(_: int = 0) -> None:
        gpu.launch(1e-3)
        gpu.synchronize()

    timer = staging.Timer(torch.cuda.current_stream())
    assert timer.waited_for(waited_for) == pytest.approx(1e-3, abs=1e-4)
    assert timer.note == ""
    assert timer(waited_for) == pytest.approx(1e-3, abs=1e-4)
    assert "times may include" in timer.note
    seconds, note = kernels.measure(SimpleNamespace(sets=1, run=waited_for), 5)
    assert seconds == pytest.approx([1e-3] * 5, abs=1e-4)
    assert "times may include" in note


@pytest.mark.parametrize("host_codes", staging.HOST_CODES)
@pytest.mark.parametrize("nbytes", staging.BODIES)
def test_bodies_have_the_size_and_the_alignment_that_is_asked_for(nbytes: int, host_codes: int) -> None:
    numel = staging.body_of(nbytes, host_codes)
    assert codec.body_bytes(numel, "int8") == pytest.approx(nbytes, rel=1e-3)
    assert codec.scale_bytes(numel, "int8") % 16 == host_codes


class OnHost(TorchFunctionMode):
    """What is made for a GPU is made in host memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class HostTimer:
    """In the place of `staging.Timer`, for a stream of the fake driver; None: what runs at once."""

    def __init__(self, stream: int | None) -> None:
        self.note = ""
        self._stream = stream

    def __call__(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        control().cuStreamSynchronize(self._stream)
        return time.perf_counter() - begin

    waited_for = __call__


def test_what_copies_and_hand_overs_are_measured_with_runs_to_its_end_on_a_fake_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control().fake_reset()
    monkeypatch.setattr(FakeDevice, "warm_up", lambda *_: None, raising=False)
    monkeypatch.setattr("parablock_rt.staging.device.CudaDevice", lambda device: FakeDevice())
    monkeypatch.setattr(staging, "Timer", HostTimer)
    monkeypatch.setattr(staging, "SLICE", 1 << 22)  # a real one takes a long time in host memory
    for name, fake in {"current_device": 0, "current_stream": None, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=fake: value)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
    with OnHost():
        rows = list(staging.on_gpu([1 << 20, 1 << 21], [1 << 20], 1))
    copied = [
        (row["host_codes_beyond_16"], row["piece_bytes"] >> 20) for row in rows if row["case"] == "device to host"
    ]
    assert copied == [*((codes, 4) for codes in staging.HOST_CODES * 2), *((4, mib) for mib in (1, 2, 8, 16))]
    assert all(row[name] > 0 for row in rows[:-3] for name in staging.FIGURES)
    assert all(row[name] > 0 for row in rows[-3:-1] for name in staging.READ)
    assert all(rows[-1][name] > 0 for name in staging.HAND_OVER)
    assert control().fake_violations() == 0


def kernel_row(case: str, by: str, seconds: float, share: float) -> dict[str, Any]:
    common = {"params": 100_000_000, "bytes_per_param": 8, "sets": 1, "note": ""}
    times = {"seconds_median": seconds, "seconds_min": seconds, "seconds_max": seconds}
    return common | times | {"case": case, "by": by, "gb_per_s": 0.8 / seconds, "ratio_to_copy": share}


def test_kernels_are_shown_beside_the_copy_beside_torch_and_by_tile() -> None:
    rows = [kernel_row("copy fp32", "copy", 0.001, 1.0), kernel_row("encode bf16 int8", "kernel", 0.00125, 0.8)]
    rows += [kernel_row("encode bf16 int8", "2048 x 4", 0.002, 0.5), kernel_row("encode bf16 int8", "eager", 0.025, 0)]
    rows.append(kernel_row("encode bf16 int8", "compile", 0.0025, 0.4))
    rows.append({"params": 1, "case": "encode fp32 int8 kernel", "by": "", "note": "left out: not enough GPU memory"})
    result = {"rows": rows, "peak_gb_per_s": 1000.0, "machine": {"gpu": "a GPU"}}
    kernel, torch_beside, tiles = kernels.tables(result)
    assert cells(kernel)[1] == ["encode bf16 int8", "100.0", "8.0000", "1250.0", "640", "0.800"]
    assert cells(torch_beside) == [["encode bf16 int8", "100.0", "20.0", "2.0"]]
    assert cells(tiles) == [["encode bf16 int8", "0.500"]]
    assert kernels.metrics(result) == {"encode bf16 int8 100000000": pytest.approx(640)}


def test_what_was_left_out_is_said_below_the_tables_and_once_for_each_reason(tmp_path: Path) -> None:
    rows = [kernel_row("copy fp32", "copy", 0.001, 1.0)]
    rows += [{"params": i, "case": f"case {i}", "by": "", "note": "left out: not enough GPU memory"} for i in (1, 2, 3)]
    rows.append({"note": "no GPU"})
    told = ["case 1, 1 and 2 more rows: left out: not enough GPU memory", "all: no GPU"]
    assert notes({"rows": rows}) == told
    machine = {"date": "2026-01-01", "cpu": "a CPU", "cores": 2, "revision": "0", "command": "bench"}
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": rows, "machine": machine}))
    assert page.section("kernels", tmp_path).splitlines()[-3::2] == told


def test_a_case_runs_until_the_clocks_have_risen_and_over_all_of_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    monkeypatch.setattr(kernels, "time", SimpleNamespace(monotonic=lambda: len(passes) * kernels.WARM_S / 10))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for sets, expected in ((1, 11), (40, 40)):
        passes.clear()
        kernels.warm_up(cast(Any, SimpleNamespace(sets=sets, run=passes.append)))
        assert passes == [i % sets for i in range(expected)]


def test_each_set_of_buffers_keeps_the_result_that_its_pass_made() -> None:
    from bench import kernel_cases

    made: list[weakref.ref[torch.Tensor]] = []

    def fresh(_: int) -> torch.Tensor:
        result = torch.zeros(1)
        made.append(weakref.ref(result))
        return result

    work = kernel_cases.Work("decode", "decode int8", 128, 5, 2, fresh, fresh, lambda i: (i,))
    case = work.by("kernel", work.kernel)
    for i in range(4):
        case.run(i % case.sets)
    assert [result() is not None for result in made] == [False, False, True, True]


def three_cases(*errors: Exception | None) -> Iterator[Any]:
    """Cases that raise these when they are run; behind the last, one that cannot be made."""
    for i, error in enumerate(errors):

        def run(_: int, error: Exception | None = error) -> None:
            if error is not None:
                raise error

        yield SimpleNamespace(name="encode", by=f"kind {i}", sets=1, bytes_per_param=8, run=run)
    raise KeyError("buffers")


def test_a_case_that_fails_is_said_to_have_and_those_behind_it_are_measured() -> None:
    errors = torch.OutOfMemoryError(), ValueError("no\ntrace"), None
    rows = list(kernels.run_group(partial(three_cases, *errors), 128, 1))
    assert [(row["case"], row["by"], row["note"]) for row in rows] == [
        ("encode kind 0", "", "left out: not enough GPU memory"),
        ("encode kind 1", "", "left out: ValueError: no"),
        ("encode", "kind 2", "interpreted, not timed"),
        ("?", "", "left out: KeyError: 'buffers'"),
    ]


@pytest.mark.parametrize("name", cli.GPU_NAMES)
def test_a_benchmark_that_is_killed_has_left_what_it_had(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_and_end(measured: dict[str, Any]) -> None:
        keep(measured)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.load(name), "keep", keep_and_end)
    monkeypatch.setattr(gpu_overlap, "boundary", lambda *_: {})
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which the benchmark sets, and a test must not
    groups = [partial(three_cases, None, None)]
    monkeypatch.setitem(sys.modules, "bench.kernel_cases", SimpleNamespace(groups=lambda *_: groups))
    with pytest.raises(KeyboardInterrupt):
        cli.main([name, "--out", str(tmp_path)])
    left = json.loads((tmp_path / f"{name}.partial.json").read_text())
    assert left["benchmark"] == name
    assert left["machine"]["cpu"]
    assert len(left["rows"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.partial.json"]


class JoinedError(Exception):
    """Has what a benchmark has passed to `join`."""


@pytest.mark.parametrize("name", ["gpu-overlap", "large-model"])
def test_a_client_may_pin_all_that_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(address: str, model: Any, optimizer: Any, *, pinned_memory: int, **_: object) -> None:
        raise JoinedError(pinned_memory)

    benchmark: Any = cli.load(name)
    monkeypatch.setattr("parablock_rt.join", join)
    monkeypatch.setattr(benchmark, "answer", lambda *_: "nowhere")
    monkeypatch.setattr(benchmark, "_serve" if name == "gpu-overlap" else "serve", os.abort)
    if name == "gpu-overlap":
        plan = benchmark.plan_of(benchmark.make_model(32, "cpu"))
        run = partial(benchmark.boundary, 32, 8, 2, 1)
    else:
        plan = benchmark.plan_of(benchmark.on_meta("small"))
        run = partial(benchmark.measure, large_model_options("--tokens", "8", "--rounds", "2"))
    with pytest.raises(JoinedError) as caught:
        run()
    assert caught.value.args == (pinned.bytes_needed(plan.blocks, "int8", 1),)


def test_copies_and_hand_overs_are_shown_with_their_ratios() -> None:
    copied = {"case": "device to host", "body_bytes": 16 << 20, "host_codes_beyond_16": 4, "piece_bytes": 4 << 20}
    copied |= {"whole_gb_per_s": 50.0, "chunked_gb_per_s": 49.0}
    copied |= {"chunked_over_whole": 0.98, "pageable_over_pinned": 0.2}
    handed = {"case": "hand-over", "params": 15_000_064, **dict.fromkeys(staging.HAND_OVER, 0.002)}
    read = {"case": "a loss that is read", "piece_bytes": 4 << 20, **dict.fromkeys(staging.READ, 2e-5)}
    result = {"rows": [copied, read, handed], "machine": {"gpu": "a GPU"}}
    copies, reads, hand_overs = staging.tables(result)
    assert cells(copies) == [["16", "4", "4", "50.0", "49.0", "0.980", "0.200"]]
    assert cells(reads) == [["4", "20", "20", "20"]]
    assert cells(hand_overs) == [["15.0", *["2.00"] * 5, "0.00"]]
    assert staging.metrics(result)[f"chunked {16 << 20} {4 << 20}"] == 0.98


def test_a_boundary_is_shown_with_its_share_of_the_round() -> None:
    at = {"case": "boundary", "params_a_block": 218_000_000, "step_s": 0.045, "round_s": 3.6, "boundary_s": 0.003}
    at |= {"block_change_s": 0.001, "exposed_s": 0.002, "exposed_share": 0.002 / 3.6}
    at |= {"waited_s": 0.0001, "steps_s": [0.045] * 4}
    along = {"case": "beside transfers", "step_s_without": 0.01, "step_s_with": 0.0101, "ratio": 1.01}
    result = {"rows": [at, along | {"transfer_gb_per_s": 3.0}], "machine": {"gpu": "a GPU"}}
    boundary, beside = gpu_overlap.tables(result)
    assert cells(boundary) == [["218", "45.00", "3.600", "3.00", "1.00", "2.00", "0.06%", "0.10"]]
    assert cells(beside) == [["10.000", "10.100", "1.010", "3.00"]]


def large_model_options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.load("large-model").add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--shape", "small", *arguments])


def steps_with_boundaries(local_steps: int, before: float, after: float) -> list[gpu_overlap.Step]:
    """Of blocks whose steps take 10, 20 and 30 ms; each boundary takes so many seconds more before and after it."""
    more = {0: after, local_steps - 1: before}
    steps = [
        gpu_overlap.Step(round, round % 3, 0.01 * (round % 3 + 1) + more.get(step, 0.0))
        for round in range(2, 12)
        for step in range(local_steps)
    ]
    return steps[:-1]


def test_a_boundary_is_held_against_steps_of_its_own_two_blocks() -> None:
    step, lost = gpu_overlap.at_the_boundaries(steps_with_boundaries(10, 0.0005, 0.0015))
    assert step == pytest.approx(0.02)
    assert lost == pytest.approx(0.002)


def test_what_a_boundary_takes_without_communication_is_not_exposed_communication() -> None:
    steps, alone = steps_with_boundaries(10, 0.0005, 0.0015), steps_with_boundaries(4, 0.0, 0.0008)
    assert gpu_overlap.compared(steps, alone, 10) == pytest.approx(
        {
            "step_s": 0.02,
            "round_s": 0.202,
            "boundary_s": 0.002,
            "block_change_s": 0.0008,
            "exposed_s": 0.0012,
            "exposed_share": 0.0012 / 0.202,
        }
    )


def test_without_communication_each_block_trains_in_its_turn_as_in_a_run() -> None:
    model = gpu_overlap.make_model(32, gpu_overlap.DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    batch = torch.randn(8, 32, dtype=torch.bfloat16, device=gpu_overlap.DEVICE)
    begins = gpu_overlap.block_changes(model, batch, 2, 3)
    assert [(round, block) for round, block, _ in begins] == [(0, 0)] * 3 + [(1, 1)] * 3
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, False]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_step_is_timed_from_its_beginning_to_the_next_ones_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu(monkeypatch)
    monkeypatch.setattr(gpu_overlap, "GPU", True)
    begins = []
    for round in range(4):
        for _ in range(3):
            begins.append((round, round % 3, gpu_overlap.event_here()))
            gpu.launch(0.01 * (round + 1))
    steps = gpu_overlap.timed(begins)
    assert [step[:2] for step in steps] == [(2, 2)] * 3 + [(3, 0)] * 2
    assert [step.seconds for step in steps] == pytest.approx([0.03] * 3 + [0.04] * 2)


@pytest.mark.parametrize("name", ["gpu-overlap", "large-model"])
def test_a_server_that_dies_is_an_error_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gpu-overlap":
        monkeypatch.setattr(gpu_overlap, "_serve", os.abort)  # takes no arguments, and so fails in the other process
        run = partial(gpu_overlap.boundary, 32, 8, 2, 1)
    else:
        large_model: Any = cli.load(name)
        monkeypatch.setattr(large_model, "serve", os.abort)
        run = partial(large_model.measure, large_model_options("--tokens", "8", "--rounds", "1"))
    with pytest.raises(ParaBlockError, match="the server's process has ended"):
        run()


def test_every_gpu_benchmark_has_its_place_in_the_documents() -> None:
    text = "".join(file.read_text() for file in page.pages())
    for name in cli.GPU_NAMES:
        assert f"<!-- bench:{name} -->" in text
