"""Reads a run's folder: everything readable, and `notes` on what is missing, damaged or not understood.

Files may be missing, incomplete or from another release; nothing here raises because of that. figures.py does the
arithmetic.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parablock_rt.errors import ConfigError
from parablock_rt.summary import SUMMARY_VERSION

MAX_SPANS = 300_000
"""The most spans of one run in a report; browsers do not cope with more."""

_LARGEST = 1e18  # larger than any count of bytes and any time in the units of these files
_SMALLEST = 1e-60  # smaller than any loss, as fp32 has it, and large enough to divide by
_CLIENT_FOLDER = re.compile(r"client-\d+")
_ROUND = re.compile(r"\bround (\d{1,18})\b")


@dataclass(frozen=True)
class Span:
    """A stretch of time on a track of a process, in microseconds of the clock that the run's processes share.

    `kind` of the transfer: upload, update or snapshot; "" if the span is not a transfer or the file does not say.
    """

    process: str
    track: str
    name: str
    start_us: float
    dur_us: float
    round: int | None
    kind: str = ""

    @property
    def end_us(self) -> float:
        """The end of the span, in microseconds."""
        return self.start_us + self.dur_us


@dataclass
class Recorded:
    """The contents of one run's folder. `rounds`: the lines of metrics.jsonl; `samples`: the lines of telemetry.jsonl
    by process."""

    name: str
    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def number(value: object) -> float | None:
    """`value` if it is a plausible number, else None: damaged files may have null, NaN, text or worse."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if value == 0 or _SMALLEST <= abs(value) <= _LARGEST else None


def load(path: Path) -> list[Recorded]:
    """The runs of a folder: one, or the runs in its subfolders (a demo has two).

    Raises ConfigError when there is no such folder or it has no files of a run.
    """
    if not path.is_dir():
        raise ConfigError(
            f"expected the folder of a run, found {'a file' if path.exists() else 'nothing'} at {path}; give the "
            "folder that `parablock serve`, `join` or `demo` wrote"
        )
    inner = sorted(p for p in path.iterdir() if p.is_dir() and not _CLIENT_FOLDER.fullmatch(p.name) and _is_run(p))
    if inner:
        return [_load_run(p, p.name) for p in sorted(inner, key=_began)]
    if not _is_run(path):
        raise ConfigError(
            f"expected summary.json, metrics.jsonl or trace.json in {path}, found none of them; give the folder that "
            "`parablock serve`, `join` or `demo` wrote"
        )
    return [_load_run(path, path.resolve().name)]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("summary.json", "metrics.jsonl", "trace.json"))


def _began(path: Path) -> tuple[float, str]:
    """A sort key: when the run ended, then its name."""
    times = [(path / name).stat().st_mtime for name in ("summary.json", "metrics.jsonl") if (path / name).exists()]
    return (times[0] if times else math.inf, path.name)


def _load_run(path: Path, name: str) -> Recorded:
    run = Recorded(name, path)
    run.summary = _read_summary(path, run.notes)
    run.rounds = _read_lines(path / "metrics.jsonl", run.notes)
    clients = sorted(p for p in path.iterdir() if p.is_dir() and _CLIENT_FOLDER.fullmatch(p.name))
    boot = ""  # the boot id of the first trace, which names its clock
    for part in (path, *clients):
        label = "" if part is path else f"{part.name}/"
        spans, its_boot = _read_trace(part / "trace.json", label, run.notes)
        boot = boot or its_boot
        if its_boot not in ("", boot):
            run.notes.append(
                f"{label}trace.json was recorded on another machine or boot, whose clock does not compare; its spans "
                f"and {label}telemetry.jsonl are left out."
            )
            continue
        run.spans += spans
        for sample in _read_lines(part / "telemetry.jsonl", run.notes, label=label, optional=True):
            process = sample.get("process")
            run.samples.setdefault(process if isinstance(process, str) else part.name, []).append(sample)
    if len(run.spans) > MAX_SPANS:
        longest = sorted(run.spans, key=lambda span: -span.dur_us)[:MAX_SPANS]
        run.notes.append(f"The timeline shows the longest {MAX_SPANS:,} of {len(run.spans):,} spans.")
        run.spans = longest
    run.spans.sort(key=lambda span: span.start_us)
    return run


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    summary = _read_json(path / "summary.json", "", notes)
    if summary is None:
        return {}
    if not isinstance(summary, dict):
        notes.append("summary.json does not hold a JSON object; its figures are left out.")
        return {}
    version = summary.get("version")
    if version is None:
        notes.append("summary.json has no version: an older release wrote it, and some figures may be missing.")
    elif version != SUMMARY_VERSION:
        notes.append(
            f"summary.json has version {version!r}, this release reads version {SUMMARY_VERSION}: figures with the "
            "same names are shown, the rest is left out."
        )
    resumed = number(summary.get("resumed_from"))
    if resumed is not None:
        notes.append(
            f"The run was resumed: the server was started again and closed the rounds from {int(resumed) + 1} on. The "
            "times of clients include the time without a server, the wall time does not; trace.json starts with the "
            "new server."
        )
    if summary.get("complete") is False:
        notes.append("The run did not end as planned: summary.json says that it is not complete.")
    return summary


def _read_json(path: Path, label: str, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_bytes(), parse_constant=lambda constant: None)
    except FileNotFoundError:
        notes.append(f"{label}{path.name} is missing.")
    except OSError as error:
        notes.append(f"{label}{path.name} cannot be read: {error.strerror}.")
    except (ValueError, RecursionError) as error:
        notes.append(f"{label}{path.name} is damaged and left out ({error}).")
    return None


def _read_lines(path: Path, notes: list[str], *, label: str = "", optional: bool = False) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a note counts the lines that are not objects."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        if not (optional and isinstance(error, FileNotFoundError)):
            missing = isinstance(error, FileNotFoundError)
            notes.append(f"{label}{path.name} " + ("is missing." if missing else f"cannot be read: {error.strerror}."))
        return []
    found, bad = [], []
    for at, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line, parse_constant=lambda constant: None)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            bad.append(at)
    if bad:
        which = f"line {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        notes.append(f"{label}{path.name}: {len(bad)} of {len(lines)} lines are damaged and left out ({which}).")
    return found


def _read_trace(path: Path, label: str, notes: list[str]) -> tuple[list[Span], str]:
    """The spans of a trace, and the boot id of its clock; "" if the file does not say."""
    trace = _read_json(path, label, notes)
    if trace is None:
        return [], ""
    about = trace.get("otherData") if isinstance(trace, dict) else None
    about = about if isinstance(about, dict) else {}
    lost = number(about.get("lost_records"))
    if lost:
        notes.append(
            f"{label}{path.name} lacks {int(lost):,} records that its process could not keep: its timeline has gaps, "
            "and shares of time are too small."
        )
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, list):
        notes.append(f"{label}{path.name} has no list of events; the timeline is left out.")
        return [], ""
    processes: dict[object, str] = {}
    tracks: dict[tuple[object, object], str] = {}
    spans, bad = [], 0
    for event in events:
        if not isinstance(event, dict):
            bad += 1
        elif event.get("ph") == "M":
            name = _text(event.get("args"), "name")
            if event.get("name") == "process_name":
                processes[str(event.get("pid"))] = name
            elif event.get("name") == "thread_name":
                tracks[str(event.get("pid")), str(event.get("tid"))] = name
        elif event.get("ph") == "X":
            start, dur = number(event.get("ts")), number(event.get("dur"))
            if start is None or dur is None or dur < 0:
                bad += 1
                continue
            pid, tid = str(event.get("pid")), str(event.get("tid"))
            name = _text(event, "name")
            process = processes.get(pid, f"process {pid}")
            track, kind = tracks.get((pid, tid), tid), _text(event.get("args"), "kind")
            spans.append(Span(process, track, name, start, dur, _round_of(event, name), "" if kind == "?" else kind))
    if bad:
        notes.append(f"{label}{path.name}: {bad:,} events are damaged and left out.")
    boot = about.get("boot")
    return spans, boot if isinstance(boot, str) else ""


def _text(holder: object, key: str) -> str:
    value = holder.get(key) if isinstance(holder, dict) else None
    return value if isinstance(value, str) else "?"


def _round_of(event: dict[str, Any], name: str) -> int | None:
    args = event.get("args")
    value = args.get("round") if isinstance(args, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = _ROUND.search(name)
    return int(found.group(1)) if found else None
