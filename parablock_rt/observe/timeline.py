"""The timeline of one process: its threads write rings, which are drained into one list of records per thread.

Native code writes records chunk by chunk; Python writes them by `add` and `span`. Times are nanoseconds of the
monotonic clock, which all processes of one machine share. trace.py turns records into tracks, flows and counters.
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
"""How many of the newest records a timeline keeps per thread, about, so that a long run does not fill the memory. A
record has 48 bytes."""

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
    """What a thread was doing. The same as `Stage` of csrc/ring.h, which says what each stage spans."""

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
_CLOCKED = {Stage.COMPUTE: "compute", Stage.FOLD: "fold", Stage.APPLY: "apply"}  # `add` feeds these to `stages`, too


class Timeline:
    """The records of one process.

    `run`, `seat` and `seats` (which client is behind a link) tie chunks to the same chunks in other processes; the code
    that does the handshake sets them. `stages` adds up seconds per stage, even without records. Only the thread named
    at construction may call `add` and `span`; one thread at a time may call the rest.
    """

    def __init__(self, process: str, thread: str, *, on: bool = True) -> None:
        """`process`, `thread`: names to show. With `on=False` nothing is recorded and no ring is made."""
        self.process = process
        self.on = on
        self.stages = StageClock()
        self.run = 0
        self.seat: int | None = None  # on a client: its seat
        self.seats: dict[int, int] = {}  # on the server: the seat behind each link
        self._threads: list[_Thread] = []
        self._ring = self.ring(thread, _LEAST_RING)

    def ring(self, thread: str, records: int) -> _C.Ring | None:
        """A new ring; only the thread of this name may write it. None when nothing is recorded.

        `records`: how many records it should hold between two calls of `drain`, limited to 2^12 to 2^20.
        """
        if not self.on:
            return None
        ring = _C.Ring(min(max(records, _LEAST_RING), _LARGEST_RING))
        self._threads.append(_Thread(thread, ring))
        return ring

    def transfer_ring(self, thread: str, plan: BlockPlan, config: RunConfig, links: int) -> _C.Ring | None:
        """Like `ring`, with room for all transfers under way: an upload and an update per round and link."""
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
        """Records a stage of a whole transfer or of a whole round. `peer`: the link."""
        if stage in _CLOCKED:
            self.stages.add(_CLOCKED[stage], start_ns, end_ns)
        if self._ring is not None:
            self._ring.write(stage, start_ns, end_ns, kind, round, block, _C.WHOLE_TRANSFER, peer, bytes)

    @contextmanager
    def span(self, stage: Stage, **key: int) -> Iterator[None]:
        """Records the body of the `with` statement as a stage, also when it raises, and shows it to an attached
        profiler. `key`: as for `add`."""
        start = time.monotonic_ns()
        try:
            with profiling.annotation(f"parablock.{stage.name.lower()}"):
                yield
        finally:
            self.add(stage, start, time.monotonic_ns(), **key)

    def drain(self) -> None:
        """Takes the records out of the rings. Call it once per round, so that no ring overflows."""
        for thread in self._threads:
            thread.drain()

    def threads(self) -> list[tuple[str, Records]]:
        """(name, records) of every thread: the kept records in the order in which they were written."""
        self.drain()
        return [(thread.name, np.concatenate([np.empty(0, RECORD), *thread.kept])) for thread in self._threads]

    @property
    def lost(self) -> int:
        """How many records are lost: overwritten in a ring before `drain`, or dropped as too old."""
        return sum(thread.ring.lost + thread.dropped for thread in self._threads)


class _Thread:
    """The ring of one thread and the records drained from it."""

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
