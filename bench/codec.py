"""Speed of the CPU codec next to a plain memory copy and to torch eager doing the same arithmetic.

`python -m bench.codec --json FILE` prints a table and writes all of it as JSON, `pytest bench/codec.py
--benchmark-only` runs the same cases under pytest-benchmark. The repetitions of all cases and of the copies are
interleaved, so that a noisy neighbour hits them alike. GB/s counts every byte that a case must read and write once
(`bytes_per_param`), not what caches fetch besides; the copy is the faster of torch's and NumPy's. Checks speed only:
that the bytes are right is the business of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.machine import machine
from parablock_rt import _C, codec

DEFAULT_PARAMS = 64 << 20
COPIES = ("copy torch", "copy numpy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One thing to time: `run` once is one pass over the whole block."""

    name: str
    bytes_per_param: float
    run: Callable[[], object]
    eager: str | None = None  # the case in which torch eager does the same


def eager_encode(now: torch.Tensor, ref: torch.Tensor, residual: torch.Tensor, format: str) -> torch.Tensor:
    """Scale, round and keep the rest, written as one would in torch: int8 codes, the residual updated in place."""
    group = codec.group_size(format)
    assert group is not None
    x = (now.float() - ref.float() + residual).view(-1, group)
    if format == "int8":
        scale = (x.abs().amax(1, keepdim=True) / 127).clamp_min_(2.0**-107)
        low, high = -127, 127
    else:
        top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
        scale = torch.where(top >= -bottom, top, bottom) / -8
        low, high = -8, 7
    scale = scale.bfloat16().float()
    code = (x * (1 / scale)).round_().clamp_(low, high)
    residual.view(-1, group).copy_(x - code * scale)
    packed = code.to(torch.int8)
    if format == "int4":
        return (packed[:, 0::2] & 15) | (packed[:, 1::2] << 4)
    return packed


def eager_apply(target: torch.Tensor, body: torch.Tensor, format: str) -> torch.Tensor:
    """Decode and add, written as one would in torch."""
    group = codec.group_size(format)
    assert group is not None
    split = codec.scale_bytes(target.numel(), format)
    scale = body[:split].view(torch.bfloat16).float().unsqueeze(1)
    code = body[split:].view(torch.int8)
    if format == "int4":
        code = torch.stack(((code << 4) >> 4, code >> 4), dim=1).view(-1)
    decoded = code.view(-1, group).float() * scale
    return target.copy_(target.float() + decoded.view(-1))


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

    def fold(format: str) -> None:
        start = bodies[format].data_ptr()
        codes = start + codec.scale_bytes(params, format)
        kind = codec.FORMATS.index(format)
        _C.accumulate(hi.data_ptr(), lo.data_ptr(), start, codes, params, kind, 1.0, threads)

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
                return eager_encode(now, ref, residual, f)

            def slow_apply(dtype: str = dtype, f: str = f) -> object:
                return eager_apply(target[dtype], bodies[f], f)

            cases += [
                Case(f"encode {name}", 2 * size + 8 + packed, encode, f"eager encode {name}"),
                Case(f"eager encode {name}", 2 * size + 8 + packed, slow_encode),
                Case(f"apply {name}", 2 * size + packed, apply, f"eager apply {name}"),
                Case(f"eager apply {name}", 2 * size + packed, slow_apply),
            ]
    cases += [
        Case(f"fold {f}", 32 + codec.body_bytes(params, f) / params, lambda f=f: fold(f)) for f in ("int8", "int4")
    ]
    cases.append(Case("accumulated mean", 20, accumulator.mean))
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
    """One row a case: medians, the bandwidth they mean and how they compare."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=DEFAULT_PARAMS, help="elements of the block (a multiple of 2048)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write machine, settings and all rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    cases = make_cases(options.params, options.threads)
    rows = summarise(cases, measure(cases, options.repetitions), options.params)
    print(f"{about['cpu']}, {about['cores']} cores, {about['instruction_set']}, {options.threads} threads")
    print(f"{'case':<24}{'B/param':>9}{'Mparams/s':>11}{'GB/s':>8}{'/ copy':>8}{'x eager':>9}")
    for row in rows:
        eager = "" if row["times_torch_eager"] is None else f"{row['times_torch_eager']:.1f}"
        print(
            f"{row['case']:<24}{row['bytes_per_param']:>9.4f}{row['mparams_per_s']:>11.0f}{row['gb_per_s']:>8.2f}"
            f"{row['ratio_to_copy']:>8.2f}{eager:>9}"
        )
    if options.json:
        settings = {"params": options.params, "threads": options.threads, "repetitions": options.repetitions}
        options.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=2) + "\n")


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """The cases over a block whose size PARABLOCK_BENCH_PARAMS may set."""
    params = int(os.environ.get("PARABLOCK_BENCH_PARAMS", DEFAULT_PARAMS))
    return {case.name: case for case in make_cases(params, torch.get_num_threads())}


@pytest.mark.parametrize(
    "name",
    [*COPIES]
    + [f"{what} {dtype} {f}" for what in ("encode", "apply") for dtype in DTYPES for f in ("int8", "int4")]
    + ["fold int8", "fold int4", "accumulated mean", "fingerprint fp32"],
)
def test_speed(name: str, cases: dict[str, Case], benchmark: Callable[..., object]) -> None:
    benchmark(cases[name].run)


if __name__ == "__main__":
    main()
