"""What is still open when the program ends is closed before the interpreter goes; in a process that was forked from it,
it is left alone.

A thread that waits in native code and comes back when there is no interpreter any more aborts the process. Whoever has
such a thread registers here; everybody should close what they open all the same. A forked process has a copy of
everything but the threads: to close or destroy it there would wait for them for ever.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something with a thread that calls native code, or one of native code."""

    def close_at_exit(self) -> None:
        """Ends the thread, and returns soon in any case."""


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_inherited: weakref.WeakSet[Closable] = weakref.WeakSet()  # from the process that this one was forked from


def register(closable: Closable) -> None:
    """Has it closed at the program's end, if it is there still. Any thread."""
    _open.add(closable)


def is_inherited(closable: Closable) -> bool:
    """Whether it belongs to the process that this one was forked from, so that closing it here must do nothing."""
    return closable in _inherited


def _inherit() -> None:
    for closable in _open:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(closable))  # never destroyed
        _inherited.add(closable)
    _open.clear()


os.register_at_fork(after_in_child=_inherit)


@atexit.register
def _close_all() -> None:
    for closable in list(_open):
        closable.close_at_exit()
