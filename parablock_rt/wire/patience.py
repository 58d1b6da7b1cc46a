"""When a wait has taken too long: measured by what moves, so that a slow link is not taken for a stuck one.

Knows neither links nor clocks; what has moved and what time it is are passed in.
"""

from __future__ import annotations


class Patience:
    """The limit of one wait: that long a time in which next to nothing moves.

    It ends all the same: as long as bytes that somebody waits for move at that speed at least.
    """

    def __init__(self, seconds: float, least: int, now: float, moved: int) -> None:
        """`least`: the bytes that must move in `seconds`. `now`: of any one clock. `moved`: bytes so far."""
        self.seconds = seconds
        self._least = least
        self._since = now
        self._moved = moved

    def over(self, now: float, moved: int) -> bool:
        """Whether the time is up. `moved` counts from zero again on every connection."""
        if now - self._since < self.seconds:
            return False
        before = self._moved if moved >= self._moved else 0
        enough = moved - before >= self._least
        self._since, self._moved = now, moved
        return not enough

    def left(self, now: float) -> float:
        """Seconds until `over` should be asked again."""
        return self.seconds - (now - self._since)
