"""How much of a slow link the transport uses, next to iperf3 on the same link in the same run.

`python -m bench.shaped --json FILE`. The kernel shapes the link, which joins two network namespaces, so both systems
send through the same token bucket, in turns. Needs root; without root it says so and exits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import namespaces
from bench.namespaces import ADDRESSES, Shape
from bench.result import columns, shown

MBIT = 1e6
SHAPES = (Shape(10 * MBIT), Shape(100 * MBIT), Shape(1000 * MBIT), Shape(100 * MBIT, delay=0.05))
SENDER, RECEIVER = 0, 1
PORT = 7070
DEADLINE_S = 120.0
FORMAT, CHUNK_ELEMENTS = "int8", 2**18  # the defaults of a run
MOST_BYTES = 2**28


def parablock_end(side: int, namespace: str, numel: int, pipe: Connection) -> None:
    """A child process, one end: makes one transfer per "go". Reports the start and end of each in nanoseconds."""
    namespaces.enter(namespace)
    from parablock_rt import _C
    from parablock_rt.wire import transport

    layout = transport.body_layout(FORMAT, numel, CHUNK_ELEMENTS)
    buffer = _C.Buffer(layout.nbytes)
    with transport.Transport() as ours:

        def wait(kind: _C.Event.Type) -> _C.Event:
            while (event := ours.next_event(DEADLINE_S)) is not None:
                if event.type == kind:
                    return event
            raise RuntimeError(f"no {kind} within {DEADLINE_S:g} s")

        if side == RECEIVER:
            ours.listen(f"{ADDRESSES[RECEIVER]}:{PORT}", protected=False, insecure=True)
            pipe.send("listening")
            link = wait(_C.Event.Type.CONNECTED).link
        else:
            link = ours.connect(f"{ADDRESSES[RECEIVER]}:{PORT}")
        run = 0
        while pipe.recv() == "go":
            start = time.monotonic_ns()
            if side == RECEIVER:
                ours.native.receive(link, 1, run, 0, buffer, layout)
                pipe.send((start, wait(_C.Event.Type.RECEIVED).at_ns))
            else:
                ours.native.send(link, 1, run, 0, ours.native.make_source(buffer, layout, True))
                wait(_C.Event.Type.SENT)
                pipe.send((start, time.monotonic_ns()))
            run += 1


class ParaBlock:
    """Both ends, each a process in its own namespace, connected and warmed up while the context lasts."""

    def __init__(self, names: tuple[str, str], nbytes: int) -> None:
        self.names = names
        self.numel = nbytes // 128 * 128

    def __enter__(self) -> ParaBlock:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[int, Connection] = {}
        self._children = []
        for side in (RECEIVER, SENDER):
            self._pipes[side], theirs = context.Pipe()
            child = context.Process(
                target=parablock_end, args=(side, self.names[side], self.numel, theirs), daemon=True
            )
            child.start()
            self._children.append(child)
            if side == RECEIVER:
                self._hear(side)
        self.mbit_per_s()
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes.values():
            pipe.send("stop")
        for child in self._children:
            child.join()

    def mbit_per_s(self) -> float:
        """One transfer, from the call that sends to the last byte in the receiver's buffer."""
        for side in (RECEIVER, SENDER):
            self._pipes[side].send("go")
        start, _ = self._hear(SENDER)
        _, end = self._hear(RECEIVER)
        from parablock_rt.codec import body_bytes

        return body_bytes(self.numel, FORMAT) * 8 / MBIT / ((end - start) / 1e9)

    def _hear(self, side: int) -> Any:
        if not self._pipes[side].poll(DEADLINE_S):
            raise RuntimeError(f"no answer from a ParaBlock end within {DEADLINE_S:g} s")
        return self._pipes[side].recv()


def iperf_mbit_per_s(names: tuple[str, str], seconds: int) -> float:
    """One iperf3 stream, by its receiver's count. Omits the first second, because ParaBlock's link is warm too."""
    receiver = ["ip", "netns", "exec", names[RECEIVER], "iperf3", "-s", "-1", "-p", str(PORT + 1), "--forceflush"]
    with subprocess.Popen(receiver, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            if server.poll() is not None:
                raise RuntimeError("iperf3 -s did not start")
        sender = ["ip", "netns", "exec", names[SENDER], "iperf3", "-c", ADDRESSES[RECEIVER], "-p", str(PORT + 1)]
        client = subprocess.run(
            [*sender, "-O", "1", "-t", str(seconds), "-J"], capture_output=True, text=True, check=True
        )
    return float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / MBIT


def measure(shape: Shape, seconds: int, repetitions: int) -> dict[str, object]:
    """One row: both systems on one link, in turns, each sending as many bytes as the link carries in `seconds`."""
    nbytes = min(int(shape.rate / 8 * seconds), MOST_BYTES)
    ours: list[float] = []
    iperf: list[float] = []
    with namespaces.link(shape) as names, ParaBlock(names, nbytes) as ends:
        for _ in range(repetitions):
            ours.append(ends.mbit_per_s())
            iperf.append(iperf_mbit_per_s(names, seconds))
    return {
        "rate_mbit_per_s": shape.rate / MBIT,
        "round_trip_ms": 2e3 * shape.delay,
        "bytes": nbytes,
        "parablock_mbit_per_s": statistics.median(ours),
        "iperf3_mbit_per_s": statistics.median(iperf),
        "ratio_to_iperf3": statistics.median(ours) / statistics.median(iperf),
        "parablock_runs": ours,
        "iperf3_runs": iperf,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One row per link."""
    table = columns(
        "links shaped by the kernel", "link, Mbit/s", "round trip, ms", "ParaBlock, Mbit/s", "iperf3, Mbit/s", "ratio"
    )
    for row in result["rows"]:
        table.add_row(
            f"{row['rate_mbit_per_s']:g}",
            f"{row['round_trip_ms']:g}",
            shown(row["parablock_mbit_per_s"], ".2f"),
            shown(row["iperf3_mbit_per_s"], ".2f"),
            shown(row["ratio_to_iperf3"], ".3f"),
        )
    return [table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=8, help="approximate length of each transfer")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write machine and all rows to this file")
    options = parser.parse_args()
    reason = namespaces.why_not() or (None if shutil.which("iperf3") else "iperf3 is not installed")
    if reason is not None:
        print(f"shaped links are not measured: {reason}")
        sys.exit(0)
    from bench.machine import machine

    result = {"machine": machine(), "rows": [measure(s, options.seconds, options.repetitions) for s in SHAPES]}
    Console(soft_wrap=True, highlight=False).print(*tables(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
