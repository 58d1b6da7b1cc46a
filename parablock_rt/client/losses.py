"""A step's loss and weight: what they are, and how they are read without making the host wait for the GPU each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parablock_rt.codec import LARGEST_WEIGHT, SMALLEST_WEIGHT
from parablock_rt.errors import ConfigError


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model puts into its output. Raises ConfigError when there is none."""
    output = model(**batch) if isinstance(batch, dict) or hasattr(batch, "keys") else model(batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "the model's output has no loss; put labels into the batch or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def weight_of(batch: Any, model: nn.Module) -> float | Tensor:
    """How many labels of a batch are trained on, at least 1; beside the labels. 1 where there are none."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        return 1.0
    tokens = batch.get("input_ids")
    encodes_and_decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if isinstance(tokens, Tensor) and tokens.shape == labels.shape and not encodes_and_decodes:
        # A causal model predicts each label from the tokens before it, so the first one of a sequence trains nothing.
        # (Where each token has a label of its own, the first is one that marks the beginning, and has none.)
        labels = labels[..., 1:]
    return (labels != -100).sum().clamp(min=1)


def as_number(value: float | Tensor) -> float | Tensor:
    """A number; of a tensor on a GPU an fp64 tensor there, for reading it would wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().reshape(()).double()
    return float(value.detach() if isinstance(value, Tensor) else value)


def check_weight(weight: float | Tensor) -> float | Tensor:
    """The weight, unless it is known here and no contribution to a sum can have it: ConfigError."""
    if not isinstance(weight, Tensor) and not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:  # nor is a NaN
        raise ConfigError(f"expected a weight from 2^-64 to 2^64, such as a count of tokens; found {weight!r}")
    return weight


def read_all(values: Sequence[float | Tensor]) -> list[float]:
    """The values as numbers; those on a GPU all at once, which waits for it."""
    there = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack([value.double() for value in there]).tolist()) if there else iter(())
    return [next(read) if isinstance(value, Tensor) else value for value in values]
