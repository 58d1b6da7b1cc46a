"""Complete uploads from the clients: checked as they arrive, and folded several at a time.

The sum takes 16 bytes per element. To save memory traffic, one pass over it folds several uploads, and there is no pass
at all if all uploads of a round can be held until the round closes. Owns the uploads that have arrived and are not
folded yet. Decides neither which client may send nor when a round closes, and sends no messages. Only the server's
thread may call this module.
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

_TOGETHER = 16  # uploads per pass: so many int8 uploads are as large as the sum


@dataclass(frozen=True)
class Taken:
    """An upload that has arrived. `reason`: why it was refused, or an empty text when it counts."""

    round: int
    reason: str


class Uplink:
    """The uploads of all clients. `nbytes`: bytes that arrived since the run began; the count survives a resume."""

    def __init__(self, intake: Intake, rounds: OpenRounds, timeline: Timeline, format: str) -> None:
        """`format`: the wire format of the uploads' bodies."""
        self.nbytes = 0
        self._intake = intake
        self._rounds = rounds
        self._timeline = timeline
        self._format = format
        self._held: dict[int, list[tuple[Member, UploadSlot]]] = {}  # by round

    def restore(self, nbytes: int) -> None:
        """Sets the byte count to an earlier server's last value."""
        self.nbytes = nbytes

    def take(self, member: Member, arrived: _C.Event) -> Taken | None:
        """Takes in an upload whose last byte has arrived. Returns None if the upload is no longer wanted, or not yet
        announced."""
        taken = self._intake.take(member, arrived)
        if taken is None:
            return None
        posted, upload = taken
        self.nbytes += posted.nbytes
        self._timeline.stages.add("receive", arrived.first_byte_ns, arrived.at_ns)
        body = as_tensor(posted.buffer, posted.nbytes)
        delivery = Delivery(member.seat, upload, body, arrived.at_ns / 1e9, posted.inspector)
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
        """Folds the held uploads of each round for which a pass over the sum is worthwhile. `idle`: the server has
        nothing else to do."""
        for index in list(self._held):
            if self.is_worth_a_pass(index, idle=idle):
                self._rounds[index].fold()
                self.release(index)

    def is_worth_a_pass(self, index: int, *, idle: bool) -> bool:
        """Whether to fold a round's held uploads before the round closes. Not if all its uploads can be held, unless
        room is short."""
        if self._intake.is_short and self._intake.taken_bytes >= self._intake.budget // 2:
            return True
        return not self._intake.holds_all(index) and (idle or len(self._held[index]) >= _TOGETHER)

    def release(self, index: int) -> None:
        """Gives back the buffers of a round's held uploads, which have been folded."""
        round = self._rounds[index]
        for member, posted in self._held.pop(index, ()):
            key = {"kind": Kind.UPLOAD, "round": index, "block": posted.block, "bytes": posted.nbytes}
            self._timeline.add(Stage.FOLD, *round.fold_span_ns[member.seat], peer=member.link or 0, **key)
            self._intake.give_back(posted)
