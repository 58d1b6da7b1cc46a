"""Decides when a wait has taken too long, by the bytes that move, so that a slow link is not mistaken for a stuck one.

Knows neither links nor clocks; the caller passes in the byte count and the time.
"""

from __future__ import annotations


class Patience:
    """The time limit of one wait: it is over after `seconds` in which next to nothing moved.

    The wait is extended for another `seconds` as long as at least `least` bytes moved in the last `seconds`.
    """

    def __init__(self, seconds: float, least: int, now: float, moved: int) -> None:
        """`least`: the bytes that must move within `seconds`. `now`: seconds of any clock, always the same one.
        `moved`: the bytes that have moved so far."""
        self.seconds = seconds
        self._least = least
        self._since = now
        self._moved = moved

    def over(self, now: float, moved: int) -> bool:
        """Whether the wait is over. `moved` starts again from zero on every connection."""
        if now - self._since < self.seconds:
            return False
        before = self._moved if moved >= self._moved else 0
        enough = moved - before >= self._least
        self._since, self._moved = now, moved
        return not enough

    def left(self, now: float) -> float:
        """Seconds until `over` should be asked again."""
        return self.seconds - (now - self._since)
