"""Speed, memory and CPU time of one link on loopback, next to other systems that carry the same bytes.

Sender and receiver are two new processes for each system; the repetitions of all systems are interleaved, so that a
noisy neighbour affects all alike. A run lasts from the call that sends to the moment when the receiving program has
every byte. "fresh": into memory that was never touched before, so page faults count; "reused": into the buffer of the
previous run, like a federation in steady state. ParaBlock checks a CRC-32C on both sides, the others check nothing
beyond TCP. The tests check that the bytes are right.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.table import Table

from .process import DEADLINE_S, GIB, MIB, cpu_seconds, memory_bytes
from .result import Result, columns, shown

SIZES = (256 * MIB, GIB)
FORMAT, CHUNK_ELEMENTS = "int8", 2**18  # the defaults of a run


class End(ABC):
    """One end of one system. `prepare` makes the payload's memory, `move` transfers it once."""

    def __init__(self, sends: bool, nbytes: int) -> None:
        self.sends = sends
        self.nbytes = nbytes

    @abstractmethod
    def open(self, pipe: Connection) -> None:
        """Connects to the other end; the receiver sends the address and the like to the sender through the pipe."""

    @abstractmethod
    def prepare(self, run: int, fresh: bool) -> None:
        """Does everything that is not timed. The sender makes its payload once."""

    @abstractmethod
    def move(self, run: int) -> None:
        """Transfers the payload. Returns when the sender may reuse the payload, or the receiver has all of it."""


class ParaBlockEnd(End):
    """The native transport, as the package uses it."""

    def open(self, pipe: Connection) -> None:
        from parablock_rt import _C
        from parablock_rt.wire import transport

        self._module, self._transport = _C, transport.Transport(tls=self._tls(pipe))
        unit = transport.body_layout(FORMAT, 128 * CHUNK_ELEMENTS, CHUNK_ELEMENTS).nbytes / (128 * CHUNK_ELEMENTS)
        numel = int(self.nbytes / unit) // 128 * 128
        self._layout = transport.body_layout(FORMAT, numel, CHUNK_ELEMENTS)
        self._buffer: Any = None
        if self.sends:
            self._link = self._transport.connect(pipe.recv())
        else:
            pipe.send(self._transport.listen("127.0.0.1:0", protected=False))
            self._link = self._wait(_C.Event.Type.CONNECTED).link

    def _tls(self, pipe: Connection) -> Any:
        """The TLS settings of this end; None: no TLS."""
        return None

    def prepare(self, run: int, fresh: bool) -> None:
        if self._buffer is None or (fresh and not self.sends):
            self._buffer = None
            self._buffer = self._module.Buffer(self.nbytes)
            if self.sends:
                fill(self._buffer)
        if not self.sends:
            self._transport.native.receive(self._link, 1, run, 0, self._buffer, self._layout)

    def move(self, run: int) -> None:
        if self.sends:
            # A Source computes each chunk's checksum only once, so every run gets a new Source.
            source = self._transport.native.make_source(self._buffer, self._layout, True)
            self._transport.native.send(self._link, 1, run, 0, source)
            self._wait(self._module.Event.Type.SENT)
        else:
            self._wait(self._module.Event.Type.RECEIVED)

    def _wait(self, kind: object) -> Any:
        event = self._transport.next_event(DEADLINE_S)
        while event is not None and event.type == self._module.Event.Type.STALLED:  # fresh memory can take seconds
            event = self._transport.next_event(DEADLINE_S)
        if event is None or event.type != kind:
            raise RuntimeError(f"expected {kind}, found {event and (event.type, event.text)}")
        return event


class ParaBlockTlsEnd(ParaBlockEnd):
    """The same over TLS 1.3, with certificates like those of `parablock certs`."""

    def _tls(self, pipe: Connection) -> Any:
        from parablock_rt.wire import certs, tls

        if self.sends:
            return tls.Tls(fingerprint=pipe.recv()).for_client()
        with tempfile.TemporaryDirectory() as folder:
            server = certs.create(Path(folder), ["127.0.0.1"]).server
            pipe.send(server.fingerprint)
            return tls.Tls(server.certificate_file, server.key_file).for_server()


class SocketEnd(End):
    """A blocking Python socket: sendall and recv_into."""

    def open(self, pipe: Connection) -> None:
        self._view: memoryview | None = None
        if self.sends:
            self._socket = socket.create_connection(pipe.recv())
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                pipe.send(listener.getsockname())
                self._socket, _ = listener.accept()

    def prepare(self, run: int, fresh: bool) -> None:
        import numpy as np

        if self._view is None or (fresh and not self.sends):
            self._view = None
            self._view = memoryview(np.empty(self.nbytes, np.uint8))
            if self.sends:
                fill(self._view)

    def move(self, run: int) -> None:
        assert self._view is not None
        if self.sends:
            self._socket.sendall(self._view)
            return
        at = 0
        while at < self.nbytes:
            count = self._socket.recv_into(self._view[at:])
            if count == 0:
                raise RuntimeError("the sender closed the connection")
            at += count


class GlooEnd(End):
    """torch.distributed send and recv over gloo."""

    def open(self, pipe: Connection) -> None:
        import torch.distributed as dist

        self._tensor: Any = None
        rank = 1 if self.sends else 0
        if rank == 0:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            pipe.send(port)
        else:
            port = pipe.recv()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)

    def prepare(self, run: int, fresh: bool) -> None:
        import torch

        if self._tensor is None or (fresh and not self.sends):
            self._tensor = None
            self._tensor = torch.empty(self.nbytes, dtype=torch.uint8)
            if self.sends:
                fill(self._tensor.numpy())

    def move(self, run: int) -> None:
        import torch.distributed as dist

        if self.sends:
            dist.send(self._tensor, 0)
        else:
            dist.recv(self._tensor, 1)


ENDS: dict[str, type[End]] = {
    "parablock": ParaBlockEnd,
    "parablock, TLS": ParaBlockTlsEnd,
    "python socket": SocketEnd,
    "gloo": GlooEnd,
}


def fill(memory: Any) -> None:
    """Fills memory with random bytes, so that the kernel backs every page."""
    import numpy as np

    words = np.frombuffer(memory, np.uint8)
    pattern = np.random.default_rng(0).integers(0, 256, MIB, np.uint8)
    for at in range(0, words.size, MIB):
        words[at : at + MIB] = pattern[: words.size - at]


def end_process(system: str, sends: bool, nbytes: int, pipe: Connection, other: Connection) -> None:
    """A child process: connects, then does one run per (run, fresh) from the pipe, until None."""
    end = ENDS[system](sends, nbytes)
    end.open(other)
    gc.collect()
    base = memory_bytes("VmRSS")
    while (order := pipe.recv()) is not None:
        run, fresh = order
        end.prepare(run, fresh)
        pipe.send("ready")
        if pipe.recv() != "go":
            break
        cpu, start = cpu_seconds(), time.monotonic_ns()
        end.move(run)
        stop = time.monotonic_ns()
        pipe.send((start, stop, cpu_seconds() - cpu))
    pipe.send(memory_bytes("VmHWM") - base - nbytes)


@dataclass
class Pair:
    """Sender and receiver of one system and one size."""

    system: str
    nbytes: int
    runs: int = 0
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    cpu: dict[bool, list[tuple[float, float]]] = field(default_factory=lambda: {False: [], True: []})
    memory: tuple[int, int] | None = None  # peak beyond the payload, of sender and receiver

    def start(self) -> None:
        """Starts both processes and connects them."""
        context = multiprocessing.get_context("spawn")
        to_receiver, to_sender = context.Pipe()
        self._pipes, self._children = [], []
        for sends, other in ((True, to_receiver), (False, to_sender)):
            ours, theirs = context.Pipe()
            child = context.Process(target=end_process, args=(self.system, sends, self.nbytes, theirs, other))
            child.start()
            theirs.close()
            self._pipes.append(ours)
            self._children.append(child)

    def run(self, fresh: bool) -> float:
        """One transfer; returns its seconds."""
        for pipe in self._pipes:
            pipe.send((self.runs, fresh))
        self._replies()
        for pipe in reversed(self._pipes):  # the receiver first
            pipe.send("go")
        (begin, _, sender_cpu), (_, end, receiver_cpu) = self._replies()
        self.runs += 1
        self.seconds[fresh].append((end - begin) / 1e9)
        self.cpu[fresh].append((sender_cpu, receiver_cpu))
        return self.seconds[fresh][-1]

    def stop(self) -> None:
        """Asks both for their peak memory and ends them."""
        for pipe in self._pipes:
            pipe.send(None)
        self.memory = tuple(self._replies())
        for child in self._children:
            child.join()

    def _replies(self) -> list[Any]:
        replies = []
        for pipe in self._pipes:
            if not pipe.poll(DEADLINE_S):
                raise RuntimeError(f"{self.system}: no answer within {DEADLINE_S:g} s")
            replies.append(pipe.recv())
        return replies


# By default iperf3 writes 128 KiB at a time, and the system chooses the congestion control. On a fast loopback it is
# quicker with larger pieces and with what our links use there.
IPERF = {name: name.split()[1:] for name in ("iperf3", "iperf3 -l 512K -C reno")}


def iperf(nbytes: int, arguments: Sequence[str] = ()) -> tuple[float, float]:
    """One iperf3 stream of `nbytes`: MiB/s by its receiver's count, and the CPU seconds of both ends. iperf3 sends the
    same small buffer again and again, and reads into another."""
    cpu = cpu_seconds(resource.RUSAGE_CHILDREN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    server = subprocess.Popen(["iperf3", "-s", "-1", "-p", port, "--forceflush"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    while "listening" not in server.stdout.readline():
        if server.poll() is not None:
            raise RuntimeError("iperf3 -s did not start")
    command = ["iperf3", "-c", "127.0.0.1", "-p", port, "-n", str(nbytes), "-J", *arguments]
    client = subprocess.run(command, capture_output=True, text=True, check=True)
    server.wait(DEADLINE_S)
    rate = float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / 8 / MIB
    return rate, cpu_seconds(resource.RUSAGE_CHILDREN) - cpu


def measure(sizes: list[int], repetitions: int) -> tuple[list[Pair], dict[tuple[str, int], list[tuple[float, float]]]]:
    """All runs, interleaved, after unmeasured runs of each pair; and those of iperf3, if it is installed."""
    pairs: list[Pair] = []
    others: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for size in sizes:
        group = [Pair(system, size) for system in ENDS]
        for pair in group:
            pair.start()
            for fresh in (False, True):
                pair.run(fresh)
                pair.seconds[fresh].clear()
                pair.cpu[fresh].clear()
        for _ in range(repetitions):
            for fresh in (False, True):
                for pair in group:
                    pair.run(fresh)
            for system, arguments in IPERF.items() if shutil.which("iperf3") else ():
                others.setdefault((system, size), []).append(iperf(size, arguments))
        for pair in group:
            pair.stop()
        pairs += group
    return pairs, others


def summarise(pairs: list[Pair], others: dict[tuple[str, int], list[tuple[float, float]]]) -> list[dict[str, object]]:
    """One row for each system, size and kind of memory."""
    rows: list[dict[str, object]] = []
    plain = {
        (p.nbytes, fresh): statistics.median(p.seconds[fresh])
        for p in pairs
        for fresh in (False, True)
        if p.system == "python socket"
    }
    for pair in pairs:
        for fresh in (False, True):
            seconds = statistics.median(pair.seconds[fresh])
            assert pair.memory is not None
            rows.append(
                {
                    "system": pair.system,
                    "bytes": pair.nbytes,
                    "memory": "fresh" if fresh else "reused",
                    "mib_per_s": pair.nbytes / MIB / seconds,
                    "mib_per_s_min": pair.nbytes / MIB / max(pair.seconds[fresh]),
                    "mib_per_s_max": pair.nbytes / MIB / min(pair.seconds[fresh]),
                    "ratio_to_python_socket": plain[pair.nbytes, fresh] / seconds,
                    "cpu_s_per_gib": statistics.median(sum(c) for c in pair.cpu[fresh]) * GIB / pair.nbytes,
                    "sender_cpu_s_per_gib": statistics.median(c[0] for c in pair.cpu[fresh]) * GIB / pair.nbytes,
                    "receiver_cpu_s_per_gib": statistics.median(c[1] for c in pair.cpu[fresh]) * GIB / pair.nbytes,
                    "sender_peak_beyond_payload_mib": pair.memory[0] / MIB,
                    "receiver_peak_beyond_payload_mib": pair.memory[1] / MIB,
                    "seconds": pair.seconds[fresh],
                }
            )
    for (system, size), runs in others.items():
        speeds = [speed for speed, _ in runs]
        speed = statistics.median(speeds)
        rows.append(
            {
                "system": system,
                "bytes": size,
                "memory": "reused",
                "mib_per_s": speed,
                "mib_per_s_min": min(speeds),
                "mib_per_s_max": max(speeds),
                "ratio_to_python_socket": speed / (size / MIB / plain[size, False]),
                "cpu_s_per_gib": statistics.median(cpu for _, cpu in runs) * GIB / size,
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes and the repetitions."""
    parser.add_argument("--mib", type=int, nargs="+", default=[s // MIB for s in SIZES], help="payload sizes")
    parser.add_argument("--repetitions", type=int, default=5)


def run(options: argparse.Namespace) -> Result:
    """Every system with every size."""
    from parablock_rt import _C

    rows = summarise(*measure([mib * MIB for mib in options.mib], options.repetitions))
    iperf3 = "measured" if shutil.which("iperf3") else "not installed, so not measured"
    settings = {"sizes": options.mib, "repetitions": options.repetitions, "format": FORMAT, "iperf3": iperf3}
    return {"settings": settings | {"chunk_elements": CHUNK_ELEMENTS, "tls": _C.TLS_LIBRARY}, "rows": rows}


def tables(result: Result) -> list[Table]:
    """One row per system, size and kind of memory, with ratios to iperf3 for the same bytes, if measured."""
    names = (
        "system",
        "MiB",
        "memory",
        "MiB/s",
        "MiB/s, ratio to iperf3",
        "CPU s/GiB, both ends",
        "CPU, ratio to iperf3",
    )
    table = columns("one link on loopback", *names, "sender's peak beyond payload, MiB", "receiver's, MiB")
    iperf3 = {row["bytes"]: row for row in result["rows"] if row["system"] == "iperf3"}
    peaks = ("sender_peak_beyond_payload_mib", "receiver_peak_beyond_payload_mib")
    for row in result["rows"]:
        figures = []
        for name, form in (("mib_per_s", ".0f"), ("cpu_s_per_gib", ".2f")):
            reference = iperf3.get(row["bytes"])
            ratio = row[name] / reference[name] if reference is not None else None
            figures += [shown(row[name], form), shown(ratio, ".2f")]
        peak = [shown(row.get(name), ".0f") for name in peaks]
        table.add_row(row["system"], str(row["bytes"] // MIB), row["memory"], *figures, *peak)
    return [table]


def metrics(result: Result) -> dict[str, float]:
    """ParaBlock's speed, and its ratio to a plain socket in the same run."""
    found = {}
    for row in result["rows"]:
        if row["system"] == "parablock":
            name = f"{row['bytes'] // MIB} MiB, {row['memory']} memory"
            found[f"MiB/s, {name}"] = row["mib_per_s"]
            found[f"over a plain socket, {name}"] = row["ratio_to_python_socket"]
    return found


def plot(result: Result, figure: Any) -> None:
    """Speed by system; one group per size and kind of memory."""

    groups = list(dict.fromkeys((row["bytes"], row["memory"]) for row in result["rows"]))
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    axis = figure.subplots()
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        own = {(row["bytes"], row["memory"]): row["mib_per_s"] for row in result["rows"] if row["system"] == system}
        places = [g + (i - (len(systems) - 1) / 2) * width for g, group in enumerate(groups) if group in own]
        axis.bar(places, [own[group] for group in groups if group in own], width, label=system)
    axis.set_xticks(range(len(groups)), [f"{nbytes // MIB} MiB, {memory}" for nbytes, memory in groups])
    axis.set_ylabel("MiB/s")
    axis.legend()
    figure.suptitle("one link on loopback")


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["transport", *sys.argv[1:]], "python -m bench"))
