"""Samples the machine during a run, on a thread of its own.

The thread asks the meters and hands their metrics, and the record of each round, to the reporters. A meter or reporter
that fails is dropped with one warning; a run never fails because of its telemetry. Rates and times use the monotonic
clock; the wall clock is only a label.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from parablock_rt.errors import ConfigError
from parablock_rt.observe import trace
from parablock_rt.observe.meters import Meter, Metrics

log = logging.getLogger("parablock")

PERIOD_S = 0.5
KEPT_SAMPLES = 20_000
_CLOSE_S = 10.0


@dataclass(frozen=True)
class Sample:
    """The metrics at one moment. `t_s`: seconds since `Telemetry.start`. `at_ns`: monotonic clock. `wall`: the system
    time, for people."""

    t_s: float
    at_ns: int
    wall: float
    metrics: Metrics


class Reporter(Protocol):
    """Receives samples and rounds. Only the telemetry thread calls it."""

    def sample(self, process: str, sample: Sample) -> None:
        """Takes a sample."""
        ...

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of a round that has ended; `round.round` is its index."""
        ...

    def close(self) -> None:
        """Called once, after the last sample and round."""
        ...


class Telemetry:
    """Owns the reporters, and the telemetry thread from `start` to `close`. Use it as a context manager."""

    def __init__(self, reporters: Sequence[Reporter], period: float) -> None:
        """`period`: seconds between samples; 0 takes no samples and reports only rounds.

        Raises ConfigError for a negative or infinite period.
        """
        if not (period >= 0 and math.isfinite(period)):
            raise ConfigError(f"expected the seconds between two samples to be 0 (no samples) or more, found {period}")
        self._process = ""
        self._meters: list[Meter] = []
        self._reporters = list(reporters)
        self._period = period
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._rounds: queue.SimpleQueue[Metrics | None] = queue.SimpleQueue()
        self._began_ns = 0
        self._thread = threading.Thread(target=self._run, name="pb-telemetry", daemon=True)

    def add(self, reporter: Reporter) -> None:
        """One more reporter, before `start`."""
        self._reporters.append(reporter)

    def start(self, process: str, meters: Sequence[Meter]) -> None:
        """Starts the thread; call it once. `process`: the name of this process in the trace."""
        self._process = process
        self._meters = list(meters) if self._period > 0 else []
        self._began_ns = time.monotonic_ns()
        self._thread.start()

    def round(self, record: Mapping[str, Any]) -> None:
        """Queues a round's record for the reporters. Any thread; never waits."""
        self._rounds.put(_numbers("round", record))

    def close(self) -> None:
        """Takes a last sample, lets the reporters finish and ends the thread. Idempotent."""
        if self._thread.ident is None:
            self._close_reporters()
            return
        self._rounds.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("the telemetry did not end within %g s; data that is not written yet is lost", _CLOSE_S)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def counters(self) -> list[trace.CounterSample]:
        """The samples as counters for `trace.write`: only metrics that make sense next to the timeline."""
        kept = ("gpu.", "process.", "link.")
        return [
            trace.CounterSample(
                s.at_ns, {n: v for n, v in s.metrics.items() if n.startswith(kept) and ".lane." not in n}
            )
            for s in list(self._samples)
        ]

    # ---- The thread

    def _run(self) -> None:
        next_ns = self._began_ns
        try:
            while True:
                now_ns = time.monotonic_ns()
                if self._meters and now_ns >= next_ns:
                    self._take_sample()
                    next_ns = max(next_ns + int(self._period * 1e9), time.monotonic_ns())
                if not self._take_rounds((next_ns - time.monotonic_ns()) / 1e9 if self._meters else None):
                    break
            if self._meters:
                self._take_sample()
        finally:
            self._close_reporters()

    def _close_reporters(self) -> None:
        for reporter in list(self._reporters):
            self._guarded(reporter, reporter.close)
        self._reporters.clear()

    def _take_rounds(self, timeout: float | None) -> bool:
        """Reports the next round if one comes within `timeout` seconds. Returns False once `close` was called."""
        try:
            metrics = self._rounds.get(timeout=None if timeout is None else max(0.0, timeout))
        except queue.Empty:
            return True
        if metrics is None:
            return False
        for reporter in list(self._reporters):
            self._guarded(reporter, lambda r=reporter: r.round(self._process, metrics))
        return True

    def _take_sample(self) -> None:
        now_ns = time.monotonic_ns()
        metrics: Metrics = {}
        for meter in list(self._meters):
            try:
                metrics |= meter.measure(now_ns)
            except Exception as error:
                self._meters.remove(meter)
                log.warning("%s failed and is dropped; its metrics end here: %s", type(meter).__name__, _text(error))
        metrics["telemetry.sample_s"] = (time.monotonic_ns() - now_ns) / 1e9
        sample = Sample((now_ns - self._began_ns) / 1e9, now_ns, time.time(), metrics)
        self._samples.append(sample)
        for reporter in list(self._reporters):
            self._guarded(reporter, lambda r=reporter: r.sample(self._process, sample))

    def _guarded(self, reporter: Reporter, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self._reporters.remove(reporter)
            log.warning("%s failed and is dropped: %s", type(reporter).__name__, _text(error))


def _numbers(prefix: str, record: Mapping[str, Any]) -> Metrics:
    """The numbers of a record, by dotted names that start with `prefix`."""
    numbers: Metrics = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(f"{prefix}.{name}", value)
        elif isinstance(value, (int, float)) and name != "fingerprint":
            numbers[f"{prefix}.{name}"] = float(value)
    return numbers


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
