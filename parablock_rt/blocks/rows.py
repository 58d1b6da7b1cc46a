"""Large embeddings and projections as several parameters of bounded size, each a range of rows.

A block needs memory in proportion to its parameters, and a parameter is never split between blocks. The vocabulary's
two matrices are the parameters that can be larger than all of a decoder layer; cut into ranges of rows, each range can
be a block. What the modules compute and the names in a state dict stay the same.

Nothing here plans, trains or moves a parameter to another device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parablock_rt.errors import ConfigError, PlanError


def split_rows(model: nn.Module, limit: int) -> list[str]:
    """Cuts the weights of `nn.Embedding` and `nn.Linear` modules that have more than `limit` elements, in place.

    What is inside of an `nn.ModuleList` is left whole: a decoder layer is one block in any case.
    Each such module is replaced by one that holds its weight as a list of parameters, ranges of rows of about equal
    size with at most `limit` elements each. Modules tied by one weight stay tied. Call it before the model is planned,
    on the server and on every client alike; one part's memory is held twice for a moment. A token that a cut embedding
    has no row for raises IndexError, as in `nn.Embedding`; on a GPU it is an assertion on the device.

    Returns the paths of the modules that were replaced. A state dict of the model keeps its names: the parts are joined
    in it, and cut when it is loaded.

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
        raise ConfigError(f"a row of {path}.weight has {columns:,} elements; found a limit of {limit:,}; raise it")
    most = limit // columns
    count = -(-rows // most)
    parts = [part.detach().clone() for part in weight.tensor_split(count)]
    return nn.ParameterList(nn.Parameter(part, requires_grad=weight.requires_grad) for part in parts)


class _Rows(nn.Module):
    """A weight [rows, columns] held as `parts`, ranges of its rows in order; a state dict has it as `weight`."""

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
        """Rows of the weight: `tokens` (integers, any shape) → that shape with the columns behind it.

        Raises IndexError for a token that has no row.
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
    """`nn.Linear` over parts: each gives its range of the outputs."""

    def __init__(self, bias: nn.Parameter | None, parts: nn.ParameterList) -> None:
        super().__init__(parts)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., columns] → [..., rows]."""
        outputs = torch.cat([F.linear(inputs, part) for part in self.parts], dim=-1)
        return outputs if self.bias is None else outputs + self.bias
