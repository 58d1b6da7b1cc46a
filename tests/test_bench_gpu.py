"""The benchmarks of the GPU data path: where there is no GPU they run to their end in a reduced form and state nothing,
and what they measured elsewhere is shown as it was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from bench import cli, gpu_overlap, kernels, page, staging

GPU_FIGURES = {
    "kernels": kernels.FIGURES,
    "staging": (*staging.FIGURES, *staging.HAND_OVER),
    "gpu-overlap": (*gpu_overlap.BOUNDARY, *gpu_overlap.BESIDE),
}


def cells(table: Table) -> list[list[str]]:
    """The rows of a table."""
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


@pytest.mark.parametrize("name", GPU_FIGURES)
def test_without_a_gpu_it_runs_to_its_end_and_states_no_figure(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parablock_rt", "bench", name, "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert "gpu" not in result["machine"]
    assert result["rows"]
    for row in result["rows"]:
        assert all(row[figure] is None for figure in GPU_FIGURES[name] if figure in row)
        assert row["note"]
    benchmark = cli.load(name)
    assert all(table.row_count == 0 for table in benchmark.tables(result))
    assert benchmark.metrics(result) == {}


def kernel_row(case: str, by: str, seconds: float, share: float) -> dict[str, Any]:
    common = {"params": 100_000_000, "bytes_per_param": 8, "sets": 1, "note": ""}
    times = {"seconds_median": seconds, "seconds_min": seconds, "seconds_max": seconds}
    return common | times | {"case": case, "by": by, "gb_per_s": 0.8 / seconds, "ratio_to_copy": share}


def test_kernels_are_shown_beside_the_copy_beside_torch_and_by_tile() -> None:
    rows = [kernel_row("copy fp32", "copy", 0.001, 1.0), kernel_row("encode bf16 int8", "kernel", 0.00125, 0.8)]
    rows += [kernel_row("encode bf16 int8", "2048 x 4", 0.002, 0.5), kernel_row("encode bf16 int8", "eager", 0.025, 0)]
    rows.append(kernel_row("encode bf16 int8", "compile", 0.0025, 0.4))
    rows.append({"params": 1, "case": "encode fp32 int8 kernel", "by": "", "note": "left out: not enough GPU memory"})
    result = {"rows": rows, "peak_gb_per_s": 1000.0, "machine": {"gpu": "a GPU"}}
    kernel, torch_beside, tiles = kernels.tables(result)
    assert cells(kernel)[1] == ["encode bf16 int8", "100.0", "8.0000", "1250.0", "640", "0.800"]
    assert cells(torch_beside) == [["encode bf16 int8", "100.0", "20.0", "2.0"]]
    assert cells(tiles) == [["encode bf16 int8", "0.500"]]
    assert kernels.metrics(result) == {"encode bf16 int8 100000000": pytest.approx(640)}


def test_copies_and_hand_overs_are_shown_with_their_ratios() -> None:
    copied = {"case": "device to host", "body_bytes": 16 << 20, "piece_bytes": 4 << 20, "whole_gb_per_s": 50.0}
    copied |= {"chunked_gb_per_s": 49.0, "chunked_over_whole": 0.98, "pageable_over_pinned": 0.2}
    handed = {"case": "hand-over", "params": 15_000_064, **dict.fromkeys(staging.HAND_OVER, 0.002)}
    result = {"rows": [copied, handed], "machine": {"gpu": "a GPU"}}
    copies, hand_overs = staging.tables(result)
    assert cells(copies) == [["16", "4", "50.0", "49.0", "0.980", "0.200"]]
    assert cells(hand_overs) == [["15.0", *["2.00"] * 5, "0.00"]]
    assert staging.metrics(result)[f"chunked {16 << 20} {4 << 20}"] == 0.98


def test_a_boundary_is_shown_with_its_share_of_the_round() -> None:
    at = {"case": "boundary", "params_a_block": 218_000_000, "step_s": 0.045, "round_s": 3.6, "boundary_s": 0.002}
    at |= {"boundary_share": 0.002 / 3.6, "waited_s": 0.0001, "steps_s": [0.045] * 4}
    along = {"case": "beside transfers", "step_s_without": 0.01, "step_s_with": 0.0101, "ratio": 1.01}
    result = {"rows": [at, along | {"transfer_gb_per_s": 3.0}], "machine": {"gpu": "a GPU"}}
    boundary, beside = gpu_overlap.tables(result)
    assert cells(boundary) == [["218", "45.00", "3.600", "2.00", "0.06%", "0.10"]]
    assert cells(beside) == [["10.000", "10.100", "1.010", "3.00"]]


def test_every_gpu_benchmark_has_its_place_in_the_documents() -> None:
    text = "".join(file.read_text() for file in page.pages())
    for name in cli.GPU_NAMES:
        assert f"<!-- bench:{name} -->" in text
