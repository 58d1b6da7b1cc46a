"""The plan of a run: the partition of a model's parameters into blocks.

`BlockPlan` says which parameters form which block; it holds names and numbers, never tensors, so it can be built for a
model on the meta device and sent over the wire (`PlanSpec`). `BlockPlan.materialise` puts the parameters into the flat
buffers of `FlatBlock`s.

This module must not decide when a block trains, must not change `requires_grad` and must not import transformers.
Nothing here allocates by a number that came over the wire: a spec only selects among the model's own parameters.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parablock_rt.blocks.flat import FlatBlock, check_no_hidden_sharing, home
from parablock_rt.blocks.layout import DTYPE_NAMES, Block, BlockSpec, ParameterSpec, PlanSpec, lay_out
from parablock_rt.blocks.partition import by_count, by_layers, by_patterns
from parablock_rt.errors import ConfigError, PlanError, PlanMismatchError
from parablock_rt.units import format_bytes


class BlockPlan:
    """An ordered, disjoint partition of (some of) a model's parameters into blocks.

    `blocks`: the blocks in order. `frozen`: (name, reason) of every parameter left out. `aliases`: for each tied
    parameter, planned or frozen, its other names. `digest`: sha256 (hex) over names, shapes, dtypes, offsets and
    their order; equal plans have equal digests on every machine. Frozen parameters do not enter the digest.
    """

    def __init__(self, model: nn.Module, spec: PlanSpec, reasons: dict[str, str]) -> None:
        """For the class methods: `spec` must fit `model`; `reasons`: for each parameter outside of `spec`."""
        self.blocks: list[Block] = [lay_out(block) for block in spec.blocks]
        self.frozen: list[tuple[str, str]] = list(reasons.items())
        self._numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.aliases: dict[str, list[str]] = {
            names[0]: names[1:] for names in _all_names(model).values() if len(names) > 1
        }
        self._spec = spec
        description = [
            [b.name, [[s.name, list(s.shape), DTYPE_NAMES[s.dtype], s.offset] for s in b.slots]] for b in self.blocks
        ]
        self.digest: str = hashlib.sha256(json.dumps(["block-plan-1", description]).encode()).hexdigest()

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        blocks: int | Sequence[str | Sequence[str]] | None = None,
        *,
        outer: Literal["freeze", "train"] = "freeze",
        outer_limit: int | None = None,
    ) -> BlockPlan:
        """Partitions `model` into blocks.

        `blocks=None`: one block per decoder layer. The decoder layers are the outermost `nn.ModuleList` with the most
        parameters; lists that contain embeddings do not count. A layer without parameters forms no block. The
        parameters outside the layers stay frozen with `outer="freeze"`. With `outer="train"` they train, too:

        - Another list of layers with at least a tenth as many parameters, such as the encoder of an encoder-decoder
          model, gets one block per layer.
        - All others form a first block "embeddings" and a last block "head". `nn.Embedding` weights go to the first,
          parameters defined after the layers to the last. Parameters defined before the layers go to the first, unless
          the name suggests a final norm, a head or an output projection.
        - `outer_limit` (elements) cuts these two into blocks of at most that size. A single parameter that is larger
          must be cut with `split_rows` first.

        `blocks=n`: n blocks of consecutive whole parameters in definition order, of about equal size.

        `blocks=[...]`: one block per item. An item is a name prefix ("model.layers.1" does not match
        "model.layers.10"), a glob pattern, or a list of those; parameters that no item matches stay frozen. `outer` and
        `outer_limit` only apply to `blocks=None`.

        A tied parameter goes by its first name in `named_parameters()` order and belongs to the first block that owns
        it. Left out and listed in `frozen`: parameters that do not require gradients now, are not fp32, bf16 or fp16,
        are quantised, sparse or another tensor subclass, or have no elements.

        Raises PlanError when no block can be found or `blocks` does not fit the model, ConfigError for an invalid
        `outer` or `outer_limit`.
        """
        if outer not in ("freeze", "train"):
            raise ConfigError(f"expected outer to be 'freeze' or 'train', found {outer!r}")
        if outer_limit is not None and outer_limit < 1:
            raise ConfigError(f"expected outer_limit to be at least 1 element, found {outer_limit}")
        parameters = dict(model.named_parameters())
        reasons = {name: reason for name, p in parameters.items() if (reason := _why_left_out(p)) is not None}
        trainable = [name for name in parameters if name not in reasons]
        if not trainable:
            found = next((f"only others, such as {name!r}: {reason}" for name, reason in reasons.items()), "none")
            fp64 = any(p.requires_grad and p.dtype == torch.float64 for p in parameters.values())
            fix = "cast the model with model.float()" if fp64 else "set requires_grad=True"
            raise PlanError(f"expected trainable fp32, bf16 or fp16 parameters, found {found}; {fix}")
        if blocks is None:
            groups, rest = (
                by_layers(model, trainable, outer, outer_limit),
                "outside the decoder layers (outer='freeze')",
            )
        elif isinstance(blocks, int):
            groups, rest = by_count(trainable, [parameters[n].numel() for n in trainable], blocks), ""
        else:
            groups, rest = by_patterns(_all_names(model), reasons, blocks), "not named by any item of blocks"
        planned = {name for _, names in groups for name in names}
        spec = PlanSpec(
            tuple(BlockSpec(block, tuple(_describe(n, parameters[n]) for n in names)) for block, names in groups)
        )
        return cls(model, spec, {n: reasons.get(n, rest) for n in parameters if n not in planned})

    @classmethod
    def from_spec(cls, model: nn.Module, spec: PlanSpec) -> BlockPlan:
        """The plan that the other side described by `spec`, for this side's model; ignores `requires_grad` here.

        `spec` may come from an untrusted peer. Raises PlanMismatchError naming the first parameter that is missing,
        differs in shape or dtype, cannot be trained here, or appears twice, or the first invalid block.
        """
        taken = set(map(id, (p for block in _find_parameters(model, spec) for p in block)))
        names: set[str] = set()
        for block in spec.blocks:
            if not 0 < len(block.name) <= 256 or not block.name.isprintable() or block.name in names:
                raise PlanMismatchError(
                    f"expected unique block names of 1 to 256 printable characters, found {_clip(block.name)} in the "
                    f"server's plan; check that this is the intended server"
                )
            names.add(block.name)
        reasons = {
            name: _why_left_out(p) or "not part of the server's plan"
            for name, p in model.named_parameters()
            if id(p) not in taken
        }
        return cls(model, spec, reasons)

    def spec(self) -> PlanSpec:
        """The plan as plain data, to send over the wire."""
        return self._spec

    def check_same(self, spec: PlanSpec) -> None:
        """Raises PlanMismatchError naming the first difference between this plan and the server's."""
        fix = "give both sides the same model, dtype and blocks"
        for i, (mine, theirs) in enumerate(zip(self._spec.blocks, spec.blocks, strict=False)):
            if mine.name != theirs.name:
                raise PlanMismatchError(
                    f"block {i} is {_clip(theirs.name)} on the server and {mine.name!r} here; {fix}"
                )
            for j in range(max(len(mine.parameters), len(theirs.parameters))):
                a = mine.parameters[j] if j < len(mine.parameters) else None
                b = theirs.parameters[j] if j < len(theirs.parameters) else None
                if a != b:
                    raise PlanMismatchError(
                        f"parameter {j} of block {mine.name!r} is {_show(b)} on the server and {_show(a)} here; {fix}"
                    )
        if len(self._spec.blocks) != len(spec.blocks):
            raise PlanMismatchError(f"the server has {len(spec.blocks)} blocks, this plan {len(self.blocks)}; {fix}")

    def materialise(self, model: nn.Module) -> list[FlatBlock]:
        """Makes each block's parameters contiguous views of one flat buffer per segment, with gaps of zeros.

        Values stay the same bit by bit, and Parameter objects stay the same, so ties hold. The old memory is released
        segment by segment, so the extra memory at any time is at most one block. A second call does not copy again.

        Call it before making optimisers that hold views or flattened copies of the weights. DistributedDataParallel
        must wrap the model before `join`, which freezes all but the first block: see docs/integrations.md. Moving or
        casting the model later (`model.to(...)`) undoes it; a new call repairs it.

        `save_pretrained`, `safetensors.torch.save_file` and `torch.save` of a state dict work as before, but
        `safetensors.torch.save_model` refuses tensors that are views, and `torch.save` of a single parameter writes its
        whole block.

        Raises PlanMismatchError if the model is not the planned one, and PlanError if a block spans devices, a
        parameter is on the meta device, or two Parameters share memory without being tied.
        """
        found = _find_parameters(model, self._spec)
        planned = {id(parameter) for params in found for parameter in params}
        check_no_hidden_sharing(model, planned)
        return [home(block, params) for block, params in zip(self.blocks, found, strict=True)]

    def frozen_fingerprint(self, model: nn.Module) -> str:
        """`combined` of `frozen_digests`, whose errors it raises; equal fingerprints prove equal frozen parts."""
        return combined(self.frozen_digests(model))

    def frozen_digests(self, model: nn.Module) -> dict[str, str]:
        """sha256 (hex) over shape, dtype and bytes of each tensor that the plan does not train, that is, the other
        parameters and the floating-point persistent buffers. Keys are "parameter NAME" and "buffer NAME".

        Raises PlanError if a tensor is on the meta device, or of a subclass whose bytes cannot be read.
        """
        planned = {name for block in self.blocks for name in block.parameters}
        tensors: dict[str, Tensor] = {}
        for names in _all_names(model).values():
            if planned.isdisjoint(names):
                tensors[f"parameter {names[0]}"] = model.get_parameter(names[0])
        for path, module in model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set and buffer.is_floating_point():
                    tensors[f"buffer {path}.{key}" if path else f"buffer {key}"] = buffer
        digests = {}
        for name, tensor in tensors.items():
            digest = hashlib.sha256()
            for label, plain in _plain_tensors(name, tensor):
                if plain.is_meta:
                    raise PlanError(f"{label} is on the meta device, with no bytes to compare; load the weights first")
                digest.update(json.dumps([label, list(plain.shape), str(plain.dtype)]).encode())
                digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digests[name] = digest.hexdigest()
        return digests

    def describe(self, formats: Sequence[str] = ("bf16", "int8", "int4")) -> str:
        """A plain-text table of parameters, elements and wire bytes in each format per block, then the tied and the
        frozen parameters. Raises ConfigError for an unknown format."""
        rows = [["block", "parameters", "elements", *formats]]
        for b in self.blocks:
            rows.append([b.name, str(len(b.slots)), f"{b.numel:,}", *(format_bytes(b.wire_bytes(f)) for f in formats)])
        totals = [format_bytes(sum(b.wire_bytes(f) for b in self.blocks)) for f in formats]
        slots, numel = sum(len(b.slots) for b in self.blocks), sum(b.numel for b in self.blocks)
        rows.append([f"total: {len(self.blocks)} blocks", str(slots), f"{numel:,}", *totals])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        align = ["<", *[">"] * (len(widths) - 1)]
        lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)) for row in rows]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        for name, others in self.aliases.items():
            lines.append(f"tied: {name} = {' = '.join(others)}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.frozen:
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            amount = f"{len(names)} parameters, {sum(self._numel[name] for name in names):,} elements"
            lines.append(f"frozen: {amount}, {reason}: {', '.join(names[:4])}{more}")
        return "\n".join(lines)


def _describe(name: str, parameter: Tensor) -> ParameterSpec:
    return ParameterSpec(name, tuple(parameter.shape), DTYPE_NAMES.get(parameter.dtype, str(parameter.dtype)))


def _show(spec: ParameterSpec | None) -> str:
    """A parameter as text for a message; clipped, as the spec may come from an untrusted peer."""
    return "absent" if spec is None else f"{_clip(spec.name)} {reprlib.repr(spec.shape)} {_clip(spec.dtype)}"


def combined(digests: Mapping[str, str]) -> str:
    """sha256 (hex) over digests and their names."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _clip(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all of its names, both in definition order."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_identity.values()}


def _unfit(parameter: nn.Parameter) -> str | None:
    """Why a parameter can never be in a block; None if it can be."""
    if getattr(parameter, "quant_state", None) is not None:
        return f"quantised ({type(parameter).__name__})"
    if type(parameter.data) is not Tensor:
        return f"a tensor subclass ({type(parameter.data).__name__}) that has no flat memory"
    if parameter.dtype not in DTYPE_NAMES:
        name = str(parameter.dtype).removeprefix("torch.")
        if not parameter.is_floating_point():
            return f"not floating point ({name})"
        return f"{name} is unsupported (fp32, bf16 and fp16 are)"
    if parameter.layout != torch.strided:
        return f"sparse ({parameter.layout})"
    return "has no elements" if parameter.numel() == 0 else None


def _why_left_out(parameter: nn.Parameter) -> str | None:
    return _unfit(parameter) or (None if parameter.requires_grad else "requires_grad is False")


def _find_parameters(model: nn.Module, spec: PlanSpec) -> list[list[nn.Parameter]]:
    """The parameters that a plan names, block by block. Raises PlanMismatchError at the first that does not fit."""
    own = dict(model.named_parameters(remove_duplicate=False))
    taken: dict[int, str] = {}
    found: list[list[nn.Parameter]] = []
    if not spec.blocks:
        raise PlanMismatchError("the plan has no blocks; check that this is the intended server")
    for block in spec.blocks:
        if not block.parameters:
            raise PlanMismatchError(f"block {_clip(block.name)} is empty; check that this is the intended server")
        found.append([])
        for wanted in block.parameters:
            parameter = own.get(wanted.name)
            if parameter is None:
                raise PlanMismatchError(
                    f"the plan has parameter {_show(wanted)}; this model ({type(model).__name__}) has none of that "
                    "name; load the model that the plan was made for (if all names here begin with '_orig_mod.', use "
                    "model.compile() instead of torch.compile(model); if with 'module.', pass the model that is inside "
                    "DistributedDataParallel or DataParallel)"
                )
            here = _describe(wanted.name, parameter)
            if here != wanted or (reason := _unfit(parameter)) is not None:
                kind = "" if here != wanted else f", {reason}"
                raise PlanMismatchError(
                    f"the plan has parameter {_show(wanted)}; this model has {_show(here)}{kind}; "
                    f"load the model that the plan was made for, in the same dtype"
                )
            if id(parameter) in taken:
                raise PlanMismatchError(
                    f"the plan has parameter {_show(wanted)} in addition to {taken[id(parameter)]!r}; in this model "
                    f"both are one parameter; tie or untie the weights as in the model that the plan was made for"
                )
            taken[id(parameter)] = wanted.name
            found[-1].append(parameter)
    return found


def _plain_tensors(label: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that make up a tensor: the tensor itself, or the parts of a subclass; and quantisation scales.

    Raises PlanError for a subclass whose parts are unknown.
    """
    data = value.data
    if type(data) is Tensor:
        yield label, data
    elif hasattr(data, "__tensor_flatten__"):
        for attribute in sorted(data.__tensor_flatten__()[0]):
            yield from _plain_tensors(f"{label}/{attribute}", getattr(data, attribute))
    else:
        raise PlanError(f"{label} is a {type(data).__name__}, whose bytes cannot be compared; use a plain tensor")
    yield from _state_tensors(label, getattr(value, "quant_state", None))


def _state_tensors(label: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a quantisation state, which may hold another state (doubly quantised scales)."""
    for key, part in sorted(vars(state).items()) if hasattr(state, "__dict__") else ():
        if isinstance(part, Tensor):
            yield f"{label}/{key}", part.data
        elif hasattr(part, "absmax"):
            yield from _state_tensors(f"{label}/{key}", part)
