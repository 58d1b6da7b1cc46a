"""Samples of what a run does to the machine, taken by one thread beside it.

The thread asks the meters, and hands what they say, and each round's record, to the reporters. A meter or a reporter
that fails is left out from then on, with one warning; a run never fails for its telemetry. Rates and times are of the
monotonic clock; the wall clock is a label.
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
    """What the meters said at one moment. `t_s`: seconds since the telemetry began; `wall`: the system's idea of the
    time, for people."""

    t_s: float
    at_ns: int
    wall: float
    metrics: Metrics


class Reporter(Protocol):
    """Where samples and rounds go. Called by the telemetry's thread alone."""

    def sample(self, process: str, sample: Sample) -> None:
        """Takes a sample."""
        ...

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of a round that has ended; `round.round` is its number."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


class Telemetry:
    """Owns the reporters, and from `start` to `close` the thread; a context manager closes it."""

    def __init__(self, reporters: Sequence[Reporter], period: float) -> None:
        """`period`: seconds between samples; 0 takes none, rounds are reported anyhow. Raises ConfigError."""
        if not (period >= 0 and math.isfinite(period)):
            raise ConfigError(f"the seconds between two samples must be 0 (none) or more; found {period}")
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
        """Begins to sample, once. `process`: its name in the trace."""
        self._process = process
        self._meters = list(meters) if self._period > 0 else []
        self._began_ns = time.monotonic_ns()
        self._thread.start()

    def round(self, record: Mapping[str, Any]) -> None:
        """Hands a round's record to the reporters. Any thread; never waits for them."""
        self._rounds.put(_numbers("round", record))

    def close(self) -> None:
        """Takes a last sample, lets the reporters finish and ends the thread. Idempotent."""
        if self._thread.ident is None:
            self._close_reporters()
            return
        self._rounds.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("the telemetry did not end within %g s; what it has not written is lost", _CLOSE_S)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def counters(self) -> list[trace.CounterSample]:
        """The samples as `trace.write` takes them: what can be understood beside the timeline."""
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
        """Reports the next round, if one comes in time. False at the end of the run."""
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
                log.warning(
                    "%s failed and is not asked again, its metrics end here: %s", type(meter).__name__, _text(error)
                )
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
            log.warning("%s failed and gets nothing more: %s", type(reporter).__name__, _text(error))


def _numbers(prefix: str, record: Mapping[str, Any]) -> Metrics:
    """The numbers of a record, by dotted names."""
    numbers: Metrics = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(f"{prefix}.{name}", value)
        elif isinstance(value, (int, float)) and name != "fingerprint":
            numbers[f"{prefix}.{name}"] = float(value)
    return numbers


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
