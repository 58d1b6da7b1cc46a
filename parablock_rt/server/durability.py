"""What of a run outlives the server's process, if anything: each step is on the disk before clients are told of it.

Says in which order; how it is written is the checkpoint's business. The server's thread alone uses it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.server import journal
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.master import Master
from parablock_rt.server.outcome import ClosedRound


class Durability:
    """The durable state of one run. Without a checkpoint nothing is kept, and every call returns at once."""

    def __init__(self, state: Checkpoint | None, master: Master, timeline: Timeline) -> None:
        self._state = state
        self._master = master
        self._timeline = timeline
        self._latest: dict[int, int] = {}  # the last closed round of each block

    @property
    def is_kept(self) -> bool:
        """Whether anything outlives this process: a client then keeps its upload until its round is closed."""
        return self._state is not None

    def restore(self, closed: Iterable[ClosedRound]) -> None:
        """Takes over the rounds that an earlier process has closed."""
        self._latest = {each.block: each.round for each in closed}

    def note(self, *records: journal.Record) -> None:
        """Makes something outlive this process. Raises CheckpointError."""
        if self._state is not None:
            self._state.append(*records)

    def close(self, record: journal.Closed, body: Tensor, wanted: set[int]) -> None:
        """Puts a round on the disk: what it changed, then that it is closed. `body`: the packed aggregate. `wanted`:
        earlier rounds whose aggregates somebody still lacks; those of others are removed. Raises CheckpointError."""
        if self._state is None:
            return
        round, block = record.closed.round, record.closed.block
        with self._timeline.span(Stage.CHECKPOINT, round=round, block=block):
            self._state.write_round(round, self._master.state(block) | {"update": body})
            self._state.append(record)
            self._latest[block] = round
            self._state.keep_rounds(wanted | set(self._latest.values()))
