"""The contents of a durable run's journal: its records in order, and the state that follows from them.

Plain data. `Checkpoint` writes the records so that none is lost or torn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from parablock_rt.config import RunConfig
from parablock_rt.errors import CheckpointError
from parablock_rt.server.outcome import WHOLE_ROUNDS, ClosedRound
from parablock_rt.wire import protocol

FORMAT = 1
_LEFT_KEPT = 100  # the last so many clients that left


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Begin(_Record, frozen=True, kw_only=True, tag=True):
    """The first record: identifies the run. `fingerprints`: of every block at the start of the run."""

    format: int
    release: str
    run: int
    config: RunConfig
    plan_digest: str
    frozen: str
    fingerprints: list[int]


class Listening(_Record, frozen=True, kw_only=True, tag=True):
    """A server has started, or started again, at this address."""

    address: str


class Seated(_Record, frozen=True, kw_only=True, tag=True):
    """A client got a seat."""

    seat: int
    secret: bytes

    def __repr__(self) -> str:  # without the secret
        return f"Seated(seat={self.seat})"


class Started(_Record, frozen=True, kw_only=True, tag=True):
    """The client in the seat takes part from this round on."""

    seat: int
    first_round: int


class Vacated(_Record, frozen=True, kw_only=True, tag=True):
    """The seat is free again: its holder left, was dismissed or replaced."""

    seat: int
    reason: str


class Finished(_Record, frozen=True, kw_only=True, tag=True):
    """The client in the seat has applied the last round and said goodbye."""

    seat: int
    goodbye: protocol.Goodbye


class Closed(_Record, frozen=True, kw_only=True, tag=True):
    """A round was closed. `verdicts`, by seat: why the upload was refused, or an empty text if it counts.

    `complete`: every client that the round waited for delivered in time. `given_up`: the seats that later rounds do not
    wait for.
    """

    closed: ClosedRound
    update: protocol.Update
    verdicts: dict[int, str]
    complete: bool = False
    given_up: list[int] = []


Record: TypeAlias = Begin | Listening | Seated | Started | Vacated | Finished | Closed


def with_left(left: list[str], seat: int, reason: str) -> list[str]:
    """Adds an entry to the list of clients that left; the oldest entries are dropped beyond a limit."""
    return [*left, f"client {seat}: {reason}"][-_LEFT_KEPT:]


@dataclass
class SeatState:
    """A seat's state according to the journal."""

    secret: bytes = field(repr=False)
    first_round: int | None = None  # None: its holder never began
    finished: protocol.Goodbye | None = None
    verdicts: dict[int, str] = field(default_factory=dict)  # only the last ones, by round; texts as in Closed


@dataclass
class Past:
    """The state of a run according to its journal. `whole`: keep all details of every round, for a caller that reads
    them once. A server keeps less of early rounds, so that its memory does not grow with rounds times clients."""

    begin: Begin
    whole: bool = False
    starts: int = 0  # how many servers have started
    address: str = ""
    seats: dict[int, SeatState] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    closed: list[Closed] = field(default_factory=list)
    given_up: set[int] = field(default_factory=set)  # the seats that rounds did not wait for

    def take(self, record: Record) -> None:
        """Replays one record. Raises CheckpointError for a record that cannot follow the ones before it."""
        match record:
            case Listening():
                self.starts += 1
                self.address = record.address
            case Seated():
                self.seats[record.seat] = SeatState(record.secret)
            case Started() if record.seat in self.seats:
                self.seats[record.seat].first_round = record.first_round
                self.given_up.discard(record.seat)
            case Vacated() if record.seat in self.seats:
                del self.seats[record.seat]
                self.left = with_left(self.left, record.seat, record.reason)
            case Finished() if record.seat in self.seats:
                self.seats[record.seat].finished = record.goodbye
            case Closed() if record.closed.round == len(self.closed):
                self._take_closed(record)
            case _:
                raise CheckpointError(
                    f"the journal has a record ({type(record).__name__}) that cannot stand where it does: it was "
                    "changed by something else than this program"
                )

    def _take_closed(self, record: Closed) -> None:
        index = record.closed.round
        for seat, reason in record.verdicts.items():
            holder = self.seats.get(seat)
            if holder is not None and holder.first_round is not None and holder.first_round <= index:
                holder.verdicts[index] = reason
                if len(holder.verdicts) > self.begin.config.staleness + 3:
                    del holder.verdicts[min(holder.verdicts)]
        self.closed.append(record)
        self.given_up = set(record.given_up)
        if not self.whole and (old := index - WHOLE_ROUNDS) >= 0:
            kept = self.closed[old]
            self.closed[old] = msgspec.structs.replace(kept, closed=kept.closed.brief(), verdicts={}, given_up=[])

    def last_round_of(self, block: int) -> int | None:
        """The last round that changed a block."""
        return next((c.closed.round for c in reversed(self.closed) if c.closed.block == block), None)
