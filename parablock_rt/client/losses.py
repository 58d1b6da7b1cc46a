"""The loss and weight of a step, and how they are read without making the host wait for the GPU at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parablock_rt.codec import LARGEST_WEIGHT, SMALLEST_WEIGHT
from parablock_rt.errors import ConfigError


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `.loss` of the model's output. Raises ConfigError when there is none."""
    output = model(**batch) if isinstance(batch, dict) or hasattr(batch, "keys") else model(batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "expected a tensor `loss` in the model's output, found none; put labels into the batch or pass "
            "loss_fn=lambda model, batch: ..."
        )
    return loss


def weight_of(batch: Any, model: nn.Module) -> float | Tensor:
    """How many labels of a batch are trained on, at least 1, on the device of the labels; 1 without labels."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        return 1.0
    tokens = batch.get("input_ids")
    encodes_and_decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if isinstance(tokens, Tensor) and tokens.shape == labels.shape and not encodes_and_decodes:
        # A causal model predicts each label from the tokens before it, so the first label of a sequence trains nothing.
        # (In token classification, where the first token does count, it is a marker of the beginning without a label.)
        labels = labels[..., 1:]
    return (labels != -100).sum().clamp(min=1)


def as_number(value: float | Tensor) -> float | Tensor:
    """`value` as a number; a tensor on a GPU becomes an fp64 scalar there, as reading it would wait for the GPU.

    Raises ConfigError for a tensor with more than one element.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"expected a loss and a weight of one element each, found a tensor of shape {tuple(value.shape)}; sum or "
            "average it first"
        )
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().reshape(()).double()
    return float(value.detach() if isinstance(value, Tensor) else value)


def check_weight(weight: float | Tensor) -> float | Tensor:
    """Returns `weight`. Raises ConfigError if it is a number outside 2^-64 to 2^64; a tensor is not checked."""
    if not isinstance(weight, Tensor) and not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:  # a NaN fails, too
        raise ConfigError(f"expected a weight from 2^-64 to 2^64, such as a count of tokens, found {weight!r}")
    return weight


def read_all(values: Sequence[float | Tensor]) -> list[float]:
    """The values as numbers. Reads those on a GPU in one transfer, which waits for the GPU."""
    there = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack([value.double() for value in there]).tolist()) if there else iter(())
    return [next(read) if isinstance(value, Tensor) else value for value in values]
