"""The server's copy of the model: steps it by a round's mean with the server optimiser, and encodes the change for the
clients.

There are two copies of each block: the master `x` in fp32, which the optimiser moves, and the reference `x̂` in the
model's dtype, the bits that every client holds. What a downlink body cannot represent stays in `x − x̂` and is sent with
the block's next aggregate.

Knows nothing of clients, deadlines or sockets. Only one thread may use it at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parablock_rt import codec
from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.errors import CheckpointError
from parablock_rt.staging.stager import Encoding, Piece, Stager
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport

_MOMENTUM = 0.9
_BETA1, _BETA2, _TAU = 0.9, 0.99, 1e-3  # the values of Reddi et al., "Adaptive Federated Optimization", 2021


class ServerOptimizer:
    """`x[b] ← x[b] + lr · direction(mean change)`, with separate state for each block.

    `average` moves by the mean itself (FedAvg at lr 1), `momentum` by its running sum, `adam` and `yogi` as FedAdam and
    FedYogi (Reddi et al. 2021, algorithm 2, no bias correction).
    """

    def __init__(self, name: str, lr: float) -> None:
        self.name = name
        self.lr = lr
        self._first: dict[int, Tensor] = {}
        self._second: dict[int, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What `state` has of a block that was moved; each is like the block's master."""
        return {"average": (), "momentum": ("first",)}.get(self.name, ("first", "second"))

    def state(self, block: int) -> dict[str, Tensor]:
        """The optimiser's state of a block, by name."""
        kept = {"first": self._first.get(block), "second": self._second.get(block)}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def restore(self, block: int, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        for name, kept in (("first", self._first), ("second", self._second)):
            if name in state:
                kept[block] = state[name]

    def step(self, block: int, x: Tensor, mean: Tensor) -> None:
        """Moves `x` (fp32, [flat_numel]) in place; `mean` may be overwritten."""
        if self.name == "average":
            x.add_(mean, alpha=self.lr)
            return
        m = self._first.setdefault(block, torch.zeros_like(x))
        if self.name == "momentum":
            x.add_(m.mul_(_MOMENTUM).add_(mean), alpha=self.lr)
            return
        v = self._second.setdefault(block, torch.full_like(x, _TAU**2))
        m.lerp_(mean, 1 - _BETA1)
        square = mean.square_()
        if self.name == "adam":
            v.lerp_(square, 1 - _BETA2)
        else:
            v.addcmul_(square, torch.sign(v - square), value=-(1 - _BETA2))
        x.addcdiv_(m, v.sqrt().add_(_TAU), value=self.lr)


class Master:
    """All blocks of the server's model. `blocks[b].flats` is the reference: the model's own parameters."""

    def __init__(self, blocks: list[FlatBlock], format: str, optimizer: ServerOptimizer) -> None:
        self.blocks = blocks
        self.format = format
        self.fingerprints = [fingerprint(block) for block in blocks]  # of the reference, kept up to date by `apply`
        self._optimizer = optimizer
        self._x: dict[int, Tensor] = {}

    def x(self, block: int) -> Tensor:
        """The fp32 master of a block, [flat_numel]; initially the reference, converted to fp32."""
        if block not in self._x:
            self._x[block] = torch.cat([flat.float() for flat in self.blocks[block].flats])
        return self._x[block]

    def state(self, block: int) -> dict[str, Tensor]:
        """The complete state of a block, by name. The tensors are not copies: the next step changes them."""
        return self._references(block) | {"x": self.x(block)} | self._optimizer.state(block)

    def restore(self, block: int, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned of a block that was moved. Raises CheckpointError when a tensor is missing or
        has another type or shape."""
        references = self._references(block)
        expected = references | dict.fromkeys(("x", *self._optimizer.names), self.x(block))
        for name, like in expected.items():
            found = state.get(name)
            if found is None or (found.dtype, found.shape) != (like.dtype, like.shape):
                raise CheckpointError(
                    f"expected {name} of block {block} in the saved state as {_kind(like)}, found {_kind(found)}: the "
                    "state is damaged and the run cannot be resumed from it"
                )
        for name, flat in references.items():
            flat.copy_(state[name])
        self._x[block] = state["x"]
        self._optimizer.restore(block, state)
        self.fingerprints[block] = fingerprint(self.blocks[block])

    def step(self, round: int, block: int, mean: Tensor, stager: Stager, transport: Transport, chunk: int) -> Encoding:
        """Moves the master by the round's mean and starts to encode the aggregate. `mean` is overwritten.

        The encoding's source may be sent at once. The caller must call `apply` before it touches the block again.
        """
        x = self.x(block)
        self._optimizer.step(block, x, mean)
        pieces = [
            Piece(now=x[segment.start : segment.start + segment.length], ref=flat)
            for segment, flat in zip(self.blocks[block].block.segments, self.blocks[block].flats, strict=True)
        ]
        return stager.encode(pieces, self.format, chunk, transport, kind=Kind.UPDATE, round=round, block=block)

    def apply(self, block: int, encoding: Encoding) -> int:
        """Waits for the encoding, moves the reference by it and returns the reference's fingerprint."""
        encoding.wait()
        self.blocks[block].check_homed()
        codec.apply_(self.blocks[block].flats, encoding.body, format=self.format)
        self.fingerprints[block] = fingerprint(self.blocks[block])
        return self.fingerprints[block]

    def _references(self, block: int) -> dict[str, Tensor]:
        return {f"reference.{i}": flat for i, flat in enumerate(self.blocks[block].flats)}


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
