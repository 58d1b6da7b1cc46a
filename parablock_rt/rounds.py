"""One open round on the server: who is expected, who has delivered, when it may close.

Holds the round's accumulator; an upload counts wholly or not at all. Knows neither links nor clocks: times are passed
in. One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from parablock_rt.codec import Accumulator
from parablock_rt.errors import CodecError
from parablock_rt.protocol import Upload


@dataclass(eq=False)
class Round:
    """The state of one round. `uploads`: what was folded, by client."""

    index: int
    block: int
    cohort: frozenset[int]
    accumulator: Accumulator
    uploads: dict[int, Upload] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # why, by client
    folded_at: list[float] = field(default_factory=list)  # seconds, of any one clock

    def fold(self, client: int, upload: Upload | None, body: Tensor, format: str, now: float) -> str:
        """Folds a complete upload that arrived at `now`; `upload`: how it was announced, None if it was not.

        Returns why not, or an empty text when it was folded. What was refused is not waited for any more.
        """
        reason = self._fold(client, upload, body, format)
        if not reason:
            self.folded_at.append(now)
        elif client not in self.uploads:
            self.refused[client] = reason
        return reason

    def _fold(self, client: int, upload: Upload | None, body: Tensor, format: str) -> str:
        if upload is None:
            return "the upload was not announced"
        if client not in self.cohort:
            return f"client {client} is not in the cohort of round {self.index}"
        if client in self.uploads:
            return f"client {client} has already delivered round {self.index}"
        if upload.block != self.block:
            return f"round {self.index} trains block {self.block}, not {upload.block}"
        try:
            self.accumulator.add(body, upload.weight, format)
        except CodecError as error:
            return str(error)
        self.uploads[client] = upload
        return ""

    @property
    def skew_s(self) -> float:
        """Seconds between the first and the last upload that was folded."""
        return max(self.folded_at) - min(self.folded_at) if self.folded_at else 0.0


class Deadline:
    """How long the oldest open round may stay open: a fixed time, or one that follows the rounds seen so far.

    Adaptive: ten times the longest of the last rounds, at least 30 s; ten minutes before the first round has closed.
    """

    _FIRST_S = 600.0
    _LEAST_S = 30.0
    _FACTOR = 10.0
    _REMEMBERED = 8

    def __init__(self, fixed: float | None) -> None:
        self._fixed = fixed
        self._seen: list[float] = []

    def saw(self, seconds: float) -> None:
        """Notes how long a round stayed the oldest open one."""
        self._seen = [*self._seen[-self._REMEMBERED + 1 :], seconds]

    @property
    def seconds(self) -> float:
        """The limit for the round that is open now."""
        if self._fixed is not None:
            return self._fixed
        if not self._seen:
            return self._FIRST_S
        return max(self._LEAST_S, self._FACTOR * max(self._seen))
