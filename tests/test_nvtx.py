"""Ranges in a tool for NVTX that is really loaded, through the interface by which Nsight Systems gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RUN = """
import torch
import parablock_rt as pb

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

def error(model, batch):
    return model(batch).square().mean()

plan = pb.BlockPlan.from_model(model(), [["0"], ["1"]])
device = "cuda" if torch.cuda.is_available() else "cpu"
with pb.serve(model(), plan=plan, rounds=3, clients=1, local_steps=1, staleness=1) as server:
    with pb.join(server.address, model().to(device), lambda p: torch.optim.SGD(p, lr=0.1)) as run:
        for batch in run.stream([torch.ones(4, 8, device=device)]):
            run.train_step(batch, error)
    server.wait(60.0)
"""

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA, and so NVTX")


def test_a_profiler_for_nvtx_gets_the_ranges_of_a_run(tmp_path: Path) -> None:
    tool, output = tmp_path / "tool.so", tmp_path / "ranges"
    build = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(tool), str(HERE / "nvtx_tool.cc")]
    subprocess.run(build, check=True)
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(tool), "NVTX_TOOL_OUTPUT": str(output)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = output.read_text().splitlines()
    begun = [line[2:] for line in lines if line.startswith("+")]
    assert begun.count("parablock.hand_over") == begun.count("parablock.compute") == 3  # a client's, a server's
    assert begun.count("parablock.apply") == 6  # of both
    assert len(begun) == sum(line.startswith("-") for line in lines)
