"""The observers of a running server, and the status that they are sent: figures of the last rounds and of the clients,
at a bounded cost.

Notes durations as they become known, and computes a status only when an observer asks. Decides nothing about the run
and touches no socket. Only the server's thread may call this module.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from statistics import mean

import msgspec

from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError
from parablock_rt.server.members import Member
from parablock_rt.server.outcome import Outcome
from parablock_rt.stages import waited_for_others
from parablock_rt.wire.protocol import ClientStatus, Status

LAST_ROUNDS = 8
MOST_CLIENTS = 64
"""The most clients that a status lists, slowest first. `Status.present` counts all of them."""

MOST_OBSERVERS = 8
YOUNG_S = 0.1
"""A status younger than this is sent again unchanged, so that frequent requests cost nothing."""


class Watch:
    """The observers, the durations of the last transfers, and the statuses made of them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        most = LAST_ROUNDS * min(config.cohort_size, 1024)
        self._uploads: deque[float] = deque(maxlen=most)
        self._updates: deque[float] = deque(maxlen=most)
        self._status: tuple[float, Status] | None = None
        self._observers: dict[int, bytes] = {}  # the server's proof for each observer, by link

    def serves(self, link: int) -> bool:
        """Whether an observer is at the other end of the link."""
        return link in self._observers

    def admit(self, link: int, mac: bytes) -> None:
        """Takes in an observer that has proved itself. Raises HandshakeError when there are too many."""
        if len(self._observers) >= MOST_OBSERVERS:
            raise HandshakeError(f"{MOST_OBSERVERS} observers are watching already; try again when one has gone")
        self._observers[link] = mac

    def disconnected(self, link: int) -> None:
        """Forgets the observer whose link has ended; does nothing for other links."""
        self._observers.pop(link, None)

    def signed(self, link: int, status: Status) -> Status:
        """The status with the proof that it is this server's."""
        return msgspec.structs.replace(status, mac=self._observers[link])

    def uploaded(self, first_byte_ns: int, last_byte_ns: int) -> None:
        """Notes the duration of a complete upload."""
        self._uploads.append((last_byte_ns - first_byte_ns) / 1e9)

    def updated(self, first_byte_ns: int, acknowledged_ns: int) -> None:
        """Notes the duration of an update that a client has acknowledged."""
        self._updates.append((acknowledged_ns - first_byte_ns) / 1e9)

    def status(
        self, members: Iterable[Member], outcome: Outcome, started_at: float | None, oldest_since: float
    ) -> Status:
        """The run's current status. `started_at`: when the first round began, None before; `oldest_since`: when the
        oldest open round became the oldest (both in monotonic seconds)."""
        now = time.monotonic()
        if self._status is None or now - self._status[0] > YOUNG_S:
            wall_s = None if started_at is None else now - started_at
            self._status = now, self._look(members, outcome, wall_s=wall_s, open_s=now - oldest_since)
        return self._status[1]

    def _look(self, members: Iterable[Member], outcome: Outcome, *, wall_s: float | None, open_s: float) -> Status:
        last = outcome.rounds[-LAST_ROUNDS:]
        waiting = [r for r in last if r.round > self._config.staleness]  # earlier rounds never wait for an aggregate
        clients = sorted((self._client(member, outcome) for member in members), key=lambda c: (-c.late_s, c.client))
        return Status(
            round=len(outcome.rounds),
            rounds=self._config.rounds,
            staleness=self._config.staleness,
            local_steps=self._config.local_steps,
            format=self._config.format,
            wall_s=wall_s,
            open_s=open_s,
            round_s=mean(r.open_s for r in last) if last else None,
            loss=last[-1].loss if last else None,
            compute_s=mean(r.compute_s for r in last) if last else None,
            exposed_s=mean(r.exposed_s for r in waiting) if waiting else None,
            others_s=mean(waited_for_others(r.exposed_s, r.stages.wait) for r in waiting) if waiting else None,
            exchange_s=mean(self._uploads) + mean(self._updates) if self._uploads and self._updates else None,
            bytes_up=last[-1].bytes_up if last else 0,
            bytes_down=last[-1].bytes_down if last else 0,
            seats=self._config.clients,
            present=len(clients),
            left=len(outcome.left),
            clients=clients[:MOST_CLIENTS],
        )

    def _client(self, member: Member, outcome: Outcome) -> ClientStatus:
        """The member's figures from the last round to which it delivered, and what it is doing now."""
        oldest = len(outcome.rounds)
        parts = (
            part for r in reversed(outcome.rounds[-LAST_ROUNDS:]) for part in r.parts if part.client == member.seat
        )
        part = next(parts, None)
        if not member.begun:
            state = "joining"
        elif oldest in member.announced:
            state = "uploading"
        else:
            state = "training" if oldest in member.posted or member.next_post <= oldest else "delivered"
        return ClientStatus(
            client=member.seat,
            state=state,
            behind=max(0, oldest - 1 - member.applied) if member.begun else 0,
            compute_s=part.compute_s if part else 0.0,
            exposed_s=part.exposed_s if part else 0.0,
            late_s=part.late_s if part else 0.0,
        )
