"""The prediction against what torch reports on a GPU, and the memory of a GPU that is too small."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_memory_held import Held, squared_error
from torch import nn

import parablock_rt as pb
from parablock_rt.client import memory
from parablock_rt.errors import DeviceMemoryError

WIDTH, LAYERS = 4096, 12  # 201 million parameters: activations of one row are nothing beside them
WITHIN = 0.05

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_model(device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    with torch.device(device):
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS)])
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e-4)
            layer.bias.zero_()
    return model


def allocated_by_libraries(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes that torch counts once the model has run forward and backward, beside the model: cuBLAS's workspaces."""
    squared_error(model, batch).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters()) - batch.nbytes


def run_on_gpu(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[int, Held, memory.Prediction]:
    gc.collect()
    torch.cuda.empty_cache()
    held = Held()
    model = make_model("cuda", dtype)
    batch = torch.ones(1, WIDTH, dtype=dtype, device="cuda")
    besides = allocated_by_libraries(model, batch)
    plan = pb.BlockPlan.from_model(model, [str(i) for i in range(LAYERS)])
    predicted = memory.predict(model, plan, pb.RunConfig(**settings), optimizer, "cuda")
    torch.cuda.reset_peak_memory_stats()
    with pb.serve(make_model("cpu", dtype), plan=plan, **settings) as server:
        with pb.join(server.address, model, optimizer) as run:
            for _ in run.stream([batch]):
                run.train_step(batch, squared_error)
                for name, nbytes in run.holdings().items():
                    held.items[name] = max(held.items.get(name, 0), nbytes)
            peak = torch.cuda.max_memory_allocated() - besides
        server.wait(90.0)
    return peak, held, predicted


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6)


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "more"),
    [
        (adamw, torch.bfloat16, {}),
        (fused, torch.bfloat16, {}),
        (fused, torch.bfloat16, {"staleness": 0}),
        (fused, torch.bfloat16, {"format": "int4"}),
        (momentum, torch.bfloat16, {}),
        (adamw, torch.float32, {}),
    ],
    ids=["AdamW", "fused", "fused, S=0", "fused, int4", "momentum", "fp32"],
)
def test_what_is_predicted_is_what_torch_reports(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype, more: dict[str, Any]
) -> None:
    settings = {"rounds": 6, "clients": 1, "local_steps": 2, **more}
    peak, held, predicted = run_on_gpu(optimizer, dtype, settings)
    assert peak == pytest.approx(predicted.peak("device"), rel=WITHIN), predicted.render()
    for name in ("weights", "references"):
        assert held.items[name] == pytest.approx(predicted.item(name), rel=WITHIN), name


def test_a_gpu_that_others_have_filled_is_refused_with_the_prediction() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    model = make_model("cuda")
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 300 * 2**20, dtype=torch.uint8, device="cuda")
    server_model = make_model("cpu")
    plan = pb.BlockPlan.from_model(server_model, [str(i) for i in range(LAYERS)])
    before = torch.cuda.memory_allocated()
    with (
        pb.serve(server_model, plan=plan, rounds=2, clients=1) as server,
        pytest.raises(DeviceMemoryError, match="optimiser state"),
    ):
        pb.join(server.address, model, adamw)
    assert torch.cuda.memory_allocated() == before
    del taken
    torch.cuda.empty_cache()
