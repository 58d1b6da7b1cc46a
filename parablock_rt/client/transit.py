"""What is on its way between a client and the server, and with what of it a new connection goes on: plain state.

Everything is kept until the other side has it: a hand-over until the verdict on it, an aggregate's buffer until it is
applied. Has no socket, no thread and no lock of its own: the server link alone calls it, with its lock held.
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
    """A body on its way in: a round's aggregate, or a whole block. Complete when message and body are there."""

    block: int
    landing: Landing
    message: protocol.Update | protocol.Snapshot | None = None
    fingerprint: int = 0  # of a whole block
    received: int = 0  # bytes that were there when the last connection broke
    spoiled: bool = False  # the landing has bytes of a body that will never be
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
    """A hand-over on its way out."""

    message: protocol.Upload
    source: _C.Source
    nbytes: int


@dataclass(frozen=True)
class Resumption:
    """What a new connection goes on with. Of what was under way: the bytes that are kept, and those that go again."""

    receive: list[tuple[int, Arrival]]  # with their rounds
    send: list[PendingUpload]
    resumed_bytes: int
    resent_bytes: int


class Transit:
    """All that is under way, in both directions."""

    def __init__(self, chunk: int) -> None:
        """`chunk`: bytes of a whole block that travel at a time."""
        self.applied = -1  # the last round whose aggregate is applied
        self.handed_over = -1  # the last round
        self.uploads: dict[int, PendingUpload] = {}  # no verdict yet
        self.arrivals: dict[int, Arrival] = {}
        self.early_updates: dict[int, protocol.Update] = {}  # announced before there was room for them
        self.announced: list[protocol.Snapshot] = []  # whole blocks that no room was made for yet
        self.block_bytes: list[int] = []  # what each block weighs
        self._chunk = chunk
        self._decided_early: set[int] = set()  # rounds that were refused before they were handed over
        self._asked: set[int] = set()  # of the uploads, the rounds that the last Rejoin has named
        self._closed_before = 0  # every round before this one is closed
        self._whole: frozenset[int] = frozenset()  # blocks that come whole, in place of their rounds before that
        self._snapshot: Arrival | None = None

    # ---- Aggregates

    def open_to(self, round: int, block: int, landing: Landing) -> Arrival:
        """There is room for a round's aggregate."""
        arrival = Arrival(block, landing, self.early_updates.pop(round, None))
        self.arrivals[round] = arrival
        return arrival

    def update_announced(self, message: protocol.Update) -> None:
        """A round is closed, and its aggregate is coming."""
        if message.round in self.arrivals:
            self.arrivals[message.round].message = message
        elif message.round > self.applied:
            self.early_updates[message.round] = message

    def decided(self, round: int) -> None:
        """The server has spoken on a round's upload, and will not do so again."""
        self.uploads.pop(round, None)
        if round > self.handed_over:
            self._decided_early = {other for other in self._decided_early if other > self.handed_over} | {round}

    def closed(self, round: int) -> bool:
        """Whether the server is known to have closed the round, or to take nothing for it any more."""
        arrival = self.arrivals.get(round)
        announced = round in self.early_updates or (arrival is not None and arrival.message is not None)
        return announced or round < self._closed_before or round in self._decided_early

    def arrived(self, round: int) -> bool:
        """Whether the round's aggregate is complete here."""
        return round in self.arrivals and self.arrivals[round].complete

    def replaced(self, round: int, block: int) -> bool:
        """Whether the round's aggregate will not come, because its block comes whole."""
        arrival = self.arrivals.get(round)
        complete = arrival is not None and arrival.complete
        return round < self._closed_before and block in self._whole and not complete

    def spoiled(self) -> list[tuple[int, int]]:
        """Rounds, and their blocks, whose landing must be renewed before their aggregates can come."""
        return [(round, arrival.block) for round, arrival in self.arrivals.items() if arrival.spoiled]

    def received(self, event: _C.Event) -> None:
        """A body's last byte is here."""
        if event.kind == Kind.UPDATE and event.round in self.arrivals:
            arrival = self.arrivals[event.round]
            arrival.first_byte_ns, arrival.last_byte_ns = event.first_byte_ns, event.at_ns
        elif event.kind == Kind.SNAPSHOT and self._snapshot is not None:
            self._snapshot.last_byte_ns = event.at_ns

    # ---- Whole blocks

    def next_snapshot(self) -> Arrival | None:
        """Makes room for the next whole block that was announced, and returns it if it may come now.

        One at a time, so that a client far behind needs room for one block and not for the model.
        """
        if not self.announced or (self._snapshot is not None and self._snapshot.message is not None):
            return None
        message = self.announced.pop(0)
        begun = self._snapshot  # what a connection that broke has left
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
        """Whether `take_snapshot` would give one."""
        return self._snapshot is not None and self._snapshot.complete

    def take_snapshot(self) -> Arrival | None:
        """A whole block, if one is complete."""
        if not self.snapshot_is_here():
            return None
        arrival, self._snapshot = self._snapshot, None
        return arrival

    # ---- From one connection to the next

    def interrupted(self, unfinished: Iterable[tuple[int, int, int, int]]) -> None:
        """The connection has ended; `unfinished`: kind, round, block and bytes here of what was coming over it."""
        for kind, round, _, received in unfinished:
            if kind == Kind.UPDATE and round in self.arrivals:
                self.arrivals[round].received = received
            elif kind == Kind.SNAPSHOT and self._snapshot is not None:
                self._snapshot.received = received
        self.announced.clear()
        if self._snapshot is not None:
            if self._snapshot.complete:  # the server will say again what is missing
                self._snapshot = None
            else:
                self._snapshot.message = None

    def server_restarted(self) -> None:
        """Gives up what a former server may have made of other uploads than the server that is there now.

        A server that was killed before a round was durable may close it with other uploads: what has come of such an
        aggregate is worth nothing. One that was announced was durable, and its bytes are the same.
        """
        for arrival in self.arrivals.values():
            if arrival.message is None:
                arrival.spoiled = arrival.landing.watermark is not None  # which has passed them on
                arrival.received = arrival.last_byte_ns = 0

    def rejoin(self) -> protocol.Rejoin:
        """Says where this client stands."""
        self._asked = set(self.uploads)
        return protocol.Rejoin(
            applied=self.applied,
            handed_over=self.handed_over,
            held=[round for round, arrival in self.arrivals.items() if arrival.last_byte_ns > 0],
            undecided=sorted(self._asked),
        )

    def resume(self, message: protocol.RejoinAnswer) -> Resumption:
        """Takes the server's answer to `rejoin`."""
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
