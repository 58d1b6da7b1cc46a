"""Speed of the GPU kernels next to a device copy and to torch, eager and compiled, doing the same arithmetic.

Times are medians between CUDA events, all queued before the GPU passes the first one, so launches by the host do not
count. Each repetition takes another set of buffers; together the sets are larger than the L2 cache. GB/s counts every
byte that a case must read or write once (`bytes_per_param`). `--tiles` also measures each kernel in other tiles and
numbers of warps; the defaults were chosen by that. Measures speed only: the tests check the bytes.

Without a GPU each case runs once at a tiny size in Triton's interpreter, to show that it runs, without times.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, product
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from . import roofline
from .ahead import LATE, Ahead
from .result import Result, columns, keep, shown

if TYPE_CHECKING:
    from .kernel_cases import Case

# Multiples of 1024, so that bodies are aligned for torch.compile too, which copies misaligned inputs.
SIZES = tuple(-(-size // 1024) * 1024 for size in (15_000_000, 100_000_000, 218_000_000, 1_000_000_000))
TINY = 128 * 40
COMPARED = (SIZES[1], TINY)  # sizes also measured with torch, eager and compiled: every compilation takes seconds
GPU = torch.cuda.is_available()
FIGURES = ("seconds_median", "seconds_min", "seconds_max", "gb_per_s", "ratio_to_copy")
# For torch eager: a pass has some forty launches, and a stream can queue about a thousand. With more the host would
# wait for the GPU, and the times would include launches.
EAGER_REPETITIONS = 10
WARM_S = 0.05
TILES = tuple(product((1024, 2048, 4096, 8192), (4, 8)))


def measure(case: Case, repetitions: int) -> tuple[list[float], str]:
    """Seconds of every repetition on the device, after warm passes over all buffers; and a note about them, or ""."""
    warm_up(case)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]

    def passes() -> None:
        for i, (start, end) in enumerate(events):
            start.record()
            case.run(i % case.sets)
            end.record()

    in_time = Ahead(torch.cuda.current_stream()).queue(passes, events[0][0])
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events], "" if in_time else LATE


def warm_up(case: Case) -> None:
    """Runs the case over all of its buffers, and on until the clocks of a GPU that idled have risen."""
    warm_at = time.monotonic() + WARM_S
    for i in count():
        if i >= max(3, case.sets) and time.monotonic() > warm_at:
            return
        case.run(i % case.sets)
        torch.cuda.synchronize()


def row(case: Case, params: int, seconds: list[float] | None, note: str = "") -> dict[str, Any]:
    """The row of one case; without seconds, its figures are null."""
    result: dict[str, Any] = {"params": params, "case": case.name, "by": case.by, "sets": case.sets, "note": note}
    result |= {"bytes_per_param": case.bytes_per_param, **dict.fromkeys(FIGURES)}
    if seconds is None:
        return result | {"note": "interpreted, not timed"}
    median = statistics.median(seconds)
    bandwidth = case.bytes_per_param * params / median / 1e9
    return result | dict(zip(FIGURES, (median, min(seconds), max(seconds), bandwidth, None), strict=True))


def run_group(group: Callable[[], Iterator[Case]], params: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """The rows of one group. A case that fails has a row with the reason, and the cases after it are still measured."""
    cases = cases_of(group)
    while True:
        case = None
        try:
            case = next(cases, None)
            if case is None:
                break
            found = measured(case, params, repetitions)
        except Exception as error:
            found = left_out(case, params, error)
        yield found
    let_memory_go()


def cases_of(group: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The group's cases; the first one makes the buffers."""
    yield from group()


def measured(case: Case, params: int, repetitions: int) -> dict[str, Any]:
    """The row of one case."""
    if GPU:
        most = EAGER_REPETITIONS if case.by == "eager" else repetitions
        return row(case, params, *measure(case, min(repetitions, most)))
    case.run(0)
    return row(case, params, None)


def left_out(case: Case | None, params: int, error: Exception) -> dict[str, Any]:
    """The row of a case that failed. `case` is None when the buffers of its group could not be made."""
    name = "?" if case is None else f"{case.name} {case.by}"
    first = next(iter(str(error).splitlines()), "")
    why = "not enough GPU memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {first}"
    return {"params": params, "case": name, "by": "", "note": f"left out: {why}"}


def let_memory_go() -> None:
    """Returns the memory that torch has cached to the GPU."""
    if GPU:
        with contextlib.suppress(RuntimeError):  # a GPU that has failed: every further case will say so
            torch.cuda.empty_cache()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The blocks, the repetitions, whether to try other tiles."""
    default = list(SIZES if GPU else (TINY,))
    parser.add_argument("--params", type=int, nargs="+", default=default, help="elements of the blocks (x 128)")
    parser.add_argument("--repetitions", type=int, default=30, help=f"at most {EAGER_REPETITIONS} of torch, eager")
    parser.add_argument("--tiles", action="store_true", help="measure each kernel in other tiles and warps, too")


def run(options: argparse.Namespace) -> Result:
    """Every case at every size. Each size begins with the copy, the reference for its other cases."""
    if not GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, with the kernels
    from .kernel_cases import groups

    rows: list[dict[str, Any]] = []
    settings = {name: getattr(options, name) for name in ("params", "repetitions", "tiles")}
    result: Result = {"settings": settings, "rows": rows, "peak_gb_per_s": roofline.peak_gb_per_s() if GPU else None}
    for params in options.params:
        copy: float | None = None
        compared = params in COMPARED
        for group in groups(params, compared, TILES if options.tiles and compared else ()):
            for found in run_group(group, params, options.repetitions):
                bandwidth = found.get("gb_per_s")
                if found["by"] == "copy":
                    copy = bandwidth
                found["ratio_to_copy"] = bandwidth / copy if bandwidth and copy else None
                rows.append(found)
                keep(result)
    return result


def tables(result: Result) -> list[Table]:
    """A row per kernel and size; the comparison with torch, if measured; and the tiles that were tried."""
    rows = [row for row in result["rows"] if row.get("gb_per_s") is not None]
    table = columns("kernels on the GPU", "case", "million parameters", "B/param", "µs", "GB/s", "ratio to copy")
    for found in rows:
        if found["by"] in ("copy", "kernel"):
            numbers = (found["params"] / 1e6, found["bytes_per_param"], found["seconds_median"] * 1e6)
            table.add_row(
                found["case"],
                *(shown(number, form) for number, form in zip(numbers, (".1f", ".4f", ".1f"), strict=True)),
                shown(found["gb_per_s"], ".0f"),
                shown(found["ratio_to_copy"], ".3f"),
            )
    return [table, _beside_torch(rows), _tiles(rows)]


def _beside_torch(rows: list[dict[str, Any]]) -> Table:
    """The time of torch, eager and compiled, over the kernel's time."""
    table = columns(
        "the same arithmetic in torch",
        "case",
        "million parameters",
        "speed-up over torch eager",
        "speed-up over torch.compile",
    )
    seconds = {(row["params"], row["case"], row["by"]): row["seconds_median"] for row in rows}
    for params, case, by in seconds:
        others = [seconds.get((params, case, other)) for other in ("eager", "compile")]
        if by == "kernel" and any(others):
            own = seconds[params, case, by]
            times = (shown(None if other is None else other / own, ".1f") for other in others)
            table.add_row(case, shown(params / 1e6, ".1f"), *times)
    return table


def _tiles(rows: list[dict[str, Any]]) -> Table:
    """Bandwidth over the copy's in each tile."""
    names = list(dict.fromkeys(row["by"] for row in rows if " x " in row["by"]))
    table = columns("ratio to copy, by elements per program x warps", "case", *names)
    shares = {(row["case"], row["by"]): row["ratio_to_copy"] for row in rows}
    for case in dict.fromkeys(row["case"] for row in rows if row["by"] in names):
        table.add_row(case, *(shown(shares.get((case, name)), ".3f") for name in names))
    return table


def metrics(result: Result) -> dict[str, float]:
    """GB/s of the kernels, by case and size."""
    rows = [row for row in result["rows"] if row["by"] == "kernel" and row.get("gb_per_s") is not None]
    return {f"{row['case']} {row['params']}": row["gb_per_s"] for row in rows}


def plot(result: Result, figure: Any) -> None:
    """Bandwidth by size of block, with the copy's bandwidth and the peak."""

    roofline.draw(result, figure)
