"""What the clients send to the server: complete uploads, which wait to be folded into their round's sum together.

The sum is 16 bytes an element, so it is moved once for several uploads. Owns the uploads that have arrived and are not
folded yet. Decides neither who may send nor when a round closes, and says nothing to anybody. The server's thread alone
uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parablock_rt import _C
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.server.attendance import Attendance
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member, Posted
from parablock_rt.server.rounds import Delivery, OpenRounds
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import as_tensor

_TOGETHER = 16  # uploads in one pass: there the sum weighs no more than they do, and a round's end waits for no more


@dataclass(frozen=True)
class Folded:
    """What became of an upload. `reason`: why it was refused, or an empty text when it is in the sum; `fold_s`: the
    seconds that took."""

    member: Member
    round: int
    reason: str
    fold_s: float


class Uplink:
    """The way up, of all clients. `nbytes`: what has arrived since the run began; a restored run goes on counting."""

    def __init__(
        self, intake: Intake, rounds: OpenRounds, attendance: Attendance, timeline: Timeline, format: str
    ) -> None:
        """`format`: of the uploads' bodies."""
        self.nbytes = 0
        self._intake = intake
        self._rounds = rounds
        self._attendance = attendance
        self._timeline = timeline
        self._format = format
        self._waiting: dict[int, list[tuple[Member, Posted, Delivery]]] = {}  # by round

    def restore(self, nbytes: int) -> None:
        """Goes on counting where an earlier server ended."""
        self.nbytes = nbytes

    def take(self, member: Member, arrived: _C.Event) -> bool:
        """Takes in the upload whose last byte has arrived. Returns whether there was one that is still wanted and was
        announced."""
        taken = self._intake.take(member, arrived)
        if taken is None:
            return False
        posted, upload = taken
        self.nbytes += posted.nbytes
        self._timeline.stages.add("receive", arrived.first_byte_ns, arrived.at_ns)
        delivery = Delivery(member.seat, upload, as_tensor(posted.buffer, posted.nbytes), arrived.at_ns / 1e9)
        self._waiting.setdefault(posted.round, []).append((member, posted, delivery))
        return True

    def waiting(self, round: int) -> set[int]:
        """The seats whose upload for a round has arrived and is not folded yet."""
        return {delivery.client for _, _, delivery in self._waiting.get(round, ())}

    def has(self, seat: int, round: int) -> bool:
        """Whether a seat's upload for a round is here, folded or not."""
        return seat in self._rounds.uploads_of(round) or seat in self.waiting(round)

    def is_worth_a_pass(self, round: int) -> bool:
        """Whether so many of a round's uploads wait that moving the sum for them costs little, others want their room,
        or no more are to come. Fewer are worth it only to a server that has nothing else to do."""
        waiting = self.waiting(round)
        if len(waiting) >= _TOGETHER or (
            self._intake.is_short and self._intake.taken_bytes >= self._intake.budget // 2
        ):
            return True
        return self._attendance.outstanding(self._rounds[round]) <= waiting

    def fold(self, is_due: Callable[[int], bool] = lambda round: True) -> list[Folded]:
        """Folds the uploads that wait, each round's together. `is_due`: whether a round's are to be folded yet."""
        due = [index for index in self._waiting if is_due(index)]
        return [folded for index in due for folded in self._fold_round(index)]

    def _fold_round(self, index: int) -> list[Folded]:
        round, uploads = self._rounds[index], self._waiting.pop(index)
        reasons = round.fold([delivery for _, _, delivery in uploads], self._format)
        folded = []
        for (member, posted, _), reason in zip(uploads, reasons, strict=True):
            if not reason:
                key = {"kind": Kind.UPLOAD, "round": index, "block": posted.block, "bytes": posted.nbytes}
                self._timeline.add(Stage.FOLD, *round.fold_span_ns[member.seat], peer=member.link or 0, **key)
            self._intake.give_back(posted)
            folded.append(Folded(member, index, reason, round.fold_s(member.seat)))
        return folded
