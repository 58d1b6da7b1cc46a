"""The memory of a client, predicted before anything is allocated: bytes by item, place and moment.

docs/memory.md explains the formulas. `Run.holdings` reports the same items as they are held, and tests compare the two.
Activations are not predicted: they depend on the model and the batch, not on the runtime.

Nothing here allocates, and the model may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from parablock_rt.blocks.layout import Block
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.active import OptimizerFactory, with_context
from parablock_rt.client.optimizers import Footprint, footprint
from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError, DeviceMemoryError
from parablock_rt.schedule import block_of
from parablock_rt.staging.device_stager import SLOTS, slot_bytes, slot_elements
from parablock_rt.units import format_bytes

DeviceKind = Literal["cuda", "cpu"]
Place = Literal["device", "pinned", "host"]

MOMENTS = ("first backward", "backward", "optimiser step", "hand-over")
"""Of a round: its first backward pass, while the previous block is encoded; later backward passes; its optimiser steps;
its end."""

Moments = tuple[int, int, int, int]

_FP32 = 4
_SWEEPS = 16  # how many sweeps of the schedule are searched for the round that holds most


@dataclass(frozen=True)
class BlockMemory:
    """The bytes of one block's tensors, with the gaps between parameters except for the gradients.

    `weights`: in the model's dtype. A block of 16-bit parameters trains through fp32 masters (`master`); its gradients
    are 16-bit at first (`gradients`) and widened for the optimiser's step (`step_gradients`). `step_scratch`: temporary
    memory in a step.
    """

    weights: int
    master: int
    gradients: int
    step_gradients: int
    step_scratch: int
    optimizer: Footprint | None
    residual: int
    body: int

    @property
    def optimizer_state(self) -> int:
        """Bytes of the optimiser's state from the first step on; 0 if unknown."""
        return 0 if self.optimizer is None else self.optimizer.state

    @property
    def training(self) -> int:
        """Bytes that training the block takes at an optimiser step beyond the model; includes the reference."""
        return self.weights + self.master + self.step_gradients + self.optimizer_state + self.step_scratch


@dataclass(frozen=True)
class Item:
    """One kind of memory: its place, and its bytes at each of `MOMENTS`."""

    name: str
    place: Place
    nbytes: Moments


@dataclass(frozen=True)
class Prediction:
    """The memory in the round that holds most. `settings`: what the prediction assumes, as text."""

    device: DeviceKind
    round: int
    block: str
    settings: str
    items: tuple[Item, ...]

    def total(self, place: Place) -> Moments:
        """Bytes in a place at each of `MOMENTS`."""
        first, later, step, end = (sum(item.nbytes[i] for item in self.items if item.place == place) for i in range(4))
        return first, later, step, end

    def peak(self, place: Place) -> int:
        """Bytes in a place at the moment that takes most."""
        return max(self.total(place))

    def item(self, name: str) -> int:
        """The most bytes of one item over the moments; 0 if it is not held at all."""
        return sum(max(item.nbytes) for item in self.items if item.name == name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        places = sorted({item.place for item in self.items})
        return {
            "device": self.device,
            "settings": self.settings,
            "round": self.round,
            "block": self.block,
            "moments": MOMENTS,
            "items": [{"name": item.name, "place": item.place, "bytes": item.nbytes} for item in self.items],
            "totals": {place: self.total(place) for place in places},
        }

    def render(self) -> str:
        """The prediction as a table."""
        rows: list[tuple[str, ...]] = [("memory of a client", "place", *MOMENTS)]
        rows += [(item.name, item.place, *map(format_bytes, item.nbytes)) for item in self.items]
        rows += [
            (f"{place} total", place, *map(format_bytes, self.total(place)))
            for place in dict.fromkeys(item.place for item in self.items)
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in rows
        ]
        return "\n".join(
            [
                f"{self.settings}; most is held in round {self.round}, which trains {self.block}",
                *lines,
                "activations: not predicted; they come on top in the backward columns",
            ]
        )


class Predictor:
    """The memory of one client of a run, block by block and round by round."""

    def __init__(
        self, model: nn.Module, plan: BlockPlan, config: RunConfig, optimizer: OptimizerFactory, device: DeviceKind
    ) -> None:
        """`optimizer` as for `join`; it is called with parameters on the meta device."""
        self._model = model
        self._plan = plan
        self._config = config
        self._optimizer = optimizer
        self._device = device
        self._footprints: dict[tuple[tuple[int, ...], ...], Footprint | None] = {}

    @cached_property
    def blocks(self) -> list[BlockMemory]:
        """Each block of the plan."""
        return [self._block(block) for block in self._plan.blocks]

    def _block(self, block: Block) -> BlockMemory:
        narrow = any(segment.dtype != torch.float32 for segment in block.segments)
        shapes = tuple(slot.shape for slot in block.slots)
        if shapes not in self._footprints:
            factory = with_context(self._optimizer, round=0, names=block.parameters)
            self._footprints[shapes] = footprint(factory, shapes, self._device)
        optimizer = self._footprints[shapes]
        return BlockMemory(
            weights=sum(segment.length * segment.dtype.itemsize for segment in block.segments),
            master=_FP32 * block.flat_numel if narrow else 0,
            gradients=sum(slot.numel * slot.dtype.itemsize for slot in block.slots),
            step_gradients=_FP32 * block.numel,
            step_scratch=_step_scratch(block, optimizer, self._config.local_steps),
            optimizer=optimizer,
            residual=0 if self._config.format == "fp32" else _FP32 * block.flat_numel,
            body=block.wire_bytes(self._config.format),
        )

    def peak(self) -> Prediction:
        """The round that holds most in the model's place, out of the first sweeps of the schedule."""
        config, count = self._config, len(self.blocks)
        rounds = range(min(config.rounds, _SWEEPS * count + config.staleness))
        schedule = [block_of(config.schedule, config.seed, round, count) for round in rounds]
        seen: dict[tuple[int, ...], int] = {}  # rounds with the same blocks before them hold the same
        for round in rounds:
            seen.setdefault(tuple(schedule[max(0, round - 2 * config.staleness) : round + 1]), round)
        place: Place = "device" if self._device == "cuda" else "host"
        return max((self._round(schedule, round) for round in seen.values()), key=lambda p: (p.peak(place), -p.round))

    def _round(self, schedule: list[int], round: int) -> Prediction:
        config, active = self._config, self.blocks[schedule[round]]
        under_way = range(max(0, round - config.staleness), round)  # handed over, aggregate not applied yet
        own = config.local_view == "own"

        def off_reference(q: int) -> bool:
            """Whether round q starts from weights other than x̂; if so, its start and its progress are kept, too."""
            return own and schedule[q] in schedule[max(0, q - config.staleness) : q]

        def start(q: int) -> int:
            return self.blocks[schedule[q]].weights if off_reference(q) else 0

        # θ differs from x̂ in the active block and, with local_view "own", in the blocks handed over but not applied.
        apart = {schedule[round], *(schedule[q] for q in under_way if own)}
        references = sum(self.blocks[b].weights for b in apart) + start(round)
        progress = sum(self._progress(schedule[q]) for q in under_way if off_reference(q))
        made = self._progress(schedule[round]) if off_reference(round) else 0
        handed_over = self.blocks[schedule[round - 1]].master + start(round - 1) if under_way else 0
        residuals = sum(block.residual for block in self.blocks)
        # A new residual is kept in addition to the old one until the verdict; a block has at most one undecided.
        undecided = sum(self.blocks[b].residual for b in {schedule[q] for q in under_way})
        handed = sum(self.blocks[b].residual for b in {schedule[q] for q in (*under_way, round)})
        body = max(block.body for block in self.blocks)
        working: Place = "device" if self._device == "cuda" else "host"
        waiting: Place = "pinned" if self._device == "cuda" else "host"
        items = [
            _steady("weights", working, self._weights()),
            _steady("references", working, references),
            Item("progress", working, (progress, progress, progress, progress + made)),
            _steady("master", working, active.master),
            Item("handed-over master", working, (handed_over, 0, 0, 0)),
            Item("gradients", working, (active.gradients, active.gradients, active.step_gradients, 0)),
            Item("optimiser state", working, (0, active.optimizer_state, active.optimizer_state, 0)),
            Item("step scratch", working, (0, 0, active.step_scratch, 0)),
            Item("residuals", waiting, (*(3 * (residuals + undecided,)), residuals + handed)),
            _steady("packed bodies", waiting, (self._uploads() + self._updates()) * body),
        ]
        if self._device == "cuda":
            items += [
                _steady("pack slots", "device", self._pack_slots()),
                _steady("arriving bodies", "device", self._updates() * body),
            ]
        return Prediction(
            self._device,
            round,
            self._plan.blocks[schedule[round]].name,
            ", ".join(
                [self._device, f"staleness {config.staleness}", config.format, config.schedule]
                + (["WITHOUT the optimiser's state, which is unknown"] if active.optimizer is None else [])
            ),
            tuple(item for item in items if any(item.nbytes)),
        )

    def _weights(self) -> int:
        frozen = (self._model.get_parameter(name) for name, _ in self._plan.frozen)
        rest = sum(tensor.nbytes for tensor in (*frozen, *self._model.buffers()))
        return sum(block.weights for block in self.blocks) + rest

    def _progress(self, block: int) -> int:
        return _FP32 * self._plan.blocks[block].flat_numel

    def _uploads(self) -> int:
        """Bodies on their way to the server: one per round under way, and the one that is encoded."""
        return self._config.staleness + 1

    def _updates(self) -> int:
        """Landings that are open for bodies to come: as many as the rounds that the server may be ahead."""
        return min(self._config.staleness + 2, self._config.rounds)

    def _pack_slots(self) -> int:
        """Bytes of two slices of a block on the device, packed and in fp32: one is encoded, the other is copied."""
        largest = max(block.flat_numel for block in self._plan.blocks)
        return SLOTS * sum(slot_bytes(slot_elements(largest, self._config.chunk), self._config.format))


def _step_scratch(block: Block, optimizer: Footprint | None, local_steps: int) -> int:
    """Bytes of temporary memory in a step: the larger of the optimiser's own scratch and of widening the gradients.

    Widening comes before the optimiser makes its state in the first step of a round; with one step per round, the
    memory of the state is free for it. Scratch and state of an unknown optimiser count as 0.
    """
    own, state = (0, 0) if optimizer is None else (optimizer.scratch, optimizer.state)
    return max(own, _widening(block) - (state if local_steps == 1 else 0))


def _widening(block: Block) -> int:
    """The most bytes that widening a block's gradients holds beyond the gradients in fp32.

    They are widened one at a time, the largest first, as in `ActiveBlock`.
    """
    held = sum(slot.numel * slot.dtype.itemsize for slot in block.slots)
    most = 0
    for slot in sorted(block.slots, key=lambda slot: slot.numel, reverse=True):
        if slot.dtype != torch.float32:
            most = max(most, held + _FP32 * slot.numel)
            held += (_FP32 - slot.dtype.itemsize) * slot.numel
    return max(0, most - _FP32 * block.numel)


def predict(
    model: nn.Module, plan: BlockPlan, config: RunConfig, optimizer: OptimizerFactory, device: DeviceKind
) -> Prediction:
    """The memory of a client of this run in the round that holds most. See `Predictor`."""
    return Predictor(model, plan, config, optimizer, device).peak()


def device_kind(name: str) -> DeviceKind:
    """Returns `name` if it is a kind of device, else raises ConfigError."""
    if name not in get_args(DeviceKind):
        raise ConfigError(f"expected device to be one of {', '.join(get_args(DeviceKind))}, found {name!r}")
    return cast(DeviceKind, name)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a CUDA device; None for other devices, which are not checked."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require_room(device: torch.device, prediction: Callable[[], Prediction]) -> None:
    """Raises DeviceMemoryError, with the prediction, when the device has too little free memory. Allocates nothing.

    The model must be on the device already: its weights are not counted again. `prediction` is called only if the free
    memory of the device is known.
    """
    free = free_bytes(device)
    if free is None:
        return
    predicted = prediction()
    needed = predicted.peak("device") - predicted.item("weights")
    if needed > free:
        raise DeviceMemoryError(
            f"expected {format_bytes(needed)} of free memory on {device} in addition to the model's weights, "
            f"found {format_bytes(free)}; use smaller blocks, an optimiser with less state, a lower staleness or a "
            f"smaller model:\n"
            f"{predicted.render()}"
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors; a storage that several tensors share counts once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _steady(name: str, place: Place, nbytes: int) -> Item:
    return Item(name, place, (nbytes, nbytes, nbytes, nbytes))
