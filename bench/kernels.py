"""Speed of the GPU kernels next to a device copy and to torch, eager and compiled, doing the same arithmetic.

`python -m bench.kernels --json FILE` prints a table and writes all of it as JSON. Times are medians between CUDA
events, with the queue kept full, so that launch overhead on the host does not count. Each repetition takes another set
of buffers, as many as it takes to outgrow the L2 cache. GB/s counts every byte that a case must read and write once
(`bytes_per_param`). Checks speed only: that the bytes are right is the business of the tests.

Without a GPU it runs every case once at a tiny size in Triton's interpreter, to show that it runs, and states no times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, with the kernels

import triton

from parablock_rt import codec, kernels

from . import eager
from .machine import machine

# Multiples of 1024, so that bodies are aligned for torch.compile too, which copies inputs that are not.
SIZES = tuple(-(-size // 1024) * 1024 for size in (15_000_000, 100_000_000, 218_000_000, 1_000_000_000))
TINY = 128 * 40
COMPARED = (SIZES[1], TINY)  # where torch, eager and compiled, is measured, too: every compilation takes seconds
FORMATS = ("int8", "int4")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SPIN_CYCLES = 4_000_000  # about 2 ms in which the host gets ahead of the device


@dataclass(frozen=True)
class Case:
    """One thing to time: `run(i)` is one pass over the i-th set of buffers."""

    name: str
    by: str  # "copy", "kernel", "eager" or "compile"
    bytes_per_param: float
    sets: int
    run: Callable[[int], object]


def sets_for(bytes_per_set: float) -> int:
    """Sets of buffers that together are four times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0
    return max(1, math.ceil(4 * cache / bytes_per_set))


def versions(
    name: str,
    params: int,
    bytes_per_param: float,
    sets: int,
    kernel: Callable[[int], object],
    eager: Callable[..., object],
    arguments: Callable[[int], tuple[object, ...]],
) -> Iterator[Case]:
    """The kernel, and at one size the same in torch, eager and (on a GPU) compiled once for all sets of buffers."""
    yield Case(name, "kernel", bytes_per_param, sets, kernel)
    if params not in COMPARED:
        return
    yield Case(name, "eager", bytes_per_param, sets, lambda i: eager(*arguments(i)))
    if GPU:
        torch.compiler.reset()
        compiled = torch.compile(eager, dynamic=False)
        yield Case(name, "compile", bytes_per_param, sets, lambda i: compiled(*arguments(i)))


def encode_cases(params: int, dtype: str, format: str) -> Iterator[Case]:
    packed = codec.body_bytes(params, format) / params
    size = 2 * DTYPES[dtype].itemsize + 8 + packed
    sets = sets_for(params * size)
    ref = [torch.randn(params, device=DEVICE).mul_(0.02).to(DTYPES[dtype]) for _ in range(sets)]
    now = [r + torch.randn(params, device=DEVICE, dtype=r.dtype).mul_(1e-4) for r in ref]
    residual = [torch.zeros(params, device=DEVICE) for _ in range(sets)]
    body = [kernels.empty_body(params, format=format, device=DEVICE) for _ in range(sets)]

    def kernel(i: int) -> object:
        return kernels.encode(now[i], ref[i], residual[i], format=format, out=body[i])

    def arguments(i: int) -> tuple[object, ...]:
        return now[i], ref[i], residual[i], format, body[i]

    yield from versions(f"encode {dtype} {format}", params, size, sets, kernel, eager.encode, arguments)


def bodies(params: int, format: str, sets: int) -> list[torch.Tensor]:
    change = torch.randn(params, device=DEVICE, dtype=torch.bfloat16).mul_(1e-4)
    return [kernels.encode(change, torch.zeros_like(change), format=format).body for _ in range(sets)]


def apply_cases(params: int, dtype: str, format: str) -> Iterator[Case]:
    size = 2 * DTYPES[dtype].itemsize + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    target = [torch.randn(params, device=DEVICE).mul_(0.02).to(DTYPES[dtype]) for _ in range(sets)]
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.apply_(target[i], body[i], format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return target[i], body[i], format

    yield from versions(f"apply {dtype} {format}", params, size, sets, kernel, eager.apply_, arguments)


def decode_cases(params: int, format: str) -> Iterator[Case]:
    size = 4 + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.decode(body[i], params, format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return body[i], params, format

    yield from versions(f"decode {format}", params, size, sets, kernel, eager.decode, arguments)


def accumulate_cases(params: int, format: str) -> Iterator[Case]:
    size = 32 + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    hi = [torch.zeros(params, dtype=torch.int64, device=DEVICE) for _ in range(sets)]
    lo = [torch.zeros(params, dtype=torch.int64, device=DEVICE) for _ in range(sets)]
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.accumulate(hi[i], lo[i], body[i], 0.1, format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return hi[i], lo[i], body[i], 0.1, format

    yield from versions(f"accumulate {format}", params, size, sets, kernel, eager.accumulate, arguments)


def other_cases(params: int) -> Iterator[Case]:
    """The copy that all are held against, and the fingerprint."""
    sets = sets_for(params * 8)
    source = [torch.randn(params, device=DEVICE) for _ in range(sets)]
    target = [torch.empty(params, device=DEVICE) for _ in range(sets)]
    yield Case("copy fp32", "copy", 8, sets, lambda i: target[i].copy_(source[i]))
    yield Case("fingerprint fp32", "kernel", 4, sets, lambda i: kernels.fingerprint_on_device(source[i]))


def all_cases(params: int) -> Iterator[Callable[[], Iterator[Case]]]:
    """Groups of cases that share buffers; a group's are freed before the next group's are made."""
    yield lambda: other_cases(params)
    for format in FORMATS:
        for dtype in DTYPES:
            yield lambda d=dtype, f=format: encode_cases(params, d, f)
            yield lambda d=dtype, f=format: apply_cases(params, d, f)
        yield lambda f=format: decode_cases(params, f)
        yield lambda f=format: accumulate_cases(params, f)


def measure(case: Case, repetitions: int) -> list[float]:
    """Seconds of every repetition on the device, after warm passes over all buffers."""
    for i in range(max(3, case.sets)):
        case.run(i % case.sets)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    for i, (start, end) in enumerate(events):
        start.record()
        case.run(i % case.sets)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def row(case: Case, params: int, seconds: list[float] | None, note: str = "") -> dict[str, object]:
    """What is printed and written of one case; no figures without seconds."""
    result: dict[str, object] = {"params": params, "case": case.name, "by": case.by, "sets": case.sets, "note": note}
    result["bytes_per_param"] = case.bytes_per_param
    if seconds is not None:
        median = statistics.median(seconds)
        result |= {"seconds_median": median, "seconds_min": min(seconds), "seconds_max": max(seconds)}
        result["gb_per_s"] = case.bytes_per_param * params / median / 1e9
    return result


def run_group(group: Callable[[], Iterator[Case]], params: int, repetitions: int) -> Iterator[dict[str, object]]:
    """The rows of one group. What does not fit into the GPU's memory is said so and left out."""
    cases = group()
    name = "?"
    try:
        for case in cases:
            name = f"{case.name} {case.by}"
            if GPU:
                yield row(case, params, measure(case, repetitions))
            else:
                case.run(0)
                yield row(case, params, None, "interpreted, not timed")
    except torch.OutOfMemoryError:
        yield {"params": params, "case": name, "by": "", "note": "left out: not enough GPU memory"}
    finally:
        cases.close()
        if GPU:
            torch.cuda.empty_cache()


def about_device() -> dict[str, object]:
    about = machine() | {"triton": triton.__version__, "device": "none: Triton's interpreter on the CPU, no figures"}
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "memory_bytes": properties.total_memory}
        about |= {"l2_bytes": properties.L2_cache_size, "cuda": torch.version.cuda}
    return about


def print_row(result: dict[str, object], copy: float | None) -> None:
    line = f"{result['params']:>13,} {result['case']!s:<22}{result['by']!s:<9}"
    if "gb_per_s" not in result:
        print(f"{line}{result['note']}")
        return
    share = "" if copy is None else f"{float(str(result['gb_per_s'])) / copy:>8.2f}"
    print(f"{line}{float(str(result['seconds_median'])) * 1e6:>11.1f}{float(str(result['gb_per_s'])):>9.0f}{share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, nargs="+", help="elements of the blocks (multiples of 128)")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write machine, settings and all rows to this file")
    options = parser.parse_args()
    sizes = options.params or (SIZES if GPU else (TINY,))
    about = about_device()
    print(f"device: {about['device']}")
    print(f"{'params':>13} {'case':<22}{'by':<9}{'us':>11}{'GB/s':>9}{'/ copy':>8}")
    rows: list[dict[str, object]] = []
    for params in sizes:
        copy: float | None = None
        for group in all_cases(params):
            for result in run_group(group, params, options.repetitions):
                if result["by"] == "copy" and "gb_per_s" in result:
                    copy = float(str(result["gb_per_s"]))
                result["ratio_to_copy"] = (
                    float(str(result["gb_per_s"])) / copy if copy and "gb_per_s" in result else None
                )
                print_row(result, copy)
                rows.append(result)
    if options.json:
        settings = {"sizes": list(sizes), "repetitions": options.repetitions}
        options.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
