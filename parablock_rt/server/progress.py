"""How far a run is, and its timing: the oldest open round, its deadline, and how long no client has been connected.

Reads the clock and says what is due, but does not act on it, and knows no clients. Only the server's thread may call
this module.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from parablock_rt.config import RunConfig

_NOBODY_LEFT_S = 30.0
_PAUSED_S = 5.0  # a longer turn of the loop means that the process was stopped or the machine slept


class Deadline:
    """How long the oldest open round may stay open: a fixed time, or one that adapts to the rounds seen so far.

    The adaptive deadline is ten times the longest of the last complete rounds, at least 30 s; before the first complete
    round it is ten minutes. A round that ran to its deadline does not count: it says nothing about how long a round
    takes, and would make the next deadline ten times as long.
    """

    _FIRST_S = 600.0
    _LEAST_S = 30.0
    _RETURN_S = 300.0
    _FACTOR = 10.0
    _REMEMBERED = 8

    def __init__(self, fixed: float | None) -> None:
        self._fixed = fixed
        self._seen: list[float] = []

    def saw(self, seconds: float) -> None:
        """Notes how long a complete round (every client that it waited for had delivered) was the oldest open one."""
        self._seen = [*self._seen[-self._REMEMBERED + 1 :], seconds]

    @property
    def seconds(self) -> float:
        """The limit for the round that is open now."""
        if self._fixed is not None:
            return self._fixed
        if not self._seen:
            return self._FIRST_S
        return max(self._LEAST_S, self._FACTOR * max(self._seen))

    @property
    def without_quorum(self) -> float:
        """How long a round without a quorum waits for clients whose connections broke: the fixed time, or at least
        five minutes."""
        return self._fixed if self._fixed is not None else max(self._RETURN_S, self.seconds)


class Progress:
    """The timing of one run, in monotonic seconds. `oldest`: the oldest open round, which equals the number of closed
    rounds; `opened_at`: when it became the oldest; `oldest_since`: the same, later by the time for which this process
    was stopped; `started_at`: when the first round began, None before."""

    def __init__(self, config: RunConfig) -> None:
        self.oldest = 0
        self.opened_at = self.oldest_since = time.monotonic()
        self.started_at: float | None = None
        self.deadline = Deadline(config.deadline)
        self._rounds = config.rounds
        self._staleness = config.staleness
        self._turn_at = time.monotonic()
        self._deserted_since: float | None = None

    @property
    def started(self) -> bool:
        """Whether the clients have begun."""
        return self.started_at is not None

    @property
    def all_closed(self) -> bool:
        """Whether the last round is closed."""
        return self.oldest == self._rounds

    @property
    def newest(self) -> int:
        """The last round that a client may train now, if it has the aggregates of all closed rounds."""
        return min(self.oldest + self._staleness, self._rounds - 1)

    @property
    def open_s(self) -> float:
        """Seconds since the oldest open round became the oldest; before the start: since the server was created."""
        return time.monotonic() - self.oldest_since

    @property
    def overdue(self) -> bool:
        """Whether the oldest open round has passed its deadline."""
        return self.open_s >= self.deadline.seconds

    def start(self) -> None:
        """Notes that the first round begins."""
        self.started_at = self.opened_at = self.oldest_since = time.monotonic()

    def restore(self, closed: int, open_s: Iterable[float], *, started: bool) -> None:
        """Continues after an earlier server that had closed `closed` rounds. `open_s`: how long each of its complete
        rounds was open."""
        self.oldest = closed
        for seconds in open_s:
            self.deadline.saw(seconds)
        if started:
            self.start()

    def close_oldest(self, open_s: float, *, complete: bool) -> None:
        """Notes that the oldest open round was closed after `open_s` seconds; the next round becomes the oldest.
        `complete`: every client that the round waited for delivered in time."""
        if complete:
            self.deadline.saw(open_s)
        self.oldest += 1
        self.opened_at = self.oldest_since = time.monotonic()

    def turn(self, longest: float) -> None:
        """Notes that another turn of the server's loop begins, normally at most `longest` seconds after the last one.

        A much longer turn means that this process was stopped. Messages that came meanwhile are still unread, so that
        time does not count against the clients.
        """
        last, self._turn_at = self._turn_at, time.monotonic()
        if self._turn_at - last > min(_PAUSED_S, max(self.deadline.seconds / 2, 10 * longest)):
            # For a round that became the oldest during that turn, only the time since then is discounted.
            self.oldest_since += self._turn_at - max(last, self.oldest_since)
            if self._deserted_since is not None:
                self._deserted_since += self._turn_at - max(last, self._deserted_since)

    def deserted(self, *, anybody: bool, may_return: bool) -> bool:
        """Whether no client has been connected for so long that waiting is pointless. `anybody`: a client is connected
        now; `may_return`: seats are kept for clients whose connections broke."""
        if anybody or self.all_closed:
            self._deserted_since = None
            return False
        now = time.monotonic()
        self._deserted_since = self._deserted_since or now
        limit = self.deadline.without_quorum if may_return else min(_NOBODY_LEFT_S, self.deadline.seconds)
        return now - self._deserted_since > limit
