"""What a process may use of a machine that it shares: by affinity, and by control groups of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parablock_rt import doctor, limits
from parablock_rt.staging import pinned

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of groups; a process on 64 cores of a machine with a petabyte."""
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "sysconf", lambda _: 2**25)
    return tmp_path / "cgroup"


def write(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(text + "\n")


def test_a_process_in_no_group_has_its_affinity_and_the_machine(groups: Path) -> None:
    assert (limits.cores(), limits.memory_bytes()) == (64.0, 2**50)
    groups.with_name("own").write_text("0::/\n")
    assert (limits.cores(), limits.memory_bytes()) == (64.0, 2**50)


def test_the_tightest_of_the_groups_around_a_process_counts(groups: Path) -> None:
    groups.with_name("own").write_text("0::/pod/box\n")
    write(groups / "pod" / "box", cpu__max="250000 100000", memory__max="max")
    write(groups / "pod", cpu__max="max 100000", memory__max=str(8 * GIB))
    write(groups, memory__max=str(16 * GIB))
    assert (limits.cores(), limits.memory_bytes()) == (2.5, 8 * GIB)
    assert doctor.examine()["cpu"]["found"] == "2.5 cores"
    assert pinned.default_cap() == 4 * GIB


def test_groups_of_version_1_count_also_where_the_path_is_that_of_the_machine_around(groups: Path) -> None:
    groups.with_name("own").write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:cpuset:/docker/abc\n")
    write(groups / "cpu", cpu__cfs_quota_us="150000", cpu__cfs_period_us="50000")
    write(groups / "memory", memory__limit_in_bytes=str(2 * GIB))
    assert (limits.cores(), limits.memory_bytes()) == (3.0, 2 * GIB)
    write(groups / "cpu", cpu__cfs_quota_us="-1")
    assert limits.cores() == 64.0


def test_fewer_cores_by_affinity_than_by_quota_are_what_there_is(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups.with_name("own").write_text("0::/\n")
    write(groups, cpu__max="400000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert limits.cores() == 1.0
