"""Where the time of a round went: seconds a stage, kept apart from the trace so that they are there without one.

A stage's seconds are those in which it was under way, however many transfers were: overlapping stretches count once.
Stages overlap each other; that is what the runtime is for.

Here is also what follows from such seconds wherever they come from (a summary, a status, a benchmark, a plan): the
share of an exchange that was hidden, and the local steps that hide one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec


class StageSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds a stage; 0 where a side has no such stage.

    On a client: `send` and `receive` from the first byte of a transfer to the last one acknowledged or there, `fold`
    what the server took to add this client's uploads, `wait` the rest of the time from the upload's arrival until the
    server closed the round. On the server: `compute` is the mean and its optimiser, `wait` goes from a round's first
    upload to its close.
    """

    compute: float = 0.0
    encode: float = 0.0
    copy: float = 0.0
    send: float = 0.0
    fold: float = 0.0
    wait: float = 0.0
    receive: float = 0.0
    apply: float = 0.0


NO_TIME = StageSeconds()
STAGES = StageSeconds.__struct_fields__


def total(of: Iterable[StageSeconds], factor: float = 1.0) -> StageSeconds:
    """The sum of each stage, times `factor`; zeros of none."""
    listed = list(of)
    return StageSeconds(**{name: sum(getattr(s, name) for s in listed) * factor for name in STAGES})


def mean(of: Iterable[StageSeconds]) -> StageSeconds:
    """The mean of each stage; zeros of none."""
    listed = list(of)
    return total(listed, 1 / max(1, len(listed)))


def hidden_share(exposed_s: float, exchange_s: float | None) -> float | None:
    """`1 − exposed / exchange`: the share of the seconds of one or several exchanges that training did not wait for.

    Negative where training waited for longer than the exchanges take; None without exchanges. `exposed_s` must not
    contain what training waited for other clients: see `waited_for_others`.
    """
    return None if not exchange_s else 1 - exposed_s / exchange_s


def waited_for_others(blocked_s: float, wait_s: float) -> float:
    """Of the seconds for which training was blocked, those that would not have been if all other clients had delivered
    in time. `wait_s`: the stage `wait` of the same rounds.

    Without the wait every aggregate would have come `wait_s` earlier, so training would have been blocked for so much
    less, but not for less than nothing.
    """
    return max(0.0, min(blocked_s, wait_s))


def steps_to_hide(exchange_s: float, send_s: float, receive_s: float, step_s: float, staleness: int) -> int:
    """The fewest local steps a round that hide exchanges, at a staleness of 1 or more. All times in seconds.

    An exchange may take `staleness` rounds. But each direction of the link carries one body per round, so a round that
    is shorter than `send_s` or `receive_s` waits, whatever the staleness.
    """
    return max(1, math.ceil(max(exchange_s / staleness, send_s, receive_s) / step_s))


class StageClock:
    """Adds up one side's seconds. One thread at a time."""

    def __init__(self) -> None:
        self._stretches: dict[str, list[tuple[int, int]]] = {name: [] for name in STAGES}
        self._counted_to_ns = dict.fromkeys(STAGES, 0)
        self._window = dict.fromkeys(STAGES, 0.0)
        self._before = dict.fromkeys(STAGES, 0.0)

    def add(self, stage: str, start_ns: int, end_ns: int) -> None:
        """Notes a stretch of a stage that has ended; monotonic clock."""
        self._stretches[stage].append((start_ns, end_ns))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Notes seconds that somebody else has measured, and that overlap no others of their stage."""
        self._window[stage] += seconds

    def take(self) -> StageSeconds:
        """The seconds of what has ended since the last call."""
        self._merge()
        taken = StageSeconds(**self._window)
        for name in STAGES:
            self._before[name] += self._window[name]
            self._window[name] = 0.0
        return taken

    def total(self) -> StageSeconds:
        """The seconds of everything so far."""
        self._merge()
        return StageSeconds(**{name: self._before[name] + self._window[name] for name in STAGES})

    def _merge(self) -> None:
        for name, stretches in self._stretches.items():
            for start, end in sorted(stretches):
                fresh = max(start, self._counted_to_ns[name])
                self._window[name] += max(0, end - fresh) / 1e9
                self._counted_to_ns[name] = max(self._counted_to_ns[name], end)
            stretches.clear()
