"""Lets clients send their uploads: posts a buffer for each upload before it is needed, within a byte budget.

When a connection breaks, the bytes of an upload that have arrived are kept, and the client resumes from there on its
next connection.

Looks at no upload itself: the transport inspects each one as it arrives. Owns the buffers of uploads in flight. Only
the server's thread may call this module.
"""

from __future__ import annotations

from parablock_rt import _C
from parablock_rt.server.members import Member, UploadSlot
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import RunState
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import BufferPool, Transport, body_layout, inspector


class Intake:
    """The upload slots of all members."""

    def __init__(self, transport: Transport, buffers: BufferPool, roster: Roster, run: RunState, budget: int) -> None:
        """`budget`: the most bytes of uploads that are not folded yet; one upload more is always allowed."""
        self._transport = transport
        self._buffers = buffers
        self._roster = roster
        self._config = run.config
        self._schedule = run.schedule
        self.budget = budget
        self.taken_bytes = 0  # of uploads that were taken and whose buffers have not been given back yet
        self._held_bytes = 0  # of these and of the uploads that may still come
        self._looked_at = 0.0  # when `silent` last checked the links
        self.is_short = False  # whether the last `let_in` had no room for some upload of the oldest round

    def holds_all(self, round: int) -> bool:
        """Whether there is room for all uploads of a round at once."""
        return len(self._schedule.cohort(round)) * self._schedule.body_bytes(round) <= self.budget

    def let_in(self, oldest: int) -> None:
        """Posts buffers within the byte budget: for uploads of the oldest open round first, then for later rounds. If
        there is no room for an upload of some round, nothing of later rounds is let in either, however small.

        One announced upload of the oldest open round is always let in, however full the budget is: the round can
        always make progress.
        """
        last = min(oldest + self._config.staleness + 1, self._config.rounds - 1)
        waiting = [member for member in self._roster.here if member.begun and member.next_post <= last]
        self.is_short = False
        next_in_line = self._next_in_line(oldest) if waiting else None
        for index in range(oldest, last + 1):
            cohort, nbytes = self._schedule.cohort(index), self._schedule.body_bytes(index)
            for member in waiting:
                if member.next_post > index or member.seat not in cohort:
                    continue
                if member is next_in_line:
                    next_in_line = None
                elif self._held_bytes + nbytes > self.budget:
                    self.is_short = index == oldest
                    if next_in_line is None:
                        return
                    continue
                self._post(member, index)
            if self.is_short:
                return

    def resume(self, member: Member) -> None:
        """Resumes on a new connection the uploads that were in flight on the old one."""
        for posted in member.posted.values():
            self._receive(member, posted)

    def take(self, member: Member, arrived: _C.Event) -> tuple[UploadSlot, protocol.Upload] | None:
        """The upload whose last byte has arrived, and its announcement. The caller owns the buffer until `give_back`.

        Returns None if the round was closed meanwhile (the client has been told), or if the announcement has not
        arrived yet because it travels on another of the link's lanes. In the latter case the upload is taken once the
        announcement arrives.
        """
        posted = member.posted.get(arrived.round)
        if posted is None:
            return None
        if arrived.round not in member.announced:
            posted.arrived = arrived
            return None
        del member.posted[arrived.round]
        self.taken_bytes += posted.nbytes
        return posted, member.announced.pop(arrived.round)

    def give_back(self, posted: UploadSlot) -> None:
        """Takes back the buffer of an upload that the caller no longer needs."""
        self.taken_bytes -= posted.nbytes
        self._let_go(posted)

    def refuse(self, member: Member, round: int) -> bool:
        """Refuses the member's upload for a round, if it may still come. Returns whether that was so."""
        if member.here and member.begun and member.next_post <= round:  # never let in, for lack of room
            assert member.link is not None
            member.next_post = round + 1
            member.announced.pop(round, None)
            self._transport.native.refuse_receive(member.link, Kind.UPLOAD, round, self._schedule.block(round))
            return True
        posted = member.posted.pop(round, None)
        if posted is None:
            return False
        member.announced.pop(round, None)
        if member.here:
            assert member.link is not None
            self._transport.native.cancel_receive(member.link, Kind.UPLOAD, round, posted.block)
        self._let_go(posted)
        return True

    def forget(self, member: Member) -> None:
        """Gives back the buffers of a member that will send nothing more."""
        for posted in member.posted.values():
            self._let_go(posted)
        member.posted.clear()

    def silent(self, oldest: int, now: float, limit_s: float) -> list[Member]:
        """The members that have announced an upload of the oldest open round and have room for it, but whose link has
        moved nothing for `limit_s` seconds. Empty unless other members wait for room; only then, and only now and then,
        are the links checked."""
        announced = [member for member in self._roster.here if oldest in member.announced]
        since_last = now - self._looked_at
        if all(oldest in member.posted for member in announced) or since_last < limit_s / 8:
            return []
        self._looked_at = now
        afresh = since_last > limit_s  # no member waited, or this process was paused: that time does not count
        silent = []
        for member in announced:
            if (posted := member.posted.get(oldest)) is None or member.link is None:
                continue
            moved = self._transport.native.stats(member.link).moved_bytes
            if afresh or moved != posted.moved[0]:
                posted.moved = moved, now
            elif now - posted.moved[1] > limit_s:
                silent.append(member)
        return silent

    def _next_in_line(self, oldest: int) -> Member | None:
        """The first member that has announced its upload of the oldest open round; None if such a member has already
        been let in."""
        ready = [m for m in self._roster.here if oldest in m.announced]
        if any(oldest in m.posted for m in ready):
            return None
        cohort = self._schedule.cohort(oldest)
        return next((m for m in ready if m.next_post <= oldest and m.seat in cohort), None)

    def _post(self, member: Member, round: int) -> None:
        nbytes = self._schedule.body_bytes(round)
        buffer, checks = self._buffers.take(nbytes), inspector(self._config.format, self._layout(round))
        member.posted[round] = UploadSlot(round, self._schedule.block(round), buffer, nbytes, checks)
        member.next_post = round + 1
        self._held_bytes += nbytes
        self._receive(member, member.posted[round])

    def _let_go(self, posted: UploadSlot) -> None:
        self._held_bytes -= posted.nbytes
        self._buffers.give_back(posted.buffer)

    def _receive(self, member: Member, posted: UploadSlot) -> None:
        assert member.link is not None
        layout, start = self._layout(posted.round), posted.received
        self._transport.native.receive(
            member.link, Kind.UPLOAD, posted.round, posted.block, posted.buffer, layout, start, posted.inspector
        )

    def _layout(self, round: int) -> _C.Layout:
        return body_layout(self._config.format, self._schedule.numel(round), self._config.chunk)
