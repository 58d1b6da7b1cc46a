"""What is still open when the program ends is closed before the interpreter goes.

A thread that waits in native code and comes back when there is no interpreter any more aborts the process. Whoever has
such a thread registers here; everybody should close what they open all the same.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something with a thread that calls native code."""

    def close_at_exit(self) -> None:
        """Ends the thread, and returns soon in any case."""


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def register(closable: Closable) -> None:
    """Has it closed at the program's end, if it is there still. Any thread."""
    _open.add(closable)


@atexit.register
def _close_all() -> None:
    for closable in list(_open):
        closable.close_at_exit()
