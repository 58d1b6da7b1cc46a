"""A log that strangers can write lines to, but cannot flood."""

from __future__ import annotations

import logging
import time


class ThrottledLog:
    """Logs at most one warning per `every_s` seconds; the next warning says how many were left out."""

    def __init__(self, log: logging.Logger, every_s: float) -> None:
        self._log = log
        self._every_s = every_s
        self._last = -every_s
        self._left_out = 0

    def warn(self, text: str) -> None:
        """Logs the text, or counts it."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            self._left_out += 1
            return
        self._log.warning("%s%s", text, f" (and {self._left_out} more like it)" if self._left_out else "")
        self._last, self._left_out = now, 0
