"""What a run has come to, as the server knows it: round by round, client by client. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from parablock_rt.stages import NO_TIME, StageSeconds
from parablock_rt.wire import protocol

WHOLE_ROUNDS = 16  # the last ones, of which everything is kept


@dataclass(frozen=True)
class Part:
    """What one client delivered to a round. `late_s`: seconds after the round's first upload."""

    client: int
    compute_s: float
    exposed_s: float
    late_s: float


@dataclass(frozen=True)
class ClosedRound:
    """What is known of a round once it is closed. Times in seconds, means over the clients that delivered.

    `stages`: what ended on the clients between this hand-over and the one before. `server_stages`: what ended on the
    server between this close and the one before.
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
    snapshot_bytes: int = 0  # of `bytes_down`: whole blocks, for clients that came late or had another model

    def brief(self) -> ClosedRound:
        """Without what grows with the number of clients, and without the stages."""
        return replace(self, parts=(), stages=NO_TIME, server_stages=NO_TIME)


@dataclass
class Outcome:
    """The result of a run, also of one that was cut short.

    `rounds` has all of them, the earlier ones without parts and stages. In a run that was resumed, `resumed_from` is
    the first one that this server closed; `wall_s` and `server_stages` then contain the rounds that earlier servers
    closed, but not the time without a server.
    """

    rounds: list[ClosedRound] = field(default_factory=list)
    resumed_from: int | None = None
    wall_s: float = 0.0
    digest: str = ""
    client_digests: dict[int, str] = field(default_factory=dict)
    goodbyes: dict[int, protocol.Goodbye] = field(default_factory=dict)
    server_stages: StageSeconds = NO_TIME
    left: list[str] = field(default_factory=list)  # who went before the end, and why
    reconnects: int = 0  # connections that broke and were replaced
    unfinished: list[int] = field(default_factory=list)  # who was still on the way when the server stopped waiting

    def add(self, closed: Iterable[ClosedRound]) -> None:
        """Some more rounds are closed. Memory does not grow with rounds times clients: of earlier ones less is kept."""
        for each in closed:
            self.rounds.append(each)
            if (old := len(self.rounds) - WHOLE_ROUNDS - 1) >= 0:
                self.rounds[old] = self.rounds[old].brief()
