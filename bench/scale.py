"""How a server grows with its clients: 1 to 256 clients that replay recorded uploads.

The server runs in a process of its own, a new one for each run. The clients speak the real protocol without a model:
they upload bodies recorded once, from one local step on each block, and acknowledge what they receive. So a round has
no computation, and the benchmark measures only the server and the loopback. A row has medians of several runs, because
the peak memory of a process varies by a few percent from run to run. It checks two statements: more than sixteen
clients take at most 5 % more of the server's memory than up to sixteen do, and with the most clients a byte takes no
longer than with the fewest. Up to sixteen clients may take less memory: the server holds their uploads until a round
closes and needs no sum.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import tempfile
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from parablock_rt import codec, serve
from parablock_rt.blocks.fingerprint import digest
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.report import folder
from parablock_rt.schedule import block_of
from parablock_rt.wire.transport import body_layout

from .process import answer
from .result import Result, columns
from .swarm import DEADLINE_S, Swarm, buffer_of, ready_of
from .transport import memory_bytes

BLOCKS = 4
HELD = 16  # clients whose int8 uploads a server can hold by default, instead of a sum
MEMORY_TOLERANCE = 0.05
MIB = 2**20
CHUNK = 2**18  # elements; the default of a run


class Stack(nn.Module):
    """Blocks of one matrix each; no data ever passes through them."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ParameterList(torch.randn(numel, generator=generator) * 0.02 for _ in range(BLOCKS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The numbers of clients, the size of a block, the number of rounds."""
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--params", type=int, default=2**20, help=f"of each of the {BLOCKS} blocks; a multiple of 128")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--rounds", type=int, default=8, help="at least 3; the first is not counted")
    parser.add_argument("--repetitions", type=int, default=3, help="runs with each number of clients")


def run(options: argparse.Namespace) -> Result:
    """One row per number of clients, and the two statements about the growth."""
    least = min(*options.clients, options.repetitions)
    if options.rounds < 3 or options.params < 128 or options.params % 128 or least < 1:
        raise ConfigError(
            "expected at least 3 rounds, 1 client and 1 repetition, and params that are a multiple of 128; found "
            f"{options.rounds}, {min(options.clients)}, {options.repetitions}, {options.params}"
        )
    rows = []
    for clients in sorted(set(options.clients)):
        runs = [_measure(clients, options) for _ in range(options.repetitions)]
        medians = {name: _median([one[name] for one in runs]) for name in runs[0]}
        body = codec.body_bytes(options.params, options.format)
        rows.append({"clients": clients, "bytes_a_round": 2 * clients * body, **medians})
    settings = {name: getattr(options, name) for name in ("clients", "params", "format", "rounds", "repetitions")}
    return {"settings": settings, "rows": rows, "growth": growth(rows)}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The growth in the rows: memory relative to the most that up to `HELD` clients take, and time relative to the row
    with the fewest clients."""
    first = rows[0]
    bound = _memory_of_few(rows)
    memory = {row["clients"]: row["peak_memory_mib"] / bound for row in rows}
    # The slope on logarithmic axes: 1 means that time grows in proportion to the bytes.
    slopes = [
        math.log(b["round_s"] / a["round_s"]) / math.log(b["bytes_a_round"] / a["bytes_a_round"])
        for a, b in itertools.pairwise(rows)
    ]
    seconds_a_byte = {row["clients"]: row["round_s"] / row["bytes_a_round"] for row in rows}
    return {
        "memory_over_few": memory,
        "memory_bounded": all(ratio <= 1 + MEMORY_TOLERANCE for ratio in memory.values()),
        "seconds_a_byte_over_smallest": {n: s / seconds_a_byte[first["clients"]] for n, s in seconds_a_byte.items()},
        "time_exponents": slopes,
        "time_no_faster_than_bytes": seconds_a_byte[rows[-1]["clients"]] <= seconds_a_byte[first["clients"]],
    }


def _memory_of_few(rows: list[dict[str, Any]]) -> float:
    """The most MiB that up to `HELD` clients take; the MiB of the fewest clients if every row has more than `HELD`."""
    return float(max(row["peak_memory_mib"] for row in rows if row["clients"] <= max(HELD, rows[0]["clients"])))


# ---- The server


def _serve(pipe: Connection, clients: int, options: argparse.Namespace, path: Path) -> None:
    """The body of the server's process. Sends its address, then the costs of a round at the end."""
    torch.set_num_threads(1)
    model = Stack(options.params)
    run_folder = RunFolder(path)
    marks: list[float] = []

    def on_round(closed: Any) -> None:
        run_folder.append_metrics(asdict(closed))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        marks.append(usage.ru_utime + usage.ru_stime)

    settings = {"rounds": options.rounds, "clients": clients, "staleness": 0, "format": options.format}
    with serve(model, plan=_plan(model), on_round=on_round, **settings) as server:
        pipe.send(server.address)
        outcome = server.wait(DEADLINE_S)
        peak = memory_bytes("VmHWM")  # before the trace is written, which takes memory too
        run_folder.write_trace(server.timeline)
        pipe.send(
            {
                "round_s": statistics.median(closed.open_s for closed in outcome.rounds[1:]),
                "cpu_s_a_round": (marks[-1] - marks[0]) / (len(marks) - 1),
                "peak_memory_mib": peak / MIB,
            }
        )


def _plan(model: nn.Module) -> BlockPlan:
    return BlockPlan.from_model(model, BLOCKS)


def _measure(clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one run takes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as scratch:
        server = context.Process(target=_serve, args=(theirs, clients, options, Path(scratch)), daemon=True)
        server.start()
        theirs.close()
        try:
            _replay(answer(ours, DEADLINE_S), clients, options)
            row = answer(ours, DEADLINE_S)
            server.join(DEADLINE_S)
        finally:
            server.kill()
        (recorded,) = folder.load(Path(scratch))
    body = codec.body_bytes(options.params, options.format)
    folded = [entry["server_stages"]["fold"] for entry in recorded.rounds]
    return {
        **row,
        "fold_mib_per_s": clients * body / MIB / statistics.median(folded[1:]) if folded[1:] else None,
    }


# ---- The clients


def _record(model: Stack, options: argparse.Namespace) -> list[Any]:
    """One body per block: the packed change of one local step towards a random target."""
    bodies = []
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers:
        now = layer.detach().clone().requires_grad_()
        loss = (now - torch.randn(options.params, generator=generator) * 0.02).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            now -= 1e-3 * now.grad
        packed = codec.encode(now.detach(), layer.detach(), format=options.format).body
        bodies.append(buffer_of(packed))
    return bodies


def _replay(address: str, clients: int, options: argparse.Namespace) -> None:
    """All clients, from joining to goodbye."""
    model = Stack(options.params)
    plan = _plan(model)
    ready = ready_of(model, plan)
    fingerprints = list(ready.fingerprints)
    layout = body_layout(options.format, options.params, CHUNK)
    bodies = _record(model, options)
    with Swarm(address, ready, clients) as swarm:
        swarm.begin()
        for index in range(options.rounds):
            block = block_of("cyclic", 0, index, BLOCKS)
            swarm.expect(index, block, layout)
            swarm.upload(index, block, bodies[block], layout)
            fingerprints[block] = swarm.apply(index)
        swarm.end(digest(plan, fingerprints))


# ---- The result


def tables(result: Result) -> list[Table]:
    """The rows, and the two statements."""
    names = (
        "clients",
        "MB per round",
        "round, s",
        "MB/s",
        "server CPU, s per round",
        "server's peak memory, MiB",
        "fold, MiB/s",
    )
    table = columns("scale (medians of the runs, and of the rounds after the first)", *names)
    for row in result["rows"]:
        rate = row["bytes_a_round"] / 1e6 / row["round_s"]
        fold = "–" if row["fold_mib_per_s"] is None else f"{row['fold_mib_per_s']:.0f}"
        table.add_row(
            str(row["clients"]),
            f"{row['bytes_a_round'] / 1e6:.1f}",
            f"{row['round_s']:.3f}",
            f"{rate:.0f}",
            f"{row['cpu_s_a_round']:.3f}",
            f"{row['peak_memory_mib']:.0f}",
            fold,
        )
    grown = result["growth"]
    statements = columns("growth", "statement", "holds", "ratio by number of clients")
    ratios = ", ".join(f"{ratio:.2f}" for ratio in grown["memory_over_few"].values())
    holds = {True: "yes", False: "no"}
    statement = f"more than {HELD} clients take at most 5 % more memory than up to {HELD}"
    statements.add_row(statement, holds[grown["memory_bounded"]], ratios)
    ratios = ", ".join(f"{ratio:.2f}" for ratio in grown["seconds_a_byte_over_smallest"].values())
    statements.add_row(
        "a byte takes no longer with the most clients than with the fewest",
        holds[grown["time_no_faster_than_bytes"]],
        ratios,
    )
    return [table, statements]


def metrics(result: Result) -> dict[str, float]:
    """Bytes per second, per CPU second and inverse memory, by number of clients; larger is better."""
    found = {}
    for row in result["rows"]:
        name = f"{row['clients']} clients"
        found[f"bytes per second, {name}"] = row["bytes_a_round"] / row["round_s"]
        found[f"bytes a CPU second, {name}"] = row["bytes_a_round"] / row["cpu_s_a_round"]
        found[f"1 / peak memory, {name}"] = 1 / row["peak_memory_mib"]
    return found


def plot(result: Result, figure: Any) -> None:
    """The round time against a time proportional to the bytes, and memory."""
    rows = result["rows"]
    clients = [row["clients"] for row in rows]
    times, memory = figure.subplots(1, 2)
    times.loglog(clients, [row["round_s"] for row in rows], marker="o", label="measured")
    proportional = [rows[0]["round_s"] * row["bytes_a_round"] / rows[0]["bytes_a_round"] for row in rows]
    times.loglog(clients, proportional, linestyle="--", color="grey", label="proportional to bytes")
    times.set_ylabel("round, s")
    times.legend()
    memory.semilogx(clients, [row["peak_memory_mib"] for row in rows], marker="o")
    memory.axhspan(0, _memory_of_few(rows) * (1 + MEMORY_TOLERANCE), color="grey", alpha=0.25)
    memory.set_ylim(bottom=0)
    memory.set_ylabel("server's peak memory, MiB")
    for axis in (times, memory):
        axis.set_xlabel("clients")
    figure.suptitle("one server, clients without computation")


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["scale", *sys.argv[1:]], "python -m bench"))
