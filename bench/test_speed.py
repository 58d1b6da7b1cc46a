"""The benchmarks under pytest-benchmark: `pytest bench --benchmark-only`.

PARABLOCK_BENCH_PARAMS sets the size of the codec's block, PARABLOCK_BENCH_MIB the size of the transfers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parablock_rt.observe import meters, trace

from . import codec, overlap, scale, telemetry, transport

PARAMS = int(os.environ.get("PARABLOCK_BENCH_PARAMS", codec.DEFAULT_PARAMS))
SIZE = int(os.environ.get("PARABLOCK_BENCH_MIB", 256)) * transport.MIB
CASES = [
    *codec.COPIES,
    *(f"{what} {dtype} {f}" for what in ("encode", "apply") for dtype in codec.DTYPES for f in ("int8", "int4")),
    *("fold int8", "fold int4", "accumulated mean", "fingerprint fp32"),
]


@pytest.fixture(scope="module")
def cases() -> dict[str, codec.Case]:
    return {case.name: case for case in codec.make_cases(PARAMS, torch.get_num_threads())}


@pytest.mark.parametrize("name", CASES)
def test_codec(name: str, cases: dict[str, codec.Case], benchmark: Callable[..., object]) -> None:
    benchmark(cases[name].run)


@pytest.fixture(params=list(transport.ENDS))
def pair(request: pytest.FixtureRequest) -> Iterator[transport.Pair]:
    """A connected pair of processes, warmed up by one run."""
    connected = transport.Pair(request.param, SIZE)
    connected.start()
    connected.run(False)
    yield connected
    connected.stop()


def test_transport(pair: transport.Pair, benchmark: Any) -> None:
    benchmark.pedantic(pair.run, args=(False,), rounds=5)


def defaults(module: Any, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.timeout(600)
def test_overlap(benchmark: Any) -> None:
    flags = ("--model", "tiny", "--rounds", "5", "--rates", "20mbit", "--no-interference", "--no-baselines")
    result = benchmark.pedantic(overlap.run, args=(defaults(overlap, *flags),), rounds=1)
    benchmark.extra_info |= overlap.metrics(result)


@pytest.mark.timeout(600)
def test_scale(benchmark: Any) -> None:
    result = benchmark.pedantic(scale.run, args=(defaults(scale, "--clients", "1", "8"),), rounds=1)
    benchmark.extra_info |= scale.metrics(result)


def test_trace_export(benchmark: Callable[..., object], tmp_path: Path) -> None:
    benchmark(trace.write, tmp_path / "trace.json", telemetry.synthetic_timeline(100_000))


def test_telemetry_sample(benchmark: Callable[..., object]) -> None:
    every = meters.of_this_machine(dict)
    benchmark(lambda: [meter.measure(time.monotonic_ns()) for meter in every])
