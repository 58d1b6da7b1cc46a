"""The prediction itself: its figures for known shapes, what changes them, and what is said when they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_memory_held import adamw, make_model, sgd
from torch import nn

import parablock_rt as pb
from bench import large_model
from parablock_rt.client import memory
from parablock_rt.errors import ConfigError, DeviceMemoryError

GIB = 2**30
FLAT = 32 * 32 + 128  # the bias is padded to 128
NUMEL = 32 * 32 + 32
CHUNK = 1 << 18  # elements, unless a run says otherwise


def small(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, pb.BlockPlan]:
    model = nn.Sequential(*[nn.Linear(32, 32, dtype=dtype, device="meta") for _ in range(4)])
    return model, pb.BlockPlan.from_model(model, ["0", "1", "2"])


def predict(dtype: torch.dtype = torch.bfloat16, device: Any = "cuda", optimizer: Any = adamw, **settings: Any) -> Any:
    model, plan = small(dtype)
    config = pb.RunConfig(**{"rounds": 100, "clients": 1, **settings})
    return memory.predict(model, plan, config, optimizer, device)


def test_a_16_bit_block_trains_with_fp32_master_gradients_and_moments_beside_two_references() -> None:
    found = predict()
    assert {item.name: max(item.nbytes) for item in found.items if item.place == "device"} == {
        "weights": 2 * (3 * FLAT + NUMEL),
        "references": 2 * 2 * FLAT,
        "master": 4 * FLAT,
        "handed-over master": 4 * FLAT,
        "gradients": 4 * NUMEL,
        "optimiser state": 8 * NUMEL,
        "step scratch": 4 * NUMEL,
        "pack slots": 2 * (pb.codec.body_bytes(CHUNK, "int8") + 16 + 4 * CHUNK),  # the least is a chunk
        "arriving bodies": 3 * plan_body(found, "int8"),
    }
    assert {item.name: max(item.nbytes) for item in found.items if item.place == "pinned"} == {
        "residuals": 4 * (3 + 2) * FLAT,
        "packed bodies": 5 * plan_body(found, "int8"),
    }


def plan_body(found: memory.Prediction, format: str) -> int:
    assert found.block == "1"
    return pb.codec.body_bytes(FLAT, format)


def test_an_fp32_block_is_its_own_master() -> None:
    found = predict(torch.float32)
    assert found.item("master") == found.item("handed-over master") == 0
    assert found.item("gradients") == 4 * NUMEL
    assert found.item("references") == 2 * 4 * FLAT


def test_gradients_come_in_16_bits_and_are_widened_for_the_step() -> None:
    (gradients,) = (item for item in predict().items if item.name == "gradients")
    assert gradients.nbytes == (2 * NUMEL, 2 * NUMEL, 4 * NUMEL, 0)


def test_without_overlap_only_the_block_that_trains_has_a_reference() -> None:
    assert predict(staleness=0).item("references") == 2 * FLAT
    assert predict(staleness=0).item("handed-over master") == 0


def test_a_lossless_format_needs_no_residuals() -> None:
    assert predict(format="fp32").item("residuals") == 0


def test_on_the_cpu_all_is_host_memory() -> None:
    found = predict(device="cpu")
    assert {item.place for item in found.items} == {"host"}
    assert found.peak("host") == max(found.total("host"))


def test_a_schedule_that_repeats_a_block_within_the_staleness_holds_progress() -> None:
    assert predict(staleness=2).item("progress") == 0
    assert predict(staleness=3).item("progress") > 0
    assert predict(staleness=3, local_view="reference").item("progress") == 0


def test_the_prediction_is_for_the_largest_block() -> None:
    model = nn.Sequential(*[nn.Linear(32, width, dtype=torch.bfloat16, device="meta") for width in (32, 128, 32)])
    plan = pb.BlockPlan.from_model(model, ["0", "1", "2"])
    assert memory.predict(model, plan, pb.RunConfig(rounds=9, clients=1), adamw, "cuda").block == "1"


def test_an_optimiser_that_nobody_can_foresee_is_said_to_be_missing() -> None:
    class Unforeseen(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return self.param_groups[0]["params"][0].sum().item()

    found = predict(optimizer=lambda parameters: Unforeseen(parameters))
    assert found.item("optimiser state") == 0
    assert "WITHOUT the optimiser's state" in found.render()
    assert "WITHOUT" not in predict(optimizer=sgd).render()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected device to be one of cuda, cpu, found 'tpu'"):
        memory.device_kind("tpu")


# ---- Eight billion parameters


@pytest.fixture(scope="module")
def eight_billion() -> memory.Prediction:
    model = large_model.on_meta("llama-3-8b")
    plan = large_model.plan_of(model)
    assert sum(block.numel for block in plan.blocks) == sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert plan.frozen == []
    config = pb.RunConfig(rounds=1000, clients=1, staleness=1, format="int8")
    return memory.predict(model, plan, config, large_model.adamw, "cuda")


def test_eight_billion_parameters_train_within_24_gib_of_device_memory(eight_billion: memory.Prediction) -> None:
    context = 0.6 * GIB  # what CUDA and its libraries take before the first tensor
    # 512 tokens, checkpointed: each layer's input, one layer's inner values, logits in bf16 and thrice in fp32.
    tokens, hidden, inner, vocabulary, layers = 512, 4096, 14336, 128256, 32
    activations = tokens * (2 * hidden * layers + 2 * (8 * hidden + 4 * inner) + (2 + 3 * 4) * vocabulary)
    assert activations > 1e9
    _, backward, step, _ = eight_billion.total("device")
    assert backward + activations + context < 24 * GIB
    assert step + context < 24 * GIB


def test_what_trains_takes_a_few_blocks_worth_beside_the_weights(eight_billion: memory.Prediction) -> None:
    weights = eight_billion.item("weights")
    assert weights == pytest.approx(2 * 8_030_261_248, rel=1e-3)
    layer = 218_112_000
    assert eight_billion.peak("device") - weights == pytest.approx((2 * 2 + 4 + 4 + 8) * layer + 1.21e9, rel=0.01)


def test_the_error_feedback_of_eight_billion_parameters_is_in_pinned_memory(eight_billion: memory.Prediction) -> None:
    assert eight_billion.peak("pinned") == pytest.approx(4 * (8_030_261_248 + 2 * 218_112_000) + 1.11e9, rel=0.01)


# ---- Too little memory


def test_too_little_device_memory_is_said_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = predict()
    needed = found.peak("device") - found.item("weights")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1000, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4000)  # 1000 that torch has and does not use
    memory.require_room(cuda, lambda: found)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4001)
    with pytest.raises(DeviceMemoryError) as caught:
        memory.require_room(cuda, lambda: found)
    assert "free memory on cuda:0 in addition to the model's weights" in str(caught.value)
    assert found.render() in str(caught.value)


def test_a_client_without_room_leaves_before_its_model_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    server_model, model = make_model(torch.bfloat16), make_model(torch.bfloat16)
    plan = pb.BlockPlan.from_model(server_model, ["0", "1"])
    places = [p.data_ptr() for p in model.parameters()]
    with pb.serve(server_model, plan=plan, rounds=2, clients=1) as server:
        with pytest.raises(DeviceMemoryError, match="optimiser state"):
            pb.join(server.address, model, adamw)
        assert [p.data_ptr() for p in model.parameters()] == places
        assert all(p.requires_grad for p in model.parameters())


def test_host_memory_is_not_checked() -> None:
    memory.require_room(torch.device("cpu"), lambda: pytest.fail("nobody asked"))
