"""How much of the communication is hidden: a sweep of link rates, and what transfers cost the training.

`python -m bench.overlap --json FILE` prints two tables.

Sweep: a server and two client processes fine-tune the model as the demonstration does, without overlap (S=0) and with
it (S=1), at rates below, at and above the one at which communication takes as long as computation. The break-even is
computed from the compute time of a first run on a fast link. `round / ideal` is the measured round time over
max(compute, communication), summed over the rounds in steady state: the first two and the last have nothing to hide
behind or nothing left to hide.

Interference: steps a second of a training thread on one core while the transport moves bodies to and from another
process at full rate on the other core, against the same without transfers, in alternating windows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.machine import machine
from parablock_rt import _C, demo, finetune
from parablock_rt.active import ActiveBlock, freeze
from parablock_rt.blocks import BlockPlan
from parablock_rt.finetune import Workload
from parablock_rt.timeline import RunFolder
from parablock_rt.transport import Shape, Transport, body_layout

FACTORS = {"below": 0.5, "at": 1.0, "above": 2.0}  # of the break-even rate
WARM_UP_ROUNDS = 2
UPLOAD = 1


def one_cell(workload: Workload, rate: float, delay: float, settings: dict[str, Any], quiet: Console) -> dict[str, Any]:
    """Both runs at one rate (bytes a second): the measured round, its ideal, the hidden share."""
    with tempfile.TemporaryDirectory() as folder:
        summaries = demo.run(demo.Demo(workload, rate, delay, RunFolder(Path(folder)), settings=settings), quiet)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    sequential, parallel = ([r for r in records if r["run"] == name] for name in (demo.SEQUENTIAL, demo.PARALLEL))
    # Round 0 waits for nothing; every later one of the sequential run waits for a whole exchange.
    communication = statistics.median(r["exposed_s"] for r in sequential[1:])
    steady = parallel[WARM_UP_ROUNDS:]
    ideal = sum(max(r["compute_s"], communication) for r in steady)
    return {
        "rate_mbit": rate * 8 / 1e6,
        "compute_s": statistics.mean(r["compute_s"] for r in steady),
        "communication_s": communication,
        "round_s": statistics.mean(r["open_s"] for r in steady),
        "round_over_ideal": sum(r["open_s"] for r in steady) / ideal,
        "overlap_efficiency_steady": 1 - sum(r["exposed_s"] for r in steady) / (communication * len(steady)),
        "overlap_efficiency_run": summaries[demo.PARALLEL]["overlap_efficiency"],
        "speedup": summaries["speedup"],
    }


def sweep(workload: Workload, settings: dict[str, Any], delay: float) -> list[dict[str, Any]]:
    """One cell a rate, preceded by a run on a fast link from which the break-even is computed."""
    quiet = Console(quiet=True)
    model, _, _ = finetune.load(workload)
    body = max(block.wire_bytes(settings["format"]) for block in BlockPlan.from_model(model).blocks)
    fast = one_cell(workload, 125e6, delay, settings, quiet)
    break_even = body / (fast["compute_s"] / 2 - delay)
    cells = [{"cell": "fast", **fast}]
    for name, factor in FACTORS.items():
        cells.append({"cell": f"{name} break-even", **one_cell(workload, factor * break_even, delay, settings, quiet)})
    return cells


def _echo(port_out: Any, core: int, nbytes: int) -> None:
    """The other process: takes bodies from and sends bodies to whoever connects; it is killed in the end."""
    os.sched_setaffinity(0, {core})
    with Transport() as transport:
        port_out.send(transport.listen("127.0.0.1:0", protected=True))
        while True:
            event = transport.next_event(60.0)
            if event is not None and event.type == _C.Event.Type.CONNECTED:
                _exchange(transport, event.link, nbytes, lambda: False)


def _exchange(transport: Transport, link: int, nbytes: int, stopped: Callable[[], bool]) -> int:
    """Sends and receives bodies of `nbytes` one after another until `stopped()`; returns the bytes moved."""
    layout = body_layout("int8", nbytes // 130 * 128, 2**18)
    out, into = _C.Buffer(layout.nbytes), _C.Buffer(layout.nbytes)
    source = transport.native.make_source(out, layout, True)
    moved = sent = received = 0
    transport.native.receive(link, UPLOAD, 0, 0, into, layout)
    transport.native.send(link, UPLOAD, 0, 0, source)
    while not stopped():
        event = transport.next_event(0.2)
        if event is None:
            continue
        if event.type == _C.Event.Type.CLOSED:
            break
        moved += layout.nbytes
        if event.type == _C.Event.Type.RECEIVED:
            received += 1
            transport.native.receive(link, UPLOAD, received, 0, into, layout)
        elif event.type == _C.Event.Type.SENT:
            sent += 1
            transport.native.send(link, UPLOAD, sent, 0, source)
    return moved


def interference(workload: Workload, windows: int, steps: int, nbytes: int) -> dict[str, Any]:
    """Median steps a second with and without transfers at full rate. Two cores: one trains, one moves bytes."""
    training_core, transport_core = 0, 1
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    peer = context.Process(target=_echo, args=(sender, transport_core, nbytes), daemon=True)
    peer.start()
    address = receiver.recv()
    os.sched_setaffinity(0, {training_core})
    model, _, task = finetune.load(workload)
    plan = BlockPlan.from_model(model)
    freeze(model.parameters())
    flat = plan.materialise(model)[len(plan.blocks) // 2]
    master = torch.empty(flat.block.flat_numel) if ActiveBlock.needs_master(flat) else None
    active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=1e-6), master)
    batch = task.train.take(range(workload.batch_size))

    def steps_per_second() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model(**batch).loss.backward()
            active.step()
        return steps / (time.perf_counter() - start)

    steps_per_second()
    rates: dict[str, list[float]] = {"without": [], "with": []}
    throughput = []
    for _ in range(windows):
        rates["without"].append(steps_per_second())
        with _Traffic(address, transport_core, nbytes) as traffic:
            rates["with"].append(steps_per_second())
        throughput.append(traffic.bytes_per_second / 2**20)
    peer.kill()
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    without, with_transfers = statistics.median(rates["without"]), statistics.median(rates["with"])
    return {
        "steps_per_s_without": without,
        "steps_per_s_with": with_transfers,
        "ratio": with_transfers / without,
        "transfer_mib_per_s": statistics.median(throughput),
        "windows": rates,
    }


class _Traffic:
    """Transfers at full rate for as long as the `with` body runs, by threads on `core`."""

    def __init__(self, address: str, core: int, nbytes: int) -> None:
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address, core, nbytes), daemon=True)
        self.bytes_per_second = 0.0

    def __enter__(self) -> _Traffic:
        self._thread.start()
        if not self._ready.wait(60.0):
            raise RuntimeError("no transfers within 60 s; see the error of their thread above")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, address: str, core: int, nbytes: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread; the transport's thread inherits it
        with Transport(Shape()) as transport:
            link = transport.connect(address)
            self._ready.set()
            start = time.perf_counter()
            moved = _exchange(transport, link, nbytes, self._stop.is_set)
            self.bytes_per_second = moved / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--format", default="int8")
    parser.add_argument("--delay", type=float, default=0.02, help="one way, seconds")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write machine, settings and both tables to this file")
    options = parser.parse_args()
    about = machine()
    workload = Workload.for_model(options.model, eval_examples=0)
    settings = {"rounds": options.rounds, "clients": 2, "local_steps": options.local_steps, "format": options.format}
    beside = interference(workload, options.windows, 10, 32 * 2**20)
    print(
        f"training with transfers at {beside['transfer_mib_per_s']:.0f} MiB/s: {beside['ratio']:.3f} of the speed "
        f"without ({beside['steps_per_s_with']:.2f} against {beside['steps_per_s_without']:.2f} steps/s)"
    )
    cells = sweep(workload, settings, options.delay)
    columns = ("rate_mbit", "compute_s", "communication_s", "round_s", "round_over_ideal")
    columns += ("overlap_efficiency_steady", "overlap_efficiency_run", "speedup")
    print(" ".join(f"{name:>16}" for name in ("cell", *(c.replace("overlap_efficiency", "hidden") for c in columns))))
    for cell in cells:
        print(f"{cell['cell']:>16} " + " ".join(f"{cell[name]:16.3f}" for name in columns))
    if options.json:
        content = {"machine": about, "settings": {**settings, "model": options.model, "delay_s": options.delay}}
        content |= {"interference": beside, "sweep": cells}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
