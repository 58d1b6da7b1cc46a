"""The cost of observing a run: recording stages, exporting the trace, taking a sample of the telemetry.

- step: a client trains against a server in another process over loopback, with one local step per round, so that every
  step encodes, sends, receives and applies a block; either with every stage of every chunk recorded on both sides, or
  with nothing recorded. Both kinds of runs alternate; the ratio is of medians over all steps after the first two
  rounds.
- record: the cost of a record for the thread that writes it, from encoding chunks of 128 elements with and without a
  ring buffer.
- export: writes a timeline of synthetic records, like those of a server with one client, as a trace.
- sample: reads every meter once. The CPU time is an upper bound for the time that a sample holds the GIL.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe import meters, trace
from parablock_rt.observe.telemetry import PERIOD_S
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.staging.stager import Piece, Stager
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport

from .result import Result, columns, shown

WARM_UP_ROUNDS = 2
EVENTS = 10**6
CHUNKS = 64
RECEIVED = (Stage.VERIFY, Stage.RECEIVE)
SENT = (Stage.CHECKSUM, Stage.SEND)


# ---- A step


def _serve(pipe: Connection, model: str, threads: int, settings: dict[str, Any]) -> None:
    """The server's process: one run for every `trace` that comes through the pipe, until it closes."""
    net, _, _ = finetune.load(Workload.for_model(model, threads=threads))
    while (traced := pipe.recv()) is not None:
        with pb.serve(net, trace=traced, **settings) as server:
            pipe.send(server.address)
            server.wait()
        pipe.send(sum(len(records) for _, records in server.timeline.threads()))


class Pair:
    """A server in a process of its own and a client in this one."""

    def __init__(self, workload: Workload, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, workload.model, workload.threads, settings)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # otherwise a dead server would not end the wait for its answer
        self._net, _, task = finetune.load(workload)
        self._batch = task.train.take(range(workload.batch_size))

    def run(self, traced: bool) -> tuple[list[float], int]:
        """Seconds of each step after the first rounds, and the number of records that both sides made."""
        self._pipe.send(traced)
        seconds: list[float] = []
        with pb.join(self._pipe.recv(), self._net, partial(torch.optim.SGD, lr=1e-6), trace=traced) as run:
            while not run.finished:
                start = time.perf_counter()
                report = run.train_step(self._batch)
                if report.round >= WARM_UP_ROUNDS and not report.finished:
                    seconds.append(time.perf_counter() - start)
        return seconds, self._pipe.recv() + sum(len(records) for _, records in run.timeline.threads())

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()


def measure_step(model: str, repetitions: int, rounds: int, chunk: int) -> Result:
    """The step with and without records."""
    settings = {"rounds": rounds, "clients": 1, "local_steps": 1, "staleness": 1, "chunk": chunk}
    pair = Pair(Workload.for_model(model), settings)
    pair.run(False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    records = 0
    for repetition in range(repetitions):
        for traced in (True, False) if repetition % 2 else (False, True):
            steps, made = pair.run(traced)
            seconds[traced] += steps
            records = max(records, made)
    pair.stop()
    with_records, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {
        "case": "step",
        "step_s_recorded": with_records,
        "step_s_off": without,
        "ratio": with_records / without,
        "ratio_of_fastest": min(seconds[True]) / min(seconds[False]),
        "records_a_step": records / rounds,
        "seconds": {"recorded": seconds[True], "off": seconds[False]},
    }


def measure_record(repetitions: int, chunks: int = 2**16) -> Result:
    """Seconds that one record costs the encode thread."""
    now, ref = torch.ones(128 * chunks), torch.zeros(128 * chunks)
    ring = _C.Ring(4 * chunks)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with Transport() as transport:
        stagers = {True: Stager(ring), False: Stager()}
        for _ in range(repetitions):
            for recorded, stager in stagers.items():
                encoding = stager.encode([Piece(now, ref)], "int8", 128, transport)
                encoding.wait()
                start_ns, end_ns = encoding.span_ns
                seconds[recorded].append((end_ns - start_ns) / 1e9)
                stager.release(encoding)
            ring.drain()
    assert ring.lost == 0
    cost = (min(seconds[True]) - min(seconds[False])) / (2 * chunks)  # each chunk has an encode and a checksum record
    return {"case": "record", "seconds": cost}


# ---- The export


def synthetic_timeline(records: int) -> Timeline:
    """At least `records` records of uploads and updates, of `CHUNKS` chunks each, with the times of a 1 Gbit/s link."""
    timeline = Timeline("server", "pb-server")
    timeline.run, timeline.seats = 1, {1: 0}
    ring = timeline.ring("pb-transport", 2**20)
    encoder = timeline.ring("pb-encode", 2**20)
    assert ring is not None
    assert encoder is not None
    made, at_ns, round, nbytes = 0, time.monotonic_ns(), 0, 266_240
    while made < records:
        for chunk in range(CHUNKS):
            for kind, stages in ((Kind.UPLOAD, RECEIVED), (Kind.UPDATE, (Stage.ENCODE, *SENT))):
                for stage in stages:
                    writer = encoder if stage == Stage.ENCODE else ring
                    writer.write(stage, at_ns, at_ns + 400_000, kind, round, round % 30, chunk, 1, nbytes)
                at_ns += 1_000_000
        timeline.add(Stage.FOLD, at_ns, at_ns + 10**6, kind=Kind.UPLOAD, round=round, block=round % 30, peer=1)
        made += 5 * CHUNKS + 1
        round += 1
        timeline.drain()
    return timeline


def measure_export(events: int, repetitions: int) -> Result:
    """Seconds to write a trace of about `events` events."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        few = synthetic_timeline(10_000)
        per_record = trace.write(path, few) / sum(len(records) for _, records in few.threads())
        timeline = synthetic_timeline(round(events / per_record))
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            written = trace.write(path, timeline)
            seconds.append(time.perf_counter() - start)
        nbytes = path.stat().st_size
    median = statistics.median(seconds)
    return {
        "case": "export",
        "events": written,
        "bytes": nbytes,
        "seconds_median": median,
        "seconds_per_million_events": median / written * 1e6,
        "lost_records": timeline.lost,
        "seconds": seconds,
    }


# ---- A sample


def measure_sample(samples: int) -> Result:
    """The cost of a sample for this thread, without links, each of which would add a system call."""
    all_meters = meters.of_this_machine(dict)
    for meter in all_meters:
        meter.measure(time.monotonic_ns())
    cpu, wall = time.thread_time(), time.perf_counter()
    for _ in range(samples):
        for meter in all_meters:
            meter.measure(time.monotonic_ns())
    cpu_s = (time.thread_time() - cpu) / samples
    return {
        "case": "sample",
        "meters": [type(meter).__name__ for meter in all_meters],
        "cpu_s": cpu_s,
        "wall_s": (time.perf_counter() - wall) / samples,
        "share_of_a_core": cpu_s / PERIOD_S,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the amount of measurements."""
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or the folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=8, help="rounds per run; the first two are not counted")
    parser.add_argument("--chunk", type=int, default=2**18, help="elements per chunk: smaller chunks make more records")
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--repetitions", type=int, default=7)


def run(options: argparse.Namespace) -> Result:
    """All four, one after the other."""
    names = ("model", "rounds", "chunk", "events", "repetitions")
    return {
        "settings": {name: getattr(options, name) for name in names},
        "rows": [
            measure_step(options.model, options.repetitions, options.rounds, options.chunk),
            measure_record(options.repetitions),
            measure_export(options.events, min(3, options.repetitions)),
            measure_sample(200),
        ],
    }


def tables(result: Result) -> list[Table]:
    """A line per case."""
    step, record, export, sample = result["rows"]
    table = columns(f"telemetry ({result['settings']['model']})", "case", "with", "without", "with / without")
    times = [shown(step[name] * 1e3, ".2f") + " ms" for name in ("step_s_recorded", "step_s_off")]
    table.add_row("step, every stage recorded", *times, shown(step["ratio"], ".4f"))
    costs = columns("the cost of a record, an export and a sample", "case", "cost", "share")
    share = step["records_a_step"] * record["seconds"] / step["step_s_off"]
    costs.add_row("one record", f"{record['seconds'] * 1e9:.0f} ns", f"{share:.4%} of a step, if one thread wrote all")
    costs.add_row("export of a million events", f"{export['seconds_per_million_events']:.2f} s", "")
    cost = f"{sample['cpu_s'] * 1e3:.3f} ms of CPU time"
    costs.add_row("one sample", cost, f"{sample['share_of_a_core']:.3%} of a core, at one sample per {PERIOD_S:g} s")
    return [table, costs]


def metrics(result: Result) -> dict[str, float]:
    """Speeds: the step, exports, samples and records."""
    step, record, export, sample = result["rows"]
    return {
        "step, recorded over off": 1 / step["ratio"],
        "million events exported a second": 1 / export["seconds_per_million_events"],
        "samples a second of processor": 1 / sample["cpu_s"],
    } | ({"million records per second": 1e-6 / record["seconds"]} if record["seconds"] > 0 else {})


def plot(result: Result, figure: Any) -> None:
    """The steps of both kinds, side by side."""
    seconds = result["rows"][0]["seconds"]
    axis = figure.subplots()
    axis.boxplot([[s * 1e3 for s in seconds[kind]] for kind in ("off", "recorded")])
    axis.set_xticks([1, 2], ["nothing recorded", "every stage recorded"])
    axis.set_ylabel("ms per step")
    figure.suptitle("the cost of recording for a step")


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["telemetry", *sys.argv[1:]], "python -m bench"))
