"""GPU telemetry through the real pynvml, on a library with NVML's C functions in the driver's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
import torch
import parablock_rt as pb

folder, lost = map(Path, sys.argv[1:])
lines = folder / "telemetry.jsonl"

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

def until(holds):
    seen = len(lines.read_text().splitlines())
    while not any(holds(line) for line in lines.read_text().splitlines()[seen:]):
        pass

plan = pb.BlockPlan.from_model(model(), [["0"], ["1"]])
with pb.serve(model(), plan=plan, rounds=3, clients=1, local_steps=1) as server:
    run = pb.join(server.address, model(), lambda p: torch.optim.SGD(p, lr=0.1))
    with run, pb.record(run, folder, period=0.05):
        for batch in run.stream([torch.ones(4, 8)]):
            if run.round == 1:
                until(lambda line: "gpu.0" in line)
                lost.touch()
                until(lambda line: "gpu." not in line)
            run.train_step(batch, lambda model, batch: model(batch).square().mean())
    server.wait(60.0)
"""


@pytest.fixture
def with_driver(tmp_path: Path) -> dict[str, str]:
    """The environment in which pynvml finds the library."""
    pytest.importorskip("pynvml")
    library = tmp_path / "driver" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "fake_nvml.cc")], check=True
    )
    return {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_LOST": str(tmp_path / "lost")}


def test_a_run_records_what_nvml_says_in_the_documented_units_and_goes_on_when_the_gpus_are_lost(
    with_driver: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), with_driver["FAKE_NVML_LOST"]],
        **{"env": with_driver, "capture_output": True, "text": True, "timeout": 300, "check": False},
    )
    assert done.returncode == 0, done.stderr
    samples: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "telemetry.jsonl").read_text().splitlines()
    ]
    gpus = [{name: value for name, value in sample.items() if name.startswith("gpu.")} for sample in samples]
    both = {
        "memory_utilization": 0.17,
        "memory_used_bytes": 41 * 2**30,
        "sm_clock_hz": 1.98e9,
        "memory_clock_hz": 3.201e9,
    }
    first = {"utilization": 0.61, "power_w": 312.5, "pcie_in_rate": 50_000 * 1024, "pcie_out_rate": 2000 * 1024}
    assert gpus[0] == pytest.approx(
        {f"gpu.0.{name}": value for name, value in (both | first).items()}
        | {f"gpu.1.{name}": value for name, value in (both | {"utilization": 0.62}).items()}
    )
    assert gpus[-1] == {}
    assert samples[-1]["process.rss_bytes"] > 0
    assert done.stderr.count("GpuMeter failed and is dropped") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"]
