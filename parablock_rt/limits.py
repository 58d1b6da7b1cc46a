"""What of this machine this process may use: cores and memory, by its affinity and by the control groups it is in.

A container sees all cores and all memory of the machine that it shares; what it may take of them is in the cgroup files
of the kernel (version 2, or 1), of its own group or of one around it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cores() -> float:
    """Cores that this process may keep busy; not always a whole number."""
    quotas = []
    for limit, period in _read("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if limit > 0 and period > 0:
            quotas.append(limit / period)
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def memory_bytes() -> int:
    """Bytes of memory that this process may use, beside others as far as they are in its groups."""
    limits = [int(limit) for limit, _ in _read("memory", "memory.max", "memory.limit_in_bytes") if limit > 0]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _read(controller: str, file: str, old_file: str, old_second: str = "") -> Iterator[tuple[float, float]]:
    """The limits of all groups around this process: the one or two numbers of `file`, or of the two old files."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for group in _around(_GROUPS, path):
                first, _, second = _text(group / file).partition(" ")
                yield _number(first), _number(second)
        elif controller in controllers.split(","):
            for group in _around(_GROUPS / controller, path):
                yield _number(_text(group / old_file)), _number(_text(group / old_second)) if old_second else 0.0


def _around(root: Path, path: str) -> Iterator[Path]:
    """The group and those around it. Within a container the path may be one of the machine, which is not there: then
    the container's own group is the root."""
    group = root / path.strip("/")
    yield group
    while group != root:
        group = group.parent
        yield group


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> float:
    """0 for what is none: there is no limit."""
    return float(text) if text.isdecimal() else 0.0
