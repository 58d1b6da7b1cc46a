"""The reference loop: federated fine-tuning of a causal language model, to be read from top to bottom.

Every client trains on its own shard, with the loss on the answer's tokens only; one block of the model trains in each
round, with an AdamW that lives for that round. All communication is in `parablock_rt.join`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parablock_rt.blocks.rows import split_rows
from parablock_rt.client.joining import join
from parablock_rt.client.losses import weight_of
from parablock_rt.client.run import Run
from parablock_rt.errors import ConfigError
from parablock_rt.finetune import data, models

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """The model, the task and the training settings. Server and clients of a run must use the same model and dtype."""

    model: str = "smollm2"
    task: str = "gsm8k"
    dtype: str = "bf16"
    batch_size: int = 1
    seq_len: int = 160
    lr: float = 2e-4
    eval_examples: int = 32
    threads: int = 1
    row_limit: int | None = None  # elements; larger embeddings and heads are cut into parameters of at most that size

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.row_limit is not None and self.row_limit < 1:
            raise ConfigError(f"row_limit must be at least 1 element; found {self.row_limit}")
        if self.eval_examples < 0:
            raise ConfigError(f"eval_examples must not be negative; found {self.eval_examples}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive; found {self.lr}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}; found {self.dtype!r}")

    @classmethod
    def for_model(cls, model: str, **given: Any) -> Workload:
        """The defaults for the model, overridden by the settings that are not None."""
        defaults: dict[str, Any] = {"model": model}
        if model == "tiny":
            defaults |= {"task": "additions", "dtype": "fp32", "batch_size": 16, "seq_len": 12, "lr": 3e-3}
        return cls(**(defaults | {name: value for name, value in given.items() if value is not None}))


def load(workload: Workload) -> tuple[nn.Module, models.Tokenizer, data.Task]:
    """The model with its initial weights, its tokenizer, and the task with its split. Sets torch's thread count."""
    torch.set_num_threads(workload.threads)
    model, tokenizer = models.load(workload.model, dtype=_DTYPES[workload.dtype])
    _cut(model, workload)
    task = data.load(workload.task, tokenizer, seq_len=workload.seq_len)
    return model, tokenizer, task


def outline(workload: Workload) -> nn.Module:
    """The model on the meta device: only its shapes, for which no weights, tokenizer or data are loaded."""
    model: nn.Module = models.outline(workload.model, dtype=_DTYPES[workload.dtype])
    return _cut(model, workload)


def for_timing(workload: Workload) -> tuple[nn.Module, data.Batch]:
    """The model and a batch of random tokens, for timing: a step takes as long as with text. Sets torch's thread
    count."""
    torch.set_num_threads(workload.threads)
    model = models.load_weights(workload.model, dtype=_DTYPES[workload.dtype])
    shape = (workload.batch_size, workload.seq_len)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return _cut(model, workload), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _cut(model: nn.Module, workload: Workload) -> nn.Module:
    if workload.row_limit is not None:
        split_rows(model, workload.row_limit)
    return model


def evaluate(model: nn.Module, task: data.Task, workload: Workload) -> float | None:
    """Mean loss per answer token on the first `eval_examples` held-out examples; None if `eval_examples` is 0."""
    if workload.eval_examples == 0:
        return None
    return data.evaluate(model, task.held_out.in_order(4, limit=workload.eval_examples))


def train(
    address: str,
    workload: Workload,
    *,
    on_join: Callable[[Run], None] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Run:
    """Runs one client, from joining to the last round's aggregate. Returns its closed run.

    `on_join`: called with the run before its first step. `device`: where the model trains. `options`: those of
    `parablock_rt.join`. Raises ConfigError for a device that this machine lacks.
    """
    where = _device(device)
    model, _, task = load(workload)
    model.to(where)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=workload.lr, weight_decay=0.0)

    with join(address, model, optimizer, **options) as run:
        if on_join is not None:
            on_join(run)
        shard = task.train.shard(run.client, run.config.clients)
        for batch in run.stream(data.Batches(shard, workload.batch_size, seed=run.config.seed)):
            # The labels are counted on the CPU: counting them on a GPU would force a synchronisation.
            weight = weight_of(batch, model)
            run.train_step({name: value.to(where) for name, value in batch.items()}, weight=weight)
    return run


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:N; found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; found {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device {name!r} is not on this machine: torch {torch.__version__} finds {count} CUDA devices; see "
            "`parablock doctor`, or train on the CPU"
        )
    return device
