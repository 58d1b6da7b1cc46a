"""The cost of transfers for training: steps per second of a training thread on one core, in alternating windows with
and without transfers. The transport's threads and its peer process exchange bodies at full rate on the other core.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from parablock_rt import _C
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.active import ActiveBlock, freeze
from parablock_rt.errors import ParaBlockError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.wire.transport import Shape, Transport, body_layout

from .process import answer

UPLOAD = 1
START_S = 120.0


def _echo(port_out: Any, core: int, nbytes: int) -> None:
    """The body of the other process: exchanges bodies with each peer that connects, until the process is killed."""
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
    """Median steps per second with and without transfers at full rate. One core trains, the other moves bytes."""
    training_core, transport_core = sorted(os.sched_getaffinity(0))[:2]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    peer = context.Process(target=_echo, args=(sender, transport_core, nbytes), daemon=True)
    peer.start()
    sender.close()
    address = answer(receiver, START_S)
    whole = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {training_core})
    model, _, task = finetune.load(workload)
    plan = BlockPlan.from_model(model)
    freeze(model.parameters())
    flat = plan.materialise(model)[len(plan.blocks) // 2]
    active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=1e-6))
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
    os.sched_setaffinity(0, whole)
    without, with_transfers = statistics.median(rates["without"]), statistics.median(rates["with"])
    return {
        "steps_per_s_without": without,
        "steps_per_s_with": with_transfers,
        "ratio": with_transfers / without,
        "transfer_mib_per_s": statistics.median(throughput),
        "windows": rates,
    }


class _Traffic:
    """Transfers at full rate while the `with` body runs, by threads on `core`."""

    def __init__(self, address: str, core: int, nbytes: int) -> None:
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address, core, nbytes), daemon=True)
        self.bytes_per_second = 0.0

    def __enter__(self) -> _Traffic:
        self._thread.start()
        if not self._ready.wait(60.0):
            raise ParaBlockError("no transfers within 60 s; see the error of their thread above")
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
