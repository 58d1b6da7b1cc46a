"""Where the time of a round goes: seconds per stage. Independent of the trace, so available without one.

The seconds of a stage are the time in which it was under way; overlapping transfers of a stage count once. Different
stages overlap by design.

Also computes the hidden share of an exchange and the local steps that hide one, for summaries, statuses, benchmarks and
plans.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec

Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # of a peer: neither NaN, nor too large to add up


class StageSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per stage; 0 for a stage that this side does not have.

    On a client, `send` runs from the first byte of an upload until its last byte is acknowledged, `receive` from the
    first byte of an aggregate until its last byte has arrived. `fold` is the server's time for adding this client's
    uploads, and `wait` the rest of the time from the upload's arrival until the server closed the round.

    On the server, `compute` is the time for the mean and the server optimiser, and `wait` runs from a round's first
    upload to its close.
    """

    compute: Seconds = 0.0
    encode: Seconds = 0.0
    copy: Seconds = 0.0
    send: Seconds = 0.0
    fold: Seconds = 0.0
    wait: Seconds = 0.0
    receive: Seconds = 0.0
    apply: Seconds = 0.0


NO_TIME = StageSeconds()
STAGES = StageSeconds.__struct_fields__


def total(of: Iterable[StageSeconds], factor: float = 1.0) -> StageSeconds:
    """The sum of each stage, times `factor`; zeros for an empty iterable."""
    listed = list(of)
    return StageSeconds(**{name: sum(getattr(s, name) for s in listed) * factor for name in STAGES})


def mean(of: Iterable[StageSeconds]) -> StageSeconds:
    """The mean of each stage; zeros for an empty iterable."""
    listed = list(of)
    return total(listed, 1 / max(1, len(listed)))


def hidden_share(exposed_s: float, exchange_s: float | None) -> float | None:
    """`1 − exposed_s / exchange_s`: the share of the time of one or several exchanges that training did not wait for.

    Negative if training waited longer than the exchanges take; None without exchanges. `exposed_s` must not contain the
    wait for other clients: see `waited_for_others`.
    """
    return None if not exchange_s else 1 - exposed_s / exchange_s


def waited_for_others(blocked_s: float, wait_s: float) -> float:
    """The part of `blocked_s` (seconds for which training was blocked) that is due to late uploads of other clients.

    `wait_s`: the seconds of the stage `wait` in the same rounds. Without it, every aggregate would have come `wait_s`
    earlier, and training would have been blocked that much less; the result is at most `blocked_s`.
    """
    return max(0.0, min(blocked_s, wait_s))


def steps_to_hide(exchange_s: float, send_s: float, receive_s: float, step_s: float, staleness: int) -> int:
    """The fewest local steps per round that hide exchanges, at a staleness of 1 or more. All times in seconds.

    An exchange may take `staleness` rounds. But each direction of the link carries one body per round, so training
    waits if a round is shorter than `send_s` or `receive_s`, whatever the staleness.
    """
    return max(1, math.ceil(max(exchange_s / staleness, send_s, receive_s) / step_s))


class StageClock:
    """Adds up the seconds of one side. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards all below; reentrant, for signal handlers
        self._stretches: dict[str, list[tuple[int, int]]] = {name: [] for name in STAGES}
        self._counted_to_ns = dict.fromkeys(STAGES, 0)
        self._window = dict.fromkeys(STAGES, 0.0)
        self._before = dict.fromkeys(STAGES, 0.0)

    def add(self, stage: str, start_ns: int, end_ns: int) -> None:
        """Adds a stretch of a stage that has ended; nanoseconds of the monotonic clock."""
        with self._lock:
            self._stretches[stage].append((start_ns, end_ns))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds seconds that the other side measured; they must not overlap other time of the same stage."""
        with self._lock:
            self._window[stage] += seconds

    def take(self) -> StageSeconds:
        """The seconds of the stretches added since the last call."""
        with self._lock:
            self._merge()
            taken = StageSeconds(**self._window)
            for name in STAGES:
                self._before[name] += self._window[name]
                self._window[name] = 0.0
            return taken

    def total(self) -> StageSeconds:
        """The seconds of all stretches so far."""
        with self._lock:
            self._merge()
            return StageSeconds(**{name: self._before[name] + self._window[name] for name in STAGES})

    def _merge(self) -> None:
        for name, stretches in self._stretches.items():
            for start, end in sorted(stretches):
                fresh = max(start, self._counted_to_ns[name])
                self._window[name] += max(0, end - fresh) / 1e9
                self._counted_to_ns[name] = max(self._counted_to_ns[name], end)
            stretches.clear()
