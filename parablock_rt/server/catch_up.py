"""Brings clients up to date: newcomers until they begin, and clients that come back on a new connection.

Sends the parts of the model that a client lacks, and tells the client with which round to begin or continue. Decides
neither who has a seat (the roster does) nor who has fallen too far behind (eviction does). Only the server's thread may
call this module.
"""

from __future__ import annotations

import logging

from parablock_rt.errors import RoundError
from parablock_rt.server import journal, rejoin
from parablock_rt.server.attendance import Attendance
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.durability import Durability
from parablock_rt.server.intake import Intake
from parablock_rt.server.members import Member, Phase
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import RunState
from parablock_rt.server.verdicts import Verdicts
from parablock_rt.wire import protocol

log = logging.getLogger("parablock")


class CatchUp:
    """Sends the clients of one run the aggregates and blocks that they lack."""

    def __init__(
        self,
        run: RunState,
        roster: Roster,
        attendance: Attendance,
        intake: Intake,
        downlink: Downlink,
        durability: Durability,
        verdicts: Verdicts,
    ) -> None:
        self._identity = run.identity
        self._config = run.config
        self._schedule = run.schedule
        self._progress = run.progress
        self._rounds = run.rounds
        self._outcome = run.outcome
        self._roster = roster
        self._attendance = attendance
        self._intake = intake
        self._downlink = downlink
        self._durability = durability
        self._verdicts = verdicts

    # ---- Newcomers

    def take_ready(self, member: Member, message: protocol.Ready) -> None:
        """Begins to send a newcomer the blocks that it lacks. Raises PlanMismatchError when it cannot take part."""
        here = self._downlink.fingerprints
        member.check(message, self._identity, len(here))
        member.phase, member.catching_up = Phase.READY, True
        member.updates_from = self._progress.oldest
        member.applied = self._progress.oldest - 1
        member.to_send = [block for block, value in enumerate(here) if value != message.fingerprints[block]]
        self.send_snapshot(member)

    def send_snapshot(self, member: Member) -> None:
        """Sends the next block that a member lacks. If none is left, lets a member that has not begun begin."""
        assert member.link is not None
        member.sending = member.to_send.pop(0) if member.to_send else None
        self.let_copies_go()
        if member.sending is not None:
            value = self._downlink.send_block(member.link, member.sending)
            version = self._progress.oldest
            self._roster.say(member, protocol.Snapshot(block=member.sending, version=version, fingerprint=value))
        elif not member.begun:
            member.phase = Phase.SYNCED
            if self._progress.started:
                self._let_in_late(member)
            else:
                here = sum(other.synced for other in self._roster.members)
                log.info(
                    "client %d is here, from %s: %d of %d", member.seat, member.address, here, self._config.clients
                )
                self.start_if_complete()

    def start_if_complete(self, *, at_deadline: bool = False) -> None:
        """Begins the first round once all clients have joined, or at the deadline if a quorum has joined.

        Raises RoundError when there is no quorum at the deadline.
        """
        synced = [member for member in self._roster.members if member.synced]
        if len(synced) < self._config.clients and not at_deadline:
            return
        if len(synced) < self._config.quorum_size:
            raise RoundError(
                f"only {len(synced)} of {self._config.clients} clients joined within {self._config.join_timeout:g} s, "
                f"and at least {self._config.quorum_size} are needed; start the missing ones or raise --join-timeout"
            )
        self._attendance.begin_with(synced)
        self._progress.start()
        self._durability.note(*[journal.Started(seat=member.seat, first_round=0) for member in synced])
        for member in synced:
            self._let_begin(member, first_round=0)

    def _let_in_late(self, member: Member) -> None:
        """Lets a newcomer begin with the next round, or with the oldest open round if that round waits for it."""
        first_round = self._progress.oldest + (0 if member.anew or self._is_needed(member) else 1)
        open_rounds = range(first_round, self._progress.newest + 1)
        of_former_holder = [index for index in open_rounds if member.seat in self._rounds.uploads_of(index)]
        first_round = max([first_round, *(index + 1 for index in of_former_holder)])
        self._durability.note(journal.Started(seat=member.seat, first_round=first_round))
        log.info("client %d is here, from %s: it begins with round %d", member.seat, member.address, first_round)
        self._let_begin(member, first_round=first_round)

    def _let_begin(self, member: Member, *, first_round: int) -> None:
        member.first_round = first_round
        member.next_post = first_round
        member.phase = Phase.BEGUN
        self._rounds.forget_refusals(member.seat, first_round)  # of the seat's former holder
        self.has_caught_up(member)
        self._attendance.takes_part(member)
        self._roster.say(member, protocol.Begin(first_round=first_round, updates_from=member.updates_from))

    def _is_needed(self, newcomer: Member) -> bool:
        """Whether the oldest open round cannot reach its quorum without this member."""
        oldest = self._progress.oldest
        return not self._progress.all_closed and self._attendance.is_needed(newcomer, self._rounds[oldest])

    # ---- Clients that come back

    def take_rejoin(self, member: Member, message: protocol.Rejoin) -> None:
        """Continues with a client on its new connection.

        Repeats the verdicts that the client may have missed, says which uploads to resume and from which byte, and
        sends the aggregates that it missed, or whole blocks instead.
        """
        assert member.link is not None
        if member.goodbye is not None:  # the Farewell is the only message that it may have missed
            member.rejoining = False
            self._roster.say(member, protocol.Farewell())
            return
        oldest = self._progress.oldest
        rejoin.check(member, message, oldest, self._progress.newest, self._config.staleness)
        member.rejoining = False
        member.applied = message.applied
        member.updates_from = oldest
        self._attendance.takes_part(member)
        self._outcome.reconnects += 1
        for index, reason in rejoin.verdicts_owed(member, message, oldest).items():
            if reason is None:
                self._verdicts.say_late(member, index)
            else:
                self._verdicts.say(member, index, reason)
        wanted = rejoin.uploads_wanted(member, message, oldest, self._rounds)
        for index in rejoin.uploads_lost(member, message, oldest, self._rounds):
            if member.seat in self._rounds[index].cohort:
                reason = "it was refused before the server was restarted"
                self._rounds[index].refused.setdefault(member.seat, reason)
        backlog = self._downlink.backlog
        missed, whole = backlog.missed(range(message.applied + 1, oldest), self._schedule.block)
        member.catching_up = bool(missed or whole)
        self._roster.say(member, protocol.RejoinAnswer(updates_from=oldest, snapshots=whole, uploads=wanted))
        self._intake.resume(member)
        for index in missed:
            if index not in message.held:
                self._downlink.send_again(member.link, index)
            self._roster.say(member, backlog[index].update)
        member.to_send = list(whole)
        self.send_snapshot(member)
        log.warning(
            "client %d is back: %d aggregates and %d whole blocks to catch up with, %d uploads wanted",
            *(member.seat, len(missed), len(whole), len(wanted)),
        )

    # ---- Both

    def has_caught_up(self, member: Member) -> None:
        """Ends a member's catching up. From now on the lag limits of all members apply to it, raised by the aggregates
        that were sent meanwhile and that it has not applied yet."""
        member.catching_up = False
        gathered = member.left_lying(self._progress.oldest)
        member.gathered_rounds = len(gathered)
        member.gathered_bytes = sum(self._schedule.body_bytes(index) for index in gathered)

    def let_copies_go(self) -> None:
        """Frees the copies of blocks that are no longer being sent to any member."""
        self._downlink.keep_copies_of({m.sending for m in self._roster.members if m.sending is not None})
