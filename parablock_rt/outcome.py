"""What a run has come to, as the server knows it: round by round, client by client. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from parablock_rt import protocol


@dataclass(frozen=True)
class ClosedRound:
    """What is known of a round once it is closed. Times in seconds, means over the clients that were folded."""

    round: int
    block: int
    loss: float
    contributions: int
    weight: float
    bad_groups: int
    compute_s: float
    exposed_s: float
    open_s: float
    skew_s: float  # between the first and the last upload that was folded
    bytes_up: int
    bytes_down: int
    fingerprint: int


@dataclass
class Outcome:
    """The result of a run, also of one that was cut short."""

    rounds: list[ClosedRound] = field(default_factory=list)
    wall_s: float = 0.0
    digest: str = ""
    client_digests: dict[int, str] = field(default_factory=dict)
    goodbyes: dict[int, protocol.Goodbye] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)  # who went before the end, and why
    unfinished: list[int] = field(default_factory=list)  # who was still on the way when the server stopped waiting
