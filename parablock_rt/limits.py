"""How many cores and how much memory this process may use, by its affinity and its control groups.

A container sees all cores and all memory of its machine. Its limits are in the kernel's cgroup files (version 1 or 2),
of its own group or of an enclosing group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cores() -> float:
    """How many cores this process may keep busy; may be a fraction."""
    quotas = []
    for limit, period in _read("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if limit > 0 and period > 0:
            quotas.append(limit / period)
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def memory_bytes() -> int:
    """Bytes of memory that this process may use; it shares them with other processes in its control groups."""
    limits = [int(limit) for limit, _ in _read("memory", "memory.max", "memory.limit_in_bytes") if limit > 0]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _read(controller: str, file: str, old_file: str, old_second: str = "") -> Iterator[tuple[float, float]]:
    """The limits of this process's control group and of all enclosing groups, as pairs of numbers.

    Version 2 has both numbers in `file`; version 1 has them in `old_file` and `old_second` (if given). 0: no limit.
    """
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
    """The group and all enclosing groups, up to the root.

    In a container, `path` may be the machine's path, which does not exist there; the root is then the container's own
    group.
    """
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
    """The number in `text`; 0, which stands for no limit, if it is not a number."""
    return float(text) if text.isdecimal() else 0.0
