"""The open rounds on the server: for each round its cohort, the uploads that count so far, and their sum.

A round owns its accumulator. An upload counts wholly or not at all. Knows no links, and reads the clock only to measure
how long folding takes; other times are passed in. Only one thread may use it at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parablock_rt import _C, stages
from parablock_rt.codec import Accumulator
from parablock_rt.errors import CodecError, RoundError
from parablock_rt.schedule import Schedule
from parablock_rt.server.outcome import ClosedRound, Part
from parablock_rt.wire.protocol import Upload


@dataclass(frozen=True)
class Delivery:
    """A complete upload of a client: its announcement, its bytes, and when the last byte arrived (seconds of any
    clock). `inspector`: has checked the bytes as they arrived; None: nobody has."""

    client: int
    upload: Upload
    body: Tensor
    at: float
    inspector: _C.Inspector | None = None


@dataclass(eq=False)
class Round:
    """The state of one round. `uploads`: the accepted uploads, by client; an accepted upload counts. It is folded later
    together with others, at the latest by `mean`; until then the caller must not reuse the buffer of its body."""

    index: int
    block: int
    cohort: frozenset[int]
    accumulator: Accumulator
    uploads: dict[int, Upload] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # why, by client
    arrived_at: dict[int, float] = field(default_factory=dict)  # seconds of any one clock, by client
    fold_span_ns: dict[int, tuple[int, int]] = field(default_factory=dict)  # when it was folded, by client

    def take(self, delivery: Delivery, format: str) -> str:
        """Takes in a client's upload, to be folded in the next pass. Returns why it was refused, or an empty text if it
        counts.

        The round does not wait any longer for a client whose upload was refused.
        """
        client, upload = delivery.client, delivery.upload
        if client in self.uploads:
            return f"client {client} has already delivered round {self.index}"
        try:
            if client not in self.cohort:
                raise RoundError(f"client {client} is not in the cohort of round {self.index}")
            if upload.block != self.block:
                raise RoundError(f"round {self.index} trains block {self.block}, not {upload.block}")
            checked = self.accumulator.check(delivery.body, upload.weight, format, inspector=delivery.inspector)
            self.accumulator.hold(checked)
        except (CodecError, RoundError) as error:
            self.refused[client] = str(error)
            return str(error)
        self.uploads[client] = upload
        self.arrived_at[client] = delivery.at
        return ""

    @property
    def waiting(self) -> list[int]:
        """The clients whose uploads are not folded yet, in the order of arrival."""
        return [client for client in self.uploads if client not in self.fold_span_ns]

    def fold(self) -> None:
        """Folds all waiting uploads in one pass over the sum."""
        start_ns = time.monotonic_ns()
        self.accumulator.fold()
        self._note_folded(start_ns)

    def mean(self, out: Tensor) -> Tensor:
        """Writes the weighted mean of all uploads to `out` (fp32, [numel]). Uploads that still wait are folded straight
        into the mean, without a pass over the sum."""
        start_ns = time.monotonic_ns()
        self.accumulator.mean(out)
        self._note_folded(start_ns)
        return out

    def _note_folded(self, start_ns: int) -> None:
        """Attributes an equal share of the pass to each waiting upload, as if they had been folded one by one."""
        waited = self.waiting
        share_ns = (time.monotonic_ns() - start_ns) // max(1, len(waited))
        for i, client in enumerate(waited):
            self.fold_span_ns[client] = start_ns + i * share_ns, start_ns + (i + 1) * share_ns

    def fold_s(self, client: int) -> float:
        """Seconds that folding a client's upload took; 0 if it has none."""
        start_ns, end_ns = self.fold_span_ns.get(client, (0, 0))
        return (end_ns - start_ns) / 1e9

    def waited_s(self, client: int, closing_ns: int) -> float:
        """Seconds from the arrival of a client's upload until the round began to close, without the time to fold it; 0
        if the client has no upload."""
        if client not in self.uploads:
            return 0.0
        folded_before = client in self.fold_span_ns and self.fold_span_ns[client][1] <= closing_ns
        waited_s = closing_ns / 1e9 - self.arrived_at[client] - (self.fold_s(client) if folded_before else 0.0)
        return max(0.0, waited_s)  # the difference of two roundings may be negative

    def closed(self, *, bad_groups: int, **of_the_server: Any) -> ClosedRound:
        """The record of the round as it closes. `bad_groups`: those of the aggregate that the clients get;
        `of_the_server`: the fields that the round itself does not know."""
        uploads = list(self.uploads.values())
        return ClosedRound(
            round=self.index,
            block=self.block,
            loss=sum(u.loss * u.weight for u in uploads) / sum(u.weight for u in uploads),
            contributions=len(uploads),
            weight=self.accumulator.total_weight,
            bad_groups=self.accumulator.bad_groups + bad_groups,
            compute_s=sum(u.compute_s for u in uploads) / len(uploads),
            exposed_s=sum(u.exposed_s for u in uploads) / len(uploads),
            skew_s=self.skew_s,
            parts=self.parts(),
            stages=stages.mean(u.stages for u in uploads),
            **of_the_server,
        )

    @property
    def skew_s(self) -> float:
        """Seconds between the first and the last upload that counts."""
        return max(self.arrived_at.values()) - min(self.arrived_at.values()) if self.arrived_at else 0.0

    def parts(self) -> tuple[Part, ...]:
        """What each client delivered, in the order of arrival."""
        if not self.arrived_at:
            return ()
        first = min(self.arrived_at.values())
        return tuple(
            Part(client, upload.compute_s, upload.exposed_s, self.arrived_at[client] - first)
            for client, upload in self.uploads.items()
        )


class OpenRounds:
    """The rounds that are not closed yet, created on first access. Accumulators of closed rounds are reused."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._rounds: dict[int, Round] = {}
        self._spare_sums: list[Accumulator] = []

    def __getitem__(self, index: int) -> Round:
        if index not in self._rounds:
            schedule = self._schedule
            sum_ = self._take_sum(schedule.numel(index))
            self._rounds[index] = Round(index, schedule.block(index), schedule.cohort(index), sum_)
        return self._rounds[index]

    def uploads_of(self, index: int) -> dict[int, Upload]:
        """The uploads that count in a round, by client."""
        return self._rounds[index].uploads if index in self._rounds else {}

    def forget_refusals(self, client: int, first_round: int) -> None:
        """A new holder has the client's seat from `first_round` on; it may deliver although an upload of the former
        holder was refused."""
        for index, round in self._rounds.items():
            if index >= first_round:
                round.refused.pop(client, None)

    def retire(self, round: Round) -> None:
        """Removes a closed round; its accumulator is reset for reuse."""
        del self._rounds[round.index]
        round.accumulator.reset()
        self._spare_sums.append(round.accumulator)

    def _take_sum(self, numel: int) -> Accumulator:
        for i, spare in enumerate(self._spare_sums):
            if spare.numel == numel:
                return self._spare_sums.pop(i)
        return Accumulator(numel)
