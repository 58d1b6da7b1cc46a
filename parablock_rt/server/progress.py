"""How far a run is and how long that has taken: the oldest open round, its deadline, how long nobody has been there.

Reads the clock and says what is due; does nothing about it, and knows no client. The server's thread alone uses it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from parablock_rt.config import RunConfig

_NOBODY_LEFT_S = 30.0
_PAUSED_S = 5.0  # a turn of the loop that took longer than this was a stopped process or a sleeping machine


class Deadline:
    """How long the oldest open round may stay open: a fixed time, or one that follows the rounds seen so far.

    Adaptive: ten times the longest of the last rounds in which nobody was missing, at least 30 s; ten minutes before
    there is one. A round that ran to its deadline says nothing about how long one takes, and would make the next
    deadline ten times as long.
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
        """Notes how long a round stayed the oldest open one that closed because everyone had delivered."""
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
        """How long a round that cannot be closed without clients whose connections broke waits for them to come back:
        the fixed time, or at least five minutes."""
        return self._fixed if self._fixed is not None else max(self._RETURN_S, self.seconds)


class Progress:
    """One run in time. `oldest`: the oldest open round, which is the number of those that are closed; `oldest_since`:
    when it became that (monotonic seconds); `started_at`: when the first round began, None before."""

    def __init__(self, config: RunConfig) -> None:
        self.oldest = 0
        self.oldest_since = time.monotonic()
        self.started_at: float | None = None
        self.deadline = Deadline(config.deadline)
        self._rounds = config.rounds
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
    def open_s(self) -> float:
        """Seconds since the oldest open round became that; before the start: since the server is there."""
        return time.monotonic() - self.oldest_since

    @property
    def overdue(self) -> bool:
        """Whether the oldest open round has passed its deadline."""
        return self.open_s >= self.deadline.seconds

    def start(self) -> None:
        """The first round begins."""
        self.started_at = self.oldest_since = time.monotonic()

    def restore(self, closed: int, open_s: Iterable[float], *, started: bool) -> None:
        """Goes on where an earlier server ended, which had closed so many rounds. `open_s`: how long those of them were
        open that were complete."""
        self.oldest = closed
        for seconds in open_s:
            self.deadline.saw(seconds)
        if started:
            self.start()

    def close_oldest(self, open_s: float, *, complete: bool) -> None:
        """The oldest open round was closed after so many seconds; the next one is the oldest. `complete`: everyone who
        was waited for had delivered in time."""
        if complete:
            self.deadline.saw(open_s)
        self.oldest += 1
        self.oldest_since = time.monotonic()

    def turn(self, longest: float) -> None:
        """Another turn of the server's loop begins, `longest` seconds after the last one if nothing held it up.

        What clients said while this process was stopped is still to be read: that time does not count against them.
        """
        last, self._turn_at = self._turn_at, time.monotonic()
        if self._turn_at - last > min(_PAUSED_S, max(self.deadline.seconds / 2, 10 * longest)):
            # A round that became the oldest during that turn loses only what came after that.
            self.oldest_since += self._turn_at - max(last, self.oldest_since)
            if self._deserted_since is not None:
                self._deserted_since += self._turn_at - max(last, self._deserted_since)

    def deserted(self, *, anybody: bool, may_return: bool) -> bool:
        """Whether nobody has been there for so long that it makes no sense to wait. `anybody`: somebody is there now;
        `may_return`: seats are kept for clients whose connections broke."""
        if anybody or self.all_closed:
            self._deserted_since = None
            return False
        now = time.monotonic()
        self._deserted_since = self._deserted_since or now
        limit = self.deadline.without_quorum if may_return else min(_NOBODY_LEFT_S, self.deadline.seconds)
        return now - self._deserted_since > limit
