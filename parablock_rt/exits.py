"""Closes objects with native threads that are still open when the program ends; leaves them alone in a forked process.

A thread that returns from native code after the interpreter has ended aborts the process. An object with such a thread
therefore registers here, as a safety net for programs that do not close it. A forked process has copies of these
objects but not of their threads: closing or destroying a copy would wait for the threads for ever.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import Protocol


class Closable(Protocol):
    """An object with a native thread, or a Python thread that calls native code."""

    def close_at_exit(self) -> None:
        """Ends the thread. Must return soon, whatever happens."""


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_inherited: weakref.WeakSet[Closable] = weakref.WeakSet()  # copies from the parent of a forked process


def register(closable: Closable) -> None:
    """Closes `closable` at the end of the program, if it still exists then. Any thread."""
    _open.add(closable)


def is_inherited(closable: Closable) -> bool:
    """Whether `closable` is a copy from the parent of this forked process; closing it must then do nothing."""
    return closable in _inherited


def _inherit() -> None:
    for closable in _open:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(closable))  # so that it is never destroyed
        _inherited.add(closable)
    _open.clear()


os.register_at_fork(after_in_child=_inherit)


@atexit.register
def _close_all() -> None:
    for closable in list(_open):
        closable.close_at_exit()
