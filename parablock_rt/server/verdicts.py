"""What clients are told about their uploads, and what is remembered of that in case they do not hear it.

Decides neither whether an upload counts nor when to say so. The server's thread alone uses it.
"""

from __future__ import annotations

import logging

from parablock_rt.config import RunConfig
from parablock_rt.schedule import Schedule
from parablock_rt.server import rejoin
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.wire import protocol

log = logging.getLogger("parablock")


class Verdicts:
    """The verdicts on all clients' uploads."""

    def __init__(self, roster: Roster, schedule: Schedule, config: RunConfig) -> None:
        self._roster = roster
        self._schedule = schedule
        self._most = config.staleness + 3  # remembered for each client

    def say(self, member: Member, index: int, reason: str) -> None:
        """Tells a member what became of its upload for a round. `reason`: why it was refused, or an empty text."""
        verdict = self._made(member, index, reason)
        member.remember(verdict, self._most)
        self._roster.say(member, verdict)

    def say_late(self, member: Member, index: int) -> None:
        """Tells a member that a round was closed without its upload.

        This is not remembered. It says no more than that there is no verdict, and a member that no longer hears
        anything gets one per round: they would take the place of a verdict that counts.
        """
        self._roster.say(member, self._made(member, index, rejoin.LATE.format(index)))

    def _made(self, member: Member, index: int, reason: str) -> protocol.Verdict:
        if reason:
            log.warning("round %d: upload of client %d rejected: %s", index, member.seat, reason)
        return protocol.Verdict(round=index, block=self._schedule.block(index), accepted=not reason, reason=reason)
