"""What the server sends to its clients: each round's aggregate, and whole blocks to those who lack more than that.

Owns the buffers of what is on its way and of what may have to be sent again. Decides neither when a round closes nor
who gets what, and says nothing about it to anybody. The server's thread alone uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from parablock_rt import _C
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.server import recovery
from parablock_rt.server.backlog import Backlog, Kept
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.journal import Past
from parablock_rt.server.master import Master
from parablock_rt.server.rounds import Round
from parablock_rt.staging.stager import Encoding, Stager
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, raw_layout


@dataclass(frozen=True, eq=False)
class _Copy:
    """A whole block as it was when somebody was sent it."""

    source: _C.Source
    nbytes: int
    fingerprint: int


class Downlink:
    """The way down, to all clients. `nbytes`: what was sent since the run began, and `snapshots_nbytes`: of it, whole
    blocks; a restored run goes on counting. `backlog`: the aggregates that may have to be sent again. `snapshot_bytes`:
    what all blocks weigh, sent whole."""

    def __init__(self, transport: Transport, master: Master, chunk: int, stager: Stager, timeline: Timeline) -> None:
        """`chunk`: elements of a transfer's chunk."""
        self.nbytes = 0
        self.snapshots_nbytes = 0
        self._transport = transport
        self._master = master
        self._chunk = chunk
        self._stager = stager
        self._timeline = timeline
        block_bytes = [sum(flat.nbytes for flat in block.flats) for block in master.blocks]
        self.snapshot_bytes = sum(block_bytes)
        self.backlog = Backlog(block_bytes)
        self._copies: dict[int, _Copy] = {}
        largest = max(block.block.flat_numel for block in master.blocks)
        self._mean = torch.empty(largest, dtype=torch.float32, device="cpu")  # of the round that closes

    @property
    def buffers(self) -> BufferPool:
        """Where its buffers come from, for others that need some."""
        return self._stager.buffers

    @property
    def fingerprints(self) -> list[int]:
        """Of every block's bits as they are now, which is what the clients get."""
        return self._master.fingerprints

    def aggregate(self, round: Round, links: Iterable[int]) -> tuple[Encoding, int]:
        """Moves the model by the round's mean and sends the change, while it is being encoded.

        Returns it, for `keep`, and the fingerprint of the new bits.
        """
        key = {"round": round.index, "block": round.block}
        with self._timeline.span(Stage.COMPUTE, **key):
            mean = round.mean(self._mean[: round.accumulator.numel])
            encoding = self._master.step(round.index, round.block, mean, self._stager, self._transport, self._chunk)
        for link in links:
            self._send(link, Kind.UPDATE, round.index, round.block, encoding.source, encoding.nbytes)
        encoding.wait()
        self._timeline.stages.add("encode", *encoding.span_ns)
        with self._timeline.span(Stage.APPLY, kind=Kind.UPDATE, **key, bytes=encoding.nbytes):
            return encoding, self._master.apply(round.block, encoding)

    def keep(self, update: protocol.Update, encoding: Encoding) -> None:
        """Keeps an aggregate for those who come back."""
        self.backlog.add(Kept(update, encoding.nbytes, encoding.source, lambda: self._stager.release(encoding)))

    def restore(self, past: Past, state: Checkpoint) -> None:
        """Takes up where an earlier server ended. Raises CheckpointError when an aggregate that it kept is damaged."""
        for kept in recovery.aggregates(past, state, self._master, self._transport, self.buffers):
            self.backlog.add(kept)
        self.nbytes = past.closed[-1].closed.bytes_down if past.closed else 0
        self.snapshots_nbytes = past.closed[-1].closed.snapshot_bytes if past.closed else 0

    def send_again(self, link: int, round: int) -> None:
        """Sends the aggregate of a closed round once more."""
        kept = self.backlog[round]
        self._send(link, Kind.UPDATE, round, kept.update.block, kept.source, kept.nbytes)

    def send_block(self, link: int, block: int) -> int:
        """Sends a whole block as it is now. Returns the fingerprint of its bits.

        Many newcomers may want the same block: it is copied once for all who are sent it before it changes.
        """
        if (copy := self._copies.get(block)) is None or copy.fingerprint != self.fingerprints[block]:
            copy = self._copies[block] = self._copy(block)
        self._send(link, Kind.SNAPSHOT, 0, block, copy.source, copy.nbytes)
        self.snapshots_nbytes += copy.nbytes
        return copy.fingerprint

    def keep_copies_of(self, blocks: Collection[int]) -> None:
        """These blocks are on their way to somebody; copies of others are let go."""
        for block in self._copies.keys() - set(blocks):
            del self._copies[block]

    def _copy(self, block: int) -> _Copy:
        flats = self._master.blocks[block].flats
        nbytes = sum(flat.nbytes for flat in flats)
        buffer = self.buffers.take(nbytes)
        raw = as_tensor(buffer, nbytes)
        start = 0
        for flat in flats:
            raw[start : start + flat.nbytes].view(flat.dtype).copy_(flat)
            start += flat.nbytes
        source = self._transport.native.make_source(buffer, raw_layout(nbytes, self._chunk), True)
        self.buffers.give_back(buffer)  # which takes it as free once no source and no link has it
        return _Copy(source, nbytes, self.fingerprints[block])

    def _send(self, link: int, kind: Kind, round: int, block: int, source: _C.Source, nbytes: int) -> None:
        self._transport.native.send(link, kind, round, block, source)
        self.nbytes += nbytes
