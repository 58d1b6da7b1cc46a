"""The conversation with the clients that hold a seat, from the first block of their snapshot to their goodbye.

Answers each message or delegates it to the module responsible, and takes uploads in. Decides neither who gets a seat
(the roster does) nor when a round closes. Only the server's thread may call this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from parablock_rt import _C
from parablock_rt.errors import DigestError, HandshakeError, ParaBlockError
from parablock_rt.server import journal, recovery
from parablock_rt.server.attendance import Attendance
from parablock_rt.server.catch_up import CatchUp
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.durability import Durability
from parablock_rt.server.eviction import Eviction
from parablock_rt.server.intake import Intake
from parablock_rt.server.journal import Past
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.server.run_state import RunState
from parablock_rt.server.throttle import ThrottledLog
from parablock_rt.server.uplink import Uplink
from parablock_rt.server.verdicts import Verdicts
from parablock_rt.server.watch import Watch
from parablock_rt.units import printable
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import Transport

log = logging.getLogger("parablock")

_STRANGER_LOG_S = 1.0


class Participants:
    """The clients of one run. `roster`: their seats; `attendance`: who takes part in which round; `intake`, `uplink`:
    their uploads; `verdicts`: what they are told about these; `catch_up`: sends lagging clients what they lack;
    `eviction`: ends the links of clients that lag too far behind."""

    def __init__(
        self,
        transport: Transport,
        run: RunState,
        downlink: Downlink,
        durability: Durability,
        watch: Watch,
        digest: Callable[[], str],
        upload_budget: int,
    ) -> None:
        """`digest`: returns the digest of the server's current bits."""
        self.roster = Roster(transport, run.identity, self)
        self.attendance = Attendance(self.roster, run.config)
        self.intake = Intake(transport, downlink.buffers, self.roster, run, upload_budget)
        self.uplink = Uplink(self.intake, run.rounds, run.timeline, run.config.format)
        self.verdicts = Verdicts(self.roster, run)
        self.catch_up = CatchUp(run, self.roster, self.attendance, self.intake, downlink, durability, self.verdicts)
        self.eviction = Eviction(
            transport, run, self.roster, self.intake, self.verdicts, self.dismiss, downlink.snapshot_bytes
        )
        self._transport = transport
        self._schedule = run.schedule
        self._progress = run.progress
        self._rounds = run.rounds
        self._outcome = run.outcome
        self._downlink = downlink
        self._durability = durability
        self._watch = watch
        self._digest = digest
        self._strangers = ThrottledLog(log, _STRANGER_LOG_S)

    # ---- Messages

    def take(self, member: Member, message: protocol.Message) -> None:
        """Answers a member's message. Raises ParaBlockError for a message that the member may not send; the caller
        then ends the member's link."""
        match message:
            case protocol.Ready() if not member.ready:
                self.catch_up.take_ready(member, message)
            case protocol.Rejoin() if member.rejoining:
                self.catch_up.take_rejoin(member, message)
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
        if message.round > self._progress.newest:
            raise HandshakeError(
                f"an upload for round {message.round} was announced while round {self._progress.oldest} is open"
            )
        if message.round < member.first_round or member.seat not in self._schedule.cohort(message.round):
            raise HandshakeError(f"client {member.seat} does not train in round {message.round}")
        self.attendance.takes_part(member)
        if message.round < self._progress.oldest:
            return  # the round was closed meanwhile, and the client has been told
        if member.seat in self._rounds.uploads_of(message.round):
            raise HandshakeError(f"round {message.round} has an upload of client {member.seat} already")
        if message.round < member.next_post and message.round not in member.posted:
            return  # the upload was refused, and the client has been told
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
            self.catch_up.has_caught_up(member)

    def _take_goodbye(self, member: Member, message: protocol.Goodbye) -> None:
        if member.goodbye is not None:
            self.roster.say(member, protocol.Farewell())
            return
        if not message.reason and message.digest != self._digest():
            raise DigestError(f"client {member.seat} ends with other bits than the server")
        self._outcome.goodbyes[member.seat] = message
        if message.reason:
            link = member.link
            self.roster.vacate(member, printable(message.reason))
            self.attendance.give_up([member.seat])  # nobody will come back to it, so a round with a quorum may close
            if link is not None:  # otherwise a client that keeps joining and leaving could use up all connections
                self._transport.native.close_link(link, "the client has left")
            return
        self._durability.note(journal.Finished(seat=member.seat, goodbye=message))
        member.goodbye = message
        self._outcome.client_digests[member.seat] = message.digest
        self.roster.say(member, protocol.Farewell())

    # ---- Uploads

    def upload_arrived(self, member: Member, event: _C.Event) -> None:
        """Takes in an upload whose last byte has arrived, and tells the client whether it counts.

        With a durable state, an acceptance is sent only once the round is closed and on the disk. Until then the client
        keeps its upload, and sends it again if the server was killed and resumed meanwhile.
        """
        if (taken := self.uplink.take(member, event)) is None:
            return
        self._watch.uploaded(event.first_byte_ns, event.at_ns)
        if taken.reason or not self._durability.is_kept:
            self.verdicts.say(member, taken.round, taken.reason)

    # ---- Going

    def gone(self, event: _C.Event, now: float) -> None:
        """Handles the end of a connection, whether its peer had a seat or not."""
        member = self.roster.on(event.link)
        candidate = self.roster.forget(event.link)
        if candidate is not None and not event.became_lane:
            self._strangers.warn(f"a connection from {candidate.address} ended before it had a seat: {event.text}")
        if member is not None:
            self._lose(member, event, now)

    def _lose(self, member: Member, event: _C.Event, now: float) -> None:
        """A member that has begun keeps its seat, and the transfers that were in flight can be resumed."""
        if not member.begun:
            self.roster.vacate(member, event.text)
            return
        self.roster.lose(member, event.text, event.unfinished, now)
        self.catch_up.let_copies_go()
        if member.goodbye is None:
            log.warning("client %d lost its connection (%s); its seat is kept for it", member.seat, event.text)

    def dismiss(self, link: int, error: ParaBlockError) -> None:
        """Tells the peer why the conversation ends, closes the link and vacates the peer's seat, if it has one."""
        if (candidate := self.roster.candidate(link)) is not None:
            self._strangers.warn(f"dismissing {candidate.address}: {error}")
        else:
            log.warning("dismissing a client: %s", error)
        self._transport.send_message(link, protocol.Failure(error=type(error).__name__, reason=str(error)))
        self._transport.native.close_link(link, str(error))
        self.roster.forget(link)
        if (member := self.roster.on(link)) is not None:
            self.roster.vacate(member, str(error))

    def seated(self, member: Member) -> None:
        """The roster calls this: a newcomer got a seat."""
        self._durability.note(journal.Seated(seat=member.seat, secret=member.secret))
        log.debug("client %d connects from %s", member.seat, member.address)

    def vacated(self, member: Member, reason: str) -> None:
        """The roster calls this: a seat is free, and everything kept for its holder is dropped."""
        self.intake.forget(member)
        self.catch_up.let_copies_go()
        self._durability.note(journal.Vacated(seat=member.seat, reason=reason))
        self._outcome.left = journal.with_left(self._outcome.left, member.seat, reason)
        log.warning("client %d is gone: %s", member.seat, reason)

    # ---- After a restart of the server

    def restore(self, past: Past, state: Checkpoint) -> None:
        """Resumes the run where an earlier server left it. Raises CheckpointError when an aggregate is damaged."""
        self._outcome.add(record.closed for record in past.closed)
        self._outcome.resumed_from = len(past.closed)
        self._outcome.left = list(past.left)
        self._durability.restore(self._outcome.rounds)
        for member in recovery.members(past):
            self.roster.restore(member)
            if member.goodbye is not None:
                self._outcome.goodbyes[member.seat] = member.goodbye
                self._outcome.client_digests[member.seat] = member.goodbye.digest
        self.attendance.resume_with(self.roster.members, past.given_up)
        self.uplink.restore(past.closed[-1].closed.bytes_up if past.closed else 0)
        self._downlink.restore(past, state)
        open_s = [record.closed.open_s for record in past.closed if record.complete]
        self._progress.restore(len(past.closed), open_s, started=bool(self.roster.members or past.closed))
