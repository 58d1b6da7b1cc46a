"""What the Chrome trace event format asks of a file, checked as a viewer would trip over it.

Complete events: no negative duration, and on one track one lies in the other or beside it. Flows: one start, then
steps, one end, in the order of time, each inside a slice of its track. Names: every process and track that is used has
one. Counters: numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

Event = dict[str, Any]
_EPSILON_US = 1e-3  # a nanosecond: times are written with three digits, and added as floats
_KEYS = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur"},
    "M": {"name", "pid", "tid", "args"},
    "C": {"name", "pid", "ts", "args"},
    "i": {"name", "pid", "tid", "ts", "s"},
    **{phase: {"name", "cat", "id", "pid", "tid", "ts"} for phase in "stf"},
}


def check(trace: dict[str, Any]) -> None:
    """Fails with the first event that breaks a rule."""
    tracks: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    flows: dict[str, list[Event]] = defaultdict(list)
    names: set[tuple[Any, Any]] = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in _KEYS, event
        assert event.keys() >= _KEYS[event["ph"]], event
        assert math.isfinite(event.get("ts", 0.0)), event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            assert event["args"]["name"]
            names.add((event["pid"], event["tid"] if event["name"] == "thread_name" else None))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in event["args"].values()), event
        elif event["ph"] in "stf":
            flows[event["id"]].append(event)
    for track, slices in tracks.items():
        assert track in names
        assert (track[0], None) in names
        _check_nesting(slices)
    for stops in flows.values():
        _check_flow(stops, tracks)


def _check_nesting(slices: list[Event]) -> None:
    open_until: list[float] = []
    for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= event["ts"] + _EPSILON_US:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + _EPSILON_US, ("reaches beyond what it lies in", event)
        open_until.append(end)


def _check_flow(stops: list[Event], tracks: dict[tuple[Any, Any], list[Event]]) -> None:
    stops = sorted(stops, key=lambda e: (e["ts"], "stf".index(e["ph"])))
    assert [e["ph"] for e in stops] == ["s", *"t" * (len(stops) - 2), "f"], stops
    for stop in stops:
        around = [e for e in tracks[stop["pid"], stop["tid"]] if e["ts"] <= stop["ts"] < e["ts"] + e["dur"]]
        assert around, ("binds to nothing", stop)


def flows(trace: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The stages that each flow passes, in order, by (name, id); of slices in each other the innermost counts."""
    tracks: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    found: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] in "stf":
            found[event["name"], event["id"]].append(event)

    def stage(stop: Event) -> str:
        around = [e for e in tracks[stop["pid"], stop["tid"]] if e["ts"] <= stop["ts"] < e["ts"] + e["dur"]]
        return str(max(around, key=lambda e: (e["ts"], -e["dur"]))["cat"])

    return {key: [stage(stop) for stop in sorted(stops, key=lambda e: e["ts"])] for key, stops in found.items()}
