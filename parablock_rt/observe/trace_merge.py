"""Merges traces into one: those of all processes of a run, of several runs, and profiles of `torch.profiler`.

All traces of one boot of one machine share the monotonic clock, so their times stay as they are. A profile has another
clock; marks from the runtime (profiling.py) give its reading at known times of the monotonic clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from parablock_rt.errors import TraceError
from parablock_rt.observe.profiling import CLOCK_MARK
from parablock_rt.observe.trace import FLOW

Trace = dict[str, Any]

_Time = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)] | float  # larger ones may not fit a float
_MARK = re.compile(re.escape(CLOCK_MARK) + "([0-9]{1,19})")


class _Event(msgspec.Struct):
    """What merging needs of an event. A profile may have a process with a name for a number."""

    ph: str
    name: str = ""
    cat: str = ""
    pid: int | str = 0
    id: int | str | msgspec.UnsetType = msgspec.UNSET
    ts: _Time | msgspec.UnsetType = msgspec.UNSET
    args: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.cat == FLOW and msgspec.UNSET in (self.id, self.ts):
            raise ValueError("Expected `id` and `ts` in a flow")
        if self.ph == "M" and self.name == "process_name" and not isinstance(self.args.get("name"), str):
            raise ValueError("Expected the text `args.name` of a process")


class _About(msgspec.Struct):
    clock: str = ""
    boot: str = ""


class _Trace(msgspec.Struct, rename="camel"):
    trace_events: list[_Event]
    other_data: _About = msgspec.field(default_factory=_About)


def read(path: Path) -> Trace:
    """Reads a trace or a profile, with its times on the monotonic clock.

    Raises TraceError when the file is damaged, not a Chrome trace, or a profile without clock marks.
    """
    try:
        found: Trace = json.loads(path.read_text())
        about = msgspec.convert(found, _Trace).other_data
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise TraceError(
            f"expected a Chrome trace in {path}, found a damaged one or none ({error}); give a trace.json of a run or "
            "a profile of torch.profiler"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TraceError(
            f"expected JSON in {path}, found none ({error}); check whether its run or profile was cut short"
        ) from error
    return found if about.clock == "CLOCK_MONOTONIC" else _on_our_clock(path, found)


def merge(traces: Iterable[tuple[str, Trace]]) -> Trace:
    """Merges named traces that `read` returned; a name that is not empty is put in front of the names of its processes.

    Raises TraceError when the traces come from different machines or boots.
    """
    merged: list[dict[str, Any]] = []
    boots: dict[str, str] = {}
    pids: dict[tuple[int, Any], int] = {}
    for number, (name, trace) in enumerate(traces):
        boot = trace.get("otherData", {}).get("boot")
        if boot:
            boots.setdefault(boot, name or f"trace {number}")
        for event in trace["traceEvents"]:
            pid = pids.setdefault((number, event.get("pid", 0)), len(pids) + 1)
            moved = event | {"pid": pid}
            if name and event["ph"] == "M" and event.get("name") == "process_name":
                moved["args"] = {"name": f"{name}: {event['args']['name']}"}
            if "id" in event and event.get("cat") != FLOW:
                moved["id"] = f"{number}:{event['id']}"  # ids are unique only within a file
            merged.append(moved)
    if len(boots) > 1:
        raise TraceError(
            f"expected traces of one machine, found different machines or boots ({', '.join(boots.values())}), whose "
            "clocks do not compare; merge only the traces of one machine"
        )
    _join_flows(merged)
    return {"displayTimeUnit": "ms", "otherData": {"clock": "CLOCK_MONOTONIC"}, "traceEvents": merged}


def _join_flows(events: list[dict[str, Any]]) -> None:
    """Joins the parts of a flow that passes through several files, each with its own start and end, into one flow."""
    flows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == FLOW:
            flows.setdefault(event["id"], []).append(event)
    for stops in flows.values():
        stops.sort(key=lambda event: float(event["ts"]))
        for stop in stops:
            stop["ph"] = "t"
        stops[0]["ph"], stops[-1]["ph"] = "s", "f"


def _on_our_clock(path: Path, profile: Trace) -> Trace:
    marks = [
        (float(event["ts"]), int(mark[1]) / 1e3)
        for event in profile["traceEvents"]
        if event["ph"] == "X" and "ts" in event and (mark := _MARK.fullmatch(event.get("name", "")))
    ]
    if not marks:
        raise TraceError(
            f"expected clock marks of the runtime in {path}, found none; record the profile with torch.profiler around "
            "run.step or run.train_step on the training thread, with ProfilerActivity.CPU, over at least one round's "
            "end"
        )
    # The clock is read a moment before the event of the mark starts: the closest pair has the smallest error.
    offset = min(theirs - ours for theirs, ours in marks)
    events = [
        event | {"ts": float(event["ts"]) - offset} if "ts" in event else event for event in profile["traceEvents"]
    ]
    return {"otherData": {"clock": "CLOCK_MONOTONIC"}, "traceEvents": events}
