"""The results of a run as the server knows them, by round and by client. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from parablock_rt.stages import NO_TIME, StageSeconds
from parablock_rt.wire import protocol

WHOLE_ROUNDS = 16  # the last so many rounds, of which all details are kept


@dataclass(frozen=True)
class Part:
    """What one client delivered to a round. `late_s`: seconds after the round's first upload."""

    client: int
    compute_s: float
    exposed_s: float
    late_s: float


@dataclass(frozen=True)
class ClosedRound:
    """What is known of a round once it is closed. Times are in seconds, means over the clients that delivered.

    `stages`: time per stage on the clients, for everything that ended between this hand-over and the previous one.
    `server_stages`: the same on the server, between this close and the previous one.
    """

    round: int
    block: int
    loss: float
    contributions: int
    weight: float
    bad_groups: int
    compute_s: float
    exposed_s: float
    open_s: float
    skew_s: float  # between the first and the last upload
    bytes_up: int
    bytes_down: int
    fingerprint: int
    parts: tuple[Part, ...] = ()
    stages: StageSeconds = NO_TIME
    server_stages: StageSeconds = NO_TIME
    snapshot_bytes: int = 0  # the part of `bytes_down` that was whole blocks, for clients that lacked them

    def brief(self) -> ClosedRound:
        """A copy without the stages and without the parts, which grow with the number of clients."""
        return replace(self, parts=(), stages=NO_TIME, server_stages=NO_TIME)


@dataclass
class Outcome:
    """The result of a run, even if the run was cut short.

    `rounds` has all closed rounds, the earlier ones without parts and stages. In a resumed run, `resumed_from` is the
    first round that this server closed; `wall_s` and `server_stages` then include the rounds that earlier servers
    closed, but not the time without a server.
    """

    rounds: list[ClosedRound] = field(default_factory=list)
    resumed_from: int | None = None
    wall_s: float = 0.0
    digest: str = ""
    client_digests: dict[int, str] = field(default_factory=dict)
    goodbyes: dict[int, protocol.Goodbye] = field(default_factory=dict)
    server_stages: StageSeconds = NO_TIME
    left: list[str] = field(default_factory=list)  # the clients that left before the end, and why
    reconnects: int = 0  # connections that broke and were replaced
    unfinished: list[int] = field(default_factory=list)  # seats without a goodbye when the server stopped waiting

    def add(self, closed: Iterable[ClosedRound]) -> None:
        """Adds closed rounds. Keeps fewer details of earlier ones, so that memory does not grow with rounds times
        clients."""
        for each in closed:
            self.rounds.append(each)
            if (old := len(self.rounds) - WHOLE_ROUNDS - 1) >= 0:
                self.rounds[old] = self.rounds[old].brief()
