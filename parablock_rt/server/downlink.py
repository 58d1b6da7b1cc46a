"""What the server sends to its clients: each round's aggregate, and whole blocks to clients that lack more than that.

Owns the buffers of everything in flight and of everything that may have to be sent again. Decides neither when a round
closes nor which client gets what, and sends no control messages. Only the server's thread may call this module.
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
    """A copy of a whole block, taken when it was first sent."""

    source: _C.Source
    nbytes: int
    fingerprint: int


class Downlink:
    """The transfers from the server to all clients.

    `nbytes`: bytes sent since the run began; `snapshots_nbytes`: the part of them that were whole blocks. Both counters
    survive a resume. `backlog`: the aggregates that may have to be sent again. `snapshot_bytes`: the size of all blocks
    together, sent whole.
    """

    def __init__(self, transport: Transport, master: Master, chunk: int, stager: Stager, timeline: Timeline) -> None:
        """`chunk`: elements per chunk of an aggregate, and bytes per chunk of a whole block."""
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
        self._mean = torch.empty(largest, dtype=torch.float32, device="cpu")  # scratch for the closing round's mean

    @property
    def buffers(self) -> BufferPool:
        """The pool from which the buffers come; other modules may take buffers from it too."""
        return self._stager.buffers

    @property
    def fingerprints(self) -> list[int]:
        """The fingerprint of every block's current bits, which are the bits that the clients hold or will get."""
        return self._master.fingerprints

    def aggregate(self, round: Round, links: Iterable[int]) -> tuple[Encoding, int]:
        """Moves the model by the round's mean, and sends the change while it is still being encoded.

        Returns the encoding, which the caller passes to `keep`, and the fingerprint of the block's new bits.
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
        """Keeps an aggregate for clients that come back. The backlog owns the encoding's buffer from now on."""
        self.backlog.add(Kept(update, encoding.nbytes, encoding.source, lambda: self._stager.release(encoding)))

    def restore(self, past: Past, state: Checkpoint) -> None:
        """Restores what an earlier server kept. Raises CheckpointError when one of its aggregates is damaged."""
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

        Many newcomers may need the same block, so they share one copy until the block changes.
        """
        if (copy := self._copies.get(block)) is None or copy.fingerprint != self.fingerprints[block]:
            copy = self._copies[block] = self._copy(block)
        self._send(link, Kind.SNAPSHOT, 0, block, copy.source, copy.nbytes)
        self.snapshots_nbytes += copy.nbytes
        return copy.fingerprint

    def keep_copies_of(self, blocks: Collection[int]) -> None:
        """Drops the copies of all blocks but these, which are being sent to a client."""
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
        self.buffers.give_back(buffer)  # the pool reuses it once no source or link owns it
        return _Copy(source, nbytes, self.fingerprints[block])

    def _send(self, link: int, kind: Kind, round: int, block: int, source: _C.Source, nbytes: int) -> None:
        self._transport.native.send(link, kind, round, block, source)
        self.nbytes += nbytes
