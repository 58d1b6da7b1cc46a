"""What a benchmark asks its own process about, what it hears from its others, and the units it speaks in."""

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
    """VmRSS (now) or VmHWM (peak so far) of this process."""
    found = re.search(rf"^{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system time of all threads of this process, or of its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def answer(pipe: Connection, seconds: float) -> Any:
    """What the process at the other end says next. Raises ParaBlockError when that takes longer, or it has ended.

    The latter is seen at once if nobody else has the other end open: whoever starts a process closes its own copy.
    """
    if not pipe.poll(seconds):
        raise ParaBlockError(f"the server's process said nothing for {seconds:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise ParaBlockError("the server's process has ended; its error stands above") from None
