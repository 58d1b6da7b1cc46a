"""The transport beyond one fast link: lanes, long paths, small messages, and many links into one server.

Each case is a function that returns rows. The transport's own shaper makes paths long, so that no root is needed. The
shaper delays frames, not TCP segments: the gain of several TCP connections on a path that loses packets must be
measured on such a path (`bench/shaped.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rich.table import Table

from .process import DEADLINE_S, GIB, MIB, cpu_seconds, memory_bytes
from .result import Result, columns, shown

Row = dict[str, Any]

LANES = (1, 2, 4)
DELAYS_S = (0.0, 0.01, 0.05)
LONG_RATE = 100e6 / 8  # bytes per second
LONG_DELAY_S = 0.05  # one way
RUNS = 15  # of each number of lanes: a transfer takes some hundredths of a second
ROUND_TRIPS = 3000
FAN_IN = (1, 16, 32)  # links; with up to 16, the server holds all uploads of a round until the round closes
CASES = ("lanes", "long", "control", "fan-in")


def in_two_processes(listens: Callable[..., None], connects: Callable[..., None], *arguments: Any) -> tuple[Row, Row]:
    """Runs both functions, each in a fresh process, with a pipe to this process and a pipe between the two; returns the
    results that they send to this process."""
    context = multiprocessing.get_context("spawn")
    between = context.Pipe()
    pipes, children = [], []
    for function, other in zip((listens, connects), between, strict=True):
        ours, theirs = context.Pipe()
        child = context.Process(target=function, args=(theirs, other, *arguments), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    results = []
    for pipe in pipes:
        if not pipe.poll(DEADLINE_S):
            raise RuntimeError(f"{listens.__name__}: no result within {DEADLINE_S:g} s")
        results.append(pipe.recv())
    for child in children:
        child.join(DEADLINE_S)
    return results[0], results[1]


def wait_for(transport: Any, kind: str) -> Any:
    """The next event of this type; skips other events, such as those of connections that become lanes."""
    from parablock_rt import _C

    while True:
        event = transport.next_event(DEADLINE_S)
        if event is None or (event.type == _C.Event.Type.CLOSED and "became a lane" not in event.text):
            raise RuntimeError(f"expected {kind}, found {event and event.text}")
        if event.type == getattr(_C.Event.Type, kind):
            return event


# ---- Transfers over lanes, rates and delays


def receive_transfers(
    result: Connection, peer: Connection, nbytes: int, rate: float, delay: float, lanes: int, runs: int
) -> None:
    """The listening end: posts, then measures the time from the sender's start to its own last byte."""
    from parablock_rt import _C
    from parablock_rt.wire import transport

    with transport.Transport(transport.Shape(rate, delay), lanes=lanes) as here:
        peer.send(here.listen("127.0.0.1:0", protected=False))
        link = wait_for(here, "CONNECTED").link
        offer = here.offer_lanes(link)
        peer.send(None if offer is None else (offer.most, offer.key))
        buffer = _C.Buffer(nbytes)
        seconds, cpu = [], []
        for run in range(1 + runs):
            peer.recv()
            begin = cpu_seconds()
            here.native.receive(link, 1, run, 0, buffer, layout_of(nbytes))
            peer.send("posted")
            wait_for(here, "RECEIVED")
            ended = time.monotonic()
            seconds.append(ended - peer.recv())
            cpu.append(cpu_seconds() - begin)
    result.send({"seconds": seconds, "cpu": cpu})


def send_transfers(
    result: Connection, peer: Connection, nbytes: int, rate: float, delay: float, lanes: int, runs: int
) -> None:
    """The connecting end; a first run warms up and does not count."""
    from parablock_rt import _C
    from parablock_rt.wire import protocol, transport

    with transport.Transport(transport.Shape(rate, delay), lanes=lanes) as here:
        link = here.connect(peer.recv())
        if (offer := peer.recv()) is not None:
            here.open_lanes(link, protocol.Lanes(most=offer[0], key=offer[1]))
        buffer = _C.Buffer(nbytes)
        memoryview(buffer)[:] = (os.urandom(MIB) * (nbytes // MIB + 1))[:nbytes]
        cpu = []
        for run in range(1 + runs):
            begin = cpu_seconds()
            peer.send("next")
            peer.recv()
            start = time.monotonic()
            here.native.send(link, 1, run, 0, here.native.make_source(buffer, layout_of(nbytes), True))
            wait_for(here, "SENT")
            cpu.append(cpu_seconds() - begin)
            used = len([lane for lane in here.native.stats(link).lanes if lane.bytes_out > MIB])
            peer.send(start)  # after the last, the peer closes the link
    result.send({"cpu": cpu, "lanes_used": used})


def layout_of(nbytes: int) -> Any:
    """Raw bytes in chunks of the default size."""
    from parablock_rt.wire import transport

    return transport.raw_layout(nbytes, 2**18)


def transfer_row(nbytes: int, rate: float, delay: float, lanes: int, runs: int = 3) -> Row:
    """One link of this shape: the median of its runs after a first one."""
    received, sent = in_two_processes(receive_transfers, send_transfers, nbytes, rate, delay, lanes, runs)
    seconds = statistics.median(received["seconds"][1:])
    cpu = statistics.median(a + b for a, b in zip(received["cpu"][1:], sent["cpu"][1:], strict=True))
    return {
        "lanes": lanes,
        "lanes_used": sent["lanes_used"],
        "delay_ms": delay * 1e3,
        "bytes": nbytes,
        "mib_per_s": nbytes / MIB / seconds,
        "cpu_s_per_gib": cpu * GIB / nbytes,
        "seconds": received["seconds"][1:],
    }


def lanes_case(mib: int) -> list[Row]:
    """Lanes x delay on an otherwise unlimited link."""
    return [transfer_row(mib * MIB, 0.0, delay, lanes, RUNS) for delay in DELAYS_S for lanes in LANES]


def long_case(mib: int) -> list[Row]:
    """100 Mbit/s with a round trip of 100 ms: the share of the rate that payload reaches, start and end included."""
    rows = [transfer_row(mib * MIB, LONG_RATE, LONG_DELAY_S, lanes) for lanes in (1, 2)]
    return [row | {"part_of_rate": row["mib_per_s"] * MIB / LONG_RATE} for row in rows]


# ---- Small messages


def answer_messages(result: Connection, peer: Connection) -> None:
    """Sends every message back."""
    from parablock_rt.wire import transport

    with transport.Transport() as here:
        peer.send(here.listen("127.0.0.1:0", protected=False))
        link = wait_for(here, "CONNECTED").link
        for _ in range(2 * ROUND_TRIPS):
            here.native.send_control(link, wait_for(here, "CONTROL").message)
        peer.recv()
    result.send({})


def ask_messages(result: Connection, peer: Connection) -> None:
    """Measures each round trip from one Python program to the other and back."""
    from parablock_rt.wire import transport

    with transport.Transport() as here:
        link = here.connect(peer.recv())

        def round_trip() -> None:
            here.native.send_control(link, b"x" * 64)
            wait_for(here, "CONTROL")

        found = timed(round_trip)
        peer.send("done")
    result.send(found)


def answer_bytes(result: Connection, peer: Connection) -> None:
    """Sends every byte back, on a plain blocking socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer.send(listener.getsockname())
        with listener.accept()[0] as here:
            here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := here.recv(4096):
                here.sendall(data)
    result.send({})


def ask_bytes(result: Connection, peer: Connection) -> None:
    """Like `ask_messages`, on a plain blocking socket: two wake-ups per round trip, the minimum with blocking calls."""
    with socket.create_connection(peer.recv()) as here:
        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def round_trip() -> None:
            here.sendall(b"x" * 64)
            here.recv(4096)

        result.send(timed(round_trip))


def timed(round_trip: Callable[[], None]) -> Row:
    """Median and 99th percentile of many round trips, after as many to warm up."""
    micros = []
    for _ in range(2 * ROUND_TRIPS):
        start = time.perf_counter_ns()
        round_trip()
        micros.append((time.perf_counter_ns() - start) / 1e3)
    measured = sorted(micros[ROUND_TRIPS:])
    return {"median_us": statistics.median(measured), "p99_us": measured[int(0.99 * len(measured))]}


def control_case() -> list[Row]:
    """Messages of 64 bytes, one at a time; and the same with a plain socket."""
    _, asked = in_two_processes(answer_messages, ask_messages)
    _, plain = in_two_processes(answer_bytes, ask_bytes)
    about = {"round_trips": ROUND_TRIPS, "bytes": 64}
    return [{"system": "parablock"} | asked | about, {"system": "plain socket"} | plain | about]


# ---- Many links into one server


def serve_uploads(result: Connection, peer: Connection, side: int, rounds: int, clients: int) -> None:
    """The real server, with a model of one block. Reports when each round's last upload was folded, and how long
    closing the round took from then on."""
    import torch

    import parablock_rt as pb
    from parablock_rt.observe.timeline import Stage

    model = torch.nn.Linear(side, side, bias=False)
    plan = pb.BlockPlan.from_model(model, [["weight"]])
    settings = {"rounds": rounds, "clients": clients, "local_steps": 1, "staleness": 0}
    with pb.serve(model, plan=plan, **settings) as server:
        base = memory_bytes("VmRSS")
        begin = cpu_seconds()
        peer.send((server.address, {k: v.clone() for k, v in model.state_dict().items()}))
        peer.recv()
        used = cpu_seconds() - begin
        peer.send("measured")
        server.close()
    folded, closed = [0] * rounds, [0] * rounds
    for _, records in server.timeline.threads():
        for stage, ends in ((Stage.FOLD, folded), (Stage.CLOSE, closed)):
            for record in records[records["stage"] == stage]:
                ends[record["round"]] = max(ends[record["round"]], int(record["end_ns"]))
    closing = [(end - start) / 1e9 for start, end in zip(folded, closed, strict=True)]
    peak = (memory_bytes("VmHWM") - base) / MIB
    result.send({"folded_ns": folded, "closing_s": closing, "cpu": used, "peak_beyond_start_mib": peak})


def upload_all(result: Connection, peer: Connection, side: int, rounds: int, clients: int) -> None:
    """All clients, each on its own link, in one thread of one process: of the two, the server has more to do. In each
    round they all send at the same time."""
    import torch

    from parablock_rt import codec
    from parablock_rt.blocks.plan import BlockPlan
    from parablock_rt.wire.transport import body_layout

    from .swarm import Swarm, buffer_of, ready_of

    address, state = peer.recv()
    model = torch.nn.Linear(side, side, bias=False)
    model.load_state_dict(state)
    ready = ready_of(model, BlockPlan.from_model(model, [["weight"]]))
    numel = side * side
    body = codec.encode(torch.randn(numel) * 1e-3, torch.zeros(numel), None, format="int8").body
    buffer, layout = buffer_of(body), body_layout("int8", numel, 2**18)
    started = []
    with Swarm(address, ready, clients) as swarm:
        swarm.begin()
        for round in range(rounds):
            swarm.expect(round, 0, layout)
            started.append(time.monotonic_ns())
            swarm.upload(round, 0, buffer, layout)
            swarm.apply(round)
        peer.send("sent")
        peer.recv()
    result.send({"started_ns": started, "bytes": body.numel()})


def fan_in_row(side: int, rounds: int, clients: int) -> Row:
    """`rounds` rounds of one server, after one to warm up: each is timed from the moment when all clients send to the
    moment when the last upload is folded."""
    served, sent = in_two_processes(serve_uploads, upload_all, side, rounds + 1, clients)
    pairs = zip(served["folded_ns"], sent["started_ns"], strict=True)
    return {
        "upload_mib": sent["bytes"] / MIB,
        "seconds": [(folded - started) / 1e9 for folded, started in pairs][1:],
        "closing_s": served["closing_s"][1:],
        "server_cpu_s_per_gib": served["cpu"] * GIB / (sent["bytes"] * clients * (rounds + 1)),
        "peak_beyond_start_mib": served["peak_beyond_start_mib"],
    }


def fan_in_case(side: int, rounds: int, repetitions: int) -> list[Row]:
    """The real server folds encoded uploads, in turns with one link that carries as many bytes without folding. On a
    shared machine the speed of the one link varies by a factor of two, so there are two ratios: to its median, and to
    its fastest run, which a noisy neighbour can only lower."""
    body = side * side + side * side // 128 * 2
    alone: list[float] = []
    runs: dict[int, list[Row]] = {clients: [] for clients in FAN_IN}
    for _ in range(repetitions):
        alone.append(transfer_row(16 * body, 0.0, 0.0, 1)["mib_per_s"])
        for clients, done in runs.items():
            done.append(fan_in_row(side, rounds, clients))
    rows = []
    for clients, done in runs.items():
        moved = clients * done[0]["upload_mib"]
        rates = [moved / statistics.median(run["seconds"]) for run in done]
        rows.append(
            {
                "links": clients,
                "rounds": rounds,
                "upload_mib": done[0]["upload_mib"],
                "mib_per_s": statistics.median(rates),
                "one_link_mib_per_s": alone,
                "rates": rates,
                "closing_s": statistics.median(second for run in done for second in run["closing_s"]),
                "server_cpu_s_per_gib": statistics.median(run["server_cpu_s_per_gib"] for run in done),
                "peak_beyond_start_mib": max(run["peak_beyond_start_mib"] for run in done),
                "seconds": [second for run in done for second in run["seconds"]],
            }
        )
    return rows


# ---- As a benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cases and their sizes."""
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the cases to measure")
    parser.add_argument("--mib", type=int, default=64, help="payload of the cases lanes and long")
    parser.add_argument("--side", type=int, default=4096, help="the fan-in's block is a square with this side")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the fan-in")
    parser.add_argument("--repetitions", type=int, default=7, help="runs of the fan-in, in turns with one link")


def run(options: argparse.Namespace) -> Result:
    """The rows of every selected case."""
    measured: dict[str, Callable[[], list[Row]]] = {
        "lanes": lambda: lanes_case(options.mib),
        "long": lambda: long_case(options.mib),
        "control": control_case,
        "fan-in": lambda: fan_in_case(options.side, options.rounds, options.repetitions),
    }
    rows = [{"case": case} | row for case in options.only for row in measured[case]()]
    return {
        "settings": {name: getattr(options, name) for name in ("only", "mib", "side", "rounds", "repetitions")},
        "rows": rows,
    }


def tables(result: Result) -> list[Table]:
    """One table per case."""
    lanes = columns("lanes and delay", "one-way delay, ms", "lanes", "MiB/s", "CPU s/GiB, both ends")
    long = columns("100 Mbit/s with a round trip of 100 ms", "lanes", "MiB", "share of the rate that payload reaches")
    names = ("system", "bytes", "round trips", "median, µs", "99th percentile, µs")
    control = columns("messages, from one program to another and back", *names)
    fan_in = columns(
        "uploads folded by one server",
        "links",
        "MiB per upload",
        "MiB/s of all links",
        "share of one link without folding",
        "share of its fastest run",
        "closing a round, ms",
        "server CPU s/GiB, closing included",
        "server's peak memory above its start, MiB",
    )
    for row in result["rows"]:
        if row["case"] == "lanes":
            cpu = shown(row["cpu_s_per_gib"], ".2f")
            lanes.add_row(f"{row['delay_ms']:.0f}", str(row["lanes"]), f"{row['mib_per_s']:.0f}", cpu)
        elif row["case"] == "long":
            long.add_row(str(row["lanes"]), str(row["bytes"] // MIB), shown(row["part_of_rate"]))
        elif row["case"] == "control":
            times = [shown(row[name], ".0f") for name in ("median_us", "p99_us")]
            control.add_row(row["system"], str(row["bytes"]), str(row["round_trips"]), *times)
        else:
            size, total = shown(row["upload_mib"], ".1f"), shown(row["mib_per_s"], ".0f")
            peak = shown(row["peak_beyond_start_mib"], ".0f")
            alone = row["one_link_mib_per_s"]
            parts = [shown(row["mib_per_s"] / rate) for rate in (statistics.median(alone), max(alone))]
            closing, cpu = shown(row["closing_s"] * 1e3, ".0f"), shown(row["server_cpu_s_per_gib"], ".2f")
            fan_in.add_row(str(row["links"]), size, total, *parts, closing, cpu, peak)
    return [lanes, long, control, fan_in]


def metrics(result: Result) -> dict[str, float]:
    """Rates, and round trips per second."""
    found = {}
    for row in result["rows"]:
        if row["case"] == "lanes":
            found[f"MiB/s, {row['lanes']} lanes, {row['delay_ms']:.0f} ms"] = row["mib_per_s"]
        elif row["case"] == "long":
            found[f"part of 100 Mbit/s, {row['lanes']} lanes"] = row["part_of_rate"]
        elif row["case"] == "control":
            found[f"messages there and back a second, {row['system']}"] = 1e6 / row["median_us"]
        else:
            found[f"MiB/s folded, {row['links']} links"] = row["mib_per_s"]
    return found


def plot(result: Result, figure: Any) -> None:
    """Speed by number of lanes, one line per delay."""
    rows = [row for row in result["rows"] if row["case"] == "lanes"]
    axis = figure.subplots()
    for delay in dict.fromkeys(row["delay_ms"] for row in rows):
        points = [(row["lanes"], row["mib_per_s"]) for row in rows if row["delay_ms"] == delay]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{delay:.0f} ms one way")
    axis.set_xticks(LANES)
    axis.set_xlabel("lanes")
    axis.set_ylabel("MiB/s")
    if rows:
        axis.legend()
    figure.suptitle("one link over several connections")


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["links", *sys.argv[1:]], "python -m bench"))
