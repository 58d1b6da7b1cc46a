"""Tells clients the verdicts on their uploads, and remembers the verdicts in case a connection breaks before delivery.

Decides neither whether an upload counts nor when to say so. Only the server's thread may call this module.
"""

from __future__ import annotations

import logging

from parablock_rt.server import rejoin
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import RunState
from parablock_rt.wire import protocol

log = logging.getLogger("parablock")


class Verdicts:
    """The verdicts on all clients' uploads."""

    def __init__(self, roster: Roster, run: RunState) -> None:
        self._roster = roster
        self._schedule = run.schedule
        self._most = run.config.staleness + 3  # verdicts remembered per client

    def say(self, member: Member, index: int, reason: str) -> None:
        """Tells a member what became of its upload for a round. `reason`: why it was refused, or an empty text."""
        verdict = self._made(member, index, reason)
        member.remember(verdict, self._most)
        self._roster.say(member, verdict)

    def say_late(self, member: Member, index: int) -> None:
        """Tells a member that a round was closed without its upload.

        This message is not remembered: it only says that no verdict was reached. A member that has become unreachable
        would accumulate such a message per round, and they would displace the verdicts that matter.
        """
        self._roster.say(member, self._made(member, index, rejoin.LATE.format(index)))

    def _made(self, member: Member, index: int, reason: str) -> protocol.Verdict:
        if reason:
            log.warning("round %d: upload of client %d rejected: %s", index, member.seat, reason)
        return protocol.Verdict(
            round=index, block=self._schedule.block(index), accepted=not reason, reason=reason[: protocol.REASON_CHARS]
        )
