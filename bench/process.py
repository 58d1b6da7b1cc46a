"""Memory and CPU time of a benchmark's own process, answers of its child processes, and units."""

from __future__ import annotations

import re
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from parablock_rt.errors import ParaBlockError

MIB = 2**20
GIB = 2**30
DEADLINE_S = 120.0


def memory_bytes(field_name: str) -> int:
    """VmRSS (current) or VmHWM (peak so far) of this process."""
    found = re.search(rf"^{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system time of all threads of this process, or of its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def answer(pipe: Connection, seconds: float) -> Any:
    """The next message from the process at the other end. Raises ParaBlockError after `seconds`, or if that process has
    ended.

    The end of the process shows at once if no other process has the other end open, so close your own copy of that end
    after starting the process.
    """
    if not pipe.poll(seconds):
        raise ParaBlockError(f"the server's process sent nothing for {seconds:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise ParaBlockError("the server's process has ended; see its error above") from None
