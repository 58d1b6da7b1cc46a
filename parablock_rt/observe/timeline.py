"""What happened when in one process: the rings that its threads write, drained into one list of records per thread.

Records come from native code, chunk by chunk, and from Python's own threads through `add` and `span`. Times are
nanoseconds of the monotonic clock, which all processes of one machine share. What a record means for a reader (tracks,
flows, counters) is trace.py's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parablock_rt import _C
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.observe import profiling
from parablock_rt.stages import StageClock

KEPT_RECORDS = 2**20
"""A timeline keeps the newest ones of each thread, 48 bytes each, so that a long run does not fill the memory."""

RECORD = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("bytes", "<u8"),
        ("round", "<u4"),
        ("block", "<u4"),
        ("chunk", "<u4"),
        ("peer", "<u4"),
        ("stage", "u1"),
        ("kind", "u1"),
        ("lane", "<u2"),
        ("unused", "<u4"),
    ]
)
"""`Record` of csrc/ring.h."""
assert RECORD.itemsize == _C.RECORD_BYTES

Records = NDArray[Any]


class Stage(IntEnum):
    """What a thread was doing: `Stage` of csrc/ring.h, which says what each one spans."""

    COMPUTE = 0
    HAND_OVER = 1
    EXPOSED = 2
    CLOSE = 3
    ENCODE = 4
    COPY = 5
    CHECKSUM = 6
    SEND = 7
    ACKNOWLEDGED = 8
    RECEIVE = 9
    VERIFY = 10
    FOLD = 11
    APPLY = 12
    CHECKPOINT = 13


_LEAST_RING, _LARGEST_RING = 2**12, 2**20
_RECORDS_A_CHUNK = 3  # checksum, send, acknowledged; or receive, verify
_CLOCKED = {Stage.COMPUTE: "compute", Stage.FOLD: "fold", Stage.APPLY: "apply"}


class Timeline:
    """The records of one process.

    `run` and `seats` (which client is behind a link) tie its chunks to the same chunks in other processes; whoever
    shakes hands sets them. `stages` adds up seconds; it works without records, too. One thread, the one named here,
    calls `add` and `span`; one at a time calls the rest.
    """

    def __init__(self, process: str, thread: str, *, on: bool = True) -> None:
        """`process`, `thread`: names for a reader. With `on=False` nothing is recorded and no ring is made."""
        self.process = process
        self.on = on
        self.stages = StageClock()
        self.run = 0
        self.seat: int | None = None  # of a client; the server has one per link
        self.seats: dict[int, int] = {}
        self._threads: list[_Thread] = []
        self._ring = self.ring(thread, _LEAST_RING)

    def ring(self, thread: str, records: int) -> _C.Ring | None:
        """A ring for a thread of that name, which alone may write it; None when nothing is recorded.

        `records`: how many it should be able to hold between two calls of `drain`; there is a least and a largest size.
        """
        if not self.on:
            return None
        ring = _C.Ring(min(max(records, _LEAST_RING), _LARGEST_RING))
        self._threads.append(_Thread(thread, ring))
        return ring

    def transfer_ring(self, thread: str, plan: BlockPlan, config: RunConfig, links: int) -> _C.Ring | None:
        """As `ring`, with room for what can be under way at once: an upload and an update a round and link."""
        chunks = max(-(-block.flat_numel // config.chunk) for block in plan.blocks)
        return self.ring(thread, 2 * chunks * _RECORDS_A_CHUNK * links * (config.staleness + 2))

    def add(
        self,
        stage: Stage,
        start_ns: int,
        end_ns: int,
        *,
        kind: int = 0,
        round: int = 0,
        block: int = 0,
        peer: int = 0,
        bytes: int = 0,
    ) -> None:
        """Notes a whole transfer's, or a whole round's, part in a stage. `peer`: the link."""
        if stage in _CLOCKED:
            self.stages.add(_CLOCKED[stage], start_ns, end_ns)
        if self._ring is not None:
            self._ring.write(stage, start_ns, end_ns, kind, round, block, _C.WHOLE_TRANSFER, peer, bytes)

    @contextmanager
    def span(self, stage: Stage, **key: int) -> Iterator[None]:
        """Notes how long the body of the `with` statement takes, also when it raises, and shows it to a profiler that
        is attached. `key`: as for `add`."""
        start = time.monotonic_ns()
        try:
            with profiling.annotation(f"parablock.{stage.name.lower()}"):
                yield
        finally:
            self.add(stage, start, time.monotonic_ns(), **key)

    def drain(self) -> None:
        """Takes what the rings hold. Call it often enough that none overflows: once per round."""
        for thread in self._threads:
            thread.drain()

    def threads(self) -> list[tuple[str, Records]]:
        """The kept records of every thread, by its name, in the order in which they were written."""
        self.drain()
        return [(thread.name, np.concatenate([np.empty(0, RECORD), *thread.kept])) for thread in self._threads]

    @property
    def lost(self) -> int:
        """Records that no reader will see: overwritten in a ring that was drained too late, or too old to be kept."""
        return sum(thread.ring.lost + thread.dropped for thread in self._threads)


class _Thread:
    """The ring of one thread and what was drained from it."""

    def __init__(self, name: str, ring: _C.Ring) -> None:
        self.name = name
        self.ring = ring
        self.kept: deque[Records] = deque()
        self.dropped = 0
        self._count = 0

    def drain(self) -> None:
        taken = np.frombuffer(self.ring.drain(), RECORD)
        if not len(taken):
            return
        self.kept.append(taken)
        self._count += len(taken)
        while self._count - len(self.kept[0]) >= KEPT_RECORDS:
            oldest = self.kept.popleft()
            self._count -= len(oldest)
            self.dropped += len(oldest)
