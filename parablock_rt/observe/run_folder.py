"""The run folder, `runs/NAME/`: the files that a run leaves, all in strict JSON, and the lock by which it owns them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from parablock_rt import _C
from parablock_rt.errors import ConfigError
from parablock_rt.observe import trace
from parablock_rt.observe.timeline import Timeline

_DEEPEST = 64  # levels


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as strict JSON, which has neither NaN nor infinity: a number that is not finite becomes null, and so
    does what is nested more than 64 levels deep, which only damaged files have.

    `content` may consist of JSON's types, tuples and msgspec structs.
    """
    return json.dumps(_finite(content, _DEEPEST), indent=indent, allow_nan=False)


def _finite(content: Any, levels: int) -> Any:
    if isinstance(content, msgspec.Struct):
        return _finite(msgspec.structs.asdict(content), levels)
    if isinstance(content, dict):
        return {key: _finite(value, levels - 1) for key, value in content.items()} if levels else None
    if isinstance(content, (list, tuple)):
        return [_finite(value, levels - 1) for value in content] if levels else None
    return None if isinstance(content, float) and not math.isfinite(content) else content


_LOCK = ".lock"
_ANOTHER = "choose another folder (--run-dir, or the argument of pb.record)"


@contextlib.contextmanager
def held(path: Path, made: Iterable[Path] = ()) -> Iterator[None]:
    """Makes the folder and locks it until the context ends, so that no second run can replace or mix up its files.

    Leaves the folder's contents unchanged. Folders that were made, here or by the caller (`made`, the innermost first),
    are removed at the end if the folder is still empty. Raises ConfigError when another run holds the folder, in this
    process or another, or when it cannot be written.
    """
    made = [*made, *(folder for folder in (path, *path.parents) if not folder.exists())]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _C.Descriptor(os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise not_writable(path, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is using the run folder {path}; end it first, or {_ANOTHER}") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with contextlib.suppress(OSError):  # another process has removed it
            if made and [entry.name for entry in path.iterdir()] == [_LOCK]:
                (path / _LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        lock.close()


def not_writable(path: Path, error: OSError) -> ConfigError:
    """What to raise when the run folder cannot be written."""
    return ConfigError(f"the run folder {path} cannot be written ({error.strerror}); {_ANOTHER}")


_LEFT_BY_A_RUN = ("summary.json", "telemetry.jsonl", "trace.json", "report.html")


class RunFolder:
    """The folder of one run. Every file is either replaced as a whole or appended to line by line."""

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        """Creates the folder and removes the files of an earlier run, whose summary a reader could take for this run's.

        With `resumed`, the earlier files belong to this run and stay; only metrics.jsonl is emptied, as the server
        writes its rounds again from its saved state. Raises ConfigError when the folder cannot be written.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").write_text("")
            for name in () if resumed else _LEFT_BY_A_RUN:
                (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise not_writable(path, error) from error

    def write_json(self, name: str, content: Any) -> None:
        """Writes `name` in one step, so that a reader never sees half a file."""
        temporary = self.path / f".{name}.part"
        temporary.write_text(to_json(content, indent=2) + "\n")
        temporary.replace(self.path / name)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        self.append("metrics.jsonl", record)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Appends a line to the file `name`."""
        with (self.path / name).open("a") as file:
            file.write(to_json(record) + "\n")

    def write_trace(self, timeline: Timeline, samples: Iterable[trace.CounterSample] = ()) -> None:
        """Writes trace.json; see `trace.write`."""
        temporary = self.path / ".trace.json.part"
        trace.write(temporary, timeline, samples)
        temporary.replace(self.path / "trace.json")
