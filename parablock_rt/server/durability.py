"""What survives the end of the server's process, if anything: each step is on the disk before clients are told of it.

Decides the order of the writes; `Checkpoint` does the writing. Only the server's thread may call this module.
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
        """Whether the run can outlive this process. If so, a client keeps its upload until the round is closed."""
        return self._state is not None

    def restore(self, closed: Iterable[ClosedRound]) -> None:
        """Takes over the rounds that an earlier process has closed."""
        self._latest = {each.block: each.round for each in closed}

    def note(self, *records: journal.Record) -> None:
        """Appends records to the durable state. Raises CheckpointError."""
        if self._state is not None:
            self._state.append(*records)

    def close(self, record: journal.Closed, body: Tensor, wanted: set[int]) -> None:
        """Writes a round to the disk: first what it changed, then the record that it is closed. Raises CheckpointError.

        `body`: the packed aggregate. `wanted`: earlier rounds whose aggregates a client may still lack. Files of other
        rounds are removed, except the latest round's of each block.
        """
        if self._state is None:
            return
        round, block = record.closed.round, record.closed.block
        with self._timeline.span(Stage.CHECKPOINT, round=round, block=block):
            self._state.write_round(round, self._master.state(block) | {"update": body})
            self._state.append(record)
            self._latest[block] = round
            self._state.keep_rounds(wanted | set(self._latest.values()))
