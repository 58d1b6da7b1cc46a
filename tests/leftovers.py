"""What a process holds, for tests that nothing is left behind: threads, descriptors, memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path

WAIT_S = 90.0


def threads(name: str) -> set[str]:
    """The native threads of this process whose names begin so."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ends meanwhile
            if (task / "comm").read_text().startswith(name):
                found.add(task.name)
    return found


def settles(done: Callable[[], bool]) -> bool:
    """Whether `done` comes true in time. Who has joined a thread may still find it listed: the kernel follows later."""
    deadline = time.monotonic() + WAIT_S
    while not done():
        gc.collect()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def least_growth(measure: Callable[[], int], work: Callable[[], None], windows: int = 3) -> int:
    """By how much `measure` grew in that one of several stretches of `work` in which it grew least.

    What leaks grows in each. Memory that is resident for the first time, because more threads than before happened to
    allocate at once, does not.
    """
    grown = []
    for _ in range(windows):
        before = measure()
        work()
        grown.append(measure() - before)
    return min(grown)
