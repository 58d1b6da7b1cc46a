"""Evicts members that take too long: ends their links or refuses their uploads, so that others need not wait for them.

Checks the members whenever the event loop asks. The callback `dismiss` tells an evicted member why. Only the server's
thread may call this module.
"""

from __future__ import annotations

from collections.abc import Callable

from parablock_rt.errors import HandshakeError, ParaBlockError, RoundError
from parablock_rt.server import roster
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import RunState
from parablock_rt.server.verdicts import Verdicts
from parablock_rt.wire.transport import Transport

_SILENT_S = 10.0
_LEAST_READY_S = 60.0  # a large model's fingerprints take their time
MAX_LAG = 32  # rounds whose aggregates a connected client may leave unapplied
UPDATE_BUDGET = 2**30  # bytes of aggregates that it may leave unapplied, not counting the newest ones


class Eviction:
    """The limits of what one client may cost the others."""

    def __init__(
        self,
        transport: Transport,
        run: RunState,
        roster: Roster,
        intake: Intake,
        verdicts: Verdicts,
        dismiss: Callable[[int, ParaBlockError], None],
        snapshot_bytes: int,
    ) -> None:
        """`dismiss`: ends a link and tells the peer why. `snapshot_bytes`: the size of all blocks together, sent
        whole."""
        self._transport = transport
        self._config = run.config
        self._schedule = run.schedule
        self._progress = run.progress
        self._rounds = run.rounds
        self._roster = roster
        self._intake = intake
        self._verdicts = verdicts
        self._dismiss = dismiss
        self._snapshot_bytes = snapshot_bytes

    def refuse_silent(self, now: float) -> None:
        """Refuses uploads that make no progress while other members wait for their room."""
        oldest = self._progress.oldest
        limit_s = min(_SILENT_S, self._progress.deadline.seconds / 2)
        for member in self._intake.silent(oldest, now, limit_s):
            reason = f"nothing of it came for {limit_s:g} s, and others waited for its room"
            self._rounds[oldest].refused.setdefault(member.seat, reason)
            self._intake.refuse(member, oldest)
            self._verdicts.say(member, oldest, reason)

    def dismiss_overdue(self, now: float) -> None:
        """Ends the links of members that do not send their Ready or Rejoin in time, or that lag too far behind.

        A member that has reconnected without sending its Rejoin keeps its seat: its next connection may work.
        """
        longest = max(_LEAST_READY_S, self._config.join_timeout)
        for member in [m for m in self._roster.members if m.link is not None]:
            assert member.link is not None
            silent_s = now - member.seated_at
            if member.rejoining and silent_s > roster.HANDSHAKE_S:
                member.seated_at = now  # do not close it again before its CLOSED event
                self._transport.native.close_link(member.link, "the client did not say where it stands")
            elif not member.ready and silent_s > longest:
                error = HandshakeError(f"a client has {longest:g} s to say what its model holds; join again")
                self._dismiss(member.link, error)
        for member in [m for m in self._roster.here if m.ready and self._lags(m)]:
            assert member.link is not None
            behind = self._progress.oldest - 1 - member.applied
            reason = f"this client fell {behind} rounds behind; join again for a snapshot"
            if member.catching_up:
                what = "what it missed" if member.begun else "its snapshot"
                reason = f"{behind} rounds have closed while this client took {what}: its link is too slow for them"
            self._dismiss(member.link, RoundError(reason))

    def _lags(self, member: Member) -> bool:
        """Whether a member has left more aggregates unapplied than allowed. Receiving a snapshot, or what a client
        missed while it was away, may take many rounds, as long as the aggregates sent since are no larger than a
        snapshot (or the update budget, if that is more)."""
        behind = member.left_lying(self._progress.oldest)
        newest = self._config.staleness + 2
        weight = sum(self._schedule.body_bytes(index) for index in behind[:-newest])
        if member.catching_up:
            return weight > max(UPDATE_BUDGET, self._snapshot_bytes)
        rounds = MAX_LAG + self._config.staleness + member.gathered_rounds
        return len(behind) > rounds or weight > UPDATE_BUDGET + member.gathered_bytes
