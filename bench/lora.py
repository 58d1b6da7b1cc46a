"""Low-rank adapters on a model's linear layers (Hu et al. 2021), reduced to the needs of a baseline.

`y = W x + (alpha / r) · B A x` with W frozen, A random and B zero, so that a fresh adapter changes nothing. The model's
own parameters are all frozen; only the adapters are trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RANK = 8
ALPHA = 16.0


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start.to(weight.dtype))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=weight.dtype))
        self.scale = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        """`x`: [..., in_features]; returns [..., out_features]."""
        return self.base(x) + self.scale * ((x @ self.down.T) @ self.up.T)


def adapt(model: nn.Module, rank: int = RANK) -> None:
    """Freezes the model and puts an adapter on every linear layer but the output head; the same bits everywhere."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    for name, layer in linear:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layer, rank, generator))
