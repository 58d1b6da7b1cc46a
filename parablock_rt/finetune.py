"""The reference loop: federated fine-tuning of a causal language model, to be read from top to bottom.

Every client trains on its own shard, with the loss on the answer's tokens only; one block of the model trains in each
round, with an AdamW that lives for that round. What runs between machines is `parablock_rt.join` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parablock_rt import data, models
from parablock_rt.client import RoundReport, Run, join
from parablock_rt.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, and how. Server and clients of one run must be given the same model and dtype."""

    model: str = "smollm2"
    task: str = "gsm8k"
    dtype: str = "bf16"
    batch_size: int = 1
    seq_len: int = 160
    lr: float = 2e-4
    eval_examples: int = 32
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.eval_examples < 0:
            raise ConfigError(f"eval_examples must not be negative; found {self.eval_examples}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive; found {self.lr}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}; found {self.dtype!r}")

    @classmethod
    def for_model(cls, model: str, **given: Any) -> Workload:
        """Defaults that suit the model, with the settings that are not None in their place."""
        defaults: dict[str, Any] = {"model": model}
        if model == "tiny":
            defaults |= {"task": "additions", "dtype": "fp32", "batch_size": 16, "seq_len": 12, "lr": 3e-3}
        return cls(**(defaults | {name: value for name, value in given.items() if value is not None}))


def load(workload: Workload) -> tuple[nn.Module, models.Tokenizer, data.Task]:
    """The model with its initial weights, its tokenizer, and the task with its split. Sets torch's thread count."""
    torch.set_num_threads(workload.threads)
    model, tokenizer = models.load(workload.model, dtype=_DTYPES[workload.dtype])
    task = data.load(workload.task, tokenizer, seq_len=workload.seq_len)
    return model, tokenizer, task


def evaluate(model: nn.Module, task: data.Task, workload: Workload) -> float | None:
    """Mean loss per answer token on the first `eval_examples` held-out examples; None when there are none to use."""
    if workload.eval_examples == 0:
        return None
    return data.evaluate(model, task.held_out.in_order(4, limit=workload.eval_examples))


def train(
    address: str,
    workload: Workload,
    *,
    token: str | None = None,
    rate: float = 0.0,
    delay: float = 0.0,
    on_round: Callable[[RoundReport], None] | None = None,
    on_join: Callable[[Run], None] | None = None,
) -> Run:
    """One client, from joining to the last round's aggregate. Returns its run, which is closed."""
    model, _, task = load(workload)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=workload.lr, weight_decay=0.0)

    with join(address, model, optimizer, token=token, rate=rate, delay=delay, on_round=on_round) as run:
        if on_join is not None:
            on_join(run)
        shard = task.train.shard(run.client, run.config.clients)
        for batch in run.stream(data.Batches(shard, workload.batch_size, seed=run.config.seed)):
            run.train_step(batch)
    return run
