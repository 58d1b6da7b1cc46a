"""Writes a timeline as a Chrome trace, the JSON that https://ui.perfetto.dev and chrome://tracing open.

Tracks: one each for the Python thread, the encode thread and the copies from a GPU. The transport thread has one for
its checksums, and per lane of each link one for sending and one for receiving. Flows tie the slices of a chunk
together, by an id that is the same in every process: encode (or copy from a GPU) → send → receive → fold or apply.
Counters show bytes in flight, encoded chunks that wait to be sent, link rates, and the metrics of the telemetry.

All figures are computed for whole arrays of records; each event is one formatting of a template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parablock_rt import _C
from parablock_rt.observe.timeline import RECORD, Records, Stage, Timeline
from parablock_rt.version import __version__
from parablock_rt.wire.protocol import Kind

FLOW = "parablock.flow"
"""The category of the events that tie slices together."""

_PID = 1  # one process per file; trace_merge.py assigns new numbers
_LINES_AT_ONCE = 10_000
_OUT, _IN, _THREAD = 0, 1, 2
_TEXTS = {Kind.UPLOAD: "upload", Kind.UPDATE: "update", Kind.SNAPSHOT: "snapshot", 0: "round"}
_NAMES = np.array([_TEXTS.get(kind, "transfer") for kind in range(256)])  # by kind
_READY = (Stage.ENCODE, Stage.COPY)  # after which a chunk can be sent; on a GPU, one record covers packing and copying
_LINK_STAGES = {Stage.SEND: _OUT, Stage.ACKNOWLEDGED: _OUT, Stage.RECEIVE: _IN, Stage.VERIFY: _IN}


@dataclass(frozen=True)
class CounterSample:
    """The telemetry at one moment: values by metric."""

    at_ns: int
    values: Mapping[str, float]


def write(path: Path, timeline: Timeline, samples: Iterable[CounterSample] = ()) -> int:
    """Writes the trace of one process and returns the number of its events. `samples` become counters.

    Raises OSError when the file cannot be written.
    """
    view = _View(timeline)
    count = 0
    with path.open("w") as file:
        about = json.dumps(_about(timeline))
        file.write(f'{{"displayTimeUnit":"ms","otherData":{about},"traceEvents":[\n')
        events = chain(view.names(), view.slices(), view.instants(), view.flows(), view.counters(), _measured(samples))
        while lines := list(islice(events, _LINES_AT_ONCE)):
            file.write(",\n" if count else "")
            file.write(",\n".join(lines))
            count += len(lines)
        file.write("\n]}\n")
    return count


def _about(timeline: Timeline) -> dict[str, Any]:
    """Facts about the trace for readers and for `trace_merge`."""
    return {
        "process": timeline.process,
        "release": __version__,
        "clock": "CLOCK_MONOTONIC",
        "boot": boot_id(),
        "run": f"{timeline.run:016x}",
        "lost_records": timeline.lost,
    }


def boot_id() -> str:
    """The kernel's id of this boot, "" if unknown. Monotonic clocks with the same id are comparable."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class _View:
    """The records of all threads of a timeline as one array, and the track of each record."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        threads = timeline.threads()
        self._threads = [name for name, _ in threads]
        self._records: Records = np.concatenate([records for _, records in threads]) if threads else np.empty(0, RECORD)
        thread = np.repeat(np.arange(len(threads)), [len(records) for _, records in threads])
        side = np.full(len(self._records), _THREAD)
        for stage, link_side in _LINK_STAGES.items():
            side[self._records["stage"] == stage] = link_side
        on_link = side != _THREAD
        peer = np.where(on_link, self._records["peer"], 0).astype(np.int64)
        lane = np.where(on_link, self._records["lane"], 0).astype(np.int64)
        self._codes, track = np.unique(((thread * 2**32 + peer) * 2**8 + lane) * 4 + side, return_inverse=True)
        self._track: NDArray[np.int64] = track.astype(np.int64) + 1
        self._seat = self._seats()

    def _seats(self) -> NDArray[np.int64]:
        """The client whose transfer each record belongs to; -1 if it belongs to no client or to all."""
        peers, inverse = np.unique(self._records["peer"], return_inverse=True)
        if self._timeline.seat is not None:
            return np.full(len(self._records), self._timeline.seat, np.int64)
        seats = [self._timeline.seats.get(int(peer), -1) for peer in peers]
        return np.array(seats, np.int64)[inverse] if seats else np.empty(0, np.int64)

    def _peer_name(self, peer: int) -> str:
        if self._timeline.seat is not None:
            return "server"
        return f"client {self._timeline.seats[peer]}" if peer in self._timeline.seats else f"link {peer}"

    def _where(self, *stages: Stage) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self._records["stage"], stages))

    def _peers(self, *stages: Stage) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """The records of these stages as (name, places) per peer; a peer may have had several links."""
        places = self._where(*stages)
        links, inverse = np.unique(self._records["peer"][places], return_inverse=True)
        names = np.array([self._peer_name(int(link)) for link in links])
        for name in dict.fromkeys(names.tolist()):
            yield name, places[(names == name)[inverse]]

    # ---- Names, slices, instants

    def names(self) -> Iterator[str]:
        """Metadata: the process and its tracks."""
        yield _metadata("process_name", 0, name=self._timeline.process)
        for tid, code in enumerate(self._codes.tolist(), start=1):
            side, lane, peer, thread = code % 4, code // 4 % 2**8, code // 2**10 % 2**32, code // 2**42
            name = self._threads[thread] + (f" lane {lane}" if lane else "")
            if side != _THREAD:
                name += f": {'to' if side == _OUT else 'from'} {self._peer_name(peer)}"
            yield _metadata("thread_name", tid, name=name)
            yield _metadata("thread_sort_index", tid, sort_index=tid)

    def slices(self) -> Iterator[str]:
        """A complete event for each record with a duration."""
        for stage in Stage:
            if stage == Stage.ACKNOWLEDGED:
                continue
            for whole in (True, False):
                places = self._where(stage)
                places = places[(self._records["chunk"][places] == _C.WHOLE_TRANSFER) == whole]
                yield from self._stage_slices(stage, places, whole)

    def _stage_slices(self, stage: Stage, places: NDArray[np.int64], whole: bool) -> Iterator[str]:
        name = stage.name.lower()
        template = (
            f'{{"ph":"X","name":"{name} round %d","cat":"{name}","pid":{_PID},"tid":%d,"ts":%d.%03d,"dur":%d.%03d,'
            '"args":{"kind":"%s","round":%d,"block":%d,"bytes":%d' + ("}}" if whole else ',"chunk":%d}}')
        )
        at = self._records[places]
        columns = [at["round"], self._track[places], *_micros(at["start_ns"])]
        columns += [*_micros(at["end_ns"] - at["start_ns"]), _NAMES[at["kind"]]]
        columns += [at["round"], at["block"], at["bytes"]]
        if not whole:
            columns.append(at["chunk"])
        return (template % row for row in zip(*(column.tolist() for column in columns), strict=True))

    def instants(self) -> Iterator[str]:
        """Acknowledgements."""
        template = (
            f'{{"ph":"i","s":"t","name":"acknowledged round %d","cat":"acknowledged","pid":{_PID},"tid":%d,'
            '"ts":%d.%03d,"args":{"round":%d,"block":%d,"bytes":%d,"chunks":%d}}'
        )
        places = self._where(Stage.ACKNOWLEDGED)
        at = self._records[places]
        columns = [at["round"], self._track[places], *_micros(at["start_ns"])]
        columns += [at["round"], at["block"], at["bytes"], at["chunk"]]
        return (template % row for row in zip(*(column.tolist() for column in columns), strict=True))

    # ---- Flows

    def flows(self) -> Iterator[str]:
        """Ties the slices of each chunk together if at least two of them are in this process."""
        stops: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        for stage, other, of_chunk in (
            (Stage.SEND, _READY, True),
            (Stage.RECEIVE, (Stage.FOLD, Stage.APPLY), False),
        ):
            places, partners = self._pairs(stage, other, of_chunk)
            ids = self._flow_ids(places)
            stops += [(ids, places), (ids, partners)]
        ids = np.concatenate([ids for ids, _ in stops])
        places = np.concatenate([places for _, places in stops])
        at = self._records[places]
        # A chunk may start to arrive before the sender's call returns, but its arrival never ends before the sender's
        # slice starts; so the end of a receive keeps the flow in order.
        at_ns = np.where(at["stage"] == Stage.RECEIVE, at["end_ns"] - 1, at["start_ns"])
        order = np.lexsort((at_ns, ids))
        ids, places, at_ns = ids[order], places[order], at_ns[order]
        first = np.ones(len(ids), bool)
        first[1:] = ids[1:] != ids[:-1]
        last = np.roll(first, -1)
        phases = np.where(first, "s", np.where(last, "f", "t"))
        template = f'{{"ph":"%s","name":"%s","cat":"{FLOW}","id":"%016x","bp":"e","pid":{_PID},"tid":%d,"ts":%d.%03d}}'
        columns = [phases, _NAMES[self._records["kind"][places]], ids, self._track[places], *_micros(at_ns)]
        return (template % row for row in zip(*(column.tolist() for column in columns), strict=True))

    def _pairs(
        self, stage: Stage, other: tuple[Stage, ...], of_chunk: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The records of `stage` that have a partner in one of the stages `other`, and the partners.

        Encoding happens per chunk, once for all clients, so with `of_chunk` partners match by chunk and not by client.
        Folding and applying happen per client, for all chunks at once, so otherwise partners match by client.
        """
        places, others = self._where(stage), self._where(*other)
        keys, other_keys = (
            _mix(
                self._records["kind"][p],
                self._records["round"][p],
                self._records["block"][p],
                self._records["chunk"][p] if of_chunk else self._seat[p],
            )
            for p in (places, others)
        )
        order = np.argsort(other_keys, kind="stable")
        if not len(order):
            return places[:0], others
        at = np.minimum(np.searchsorted(other_keys[order], keys, side="right") - 1, len(order) - 1)
        partners = others[order[at]]
        fits = (other_keys[order[at]] == keys) & (at >= 0)
        return places[fits], partners[fits]

    def _flow_ids(self, places: NDArray[np.int64]) -> NDArray[np.uint64]:
        at = self._records[places]
        run = np.full(len(places), self._timeline.run, np.uint64)
        return _mix(run, at["kind"], self._seat[places], at["round"], at["block"], at["chunk"])

    def _once(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The records without repeated sends: a chunk is sent again on a link if it arrives damaged."""
        sent = places[self._records["stage"][places] == Stage.SEND]
        _, first = np.unique(_mix(self._flow_ids(sent), self._records["peer"][sent]), return_index=True)
        return np.concatenate([sent[first], places[self._records["stage"][places] != Stage.SEND]])

    # ---- Counters

    def counters(self) -> Iterator[str]:
        """Counters computed from the records: bytes in flight, chunks that wait, and the rate of every link."""
        for name, places in self._peers(Stage.SEND, Stage.ACKNOWLEDGED):
            at = self._records[self._once(places)]
            moved = np.where(at["stage"] == Stage.SEND, 1, -1) * at["bytes"].astype(np.int64)
            yield from _steps(f"bytes in flight to {name}", at["end_ns"], moved)
        sent, encoded = self._pairs(Stage.SEND, _READY, True)
        if len(sent):
            at_ns = np.concatenate([self._records["end_ns"][encoded], self._records["end_ns"][sent]])
            yield from _steps("chunks encoded, not sent", at_ns, np.repeat([1, -1], len(sent)))
        for stage, direction in ((Stage.SEND, "to"), (Stage.RECEIVE, "from")):
            for name, places in self._peers(stage):
                at = self._records[places]
                rate = at["bytes"] * 8e3 / np.maximum(at["end_ns"] - at["start_ns"], 1)
                at_ns = np.concatenate([at["start_ns"], at["end_ns"]])
                yield from _steps(f"Mbit/s {direction} {name}", at_ns, np.concatenate([rate, -rate]), digits=3)


def _measured(samples: Iterable[CounterSample]) -> Iterator[str]:
    for sample in samples:
        for name, value in sample.values.items():
            yield _counter(name, sample.at_ns, value)


def _steps(name: str, at_ns: NDArray[Any], changes: NDArray[Any], digits: int = 0) -> Iterator[str]:
    """A counter that changes by `changes` at `at_ns`; one event per moment."""
    order = np.argsort(at_ns, kind="stable")
    at_ns, level = at_ns[order], np.cumsum(changes[order])
    last = np.append(at_ns[1:] != at_ns[:-1], True)
    label = json.dumps(name)
    template = f'{{"ph":"C","name":{label},"pid":{_PID},"tid":0,"ts":%d.%03d,"args":{{"value":%.{digits}f}}}}'
    # Adding and subtracting the same rates leaves rounding errors where the counter should be 0.
    values = np.round(np.maximum(level[last], 0), digits)
    columns = [*_micros(at_ns[last]), values]
    return (template % row for row in zip(*(column.tolist() for column in columns), strict=True))


def _counter(name: str, at_ns: int, value: float) -> str:
    event = {"ph": "C", "name": name, "pid": _PID, "tid": 0, "ts": at_ns / 1e3, "args": {"value": value}}
    return json.dumps(event)


def _metadata(kind: str, tid: int, **args: Any) -> str:
    return json.dumps({"ph": "M", "name": kind, "pid": _PID, "tid": tid, "args": args})


def _micros(ns: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Whole microseconds and the remaining nanoseconds; a float would lose digits."""
    return ns // 1000, ns % 1000


def _mix(*columns: NDArray[Any]) -> NDArray[np.uint64]:
    """A hash of each row (splitmix64), the same in every process."""
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
