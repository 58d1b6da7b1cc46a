"""Cuts large embeddings and projections into several parameters of bounded size, each a range of rows.

A block needs memory in proportion to its parameters, and a parameter is never split between blocks. The two matrices of
the vocabulary can be larger than a whole decoder layer; cut into ranges of rows, each range can be a block. What the
modules compute and the names in a state dict stay the same.

Nothing here plans, trains or moves a parameter to another device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parablock_rt.errors import ConfigError, PlanError


def split_rows(model: nn.Module, limit: int) -> list[str]:
    """Replaces, in place, the `nn.Embedding` and `nn.Linear` modules whose weights have more than `limit` elements.

    The replacement holds the weight as a list of parameters: ranges of rows of about equal size with at most `limit`
    elements each. Modules that share a weight stay tied. Modules in an `nn.ModuleList` are left whole, as a decoder
    layer is one block in any case. Call this before planning, on the server and on every client with the same `limit`.
    While it copies, the memory of one weight is held twice. A token without a row raises IndexError, as in
    `nn.Embedding`; on a GPU it fails an assertion on the device.

    Returns the paths of the replaced modules. A state dict of the model keeps its names: saving joins the parts, and
    loading cuts the weight.

    Raises ConfigError when a single row is larger than `limit`, and PlanError for an embedding with `max_norm`,
    `scale_grad_by_freq` or sparse gradients, or for a weight that is tied to a module of another type.
    """
    cut: dict[int, nn.ParameterList] = {}  # by the identity of the weight: tied modules share their parts
    replaced = []
    modules = list(model.named_modules(remove_duplicate=False))
    lists = tuple(f"{path}." for path, module in modules if isinstance(module, nn.ModuleList))
    for path, module in modules:
        if type(module) not in (nn.Embedding, nn.Linear) or module.weight.numel() <= limit or path.startswith(lists):
            continue
        weight = module.weight
        if id(weight) not in cut:
            _check_ties(path, weight, modules)
            cut[id(weight)] = _cut(path, weight, limit)
        parent, _, name = path.rpartition(".")
        parts = cut[id(weight)]
        setattr(
            model.get_submodule(parent),
            name,
            RowEmbedding(path, module, parts) if isinstance(module, nn.Embedding) else RowLinear(module.bias, parts),
        )
        replaced.append(path)
    return replaced


def _check_ties(path: str, weight: nn.Parameter, modules: list[tuple[str, nn.Module]]) -> None:
    for other, module in modules:
        if type(module) not in (nn.Embedding, nn.Linear) and any(own is weight for own in module._parameters.values()):
            raise PlanError(
                f"{path}.weight cannot be cut into rows: it is tied to {other}, a {type(module).__name__}, which would "
                "keep the whole; untie them, or choose a row limit of at least its size"
            )


def _cut(path: str, weight: nn.Parameter, limit: int) -> nn.ParameterList:
    rows, columns = weight.shape
    if columns > limit:
        raise ConfigError(
            f"expected a limit of at least {columns:,} elements, a row of {path}.weight, found {limit:,}; raise it"
        )
    most = limit // columns
    count = -(-rows // most)
    parts = [part.detach().clone() for part in weight.tensor_split(count)]
    return nn.ParameterList(nn.Parameter(part, requires_grad=weight.requires_grad) for part in parts)


class _Rows(nn.Module):
    """A weight [rows, columns] held as `parts`, ranges of its rows in order; joined as `weight` in a state dict."""

    def __init__(self, parts: nn.ParameterList) -> None:
        super().__init__()
        self.parts = parts
        self.register_state_dict_post_hook(_join)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_cut_loaded)  # type: ignore[no-untyped-call]


def _join(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    assert isinstance(module, _Rows)
    parts = [state.pop(f"{prefix}parts.{i}") for i in range(len(module.parts))]
    state[f"{prefix}weight"] = torch.cat(parts)


def _cut_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, _Rows)
    if f"{prefix}weight" in state:
        parts = state.pop(f"{prefix}weight").split([len(part) for part in module.parts])
        state.update({f"{prefix}parts.{i}": part for i, part in enumerate(parts)})


class RowEmbedding(_Rows):
    """`nn.Embedding` over parts. Only parts that require gradients take part in the backward pass."""

    def __init__(self, path: str, module: nn.Embedding, parts: nn.ParameterList) -> None:
        super().__init__(parts)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise PlanError(
                f"{path} cannot be cut into rows: it uses max_norm, scale_grad_by_freq or sparse gradients; "
                "turn them off, or freeze it"
            )
        self.padding_idx = module.padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of the weight: `tokens` (integers, any shape [...]) → [..., columns].

        Raises IndexError for a token without a row; on a GPU, an assertion fails on the device.
        """
        self._check_range(tokens)
        result: Tensor | None = None
        first = 0
        for part in self.parts:
            local = tokens - first
            rows = len(part)
            padding = self.padding_idx
            found = F.embedding(
                local.clamp(0, rows - 1),
                part,
                padding_idx=padding - first if padding is not None and first <= padding < first + rows else None,
            )
            result = found if result is None else torch.where((local >= 0).unsqueeze(-1), found, result)
            first += rows
        assert result is not None
        return result

    def _check_range(self, tokens: Tensor) -> None:
        if tokens.numel() == 0:
            return
        rows = sum(len(part) for part in self.parts)
        inside = ((tokens >= 0) & (tokens < rows)).all()
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            if not inside:
                raise IndexError(
                    f"expected tokens from 0 to {rows - 1}, found {int(tokens.min())} to {int(tokens.max())}"
                )
        else:  # without waiting for the device
            torch._assert_async(inside)


class RowLinear(_Rows):
    """`nn.Linear` over parts; each part computes its range of the outputs."""

    def __init__(self, bias: nn.Parameter | None, parts: nn.ParameterList) -> None:
        super().__init__(parts)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., columns] → [..., rows]."""
        outputs = torch.cat([F.linear(inputs, part) for part in self.parts], dim=-1)
        return outputs if self.bias is None else outputs + self.bias
