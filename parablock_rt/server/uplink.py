"""What the clients send to the server: complete uploads, checked when they arrive, and folded together.

The sum is 16 bytes an element, so it is moved for several uploads at once; and not at all if there is room to hold all
of a round until it closes. Owns the uploads that have arrived and are not folded yet. Decides neither who may send nor
when a round closes, and says nothing to anybody. The server's thread alone uses it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from parablock_rt import _C
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member, UploadSlot
from parablock_rt.server.rounds import Delivery, OpenRounds
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import as_tensor

log = logging.getLogger("parablock")

_TOGETHER = 16  # uploads in one pass: there the sum weighs no more than they do


@dataclass(frozen=True)
class Taken:
    """An upload that has arrived. `reason`: why it was refused, or an empty text when it counts."""

    round: int
    reason: str


class Uplink:
    """The way up, of all clients. `nbytes`: what has arrived since the run began; a restored run goes on counting."""

    def __init__(self, intake: Intake, rounds: OpenRounds, timeline: Timeline, format: str) -> None:
        """`format`: of the uploads' bodies."""
        self.nbytes = 0
        self._intake = intake
        self._rounds = rounds
        self._timeline = timeline
        self._format = format
        self._held: dict[int, list[tuple[Member, UploadSlot]]] = {}  # by round

    def restore(self, nbytes: int) -> None:
        """Goes on counting where an earlier server ended."""
        self.nbytes = nbytes

    def take(self, member: Member, arrived: _C.Event) -> Taken | None:
        """Takes in the upload whose last byte has arrived; None if it is not wanted any more, or not announced yet."""
        taken = self._intake.take(member, arrived)
        if taken is None:
            return None
        posted, upload = taken
        self.nbytes += posted.nbytes
        self._timeline.stages.add("receive", arrived.first_byte_ns, arrived.at_ns)
        delivery = Delivery(member.seat, upload, as_tensor(posted.buffer, posted.nbytes), arrived.at_ns / 1e9)
        round = self._rounds[posted.round]
        bad_before = round.accumulator.bad_groups
        reason = round.take(delivery, self._format)
        if (bad := round.accumulator.bad_groups - bad_before) > 0:
            log.warning(
                "round %d: %d parts of what client %d trained were NaN or infinite and count as no change",
                *(posted.round, bad, member.seat),
            )
        if reason:
            self._intake.give_back(posted)
        else:
            self._held.setdefault(posted.round, []).append((member, posted))
        return Taken(posted.round, reason)

    def fold(self, *, idle: bool) -> None:
        """Folds what is held of each round, where that is worth a pass over the sum. `idle`: the server has nothing
        else to do."""
        for index in list(self._held):
            if self.is_worth_a_pass(index, idle=idle):
                self._rounds[index].fold()
                self.release(index)

    def is_worth_a_pass(self, index: int, *, idle: bool) -> bool:
        """Whether to fold what is held of a round before it closes: not while all of the round can be held."""
        if self._intake.is_short and self._intake.taken_bytes >= self._intake.budget // 2:
            return True
        return not self._intake.holds_all(index) and (idle or len(self._held[index]) >= _TOGETHER)

    def release(self, index: int) -> None:
        """What was held of a round has been folded."""
        round = self._rounds[index]
        for member, posted in self._held.pop(index, ()):
            key = {"kind": Kind.UPLOAD, "round": index, "block": posted.block, "bytes": posted.nbytes}
            self._timeline.add(Stage.FOLD, *round.fold_span_ns[member.seat], peer=member.link or 0, **key)
            self._intake.give_back(posted)
