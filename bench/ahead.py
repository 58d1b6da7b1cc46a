"""Holds up a GPU stream until all of its work is queued, so that timing on it covers the work and not the launches.

An idle stream passes the first event at once and then waits for the host between one piece of work and the next: the
time of short work would be the time of its launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LEAST_CYCLES = 2_000_000  # a millisecond or so
MOST_CYCLES = 256_000_000
LATE = "more launches than the device can queue: times may include some of them"  # what to note if `queue` is False


class Ahead:
    """Keeps one stream busy until the host has queued the next work."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._cycles = LEAST_CYCLES

    def queue(self, work: Callable[[], object], begin: torch.cuda.Event) -> bool:
        """Queues `work`, which records `begin` first, behind a sleep of the stream. True if all was queued in time.

        If not, tries again behind a sleep of twice the length, up to a limit. Useless for work that the host waits for
        and for more launches than a stream can queue (about a thousand): both always return False.
        """
        while True:
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(self._cycles)
            work()
            if not begin.query():
                return True
            if self._cycles >= MOST_CYCLES:
                return False
            self._cycles *= 2
