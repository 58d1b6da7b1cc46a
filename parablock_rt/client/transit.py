"""State of all transfers in flight between a client and the server, and what must be resumed on a new connection.

Everything is kept until it is no longer needed: a hand-over until its verdict, an aggregate's buffer until the
aggregate is applied. Has no socket, thread or lock of its own: only ServerLink calls it, with its lock held.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parablock_rt import _C
from parablock_rt.staging.stager import Landing
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import raw_layout


@dataclass(eq=False)
class Arrival:
    """An incoming body: a round's aggregate, or a whole block. Complete when both message and body have arrived."""

    block: int
    landing: Landing
    message: protocol.Update | protocol.Snapshot | None = None
    fingerprint: int = 0  # of a whole block
    received: int = 0  # bytes that had arrived when the last connection broke
    spoiled: bool = False  # the landing has bytes of a body that will never be completed
    first_byte_ns: int = 0
    last_byte_ns: int = 0

    @property
    def complete(self) -> bool:
        """Whether it can be applied."""
        return self.message is not None and self.last_byte_ns > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the body."""
        return self.landing.layout.nbytes


@dataclass(frozen=True, eq=False)
class PendingUpload:
    """A hand-over that has no verdict yet. Keeps the source alive, so that it can be sent again."""

    message: protocol.Upload
    source: _C.Source
    nbytes: int


@dataclass(frozen=True)
class Resumption:
    """The transfers to resume on a new connection. `resumed_bytes`: the bytes of them that are kept; `resent_bytes`:
    the bytes that must still be sent."""

    receive: list[tuple[int, Arrival]]  # rounds and their arrivals
    send: list[PendingUpload]
    resumed_bytes: int
    resent_bytes: int


class Transit:
    """All transfers in flight, in both directions."""

    def __init__(self, chunk: int) -> None:
        """`chunk`: bytes per chunk of a whole block."""
        self.applied = -1  # the last round whose aggregate is applied
        self.handed_over = -1  # the last round that was handed over
        self.uploads: dict[int, PendingUpload] = {}  # hand-overs without a verdict, by round
        self.arrivals: dict[int, Arrival] = {}  # aggregates, by round
        self.early_updates: dict[int, protocol.Update] = {}  # announced before a landing was posted for them
        self._announced: list[protocol.Snapshot] = []  # whole blocks without a landing yet
        self._came_whole: set[int] = set()  # the blocks that were announced whole on this connection
        self.block_bytes: list[int] = []  # the size of each block, sent whole
        self._chunk = chunk
        self.decided_early: set[int] = set()  # rounds that were refused before they were handed over
        self._asked: set[int] = set()  # the undecided rounds that the last Rejoin named
        self._closed_before = 0  # every round before this one is closed
        self._whole: frozenset[int] = frozenset()  # blocks sent whole instead of their aggregates before that round
        self._snapshot: Arrival | None = None

    # ---- Aggregates

    def open_to(self, round: int, block: int, landing: Landing) -> Arrival:
        """Adds the landing for a round's aggregate. This object owns the landing until the arrival is taken."""
        arrival = Arrival(block, landing, self.early_updates.pop(round, None))
        self.arrivals[round] = arrival
        return arrival

    def update_announced(self, message: protocol.Update) -> None:
        """Notes that a round is closed and its aggregate is coming."""
        if message.round in self.arrivals:
            self.arrivals[message.round].message = message
        elif message.round > self.applied:
            self.early_updates[message.round] = message

    def decided(self, round: int) -> None:
        """Notes that the server has sent its verdict on a round's upload: the upload is no longer kept."""
        self.uploads.pop(round, None)
        if round > self.handed_over:
            self.decided_early = {other for other in self.decided_early if other > self.handed_over} | {round}

    def closed(self, round: int) -> bool:
        """Whether the server is known to have closed the round, or to accept no upload for it any more."""
        arrival = self.arrivals.get(round)
        announced = round in self.early_updates or (arrival is not None and arrival.message is not None)
        return announced or round < self._closed_before or round in self.decided_early

    def arrived(self, round: int) -> bool:
        """Whether the round's aggregate has arrived completely."""
        return round in self.arrivals and self.arrivals[round].complete

    def replaced(self, round: int, block: int) -> bool:
        """Whether the round's aggregate will not come because the server sends its block whole."""
        arrival = self.arrivals.get(round)
        complete = arrival is not None and arrival.complete
        return round < self._closed_before and block in self._whole and not complete

    def spoiled(self) -> list[tuple[int, int]]:
        """The rounds, with their blocks, whose landing must be renewed before the aggregate can be received."""
        return [(round, arrival.block) for round, arrival in self.arrivals.items() if arrival.spoiled]

    def received(self, event: _C.Event) -> None:
        """Notes that a body's last byte has arrived."""
        if event.kind == Kind.UPDATE and event.round in self.arrivals:
            arrival = self.arrivals[event.round]
            arrival.first_byte_ns, arrival.last_byte_ns = event.first_byte_ns, event.at_ns
        elif event.kind == Kind.SNAPSHOT and self._snapshot is not None:
            self._snapshot.last_byte_ns = event.at_ns

    # ---- Whole blocks

    def lacks(self, block: int) -> bool:
        """Whether the server may announce this block: it does so once per connection."""
        return block < len(self.block_bytes) and block not in self._came_whole

    def snapshot_announced(self, message: protocol.Snapshot) -> None:
        """Notes that a block is coming whole."""
        self._came_whole.add(message.block)
        self._announced.append(message)

    def next_snapshot(self) -> Arrival | None:
        """Allocates a landing for the next announced whole block and returns the arrival; None if there is none to
        receive now.

        One block at a time, so that a client far behind needs memory for one block and not for the whole model.
        """
        if not self._announced or (self._snapshot is not None and self._snapshot.message is not None):
            return None
        message = self._announced.pop(0)
        begun = self._snapshot  # partly received before the connection broke
        if begun is not None and (begun.block, begun.fingerprint) != (message.block, message.fingerprint):
            begun = None
        if begun is None:
            nbytes = self.block_bytes[message.block]
            landing = Landing(_C.Buffer(nbytes), raw_layout(nbytes, self._chunk))
            begun = Arrival(message.block, landing, fingerprint=message.fingerprint)
        begun.message = message
        self._snapshot = begun
        return begun

    def snapshot_is_here(self) -> bool:
        """Whether `take_snapshot` would return a block."""
        return self._snapshot is not None and self._snapshot.complete

    def take_snapshot(self) -> Arrival | None:
        """The whole block that has arrived, or None. The caller owns it from now on."""
        if not self.snapshot_is_here():
            return None
        arrival, self._snapshot = self._snapshot, None
        return arrival

    # ---- From one connection to the next

    def interrupted(self, unfinished: Iterable[tuple[int, int, int, int]]) -> None:
        """Notes that the connection has ended. `unfinished`: kind, round, block and received bytes of each incoming
        transfer."""
        for kind, round, _, received in unfinished:
            if kind == Kind.UPDATE and round in self.arrivals:
                self.arrivals[round].received = received
            elif kind == Kind.SNAPSHOT and self._snapshot is not None:
                self._snapshot.received = received
        self._announced.clear()
        self._came_whole.clear()
        if self._snapshot is not None:
            if self._snapshot.complete:  # not applied yet; the server will announce again what is missing
                self._snapshot = None
            else:
                self._snapshot.message = None

    def server_restarted(self) -> None:
        """Discards partial aggregates that the restarted server may compute differently.

        If the server was killed before a round was durable, the round may be closed again with other uploads, and the
        received bytes of its first aggregate are worthless. An announced aggregate was durable: its bytes are the same.
        """
        for arrival in self.arrivals.values():
            if arrival.message is None:
                arrival.spoiled = arrival.landing.watermark is not None  # bytes were already passed on
                arrival.received = arrival.last_byte_ns = 0

    def rejoin(self) -> protocol.Rejoin:
        """The message that tells the server this client's position, for a new connection."""
        self._asked = set(self.uploads)
        return protocol.Rejoin(
            applied=self.applied,
            handed_over=self.handed_over,
            held=[round for round, arrival in self.arrivals.items() if arrival.last_byte_ns > 0],
            undecided=sorted(self._asked),
        )

    def resume(self, message: protocol.RejoinAnswer) -> Resumption:
        """Takes the server's answer to `rejoin` and returns the transfers to resume."""
        self._closed_before = message.updates_from
        self._whole = frozenset(message.snapshots)
        receive = [
            (round, arrival)
            for round, arrival in self.arrivals.items()
            if arrival.last_byte_ns == 0 and not arrival.spoiled and not self.replaced(round, arrival.block)
        ]
        send = [
            upload for round, upload in self.uploads.items() if round in message.uploads or round not in self._asked
        ]
        here = {upload.message.round: upload.nbytes for upload in send if upload.message.round in message.uploads}
        missing = sum(arrival.nbytes - arrival.received for round, arrival in receive if round < message.updates_from)
        there = sum(message.uploads[round] for round in here)
        return Resumption(
            receive,
            send,
            resumed_bytes=sum(arrival.received for _, arrival in receive) + there,
            resent_bytes=missing + sum(here.values()) - there,
        )
