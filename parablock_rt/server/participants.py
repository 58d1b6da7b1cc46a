"""The conversation with those who hold a seat: from the first block of their snapshot to their goodbye.

Answers each message, asks for uploads and takes them in, brings up to date who comes late or comes back. Decides
neither who gets a seat (the roster) nor when a round closes. The server's thread alone uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from parablock_rt import _C
from parablock_rt.errors import DigestError, HandshakeError, ParaBlockError, RoundError
from parablock_rt.observe.timeline import Timeline
from parablock_rt.schedule import Schedule
from parablock_rt.server import journal, recovery, rejoin, roster
from parablock_rt.server.attendance import Attendance
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.durability import Durability
from parablock_rt.server.intake import Intake
from parablock_rt.server.journal import Past
from parablock_rt.server.members import Identity, Member
from parablock_rt.server.outcome import Outcome
from parablock_rt.server.progress import Progress
from parablock_rt.server.roster import Roster
from parablock_rt.server.rounds import OpenRounds
from parablock_rt.server.throttle import ThrottledLog
from parablock_rt.server.uplink import Uplink
from parablock_rt.server.watch import Watch
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import Transport

log = logging.getLogger("parablock")

_STRANGER_LOG_S = 1.0
_SILENT_S = 10.0
_LEAST_READY_S = 60.0  # a large model's fingerprints take their time
MAX_LAG = 32  # rounds that a connected client may leave its aggregates lying
UPDATE_BUDGET = 2**30  # bytes of aggregates that it may leave lying, the newest ones apart


class Participants:
    """The clients of one run. `roster`: their seats; `attendance`: who takes part in which round; `intake`, `uplink`:
    what they send."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        schedule: Schedule,
        progress: Progress,
        rounds: OpenRounds,
        downlink: Downlink,
        durability: Durability,
        watch: Watch,
        timeline: Timeline,
        outcome: Outcome,
        digest: Callable[[], str],
        upload_budget: int,
        update_budget: int = UPDATE_BUDGET,
    ) -> None:
        """`digest`: of the server's own bits, as they are now."""
        self.roster = Roster(transport, identity, self)
        self.attendance = Attendance(self.roster, identity.config)
        self.intake = Intake(transport, downlink.buffers, self.roster, identity.config, schedule, upload_budget)
        self.uplink = Uplink(self.intake, rounds, timeline, identity.config.format)
        self._transport = transport
        self._identity = identity
        self._config = identity.config
        self._schedule = schedule
        self._progress = progress
        self._rounds = rounds
        self._downlink = downlink
        self._durability = durability
        self._watch = watch
        self._outcome = outcome
        self._digest = digest
        self._update_budget = update_budget
        self._strangers = ThrottledLog(log, _STRANGER_LOG_S)

    # ---- Messages

    def take(self, member: Member, message: protocol.Message) -> None:
        """Answers a member. Raises ParaBlockError for what it may not say, which ends its link."""
        match message:
            case protocol.Ready() if not member.ready:
                self._take_ready(member, message)
            case protocol.Rejoin() if member.rejoining:
                self._take_rejoin(member, message)
            case _ if member.rejoining:
                raise HandshakeError(f"expected Rejoin, found {type(message).__name__}")
            case protocol.Upload() if member.begun:
                self._take_announcement(member, message)
            case protocol.Applied() if member.begun:
                self._take_applied(member, message)
            case protocol.Goodbye() if message.reason or self._progress.all_closed:
                self._take_goodbye(member, message)
            case _:
                raise HandshakeError(f"{type(message).__name__} has no place here")

    def _take_announcement(self, member: Member, message: protocol.Upload) -> None:
        if message.round > self._progress.oldest + self._config.staleness:
            raise HandshakeError(
                f"an upload for round {message.round} was announced while round {self._progress.oldest} is open"
            )
        self.attendance.takes_part(member)
        if message.round < self._progress.oldest:
            return  # it was closed meanwhile, and the client has been told
        if member.seat in self._rounds.uploads_of(message.round):
            raise HandshakeError(f"round {message.round} has an upload of client {member.seat} already")
        member.announced[message.round] = message
        posted = member.posted.get(message.round)
        if posted is not None and posted.arrived is not None:
            self.upload_arrived(member, posted.arrived)

    def _take_applied(self, member: Member, message: protocol.Applied) -> None:
        closed = self._outcome.rounds
        if not 0 <= message.round < len(closed) or message.fingerprint != closed[message.round].fingerprint:
            raise DigestError(f"client {member.seat} holds other bits than the server after round {message.round}")
        member.applied = max(member.applied, message.round)
        if member.catching_up and member.applied >= member.updates_from:
            self._has_caught_up(member)

    def _take_goodbye(self, member: Member, message: protocol.Goodbye) -> None:
        if not message.reason and message.digest != self._digest():
            raise DigestError(f"client {member.seat} ends with other bits than the server")
        self._outcome.goodbyes[member.seat] = message
        if message.reason:
            printable = "".join(letter if letter.isprintable() else "?" for letter in message.reason)
            link = member.link
            self.roster.vacate(member, printable)
            if link is not None:  # else whoever joins and leaves again and again would hold every connection there is
                self._transport.native.close_link(link, "the client has left")
            return
        self._durability.note(journal.Finished(seat=member.seat, goodbye=message))
        member.goodbye = message
        self._outcome.client_digests[member.seat] = message.digest
        self.roster.say(member, protocol.Farewell())

    # ---- Uploads

    def upload_arrived(self, member: Member, event: _C.Event) -> None:
        """The last byte of an upload is here. Says whether it counts: with a durable state not before the round is
        closed and that is on the disk. Until then a client keeps its upload, and sends it again to a server that was
        killed meanwhile.
        """
        if (taken := self.uplink.take(member, event)) is None:
            return
        self._watch.uploaded(event.first_byte_ns, event.at_ns)
        if taken.reason or not self._durability.is_kept:
            self.say_verdict(member, taken.round, taken.reason)

    def refuse_silent(self, now: float) -> None:
        """Room that others wait for is not kept for an upload of which nothing comes."""
        oldest = self._progress.oldest
        limit_s = min(_SILENT_S, self._progress.deadline.seconds / 2)
        for member in self.intake.silent(oldest, now, limit_s):
            reason = f"nothing of it came for {limit_s:g} s, and others waited for its room"
            self._rounds[oldest].refused.setdefault(member.seat, reason)
            self.intake.refuse(member, oldest)
            self.say_verdict(member, oldest, reason)

    def say_verdict(self, member: Member, index: int, reason: str) -> None:
        """Tells a member what became of its upload for a round. `reason`: why it was refused, or an empty text."""
        verdict = self._verdict(member, index, reason)
        member.remember(verdict, self._config.staleness + 3)
        self.roster.say(member, verdict)

    def say_late(self, member: Member, index: int) -> None:
        """Tells a member that a round was closed without its upload.

        This is not remembered. It says no more than that there is no verdict, and a member that no longer hears
        anything gets one per round: they would take the place of a verdict that counts.
        """
        self.roster.say(member, self._verdict(member, index, rejoin.LATE.format(index)))

    def _verdict(self, member: Member, index: int, reason: str) -> protocol.Verdict:
        if reason:
            log.warning("round %d: upload of client %d rejected: %s", index, member.seat, reason)
        return protocol.Verdict(round=index, block=self._schedule.block(index), accepted=not reason, reason=reason)

    # ---- Coming

    def _take_ready(self, member: Member, message: protocol.Ready) -> None:
        here = self._downlink.fingerprints
        member.check(message, self._identity, len(here))
        member.ready = member.catching_up = True
        member.updates_from = self._progress.oldest
        member.applied = self._progress.oldest - 1
        member.to_send = [block for block, value in enumerate(here) if value != message.fingerprints[block]]
        self.send_snapshot(member)

    def send_snapshot(self, member: Member) -> None:
        """Sends the next block that a member lacks, or lets it begin if it has not yet."""
        assert member.link is not None
        member.sending = member.to_send.pop(0) if member.to_send else None
        self._let_copies_go()
        if member.sending is not None:
            value = self._downlink.send_block(member.link, member.sending)
            version = self._progress.oldest
            self.roster.say(member, protocol.Snapshot(block=member.sending, version=version, fingerprint=value))
        elif not member.begun:
            member.synced = True
            if self._progress.started:
                self._let_in_late(member)
            else:
                self.start_if_complete()

    def _let_copies_go(self) -> None:
        self._downlink.keep_copies_of({m.sending for m in self.roster.members if m.sending is not None})

    def start_if_complete(self, *, at_deadline: bool = False) -> None:
        """Begins the first round once all clients are there; at the deadline with a quorum. Raises RoundError when that
        is not there either."""
        synced = [member for member in self.roster.members if member.synced]
        if len(synced) < self._config.clients and not at_deadline:
            return
        if len(synced) < self._config.quorum_size:
            raise RoundError(
                f"only {len(synced)} of {self._config.clients} clients joined within {self._config.join_timeout:g} s, "
                f"and at least {self._config.quorum_size} are needed; start the missing ones or raise --join-timeout"
            )
        self.attendance.begin_with(synced)
        self._progress.start()
        self._durability.note(*[journal.Started(seat=member.seat, first_round=0) for member in synced])
        for member in synced:
            self._let_begin(member, first_round=0)

    def _let_in_late(self, member: Member) -> None:
        """A newcomer begins with the next round; with the oldest open one if that waits for it."""
        first_round = self._progress.oldest + (0 if member.anew or self._is_needed(member) else 1)
        open_rounds = range(first_round, self._progress.oldest + self._config.staleness + 1)
        of_former_holder = [index for index in open_rounds if member.seat in self._rounds.uploads_of(index)]
        first_round = max([first_round, *(index + 1 for index in of_former_holder)])
        self._durability.note(journal.Started(seat=member.seat, first_round=first_round))
        self._let_begin(member, first_round=first_round)

    def _let_begin(self, member: Member, *, first_round: int) -> None:
        member.first_round = first_round
        member.next_post = first_round
        member.begun = True
        self._rounds.forget_refusals(member.seat, first_round)  # of the seat's former holder
        self._has_caught_up(member)
        self.attendance.takes_part(member)
        self.roster.say(member, protocol.Begin(first_round=first_round, updates_from=member.updates_from))

    def _has_caught_up(self, member: Member) -> None:
        """From here on it may leave as much lying as others, and what has gathered so far."""
        member.catching_up = False
        gathered = self._left_lying(member)
        member.gathered_rounds, member.gathered_bytes = len(gathered), self._weight(gathered)

    def _is_needed(self, newcomer: Member) -> bool:
        """Whether the oldest open round waits for this very member."""
        oldest = self._progress.oldest
        return not self._progress.all_closed and self.attendance.is_needed(newcomer, self._rounds[oldest])

    def _take_rejoin(self, member: Member, message: protocol.Rejoin) -> None:
        """Goes on with a client on its new connection: says the verdicts that it may have missed, which uploads are
        wanted and from which byte, and sends the aggregates of the rounds since, or their blocks."""
        assert member.link is not None
        if member.goodbye is not None:  # all that it may have missed is the answer to that
            member.rejoining = False
            self.roster.say(member, protocol.Farewell())
            return
        oldest = self._progress.oldest
        rejoin.check(member, message, oldest, self._config.staleness)
        member.rejoining = False
        member.applied = message.applied
        member.updates_from = oldest
        self.attendance.takes_part(member)
        self._outcome.reconnects += 1
        for index, reason in rejoin.verdicts_owed(member, message, oldest).items():
            if reason is None:
                self.say_late(member, index)
            else:
                self.say_verdict(member, index, reason)
        wanted = rejoin.uploads_wanted(member, message, oldest, self._rounds)
        for index in rejoin.uploads_lost(member, message, oldest, self._rounds):
            if member.seat in self._rounds[index].cohort:
                reason = "it was refused before the server was restarted"
                self._rounds[index].refused.setdefault(member.seat, reason)
        backlog = self._downlink.backlog
        missed, whole = backlog.missed(range(message.applied + 1, oldest), self._schedule.block)
        member.catching_up = bool(missed or whole)
        self.roster.say(member, protocol.RejoinAnswer(updates_from=oldest, snapshots=whole, uploads=wanted))
        self.intake.resume(member)
        for index in missed:
            if index not in message.held:
                self._downlink.send_again(member.link, index)
            self.roster.say(member, backlog[index].update)
        member.to_send = list(whole)
        self.send_snapshot(member)
        log.warning(
            "client %d is back: %d aggregates and %d whole blocks to catch up with, %d uploads wanted",
            *(member.seat, len(missed), len(whole), len(wanted)),
        )

    # ---- Going

    def gone(self, event: _C.Event, now: float) -> None:
        """A connection has ended, a client's or that of somebody who has no seat yet."""
        member = self.roster.on(event.link)
        if (candidate := self.roster.forget(event.link)) is not None:
            self._strangers.warn(f"a connection from {candidate.address} ended before it had a seat: {event.text}")
        if member is not None:
            self._lose(member, event, now)

    def _lose(self, member: Member, event: _C.Event, now: float) -> None:
        """One who takes part keeps the seat, and all that was on its way."""
        if not member.begun:
            self.roster.vacate(member, event.text)
            return
        self.roster.lose(member, event.text, event.unfinished, now)
        self._let_copies_go()
        if member.goodbye is None:
            log.warning("client %d lost its connection (%s); its seat is kept for it", member.seat, event.text)

    def dismiss(self, link: int, error: ParaBlockError) -> None:
        """Tells whoever is at the other end why the conversation ends, and ends it."""
        if (candidate := self.roster.candidate(link)) is not None:
            self._strangers.warn(f"dismissing {candidate.address}: {error}")
        else:
            log.warning("dismissing a client: %s", error)
        self._transport.send_message(link, protocol.Failure(error=type(error).__name__, reason=str(error)))
        self._transport.native.close_link(link, str(error))
        self.roster.forget(link)
        if (member := self.roster.on(link)) is not None:
            self.roster.vacate(member, str(error))

    def dismiss_overdue(self, now: float) -> None:
        """Ends the links of those who do not say what they must, or leave more lying than is kept for one.

        One that has come back and says nothing keeps its seat: it may do better on another connection.
        """
        longest = max(_LEAST_READY_S, self._config.join_timeout)
        for member in [m for m in self.roster.members if m.link is not None]:
            assert member.link is not None
            silent_s = now - member.seated_at
            if member.rejoining and silent_s > roster.HANDSHAKE_S:
                member.seated_at = now  # until its end is heard of
                self._transport.native.close_link(member.link, "the client did not say where it stands")
            elif not member.ready and silent_s > longest:
                error = HandshakeError(f"a client has {longest:g} s to say what its model holds; join again")
                self.dismiss(member.link, error)
        for member in [m for m in self.roster.here if m.ready and self._lags(m)]:
            assert member.link is not None
            behind = self._progress.oldest - 1 - member.applied
            reason = f"this client fell {behind} rounds behind; join again for a snapshot"
            if member.catching_up:
                what = "what it missed" if member.begun else "its snapshot"
                reason = f"{behind} rounds have closed while this client took {what}: its link is too slow for them"
            self.dismiss(member.link, RoundError(reason))

    def _lags(self, member: Member) -> bool:
        """Whether more is kept for a member than one may leave lying. A snapshot may take many rounds, and so may what
        a client missed while it was away, as long as the aggregates since weigh no more than a snapshot."""
        behind = self._left_lying(member)
        newest = self._config.staleness + 2
        weight = self._weight(behind[:-newest])
        if member.catching_up:
            return weight > max(self._update_budget, self._downlink.snapshot_bytes)
        rounds = MAX_LAG + self._config.staleness + member.gathered_rounds
        return len(behind) > rounds or weight > self._update_budget + member.gathered_bytes

    def _left_lying(self, member: Member) -> range:
        """The closed rounds whose aggregates were sent to a member as they closed, and that it has not applied."""
        return range(max(member.applied + 1, member.updates_from), self._progress.oldest)

    def _weight(self, rounds: range) -> int:
        return sum(self._schedule.body_bytes(index) for index in rounds)

    def seated(self, member: Member) -> None:
        """For the roster: a newcomer got a seat."""
        self._durability.note(journal.Seated(seat=member.seat, secret=member.secret))
        log.info("client %d joined from %s", member.seat, member.address)

    def vacated(self, member: Member, reason: str) -> None:
        """For the roster: a seat is free, and with it what was kept of its holder."""
        self.intake.forget(member)
        self._let_copies_go()
        self._durability.note(journal.Vacated(seat=member.seat, reason=reason))
        self._outcome.left = journal.with_left(self._outcome.left, member.seat, reason)
        log.warning("client %d is gone: %s", member.seat, reason)

    # ---- After a restart of the server

    def restore(self, past: Past, state: Checkpoint) -> None:
        """Takes up the run where an earlier server left it. Raises CheckpointError when an aggregate is damaged."""
        self._outcome.add(record.closed for record in past.closed)
        self._outcome.left = list(past.left)
        self._durability.restore(self._outcome.rounds)
        for member in recovery.members(past):
            self.roster.restore(member)
            if member.goodbye is not None:
                self._outcome.goodbyes[member.seat] = member.goodbye
                self._outcome.client_digests[member.seat] = member.goodbye.digest
        self.attendance.resume_with(self.roster.members, past.closed[-1].given_up if past.closed else ())
        self.uplink.restore(past.closed[-1].closed.bytes_up if past.closed else 0)
        self._downlink.restore(past, state)
        open_s = [record.closed.open_s for record in past.closed if record.complete]
        self._progress.restore(len(past.closed), open_s, started=bool(self.roster.members or past.closed))
