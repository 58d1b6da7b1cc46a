"""The end of a round: when the oldest open round closes, and in which order its closing proceeds.

The model moves, the round is written to the disk, and only then are clients told. Only the server's thread may call
this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from parablock_rt.errors import RoundError
from parablock_rt.observe.timeline import Stage
from parablock_rt.server import journal
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.durability import Durability
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.server.participants import Participants
from parablock_rt.server.rounds import Round
from parablock_rt.server.run_state import RunState
from parablock_rt.staging.stager import Encoding
from parablock_rt.wire import protocol


class Closing:
    """Closes the rounds of one run."""

    def __init__(
        self,
        run: RunState,
        participants: Participants,
        downlink: Downlink,
        durability: Durability,
        on_round: Callable[[ClosedRound], None] | None,
    ) -> None:
        """`on_round`: one of the `listeners`, which are called after each round that closes."""
        self._progress = run.progress
        self._rounds = run.rounds
        self._timeline = run.timeline
        self._outcome = run.outcome
        self._participants = participants
        self._roster = participants.roster
        self._attendance = participants.attendance
        self._downlink = downlink
        self._durability = durability
        self.listeners = [] if on_round is None else [on_round]
        # The last round that lacked a quorum and waited for seats that nobody expected: its length says nothing about
        # the deadline that later rounds need.
        self._was_short = -1

    def close_due(self) -> None:
        """Closes the oldest open rounds, in order, as long as no more uploads are expected for them.

        Raises RoundError when a round can never reach its quorum, CheckpointError when the disk fails.
        """
        while self._progress.started and not self._progress.all_closed:
            round = self._rounds[self._progress.oldest]
            overdue = self._progress.overdue
            waited_for = self._attendance.outstanding(round)
            if waited_for and not overdue:
                return
            if len(round.uploads) < self._attendance.quorum(round):
                if self._may_reach_quorum(round):
                    self._was_short = round.index
                    return
                raise RoundError(self._without_quorum(round))
            self._attendance.give_up(waited_for)
            self._close(round, complete=not (waited_for or overdue or self._was_short == round.index))

    def _may_reach_quorum(self, round: Round) -> bool:
        """Whether to keep waiting for the uploads that a round lacks, expected or not: until the round's deadline, and
        longer for a client that is away, or that has come back and may still have to send its upload."""
        missing = self._attendance.missing(round)
        lost = {member.seat for member in self._attendance.lost}
        back = {member.seat for member in self._roster.here if member.seated_at > self._progress.opened_at}
        deadline = self._progress.deadline
        limit = deadline.without_quorum if missing & (lost | back) else deadline.seconds
        return bool(missing) and self._progress.open_s < limit

    def _without_quorum(self, round: Round) -> str:
        missing = self._attendance.who_is_missing(round, self._outcome.left)
        advice = "restart them, or set a lower --quorum or a longer --deadline"
        if self._durability.is_kept:  # a resumed run cannot change its settings
            advice = "resume the run and restart them before its deadline passes"
        return (
            f"round {round.index} cannot be closed: {len(round.uploads)} of {len(round.cohort)} clients delivered in "
            f"the {self._progress.open_s:.1f} s it was open, at least {self._attendance.quorum(round)} are needed "
            f"({missing}); {advice}"
        )

    def _close(self, round: Round, *, complete: bool) -> None:
        start_ns = time.monotonic_ns()
        first_s = min(round.arrived_at.values(), default=start_ns / 1e9)
        self._timeline.stages.add("wait", int(first_s * 1e9), start_ns)
        receivers = [m for m in self._roster.here if m.ready and m.updates_from <= round.index]
        # The aggregate's bytes are in flight from here on, but clients apply them only after the announcement below.
        encoding, value = self._downlink.aggregate(round, [m.link for m in receivers if m.link is not None])
        self._participants.uplink.release(round.index)
        update = protocol.Update(
            round=round.index,
            block=round.block,
            fingerprint=value,
            contributions=len(round.uploads),
            bad_groups=round.accumulator.bad_groups,
        )
        closed = self._record_of(round, encoding, value)
        record = journal.Closed(
            closed=closed,
            update=update,
            verdicts=round.refused | dict.fromkeys(round.uploads, ""),  # a seat may have had two holders
            complete=complete,
            given_up=self._attendance.given_up,
        )
        self._durability.close(record, encoding.body, self._downlink.backlog.rounds)
        self._say_verdicts(round)
        for member in receivers:
            own = update
            if member.first_round <= round.index:  # otherwise the seat's upload is from its former holder
                waited_s, fold_s = round.waited_s(member.seat, start_ns), round.fold_s(member.seat)
                own = msgspec.structs.replace(update, wait_s=waited_s, fold_s=fold_s)
            self._roster.say(member, own)
        self._downlink.keep(update, encoding)
        behind = [m.applied for m in self._roster.members if m.begun and m.goodbye is None]
        self._downlink.backlog.drop_through(min(behind, default=round.index))
        self._timeline.add(Stage.CLOSE, start_ns, time.monotonic_ns(), round=round.index, block=round.block)
        self._timeline.drain()
        self._outcome.add([closed])
        self._rounds.retire(round)  # not earlier: emptying the sum takes time that clients would wait
        self._progress.close_oldest(closed.open_s, complete=complete)
        for listener in list(self.listeners):
            listener(closed)

    def _record_of(self, round: Round, encoding: Encoding, fingerprint: int) -> ClosedRound:
        return round.closed(
            open_s=self._progress.open_s,
            bad_groups=encoding.bad_groups,
            bytes_up=self._participants.uplink.nbytes,
            bytes_down=self._downlink.nbytes,
            snapshot_bytes=self._downlink.snapshots_nbytes,
            fingerprint=fingerprint,
            server_stages=self._timeline.stages.take(),
        )

    def _say_verdicts(self, round: Round) -> None:
        """Sends the acceptances that had to wait for the disk, and tells the members whose uploads came too late."""
        for seat in round.uploads if self._durability.is_kept else ():
            if (holder := self._roster.holder(seat)) is not None and holder.first_round <= round.index:
                self._participants.verdicts.say(holder, round.index, "")
        for member in self._roster.members:
            if member.seat not in round.cohort or not self._participants.intake.refuse(member, round.index):
                continue
            if member.here:
                self._participants.verdicts.say_late(member, round.index)
