"""A GPU's stream that waits until all of its work is queued, so that what is timed on it is the work and no launch.

On a stream that is idle the first event is passed at once, and from then on the stream waits for the host between one
piece of work and the next: short work would be timed at what its launches take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LEAST_CYCLES = 2_000_000  # a millisecond or so
MOST_CYCLES = 256_000_000


class Ahead:
    """Keeps one stream busy until the host has queued what comes next."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._cycles = LEAST_CYCLES

    def queue(self, work: Callable[[], object], begin: torch.cuda.Event) -> bool:
        """Queues `work`, which records `begin` first, behind a sleep of the stream; whether all was queued in time.

        If not, it is done again behind a longer sleep, twice as long each time. Not for work that the host waits for,
        nor for more than a stream takes (some thousand launches): neither ever is in time.
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
