"""A block in memory: flat buffers that the model's own parameters are views of.

Moves parameters into these buffers and checks that they still are there. Chooses neither the parameters nor what trains
when, and does not change `requires_grad`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parablock_rt.blocks.layout import Block, Segment, Slot
from parablock_rt.errors import PlanError


@dataclass(eq=False)
class FlatBlock:
    """A block in memory: `flats[i]` (1-D, `segments[i].length`) owns the storage that `params` (plan order) view."""

    block: Block
    flats: list[Tensor]
    params: list[nn.Parameter]

    def check_homed(self, model: nn.Module | None = None) -> None:
        """Raises PlanError when a parameter is no longer a view of the flat buffers, or no longer in the model.

        Names do not matter: a wrapper around a module may have changed them.
        """
        own = None if model is None else {id(parameter) for parameter in model.parameters()}
        for segment, flat in zip(self.block.segments, self.flats, strict=True):
            for i, slot in self.block.segment_slots(segment):
                place = flat.data_ptr() + (slot.offset - segment.start) * flat.element_size()
                if self.params[i].data_ptr() != place or self.params[i].dtype != flat.dtype:
                    raise PlanError(
                        f"parameter {slot.name!r} has left its block's flat buffer: during the run the model was "
                        "moved, cast or planned anew, or something has put another tensor into its .data; change "
                        "weights in place, and give every join and serve a model of its own"
                    )
                if own is not None and id(self.params[i]) not in own:
                    raise PlanError(
                        f"parameter {slot.name!r} was replaced during the run, by load_state_dict(..., assign=True) or "
                        "an assignment; copy into it instead"
                    )

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views into another flat buffer of the whole block (such as fp32 masters), shaped and ordered like `params`.

        `buffer`: 1-D, contiguous, `block.flat_numel` elements, any dtype and device. Raises PlanError otherwise.
        """
        if buffer.shape != (self.block.flat_numel,) or not buffer.is_contiguous():
            raise PlanError(
                f"expected a contiguous flat buffer of shape ({self.block.flat_numel},) for block {self.block.name!r}, "
                f"found shape {tuple(buffer.shape)}, strides {buffer.stride()}; allocate block.flat_numel elements"
            )
        return [buffer[s.offset : s.offset + s.numel].view(s.shape) for s in self.block.slots]


def check_no_hidden_sharing(model: nn.Module, planned: set[int]) -> None:
    """Raises PlanError when distinct Parameters, or a Parameter and a buffer, share memory: moving one of them into a
    flat buffer would silently untie them.

    A dense tensor counts with all its bytes, a strided one with its first element only. `planned`: the ids of the
    parameters that will move; sharing between other tensors is fine.
    """
    spans: list[tuple[str, int, int, str, bool]] = []
    for name, p in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(p.data) is Tensor and p.layout == torch.strided and p.numel() and not p.is_meta:
            reach = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
            length = p.numel() if reach == p.numel() else 1
            start = p.data_ptr()
            spans.append((str(p.device), start, start + length * p.element_size(), name, id(p) in planned))
    widest = ("", 0, 0, "", False)
    for span in sorted(spans):
        if span[0] == widest[0] and span[1] < widest[2] and (span[4] or widest[4]):
            raise PlanError(
                f"{widest[3]!r} and {span[3]!r} share memory but are not the same nn.Parameter; assign one Parameter "
                f"object to both modules to tie them, or clone one to separate them"
            )
        if span[0] != widest[0] or span[2] > widest[2]:
            widest = span


def home(block: Block, params: list[nn.Parameter]) -> FlatBlock:
    """Puts one block's parameters into flat buffers, or finds the flat buffers that they are in already.

    Raises PlanError when the parameters are on several devices or on the meta device.
    """
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1 or devices == ["meta"]:
        raise PlanError(
            f"expected the parameters of block {block.name!r} on one real device, found {', '.join(devices)}; "
            f"load the weights and move the model with model.to(device) first"
        )
    flats: list[Tensor] = []
    for segment in block.segments:
        members = [(slot, params[i]) for i, slot in block.segment_slots(segment)]
        flat = _existing_flat(segment, members)
        if flat is None:
            flat = torch.zeros(segment.length, dtype=segment.dtype, device=params[0].device)
            for slot, parameter in members:
                start = slot.offset - segment.start
                view = flat[start : start + slot.numel].view(slot.shape)
                view.copy_(parameter.detach())
                parameter.data = view
        flats.append(flat)
    return FlatBlock(block, flats, params)


def _existing_flat(segment: Segment, members: list[tuple[Slot, nn.Parameter]]) -> Tensor | None:
    """The flat buffer that already holds exactly these parameters at their offsets, with zero gaps; else None."""
    storage = members[0][1].untyped_storage()
    if storage.nbytes() != segment.length * segment.dtype.itemsize:
        return None
    for slot, p in members:
        same = p.untyped_storage().data_ptr() == storage.data_ptr()
        if not (same and p.storage_offset() == slot.offset - segment.start and p.is_contiguous()):
            return None
    flat = torch.empty(0, dtype=segment.dtype, device=members[0][1].device).set_(storage)
    gaps = [flat[s.offset - segment.start + s.numel : s.offset - segment.start + s.padded] for s, _ in members]
    return None if bool(torch.cat(gaps).any()) else flat
