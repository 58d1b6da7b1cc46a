"""What a benchmark asks its own process about, and the units it speaks in."""

from __future__ import annotations

import re
import resource
from pathlib import Path

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
