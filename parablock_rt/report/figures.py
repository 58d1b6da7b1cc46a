"""The figures of a report, computed from the records of a run: stages, utilisation, stragglers, the forecast.

Pure functions of a `Recorded`. A figure that cannot be computed is None or absent, never zero.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import dropwhile
from statistics import mean, median
from typing import Any

from parablock_rt.report.folder import Recorded, Span, number
from parablock_rt.stages import hidden_share, steps_to_hide

TRAINING = ("compute", "apply", "exposed")
EXCHANGE = ("encode", "copy", "send", "fold", "wait", "receive")
STAGES = (*TRAINING, *EXCHANGE, "upload", "update", "close")
BINS = 300
_FAR_LONGER = 1.5  # above this ratio of a sender's time to the receiver's, the receiver's view of the link is not used
_LATE_TO_END = ("send", "receive")  # a round's line has those of an earlier round; 0 in the first lines means unknown
_LINK_RATE = re.compile(r"link\.[^.]+\.bytes_(in|out)_rate")  # not the rates of lanes, which are contained in it

Interval = tuple[float, float]


def stage_of(span: Span) -> str:
    """The stage that a span belongs to, from the first word of its track, else of its name; "" if neither is a stage.

    On the server a transfer is an "upload" or an "update": a client's sending or receiving, seen from the far end.
    Other work of the server for a round is part of its "close".
    """
    words = (span.track.split(" ")[0].lower(), span.name.split(" ")[0].lower())
    known = (*STAGES, "acknowledged")
    stage = next((word for word in words if word in known), "")
    stage = "send" if stage == "acknowledged" else stage
    if span.process.split(" ")[0] == "server":
        return {"receive": "upload", "send": "update", "compute": "", "encode": "", "apply": ""}.get(stage, stage)
    return stage


def origin_us(run: Recorded) -> float:
    """The start of the report's time axis in microseconds of the run's clock: the first span, else the first sample."""
    if run.spans:
        return min(span.start_us for span in run.spans)
    at_ns = [
        at for samples in run.samples.values() for each in samples if (at := number(each.get("at_ns"))) is not None
    ]
    return min(at_ns, default=0.0) / 1e3


def covered(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, in order and without overlaps."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    return sum(end - start for start, end in covered(intervals))


def rounds(run: Recorded) -> list[dict[str, Any]]:
    """One entry per round, in order: the figures of metrics.jsonl and `stages`, the seconds per stage, as means over
    clients."""
    entries: dict[int, dict[str, Any]] = {}
    for line in run.rounds:
        index = number(line.get("round"))
        if index is not None:
            names = ("block", "loss", "compute_s", "exposed_s", "open_s", "skew_s", "bytes_up", "bytes_down")
            entries[int(index)] = {"round": int(index), **{name: number(line.get(name)) for name in names}}
            recorded = line.get("stages")
            entries[int(index)]["stages"] = {
                stage: seconds
                for stage, value in (recorded.items() if isinstance(recorded, dict) else ())
                if stage in (*TRAINING, *EXCHANGE)
                and (seconds := number(value)) is not None
                and (seconds > 0 or stage not in _LATE_TO_END)
            }
    for index, stages in _stages_of_spans(run.spans).items():
        entry = entries.setdefault(index, {"round": index, "stages": {}})
        right_round = {stage: stages[stage] for stage in _LATE_TO_END if stage in stages}
        entry["stages"] = {**stages, **entry["stages"], **right_round}
    for entry in entries.values():
        for stage, name in (("compute", "compute_s"), ("exposed", "exposed_s")):
            if entry.get(name) is not None:  # better than the spans: a wait may carry the round that it waited for
                entry["stages"][stage] = entry[name]
    return [entries[index] for index in sorted(entries)]


def _stages_of_spans(spans: list[Span]) -> dict[int, dict[str, float]]:
    """Seconds by round and stage: the length of a stage in each process, averaged over processes."""
    found: dict[tuple[int, str], dict[str, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    arrived: dict[int, dict[str, float]] = defaultdict(dict)  # when the last byte of a client's upload arrived
    delivery: dict[int, dict[str, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    closing: dict[int, float] = {}
    for span in spans:
        stage = stage_of(span)
        if not stage or span.round is None or span.kind == "snapshot":  # a snapshot is not part of a round's exchange
            continue
        if stage == "upload":
            arrived[span.round][span.track] = max(arrived[span.round].get(span.track, 0.0), span.end_us)
        elif stage == "update":
            delivery[span.round][span.track].append((span.start_us, span.end_us))
        elif stage == "close":
            closing[span.round] = span.start_us
        else:
            found[span.round, stage][span.process].append((span.start_us, span.end_us))
    stages: dict[int, dict[str, float]] = defaultdict(dict)
    for (index, stage), processes in found.items():
        stages[index][stage] = mean(length(intervals) for intervals in processes.values()) / 1e6
    for index, clients in delivery.items():
        # A client sees the first byte of a body only after a slow link has delivered it: the sender's time is better.
        seconds = mean(length(intervals) for intervals in clients.values()) / 1e6
        stages[index]["receive"] = max(stages[index].get("receive", 0.0), seconds)
    for index, ends in arrived.items():
        if index in closing:  # a client waits from the arrival of its upload until the round closes
            stages[index].setdefault("wait", mean(max(0.0, closing[index] - end) for end in ends.values()) / 1e6)
    return stages


@dataclass(frozen=True)
class Activity:
    """How busy a run was. `series`: by name, the busy share of each bin (0 to 1). `busy`: the mean over all bins.
    `idle_link`: the share of the time in which neither direction of the link was busy, if known."""

    start_us: float
    bin_us: float
    series: dict[str, list[float]]
    busy: dict[str, float]
    idle_link: float | None


def activity(run: Recorded) -> Activity | None:
    """The shares of the time in which clients computed and their links were busy, as means over clients; None without
    spans.

    A link is busy from the first byte of a body until its last byte is acknowledged, in either direction. The sender
    measures this best: the client for uploads, the server for updates. Without the sender's spans, the receiver's are
    used, unless the clients reported a much longer time of sending, as with an artificially slow link.
    """
    views = {"compute": ("compute",), "link up": ("send", "upload"), "link down": ("update", "receive")}
    by_stage: dict[str, dict[str, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    for span in run.spans:
        stage = stage_of(span)
        client = f"client {span.track.split(' ')[-1]}" if stage in ("upload", "update") else span.process
        by_stage[stage][client].append((span.start_us, span.end_us))
    found = {name: next((by_stage[s] for s in stages if s in by_stage), {}) for name, stages in views.items()}
    seen_s = [length(intervals) / 1e6 for intervals in found["link up"].values()]
    if "send" not in by_stage and seen_s and _sent_s(run) > _FAR_LONGER * mean(seen_s):
        found["link up"] = {}
    everything = [interval for processes in found.values() for part in processes.values() for interval in part]
    if not everything:
        return None
    start, end = min(i[0] for i in everything), max(i[1] for i in everything)
    if end <= start:
        return None
    width = (end - start) / BINS
    series = {name: _shares(list(found[name].values()), start, width) for name in views if found[name]}
    busy = {name: sum(values) / BINS for name, values in series.items()}
    up, down = found["link up"], found["link down"]
    idle = None
    if up and down:
        idle = mean(1 - length(up[p] + down.get(p, [])) / (end - start) for p in up)
    return Activity(start, width, series, busy, idle)


def _sent_s(run: Recorded) -> float:
    """Seconds of sending as the clients reported them to the server, mean over clients; 0 without reports."""
    stages = (line["stages"] for line in run.rounds if isinstance(line.get("stages"), dict))
    return sum(number(each.get("send")) or 0.0 for each in stages)


def _shares(processes: list[list[Interval]], start: float, width: float) -> list[float]:
    sums = [0.0] * BINS
    for intervals in processes:
        for begin, end in covered(intervals):
            first = int((begin - start) / width)
            for at in range(first, min(BINS, int((end - start) / width) + 1)):
                low, high = start + at * width, start + (at + 1) * width
                sums[at] += max(0.0, min(end, high) - max(begin, low))
    return [min(1.0, total / width / len(processes)) for total in sums]


def clients(run: Recorded) -> list[dict[str, Any]]:
    """One entry per client, slowest first: mean compute, wait and lateness (seconds per round), and rounds delivered.

    Lateness: the time from the round's first upload to the client's own.
    """
    parts: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in run.rounds:
        listed = line.get("parts")
        for part in listed if isinstance(listed, list) else []:
            if isinstance(part, dict) and isinstance(seat := part.get("client"), int):
                parts[seat].append(part)
    table = []
    for seat, delivered in parts.items():
        entry: dict[str, Any] = {"client": seat, "rounds": len(delivered)}
        for name in ("compute_s", "exposed_s", "late_s"):
            values = [value for part in delivered if (value := number(part.get(name))) is not None]
            entry[name] = mean(values) if values else None
        table.append(entry)
    return sorted(table, key=lambda entry: (-(entry["late_s"] or 0.0), entry["client"]))


@dataclass(frozen=True)
class Forecast:
    """The times that decide how many steps hide a run's exchanges, in seconds per round or step.

    `measured`: `exchange_s` comes from a run without overlap; otherwise it is estimated. `send_s`, `receive_s`: how
    long an exchange occupies each direction of the link.
    """

    exchange_s: float
    send_s: float
    receive_s: float
    step_s: float
    steps: int
    measured: bool

    def steps_to_hide(self, staleness: int) -> int:
        """The fewest local steps that hide an exchange at this staleness (0 counts as 1)."""
        return steps_to_hide(self.exchange_s, self.send_s, self.receive_s, self.step_s, max(1, staleness))


def forecast(run: Recorded) -> Forecast | None:
    """The forecast from the run's step time and the time of one exchange; None if either is unknown."""
    entries = [entry for entry in rounds(run) if entry["stages"].get("compute")]
    steps, count = number(run.summary.get("local_steps")), number(run.summary.get("rounds"))
    if not entries or not steps or steps < 1:
        return None
    step_s = median(entry["stages"]["compute"] for entry in entries) / steps
    serial = number(run.summary.get("serial_comm_s"))
    send_s, fold_s, receive_s = (_per_round(run, entries, stage) for stage in ("send", "fold", "receive"))
    if serial and count and number(run.summary.get("rounds_trained")) in (None, count):
        exchange_s, measured = serial / count, True
    elif send_s and receive_s:
        # Not added: encoding, which overlaps sending, and the wait for other clients, which is not a transfer.
        exchange_s, measured = send_s + fold_s + receive_s, False
    else:
        return None
    if exchange_s <= 0 or step_s <= 0:
        return None
    if not (send_s and receive_s):  # a lower bound: one direction takes at least half of the exchange
        send_s = receive_s = exchange_s / 2
    return Forecast(exchange_s, send_s, receive_s, step_s, int(steps), measured)


def _per_round(run: Recorded, entries: list[dict[str, Any]], stage: str) -> float:
    """Seconds of a stage per round; 0 if unknown.

    Means, because an acknowledgement that comes a little late puts the times of two rounds into one line, and none into
    another. The lines before the first that has any do not count, unless the summary has the sum over the whole run.
    """
    # A client receives the aggregates of all rounds, but trains and sends only in those of its cohort.
    totals, of_rounds = run.summary.get("stages"), "rounds" if stage == "receive" else "rounds_trained"
    count = number(run.summary.get(of_rounds))
    total = number(totals.get(stage)) if isinstance(totals, dict) else None
    of_lines = list(dropwhile(lambda seconds: not seconds, (entry["stages"].get(stage, 0.0) for entry in entries)))
    seen_s = mean(of_lines) if of_lines else 0.0
    if not total or not count:
        return seen_s
    # Who sends has a better view of a slow link than who receives, see `_stages_of_spans`.
    return max(total / count, seen_s) if stage == "receive" else total / count


@dataclass(frozen=True)
class Hidden:
    """The hidden share of the exchanges; negative if training waited longer than all transfers take.

    `measured`: compared with a run without overlap; otherwise with the durations of this run's own transfers.
    """

    share: float
    measured: bool


def hidden(run: Recorded) -> Hidden | None:
    """The summary's overlap efficiency, else an estimate; None if neither is possible.

    There is no estimate for a resumed run, nor after a reconnect: training also waited while there was no connection.
    """
    efficiency = number(run.summary.get("overlap_efficiency"))
    if efficiency is not None:
        return Hidden(efficiency, True)
    exposed, ahead = number(run.summary.get("exposed_comm_s")), forecast(run)
    interrupted = number(run.summary.get("resumed_from")) is not None or number(run.summary.get("reconnects"))
    rounds = number(run.summary.get("rounds")) or len(run.rounds)
    if exposed is None or ahead is None or not rounds or interrupted:
        return None
    trained = number(run.summary.get("rounds_trained")) or rounds
    share = hidden_share(exposed, ahead.exchange_s * trained + ahead.receive_s * (rounds - trained))
    return None if share is None else Hidden(share, False)


def telemetry(run: Recorded) -> list[dict[str, Any]]:
    """GPU utilisation (%) and link rates (MB/s) from telemetry.jsonl, as series of (seconds, value).

    Seconds since the start of the timeline, by the shared clock; `t_s` starts at another moment in each process.
    """
    begin_ns = origin_us(run) * 1e3
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for process, samples in run.samples.items():
        for sample in samples:
            at_ns = number(sample.get("at_ns"))
            if at_ns is None:
                continue
            at = (at_ns - begin_ns) / 1e9
            rates: dict[str, float] = defaultdict(float)
            for name, raw in sample.items():
                value = number(raw)
                if value is None:
                    continue
                if name.startswith("gpu.") and name.endswith(".utilization"):
                    series[f"{process}: GPU {name.split('.')[1]}", "%", "gpu"].append((at, 100 * value))
                elif _LINK_RATE.fullmatch(name):
                    rates["out" if name.endswith("out_rate") else "in"] += value / 1e6
            for direction, rate in rates.items():
                series[f"{process}: {direction}", "MB/s", "link"].append((at, rate))
    return [
        {"name": name, "unit": unit, "kind": kind, "points": points} for (name, unit, kind), points in series.items()
    ]
