"""The layout of a block: which parameters it has, and where each stands in its flat index space.

The layout follows from a `BlockSpec` alone, so it is the same on every machine. Names and numbers only: nothing here
holds a tensor or looks at a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from parablock_rt.codec import ALIGNMENT, body_bytes

# The order is part of the layout: a block's segments follow it.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ParameterSpec(msgspec.Struct, frozen=True):
    """One parameter as plain data; `dtype` is "fp32", "bf16" or "fp16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class BlockSpec(msgspec.Struct, frozen=True):
    """One block as plain data: its parameters in plan order."""

    name: str
    parameters: tuple[ParameterSpec, ...]


class PlanSpec(msgspec.Struct, frozen=True):
    """A whole plan as plain data, without offsets, which follow from the order, shapes and dtypes."""

    blocks: tuple[BlockSpec, ...]


@dataclass(frozen=True)
class Slot:
    """Where one parameter stands: elements `offset` to `offset + numel` of its block's flat index space."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int

    @property
    def padded(self) -> int:
        """`numel` rounded up to the alignment; the elements beyond `numel` are a gap of zeros."""
        return -(-self.numel // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Segment:
    """The part of a block's flat index space that holds one dtype: `length` elements from `start`."""

    dtype: torch.dtype
    start: int
    length: int


@dataclass(frozen=True)
class Block:
    """One block. `slots` are in plan order. The flat index space has one segment per dtype, in the order of `DTYPES`;
    within a segment, offsets follow the plan order.

    `numel` counts the parameters' elements, `flat_numel` the flat index space with its gaps (a multiple of 128).
    """

    name: str
    slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]
    numel: int
    flat_numel: int

    @property
    def parameters(self) -> list[str]:
        """The names of the block's parameters in plan order."""
        return [slot.name for slot in self.slots]

    @property
    def needs_master(self) -> bool:
        """Whether the block has 16-bit parameters, which would lose small updates without fp32 masters."""
        return any(segment.dtype != torch.float32 for segment in self.segments)

    def wire_bytes(self, format: str) -> int:
        """Bytes of the block's packed body in a wire format. Raises ConfigError for an unknown format."""
        return body_bytes(self.flat_numel, format)

    def segment_slots(self, segment: Segment) -> Iterator[tuple[int, Slot]]:
        """The slots of one segment with their positions in `slots`, by rising offset."""
        return ((i, slot) for i, slot in enumerate(self.slots) if slot.dtype == segment.dtype)


def lay_out(spec: BlockSpec) -> Block:
    """Assigns offsets: dtype after dtype, within a dtype in plan order, each parameter at the next multiple of 128."""
    slots: dict[str, Slot] = {}
    segments: list[Segment] = []
    offset = 0
    for dtype_name, dtype in DTYPES.items():
        start = offset
        for p in spec.parameters:
            if p.dtype == dtype_name:
                slots[p.name] = slot = Slot(p.name, p.shape, dtype, offset, torch.Size(p.shape).numel())
                offset += slot.padded
        if offset > start:
            segments.append(Segment(dtype, start, offset - start))
    ordered = tuple(slots[p.name] for p in spec.parameters)
    return Block(spec.name, ordered, tuple(segments), sum(s.numel for s in ordered), offset)
