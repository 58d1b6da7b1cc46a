"""The server's event loop: admits clients, folds what they deliver, closes rounds, broadcasts the aggregates.

One thread runs it and owns everything here; only `stop` may be called by others. Payload bytes move in native code
meanwhile: this thread sees that an upload is complete, never the bytes on their way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from parablock_rt import _C
from parablock_rt.blocks.fingerprint import digest
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.errors import CheckpointError, DigestError, HandshakeError, ParaBlockError, RoundError
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.schedule import block_of
from parablock_rt.server import checkpoint, comeback, recovery
from parablock_rt.server.attendance import Attendance
from parablock_rt.server.checkpoint import Checkpoint, Past
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.intake import LARGEST_UPLOAD_BUDGET, Intake
from parablock_rt.server.journal import Journal
from parablock_rt.server.master import Master
from parablock_rt.server.members import Candidate, Identity, Member
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.server.roster import Roster
from parablock_rt.server.rounds import Deadline, OpenRounds, Round
from parablock_rt.server.throttle import ThrottledLog
from parablock_rt.server.uplink import Uplink
from parablock_rt.server.visitors import PURPOSES, Visitors
from parablock_rt.server.watch import Watch
from parablock_rt.staging.stager import Stager
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport, describe

log = logging.getLogger("parablock")

_STRANGER_LOG_S = 1.0
_NOBODY_LEFT_S = 30.0
_GOODBYE_S = 60.0
_TURN_S = 0.05  # the longest that the loop waits for an event
_PAUSED_S = 5.0  # a turn of the loop that took longer than this was a stopped process or a sleeping machine
_MAX_LAG = 32  # rounds that a connected client may leave its aggregates lying
UPDATE_BUDGET = 2**30  # bytes of aggregates that it may leave lying, the newest ones apart
_EVENTS_AT_ONCE = 32  # before rounds and clocks are looked at again


class Coordinator:
    """One run, from the first connection to the last goodbye."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        plan: BlockPlan,
        master: Master,
        on_round: Callable[[ClosedRound], None] | None = None,
        upload_budget: int = LARGEST_UPLOAD_BUDGET,
        update_budget: int = UPDATE_BUDGET,
        state: Checkpoint | None = None,
        past: Past | None = None,
        trace: bool = True,
    ) -> None:
        """`state`: where the run is kept so that it outlives this process. `past`: what an earlier one has left there;
        `master` has been restored from it."""
        self.outcome = Outcome()
        self.timeline = Timeline("server", "pb-server", on=trace)
        self.timeline.run = identity.run
        self._transport = transport
        self._identity = identity
        self._config = identity.config
        self._plan = plan
        self._master = master
        self._on_round = on_round
        self._update_budget = update_budget
        stager = Stager(self.timeline.transfer_ring("pb-encode", plan, self._config, links=1))
        self._downlink = Downlink(transport, master, self._config.chunk, stager, self.timeline)
        links = self._config.cohort_size
        transport.native.record(self.timeline.transfer_ring("pb-transport", plan, self._config, links))
        self._journal = Journal(state, master, self.timeline)
        self._roster = Roster(transport, identity, self)
        self._attendance = Attendance(self._roster, self._config)
        self._rounds = OpenRounds(self._config, self._numel_of)
        self._intake = Intake(transport, stager.buffers, self._roster, self._config, self._numel_of, upload_budget)
        self._uplink = Uplink(self._intake, self._rounds, self._attendance, self.timeline, self._config.format)
        self._watch = Watch(self._config)
        self._visitors = Visitors(transport, identity.run, self._watch, self._status)
        self._strangers = ThrottledLog(log, _STRANGER_LOG_S)
        self._oldest = 0
        self._oldest_since = time.monotonic()
        self._started_at: float | None = None
        self._lonely_since: float | None = None
        self._deadline = Deadline(self._config.deadline)
        self._stop_reason: str | None = None
        if past is not None and state is not None:
            self._restore(past, state)

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._config

    def link_stats(self) -> dict[str, _C.LinkStats]:
        """What the link to each client is like now. Any thread."""
        native = self._transport.native
        return {f"client-{m.seat}": native.stats(m.link) for m in self._roster.members if m.link is not None}

    def stop(self, reason: str) -> None:
        """Ends the run soon; every client is told why. Any thread."""
        self._stop_reason = reason

    def run(self) -> None:
        """Returns when every client has said goodbye. Raises RoundError or another ParaBlockError; `outcome` is
        valid in any case."""
        try:
            turn = time.monotonic()
            while not self._over():
                if self._stop_reason is not None:
                    raise ParaBlockError(f"the server was stopped: {self._stop_reason}")
                turn, before = time.monotonic(), turn
                # What clients said meanwhile is still to be read: they are not late.
                if turn - before > min(_PAUSED_S, max(self._deadline.seconds / 2, 10 * _TURN_S)):
                    self._oldest_since += turn - before
                for at_once in range(_EVENTS_AT_ONCE):
                    event = self._transport.next_event(0.0 if at_once else _TURN_S)
                    if event is None:
                        break
                    self._take(event)
                self._settle(idle=event is None and at_once == 0)
        except ParaBlockError as error:
            self._tell_all(error)
            raise
        except Exception as error:
            self._tell_all(ParaBlockError(f"the server failed with {type(error).__name__}; its own output says why"))
            raise
        finally:
            if self._started_at is not None:
                self.outcome.wall_s = time.monotonic() - self._started_at
            self.outcome.server_stages = self.timeline.stages.total()
            self.outcome.digest = self._digest()
            self.outcome.left = self._attendance.gone(self.outcome.left)

    def _settle(self, *, idle: bool = False) -> None:
        """What follows from the events that were taken, and from the time. `idle`: there was none for a while."""
        self._fold(lambda round: idle or self._uplink.is_worth_a_pass(round))
        self._check_clock()
        self._close_rounds()
        if self._started_at is not None:
            self._intake.let_in(self._oldest)

    def _tell_all(self, error: ParaBlockError) -> None:
        for member in self._roster.members:
            if member.link is not None:
                failure = protocol.Failure(error=type(error).__name__, reason=str(error))
                self._transport.send_message(member.link, failure)

    def _digest(self) -> str:
        return digest(self._plan, self._master.fingerprints)

    def _say(self, member: Member, message: protocol.Message) -> None:
        if member.here:
            assert member.link is not None
            self._transport.send_message(member.link, message)

    # ---- Events

    def _take(self, event: _C.Event) -> None:
        kinds = _C.Event.Type
        if event.type == kinds.CLOSED or (event.type == kinds.SENT and event.kind == Kind.SNAPSHOT):
            self._fold()  # who goes or begins now does so after what has arrived
        member = self._roster.on(event.link)
        if event.type == kinds.CONNECTED:
            self._roster.connected(event.link, event.text, time.monotonic())
        elif event.type == kinds.CLOSED:
            self._visitors.leave(event.link)
            if (candidate := self._roster.forget(event.link)) is not None:
                self._strangers.warn(f"a connection from {candidate.address} ended before it had a seat: {event.text}")
            if member is not None:
                self._lose(member, event)
        elif event.type == kinds.CONTROL:
            self._take_message(event.link, event.message)
        elif member is not None:
            if event.type == kinds.RECEIVED:
                self._take_upload(member, event)
            elif event.type == kinds.SENT and event.kind == Kind.SNAPSHOT:
                self._send_snapshot(member)
            elif event.type == kinds.STALLED:
                log.warning("client %d, %s: %s", member.seat, describe(event), event.text)
            elif event.type == kinds.SENT and event.kind == Kind.UPDATE:
                self._watch.updated(event.first_byte_ns, event.at_ns)
                self.timeline.stages.add("send", event.first_byte_ns, event.at_ns)

    def _take_message(self, link: int, data: bytes) -> None:
        """Hands a message to whom it concerns. What a client does wrong ends its link, never the run."""
        try:
            message = protocol.decode(data)
            if not isinstance(message, (protocol.Upload, protocol.Applied)):
                self._fold()  # one who comes back, or leaves, is told of what has arrived
            if (candidate := self._roster.candidate(link)) is not None:
                self._take_candidate(candidate, message)
            elif self._visitors.serves(link):
                self._visitors.take(link, message)
            elif (member := self._roster.on(link)) is not None:
                self.timeline.seats[link] = member.seat
                self._take_member(member, message)
        except ParaBlockError as error:
            if isinstance(error, CheckpointError):
                raise
            self.dismiss(link, error)

    def _take_candidate(self, candidate: Candidate, message: protocol.Message) -> None:
        self._roster.take(candidate, message, time.monotonic())
        if candidate.proved and candidate.purpose in PURPOSES:
            self._visitors.admit(candidate)
            self._roster.forget(candidate.link)

    def _status(self) -> protocol.Status:
        present = [member for member in self._roster.members if member.link is not None]
        return self._watch.status(present, self.outcome, self._started_at, self._oldest_since)

    def _take_member(self, member: Member, message: protocol.Message) -> None:
        match message:
            case protocol.Ready() if not member.ready:
                member.check(message, self._identity, len(self._master.blocks))
                member.ready = True
                member.updates_from = self._oldest
                member.applied = self._oldest - 1
                here = self._master.fingerprints
                member.to_send = [b for b, value in enumerate(here) if value != message.fingerprints[b]]
                self._send_snapshot(member)
            case protocol.Rejoin() if member.rejoining:
                self._take_rejoin(member, message)
            case _ if member.rejoining:
                raise HandshakeError(f"expected Rejoin, found {type(message).__name__}")
            case protocol.Upload() if member.begun:
                self._note_upload(member, message)
            case protocol.Applied() if member.begun:
                self._check_applied(member, message)
            case protocol.Goodbye() if message.reason or self._oldest == self._config.rounds:
                self._take_goodbye(member, message)
            case _:
                raise HandshakeError(f"{type(message).__name__} has no place here")

    def _note_upload(self, member: Member, message: protocol.Upload) -> None:
        if message.round > self._oldest + self._config.staleness:
            raise HandshakeError(
                f"an upload for round {message.round} was announced while round {self._oldest} is open"
            )
        if message.round < self._oldest:
            return  # it was closed meanwhile, and the client has been told
        if self._uplink.has(member.seat, message.round):
            raise HandshakeError(f"round {message.round} has an upload of client {member.seat} already")
        member.announced[message.round] = message
        posted = member.posted.get(message.round)
        if posted is not None and posted.arrived is not None:
            self._take_upload(member, posted.arrived)

    def _check_applied(self, member: Member, message: protocol.Applied) -> None:
        closed = self.outcome.rounds
        if not 0 <= message.round < len(closed) or message.fingerprint != closed[message.round].fingerprint:
            raise DigestError(f"client {member.seat} holds other bits than the server after round {message.round}")
        member.applied = max(member.applied, message.round)

    def _take_goodbye(self, member: Member, message: protocol.Goodbye) -> None:
        if not message.reason and message.digest != self._digest():
            raise DigestError(f"client {member.seat} ends with other bits than the server")
        self.outcome.goodbyes[member.seat] = message
        if message.reason:
            self._roster.vacate(member, message.reason)
            return
        self._journal.note(checkpoint.Finished(seat=member.seat, goodbye=message))
        member.goodbye = message
        self.outcome.client_digests[member.seat] = message.digest
        self._say(member, protocol.Farewell())

    def _take_upload(self, member: Member, event: _C.Event) -> None:
        if self._uplink.take(member, event):
            self._watch.uploaded(event.first_byte_ns, event.at_ns)

    def _fold(self, is_due: Callable[[int], bool] = lambda round: True) -> None:
        """Folds the uploads that wait, and says so: with a durable state not before the round is closed and that is on
        the disk. Until then a client keeps its upload, and sends it again to a server that was killed meanwhile."""
        for folded in self._uplink.fold(is_due):
            if folded.reason or not self._journal.is_kept:
                self._send_verdict(folded.member, folded.round, folded.reason, folded.fold_s)

    def _send_verdict(self, member: Member, round: int, reason: str, fold_s: float = 0.0) -> None:
        if reason:
            log.warning("round %d: upload of client %d rejected: %s", round, member.seat, reason)
        block = self._block_of(round)
        verdict = protocol.Verdict(round=round, block=block, accepted=not reason, reason=reason, fold_s=fold_s)
        member.remember(verdict, self._config.staleness + 3)
        self._say(member, verdict)

    # ---- Coming and going

    def _send_snapshot(self, member: Member) -> None:
        """Sends the next block that the member lacks, or lets it begin if it has not yet."""
        assert member.link is not None
        if not member.to_send and member.begun:
            return
        if not member.to_send:
            member.synced = True
            if self._started_at is not None:
                # The others wait already for one who comes again.
                first_round = self._oldest + (0 if member.anew or self._is_needed(member) else 1)
                while member.seat in self._rounds.uploads_of(first_round):  # of the seat's former holder
                    first_round += 1
                self._journal.note(checkpoint.Started(seat=member.seat, first_round=first_round))
                self._let_begin(member, first_round=first_round)
            else:
                self._start_if_complete()
            return
        block = member.to_send.pop(0)
        value = self._downlink.send_block(member.link, block)
        self._say(member, protocol.Snapshot(block=block, version=self._oldest, fingerprint=value))

    def _start_if_complete(self, *, at_deadline: bool = False) -> None:
        synced = [member for member in self._roster.members if member.synced]
        if len(synced) < self._config.clients and not at_deadline:
            return
        if len(synced) < self._config.quorum_size:
            raise RoundError(
                f"only {len(synced)} of {self._config.clients} clients joined within {self._config.join_timeout:g} s, "
                f"and at least {self._config.quorum_size} are needed; start the missing ones or raise --join-timeout"
            )
        self._attendance.begin_with(synced)
        self._started_at = self._oldest_since = time.monotonic()
        self._journal.note(*[checkpoint.Started(seat=member.seat, first_round=0) for member in synced])
        for member in synced:
            self._let_begin(member, first_round=0)

    def _let_begin(self, member: Member, *, first_round: int) -> None:
        member.first_round = first_round
        member.next_post = first_round
        member.begun = True
        member.max_lag = _MAX_LAG + self._config.staleness + self._oldest - member.updates_from
        self._attendance.takes_part(member)
        self._say(member, protocol.Begin(first_round=first_round, updates_from=member.updates_from))

    def _is_needed(self, newcomer: Member) -> bool:
        """Whether the oldest open round waits for this very member."""
        return self._oldest < self._config.rounds and self._attendance.is_needed(newcomer, self._rounds[self._oldest])

    def dismiss(self, link: int, error: ParaBlockError) -> None:
        """Tells a client why its conversation ends, and ends it."""
        if (candidate := self._roster.candidate(link)) is not None:
            self._strangers.warn(f"dismissing {candidate.address}: {error}")
        else:
            log.warning("dismissing a client: %s", error)
        self._transport.send_message(link, protocol.Failure(error=type(error).__name__, reason=str(error)))
        self._transport.native.close_link(link, str(error))
        self._roster.forget(link)
        self._visitors.leave(link)
        if (member := self._roster.on(link)) is not None:
            self._roster.vacate(member, str(error))

    def seated(self, member: Member) -> None:
        """For the roster: a newcomer got a seat."""
        self._journal.note(checkpoint.Seated(seat=member.seat, secret=member.secret))
        log.info("client %d joined from %s", member.seat, member.address)

    def vacated(self, member: Member, reason: str) -> None:
        """For the roster: a seat is free, and with it what was kept of its holder."""
        self._intake.forget(member)
        self._journal.note(checkpoint.Vacated(seat=member.seat, reason=reason))
        self.outcome.left.append(f"client {member.seat}: {reason}")
        log.warning("client %d is gone: %s", member.seat, reason)

    def _lose(self, member: Member, event: _C.Event) -> None:
        """A connection broke. One who takes part keeps the seat, and all that was on its way."""
        if not member.begun:
            self._roster.vacate(member, event.text)
            return
        self._roster.lose(member, event.text, event.unfinished, time.monotonic())
        if member.goodbye is None:
            log.warning("client %d lost its connection (%s); its seat is kept for it", member.seat, event.text)

    def _take_rejoin(self, member: Member, message: protocol.Rejoin) -> None:
        """Goes on with a client on its new connection: says the verdicts that it may have missed, which uploads are
        wanted and from which byte, and sends the aggregates of the rounds since, or their blocks."""
        assert member.link is not None
        comeback.check(member, message, self._oldest, self._config.staleness)
        member.rejoining = False
        member.applied = message.applied
        member.updates_from = self._oldest
        member.max_lag = _MAX_LAG + self._config.staleness
        self._attendance.takes_part(member)
        self.outcome.reconnects += 1
        for round, reason in comeback.decided(member, message, self._oldest).items():
            self._send_verdict(member, round, comeback.LATE.format(round) if reason is None else reason)
        wanted = comeback.wanted(member, message, self._oldest, self._rounds)
        for round in comeback.forgotten(member, message, self._oldest, self._rounds):
            if member.seat in self._rounds[round].cohort:
                reason = "it was refused before the server was restarted"
                self._rounds[round].refused.setdefault(member.seat, reason)
        rounds, whole = self._downlink.backlog.missed(range(message.applied + 1, self._oldest), self._block_of)
        self._say(member, protocol.Resume(updates_from=self._oldest, snapshots=whole, uploads=wanted))
        self._intake.resume(member)
        for round in rounds:
            if round not in message.held:
                self._downlink.send_again(member.link, round)
            self._say(member, self._downlink.backlog[round].update)
        member.to_send = list(whole)
        self._send_snapshot(member)
        log.warning(
            "client %d is back: %d aggregates and %d whole blocks to catch up with, %d uploads wanted",
            *(member.seat, len(rounds), len(whole), len(wanted)),
        )

    def _restore(self, past: Past, state: Checkpoint) -> None:
        """Takes up the run where an earlier server left it."""
        self.outcome.rounds = [record.closed for record in past.closed]
        self._journal.restore(self.outcome.rounds)
        self.outcome.left = list(past.left)
        self._oldest = len(past.closed)
        for member in recovery.members(past):
            self._roster.restore(member)
            if member.goodbye is not None:
                self.outcome.goodbyes[member.seat] = member.goodbye
                self.outcome.client_digests[member.seat] = member.goodbye.digest
        self._attendance.begin_with(self._roster.members)
        if self._roster.members or past.closed:
            self._started_at = self._oldest_since
        self._uplink.nbytes = past.closed[-1].closed.bytes_up if past.closed else 0
        kept = recovery.aggregates(past, state, self._master, self._transport, self._downlink.buffers)
        self._downlink.restore(kept, past.closed[-1].closed.bytes_down if past.closed else 0)

    # ---- Rounds

    def _close_rounds(self) -> None:
        """Closes the oldest open rounds, in order, as long as nothing more is expected for them."""
        while self._started_at is not None and self._oldest < self._config.rounds:
            round = self._rounds[self._oldest]
            if overdue := time.monotonic() - self._oldest_since >= self._deadline.seconds:
                self._fold()
            waited_for = self._attendance.outstanding(round)
            if waited_for and not overdue:
                return
            if len(round.uploads) < self._config.quorum_size:
                open_s = time.monotonic() - self._oldest_since
                lost = {member.seat for member in self._attendance.lost}
                if waited_for & lost and open_s < self._deadline.without_quorum:
                    return  # they may come back
                missing = self._attendance.who_is_missing(round, self.outcome.left)
                raise RoundError(
                    f"round {round.index} cannot be closed: {len(round.uploads)} of {len(round.cohort)} clients "
                    f"delivered in the {open_s:.1f} s it was open, at least {self._config.quorum_size} are needed "
                    f"({missing}); restart them, or set a lower --quorum or a longer --deadline"
                )
            self._attendance.give_up(waited_for)
            self._close(round)

    def _close(self, round: Round) -> None:
        start_ns = time.monotonic_ns()
        folded = [end for _, end in round.fold_span_ns.values()]
        self.timeline.stages.add("wait", min(folded, default=start_ns), start_ns)
        receivers = [m for m in self._roster.here if m.ready and m.updates_from <= round.index]
        links = [member.link for member in receivers if member.link is not None]
        encoding, value = self._downlink.aggregate(round, links)
        update = protocol.Update(
            round=round.index,
            block=round.block,
            fingerprint=value,
            contributions=len(round.uploads),
            bad_groups=round.accumulator.bad_groups,
        )
        closed = round.closed(
            open_s=time.monotonic() - self._oldest_since,
            bad_groups=encoding.bad_groups,
            bytes_up=self._uplink.nbytes,
            bytes_down=self._downlink.nbytes,
            fingerprint=value,
            server_stages=self.timeline.stages.take(),
        )
        # The bytes of the aggregate are on their way meanwhile, but nobody applies them before this message.
        self._journal.close(round, closed, update, encoding.body, self._downlink.backlog.rounds)
        for seat in round.uploads if self._journal.is_kept else ():
            if (holder := self._roster.holder(seat)) is not None and holder.first_round <= round.index:
                self._send_verdict(holder, round.index, "", round.fold_s(seat))
        for member in self._roster.members:
            if member.seat in round.cohort and self._intake.refuse(member, round.index) and member.here:
                self._send_verdict(member, round.index, comeback.LATE.format(round.index))
        for member in receivers:
            wait_s = round.waited_s(member.seat, start_ns)
            self._say(member, msgspec.structs.replace(update, wait_s=wait_s))
        self._downlink.keep(update, encoding)
        behind = [m.applied for m in self._roster.members if m.begun and m.goodbye is None]
        self._downlink.backlog.drop_through(min(behind, default=round.index))
        self.timeline.add(Stage.CLOSE, start_ns, time.monotonic_ns(), round=round.index, block=round.block)
        self.timeline.drain()
        self._deadline.saw(closed.open_s)
        self.outcome.rounds.append(closed)
        self._rounds.retire(round)  # now, when nobody waits for it
        self._oldest += 1
        self._oldest_since = time.monotonic()
        if self._on_round is not None:
            self._on_round(closed)

    def _numel_of(self, round: int) -> tuple[int, int]:
        block = self._block_of(round)
        return block, self._master.blocks[block].block.flat_numel

    def _block_of(self, round: int) -> int:
        return block_of(self._config.schedule, self._config.seed, round, len(self._master.blocks))

    # ---- Time

    def _check_clock(self) -> None:
        now = time.monotonic()
        self._roster.check_clock(now)
        if (overdue := self._visitors.overdue()) is not None:
            self.dismiss(overdue, HandshakeError("measuring this link took longer than the server allows"))
        for member in [m for m in self._roster.here if m.begun and self._lags(m)]:
            assert member.link is not None
            reason = f"this client fell {self._oldest - 1 - member.applied} rounds behind; join again for a snapshot"
            self.dismiss(member.link, RoundError(reason))
        if self._started_at is None:
            if now - self._oldest_since > self._config.join_timeout:
                self._start_if_complete(at_deadline=True)
        elif self._roster.here or self._oldest == self._config.rounds:
            self._lonely_since = None
        else:
            self._lonely_since = self._lonely_since or now
            may_return = bool(self._attendance.lost)
            limit = self._deadline.without_quorum if may_return else min(_NOBODY_LEFT_S, self._deadline.seconds)
            if now - self._lonely_since > limit:
                gone = "; ".join(self._attendance.gone(self.outcome.left))
                raise RoundError(f"no client is left ({gone}); start them and the server again")

    def _lags(self, member: Member) -> bool:
        """Whether more is kept for a member than one may leave lying."""
        behind = range(max(member.applied + 1, member.updates_from), self._oldest)
        newest = self._config.staleness + 2
        left_lying = sum(self._intake.nbytes_of(round) for round in behind[:-newest])  # up and down weigh the same
        return len(behind) > member.max_lag or left_lying > self._update_budget

    def _over(self) -> bool:
        if self._oldest < self._config.rounds:
            return False
        waiting = self._attendance.unfinished()
        limit = max(_GOODBYE_S, self._deadline.seconds)
        if waiting and time.monotonic() - self._oldest_since <= limit:
            return False
        for member in waiting:
            self.outcome.unfinished.append(member.seat)
            if member.link is not None:
                self.dismiss(member.link, RoundError(f"the last aggregate was not applied within {limit:g} s"))
        return True
