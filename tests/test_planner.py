"""What a plan is said to cost: sizes, transfer times, the local steps that hide them, the measured step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import parablock_rt as pb
from parablock_rt import codec, planner
from parablock_rt.client import memory, optimizers


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, pb.BlockPlan]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)]).to(dtype)
    return model, pb.BlockPlan.from_model(model, ["0", "1", "2"])


FLAT = 32 * 32 + 128  # the bias is padded to 128


def predictor(model: nn.Module, plan: pb.BlockPlan, format: str = "int8") -> memory.Predictor:
    config = pb.RunConfig(rounds=12, clients=1, format=format)
    return memory.Predictor(model, plan, config, optimizers.by_name("adamw-fused"), "cpu")


def test_a_transfer_takes_the_body_and_the_delay_in_both_directions() -> None:
    _, plan = make()
    for format in codec.FORMATS:
        nbytes = codec.body_bytes(FLAT, format)
        assert plan.blocks[0].wire_bytes(format) == nbytes
        link = planner.Link(up=1000.0, down=4000.0, delay=0.25)
        assert link.exchange_s(plan.blocks[0], format) == pytest.approx(nbytes / 1000 + nbytes / 4000 + 0.5)


def test_a_forecast_says_how_many_local_steps_hide_the_transfer() -> None:
    model, plan = make()
    figures = planner.forecast(plan, predictor(model, plan), rate=1000.0, delay=0.25, step_s=0.1, staleness=1)
    assert figures["digest"] == plan.digest
    assert [entry["name"] for entry in figures["blocks"]] == ["0", "1", "2"]
    for entry in figures["blocks"]:
        assert entry["parameters"] == 32 * 32 + 32
        assert entry["residual_bytes"] == 4 * FLAT
        assert entry["training_bytes"] == (4 + 4 * entry["parameters"] / FLAT + 8 * entry["parameters"] / FLAT) * FLAT
        for format in codec.FORMATS:
            steps = entry["local_steps_to_hide"][format]
            seconds = entry["exchange_s"][format]
            assert steps == math.ceil(seconds / 0.1)
            assert (steps - 1) * 0.1 < seconds <= steps * 0.1 + 1e-9


@pytest.mark.parametrize(("rate", "step_s"), [(0.0, 0.1), (1000.0, None)], ids=["no rate", "no step time"])
def test_without_a_rate_or_a_step_time_there_is_no_forecast_of_time(rate: float, step_s: float | None) -> None:
    model, plan = make()
    figures = planner.forecast(plan, predictor(model, plan), rate, 0.0, step_s, 1)
    assert all("exchange_s" not in entry for entry in figures["blocks"])
    assert "local steps or more" not in planner.render(plan, predictor(model, plan), figures)


def test_the_forecast_for_a_reader_has_every_format_and_the_largest_block() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 8))
    plan = pb.BlockPlan.from_model(model, ["0", "1", "2"])
    held = predictor(model, plan)
    text = planner.render(plan, held, planner.forecast(plan, held, 125_000.0, 0.02, 0.5, 1))
    assert held.peak().render() in text
    assert "at 1 Mbit/s each way, 20 ms one-way delay and 0.500 s per local step, 1 needs:" in text
    assert all(f"  {format:>5}: " in text for format in codec.FORMATS)


def test_nothing_is_hidden_at_staleness_0_however_long_a_round_is() -> None:
    model, plan = make()
    figures = planner.forecast(plan, predictor(model, plan), 1e9, 0.0, step_s=100.0, staleness=0)
    assert {steps for entry in figures["blocks"] for steps in entry["local_steps_to_hide"].values()} == {None}
    assert "not hidden, as expected at staleness 0" in planner.render(plan, predictor(model, plan), figures)
    link = planner.Link(1e9, 1e9, 0.0)
    assert planner.verdict(plan, "int8", 0, 4, link, 100.0).startswith("not hidden: at staleness 0 training waits")
    assert "--staleness 1 with --local-steps 1 would hide it" in planner.verdict(plan, "int8", 0, 4, link, 100.0)


def test_a_slow_direction_is_not_hidden_by_more_staleness() -> None:
    _, plan = make()
    nbytes = plan.blocks[0].wire_bytes("int8")
    link = planner.Link(up=nbytes / 4.0, down=nbytes / 1.0, delay=0.0)  # 4 s up, 1 s down
    assert [link.steps_to_hide(plan.blocks[0], "int8", 0.5, staleness) for staleness in (1, 2, 8)] == [10, 8, 8]
    assert planner.verdict(plan, "int8", 8, 7, link, 0.5).endswith("--local-steps 8 would hide it")
    assert planner.verdict(plan, "int8", 8, 8, link, 0.5).startswith("hidden at staleness 8: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_measuring_a_step_leaves_the_model_as_it_was(dtype: torch.dtype) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make(dtype)[0]

        def forward(self, x: torch.Tensor) -> object:
            return type("Output", (), {"loss": self.net(x).square().mean()})

    model = WithLoss()
    model.net[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    plan = pb.BlockPlan.from_model(model, ["net.0", "net.1", "net.2.weight"])
    assert planner.measure_step(model, plan, {"x": torch.ones(2, 32, dtype=dtype)}) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(p.grad is None for p in model.parameters())
