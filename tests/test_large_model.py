"""The bench of a large model, in its reduced form: it runs to its end, and what is held is in proportion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import large_model
from parablock_rt import BlockPlan, RunConfig
from parablock_rt.client import memory

RUN = """
import sys
from bench import cli, large_model

kept = []
large_model.keep = lambda result: kept.append(result["rows"][0]["rounds_done"])
cli.main(sys.argv[1:])
print("rounds of what was kept:", kept)
"""
WHAT_TRAINS = ("weights", "references", "master", "gradients", "optimiser state")


def predicted(shape: str) -> float:
    """Bytes a parameter of the model and what trains."""
    model = large_model.on_meta(shape)
    plan: BlockPlan = large_model.plan_of(model)
    found = memory.predict(model, plan, RunConfig(rounds=100, clients=1), large_model.adamw, "cuda")
    return sum(map(found.item, WHAT_TRAINS)) / sum(p.numel() for p in model.parameters())


def test_a_small_model_of_the_same_proportions_holds_what_the_large_one_is_predicted_to(tmp_path: Path) -> None:
    arguments = ["--shape", "small", "--device", "cpu", "--local-steps", "1", "--rounds", "7", "--tokens", "8"]
    command = [sys.executable, "-c", RUN, "large-model", *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=500, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "rounds of what was kept: [None, 4, 7]"  # the first has the prediction
    figures = json.loads((tmp_path / "large-model.json").read_text())["rows"][0]
    assert figures["trained_parameters"] == figures["parameters"]
    assert figures["peak_device_bytes"] is None
    small = figures["model_and_training_bytes_a_parameter"]
    assert small == pytest.approx(predicted("small"), rel=0.001)
    assert small == pytest.approx(predicted("llama-3-8b"), rel=0.005)
