"""Speed of the CPU codec next to a plain memory copy and to torch eager doing the same arithmetic.

The repetitions of all cases and of the copies are interleaved, so that a noisy neighbour affects all alike. GB/s counts
every byte that a case must read or write once (`bytes_per_param`), not the bytes that caches fetch in addition; the
copy is the faster one of torch's and NumPy's. Measures speed only: the tests check the bytes, including torch's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from parablock_rt import _C, codec

from . import eager
from .result import Result, columns, shown

DEFAULT_PARAMS = 64 << 20
TOGETHER = 16  # uploads folded in one pass
COPIES = ("copy torch", "copy numpy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """An operation to time: one `run` is one pass over the whole block."""

    name: str
    bytes_per_param: float
    run: Callable[[], object]
    eager: str | None = None  # the case of the same operation in torch eager


def make_cases(params: int, threads: int) -> list[Case]:
    """All cases over shared buffers of `params` elements, with values of the size of real weights and changes."""
    generator = torch.Generator().manual_seed(0)
    ref32 = torch.randn(params, generator=generator).mul_(0.02)
    now32 = torch.randn(params, generator=generator).mul_(1e-4).add_(ref32)
    inputs = {"fp32": (now32, ref32), "bf16": (now32.bfloat16(), ref32.bfloat16())}
    residual = torch.zeros(params)
    target = {name: ref32.to(dtype) for name, dtype in DTYPES.items()}
    bodies = {f: codec.encode(now32, ref32, format=f).body for f in codec.FORMATS}
    spare = torch.zeros(params)
    accumulator = codec.Accumulator(params, threads=threads)

    def halves_copy() -> None:
        edges = [params * i // threads for i in range(threads + 1)]
        list(
            workers.map(
                lambda i: np.copyto(spare_np[edges[i] : edges[i + 1]], now_np[edges[i] : edges[i + 1]]), range(threads)
            )
        )

    def accumulate(format: str) -> None:
        accumulator.reset()
        accumulator.add(bodies[format], 1.0, format)

    def fold(format: str, uploads: int = 1) -> None:
        start = bodies[format].data_ptr()
        codes = start + codec.scale_bytes(params, format)
        kind = codec.FORMATS.index(format)
        _C.accumulate(hi.data_ptr(), lo.data_ptr(), [(start, codes, kind, 1.0)] * uploads, params, False, threads)

    workers = ThreadPoolExecutor(threads)
    spare_np, now_np = spare.numpy(), now32.numpy()
    hi, lo = torch.zeros(params, dtype=torch.int64), torch.zeros(params, dtype=torch.int64)
    accumulate("int8")
    cases = [Case(COPIES[0], 8, lambda: spare.copy_(now32)), Case(COPIES[1], 8, halves_copy)]
    for dtype, (now, ref) in inputs.items():
        for f in ("int8", "int4"):
            packed = codec.body_bytes(params, f) / params
            size = now.element_size()
            name = f"{dtype} {f}"

            def encode(now: torch.Tensor = now, ref: torch.Tensor = ref, f: str = f) -> object:
                return codec.encode(now, ref, residual, format=f, threads=threads, out=bodies[f])

            def apply(dtype: str = dtype, f: str = f) -> object:
                return codec.apply_(target[dtype], bodies[f], format=f, threads=threads)

            def slow_encode(now: torch.Tensor = now, ref: torch.Tensor = ref, f: str = f) -> object:
                return eager.encode(now, ref, residual, f, bodies[f])

            def slow_apply(dtype: str = dtype, f: str = f) -> object:
                return eager.apply_(target[dtype], bodies[f], f)

            cases += [
                Case(f"encode {name}", 2 * size + 8 + packed, encode, f"eager encode {name}"),
                Case(f"eager encode {name}", 2 * size + 8 + packed, slow_encode),
                Case(f"apply {name}", 2 * size + packed, apply, f"eager apply {name}"),
                Case(f"eager apply {name}", 2 * size + packed, slow_apply),
            ]
    cases += [
        Case(f"fold {f}", 32 + codec.body_bytes(params, f) / params, lambda f=f: fold(f)) for f in ("int8", "int4")
    ]
    several = 32 + TOGETHER * codec.body_bytes(params, "int8") / params
    cases.append(Case(f"fold int8, {TOGETHER} uploads together", several, lambda: fold("int8", TOGETHER)))
    cases.append(Case("accumulated mean", 20, lambda: accumulator.mean(spare)))
    cases.append(Case("fingerprint fp32", 4, lambda: codec.fingerprint(now32)))
    return cases


def measure(cases: list[Case], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every case, after one unmeasured round."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for repetition in range(repetitions + 1):
        for case in cases:
            start = time.perf_counter()
            case.run()
            if repetition > 0:
                seconds[case.name].append(time.perf_counter() - start)
    return seconds


def summarise(cases: list[Case], seconds: dict[str, list[float]], params: int) -> list[dict[str, object]]:
    """One row per case: medians, the bandwidth that follows from them, and ratios."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    copy = max(8 * params / median[name] for name in COPIES)
    rows: list[dict[str, object]] = []
    for case in cases:
        bandwidth = case.bytes_per_param * params / median[case.name]
        rows.append(
            {
                "case": case.name,
                "bytes_per_param": case.bytes_per_param,
                "seconds_median": median[case.name],
                "seconds_min": min(seconds[case.name]),
                "seconds_max": max(seconds[case.name]),
                "mparams_per_s": params / median[case.name] / 1e6,
                "gb_per_s": bandwidth / 1e9,
                "ratio_to_copy": bandwidth / copy,
                "times_torch_eager": None if case.eager is None else median[case.eager] / median[case.name],
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The block, the threads, the repetitions."""
    parser.add_argument("--params", type=int, default=DEFAULT_PARAMS, help="elements of the block (a multiple of 2048)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repetitions", type=int, default=7)


def run(options: argparse.Namespace) -> Result:
    """Every case, `repetitions` times."""
    torch.set_num_threads(options.threads)
    cases = make_cases(options.params, options.threads)
    rows = summarise(cases, measure(cases, options.repetitions), options.params)
    settings = {name: getattr(options, name) for name in ("params", "threads", "repetitions")}
    return {"settings": settings, "rows": rows}


def tables(result: Result) -> list[Table]:
    """One row per case."""
    title = f"codec ({result['settings']['threads']} threads)"
    table = columns(title, "case", "B/param", "Mparams/s", "GB/s", "ratio to copy", "speed-up over torch eager")
    for row in result["rows"]:
        figures = (("bytes_per_param", ".4f"), ("mparams_per_s", ".0f"), ("gb_per_s", ".2f"), ("ratio_to_copy", ".2f"))
        table.add_row(
            row["case"], *(shown(row[name], form) for name, form in figures), shown(row["times_torch_eager"], ".1f")
        )
    return [table]


def metrics(result: Result) -> dict[str, float]:
    """Parameters per second, by case, without torch's own cases."""
    return {row["case"]: row["mparams_per_s"] for row in result["rows"] if not row["case"].startswith("eager")}


def plot(result: Result, figure: Any) -> None:
    """Bandwidth by case, with the copy's bandwidth as a line."""
    rows = [row for row in result["rows"] if not row["case"].startswith(("eager", "copy"))]
    axis = figure.subplots()
    axis.barh([row["case"] for row in rows], [row["gb_per_s"] for row in rows])
    copy = max(row["gb_per_s"] for row in result["rows"] if row["case"] in COPIES)
    axis.axvline(copy, color="grey", linestyle="--", label="memory copy")
    axis.invert_yaxis()
    axis.set_xlabel("GB/s, counting every byte read and written once")
    axis.legend()
    figure.suptitle("codec on the CPU")


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["codec", *sys.argv[1:]], "python -m bench"))
