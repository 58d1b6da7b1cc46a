"""The server's event loop: admits clients, folds what they deliver, closes rounds, broadcasts the aggregates.

One thread runs it and owns everything here; only `stop` may be called by others. Payload bytes move in native code
meanwhile: this thread sees that an upload is complete, never the bytes on their way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from parablock_rt import _C, codec, protocol
from parablock_rt.aggregate import Master, digest, fingerprint
from parablock_rt.blocks import BlockPlan
from parablock_rt.codec import Accumulator
from parablock_rt.errors import DigestError, HandshakeError, ParaBlockError, RoundError
from parablock_rt.members import Candidate, Identity, Member, Posted
from parablock_rt.outcome import ClosedRound, Outcome
from parablock_rt.protocol import Kind
from parablock_rt.rounds import Deadline, Round
from parablock_rt.schedule import block_of, cohort_of
from parablock_rt.staging import Stager
from parablock_rt.timeline import Timeline
from parablock_rt.transport import Transport, as_tensor, body_layout, raw_layout

log = logging.getLogger("parablock")

_HANDSHAKE_S = 20.0
_MAX_CANDIDATES = 256
_NOBODY_LEFT_S = 30.0
_GOODBYE_S = 60.0
_MAX_LAG = 32  # rounds whose aggregates are kept for a client that has not taken them
UPLOAD_BUDGET = 256 * 2**20  # bytes of unfinished uploads, one upload apart


class Coordinator:
    """One run, from the first connection to the last goodbye."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        plan: BlockPlan,
        master: Master,
        on_round: Callable[[ClosedRound], None] | None = None,
        upload_budget: int = UPLOAD_BUDGET,
    ) -> None:
        self.outcome = Outcome()
        self.timeline = Timeline("server")
        self._transport = transport
        self._identity = identity
        self._config = identity.config
        self._plan = plan
        self._master = master
        self._on_round = on_round
        self._budget = upload_budget
        self._stager = Stager()
        self._candidates: dict[int, Candidate] = {}
        self._members: dict[int, Member] = {}
        self._absent: set[int] = set()
        self._rounds: dict[int, Round] = {}
        self._spare_sums: list[Accumulator] = []
        self._oldest = 0
        self._oldest_since = time.monotonic()
        self._started_at: float | None = None
        self._lonely_since: float | None = None
        self._deadline = Deadline(self._config.deadline)
        self._bytes_up = 0
        self._bytes_down = 0
        self._stop_reason: str | None = None

    def stop(self, reason: str) -> None:
        """Ends the run soon; every client is told why. Any thread."""
        self._stop_reason = reason

    def run(self) -> None:
        """Returns when every client has said goodbye. Raises RoundError or another ParaBlockError; `outcome` is
        valid in any case."""
        try:
            while not self._over():
                if self._stop_reason is not None:
                    raise ParaBlockError(f"the server was stopped: {self._stop_reason}")
                event = self._transport.next_event(0.05)
                if event is not None:
                    self._take(event)
                self._check_clock()
                self._close_rounds()
                self._post_uploads()
        except ParaBlockError as error:
            self._tell_all(error)
            raise
        except Exception as error:
            self._tell_all(ParaBlockError(f"the server failed with {type(error).__name__}; its own output says why"))
            raise
        finally:
            if self._started_at is not None:
                self.outcome.wall_s = time.monotonic() - self._started_at
            self.outcome.digest = self._digest()

    def _tell_all(self, error: ParaBlockError) -> None:
        for link in self._members:
            self._transport.send_message(link, protocol.Failure(error=type(error).__name__, reason=str(error)))

    def _digest(self) -> str:
        return digest(self._plan, self._master.fingerprints)

    # ---- Events

    def _take(self, event: _C.Event) -> None:
        kinds = _C.Event.Type
        if event.type == kinds.CONNECTED:
            if len(self._candidates) >= _MAX_CANDIDATES:
                self._transport.native.close_link(event.link, "too many connections that have not said who they are")
            else:
                self._candidates[event.link] = Candidate(event.link, event.text, time.monotonic())
        elif event.type == kinds.CLOSED:
            self._candidates.pop(event.link, None)
            if event.link in self._members:
                self._lose(self._members[event.link], event.text)
        elif event.type == kinds.CONTROL:
            self._take_message(event.link, event.message)
        elif event.link in self._members:
            member = self._members[event.link]
            if event.type == kinds.RECEIVED:
                self._take_upload(member, event)
            elif event.type == kinds.SENT and event.kind == Kind.SNAPSHOT:
                self._send_snapshot(member)

    def _take_message(self, link: int, data: bytes) -> None:
        """Hands a message to whom it concerns. What a client does wrong ends its link, never the run."""
        try:
            message = protocol.decode(data)
            if link in self._candidates:
                self._take_candidate(self._candidates[link], message)
            elif link in self._members:
                self._take_member(self._members[link], message)
        except ParaBlockError as error:
            self._dismiss(link, error)

    def _take_candidate(self, candidate: Candidate, message: protocol.Message) -> None:
        if not candidate.greeted:
            self._transport.send_message(candidate.link, candidate.challenge(message, self._identity))
            return
        candidate.prove(message, self._identity)
        taken = {member.seat for member in self._members.values()}
        seat = next((seat for seat in range(self._config.clients) if seat not in taken), None)
        if seat is None:
            raise HandshakeError(
                f"all {self._config.clients} seats of this run are taken. The seat of a client whose network broke is "
                "free a minute later: try again then; for one client more, start the server with more clients"
            )
        del self._candidates[candidate.link]
        self._members[candidate.link] = Member(seat, candidate.link, candidate.address)
        self._transport.native.trust(candidate.link, self._identity.run, protocol.CONTROL_BYTES)
        self._transport.send_message(candidate.link, candidate.welcome(seat, self._identity))
        log.info("client %d joined from %s", seat, candidate.address)

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
        if message.round >= self._oldest:  # else it was closed meanwhile, and the client has been told
            member.announced[message.round] = message

    def _check_applied(self, member: Member, message: protocol.Applied) -> None:
        closed = self.outcome.rounds
        if not 0 <= message.round < len(closed) or message.fingerprint != closed[message.round].fingerprint:
            raise DigestError(f"client {member.seat} holds other bits than the server after round {message.round}")
        member.applied = message.round

    def _take_goodbye(self, member: Member, message: protocol.Goodbye) -> None:
        if not message.reason and message.digest != self._digest():
            raise DigestError(f"client {member.seat} ends with other bits than the server")
        member.goodbye = message
        self.outcome.goodbyes[member.seat] = message
        if message.reason:
            self._lose(member, message.reason)
        else:
            self.outcome.client_digests[member.seat] = message.digest

    def _take_upload(self, member: Member, event: _C.Event) -> None:
        posted = member.posted.pop(event.round, None)
        if posted is None:
            return  # its round was closed while the last bytes came in; the client has been told
        upload = member.announced.pop(event.round, None)
        self._bytes_up += posted.nbytes
        with self.timeline.span("fold", f"round {event.round}", client=member.seat):
            body = as_tensor(posted.buffer, posted.nbytes)
            reason = self._round(event.round).fold(member.seat, upload, body, self._config.format, event.at_ns / 1e9)
        self.timeline.add(
            f"upload {member.seat}", f"round {event.round}", event.first_byte_ns, event.at_ns, bytes=posted.nbytes
        )
        self._stager.buffers.give_back(posted.buffer)
        self._send_verdict(member, posted, reason)

    def _send_verdict(self, member: Member, posted: Posted, reason: str) -> None:
        if reason:
            log.warning("round %d: upload of client %d rejected: %s", posted.round, member.seat, reason)
        self._transport.send_message(
            member.link,
            protocol.Verdict(round=posted.round, block=posted.block, accepted=not reason, reason=reason),
        )

    # ---- Coming and going

    def _send_snapshot(self, member: Member) -> None:
        """Sends the next block that the member lacks, or lets it begin."""
        if not member.to_send:
            member.synced = True
            if self._started_at is not None:
                self._let_begin(member, first_round=self._oldest + (0 if self._is_needed(member) else 1))
            else:
                self._start_if_complete()
            return
        block = member.to_send.pop(0)
        flats = self._master.blocks[block].flats
        nbytes = sum(flat.nbytes for flat in flats)
        buffer = self._stager.buffers.take(nbytes)
        raw = as_tensor(buffer, nbytes)
        start = 0
        for flat in flats:
            raw[start : start + flat.nbytes].view(flat.dtype).copy_(flat)
            start += flat.nbytes
        source = self._transport.native.make_source(buffer, raw_layout(nbytes, self._config.chunk), True)
        self._transport.send_message(
            member.link,
            protocol.Snapshot(block=block, version=self._oldest, fingerprint=fingerprint(flats)),
        )
        self._transport.native.send(member.link, Kind.SNAPSHOT, 0, block, source)
        self._stager.buffers.give_back(buffer)
        self._bytes_down += nbytes

    def _start_if_complete(self, *, at_deadline: bool = False) -> None:
        synced = [member for member in self._members.values() if member.synced]
        if len(synced) < self._config.clients and not at_deadline:
            return
        if len(synced) < self._config.quorum_size:
            raise RoundError(
                f"only {len(synced)} of {self._config.clients} clients joined within {self._config.join_timeout:g} s, "
                f"and at least {self._config.quorum_size} are needed; start the missing ones or raise --join-timeout"
            )
        self._absent = set(range(self._config.clients)) - {m.seat for m in synced}
        self._started_at = self._oldest_since = time.monotonic()
        for member in synced:
            self._let_begin(member, first_round=0)

    def _let_begin(self, member: Member, *, first_round: int) -> None:
        member.first_round = first_round
        member.next_post = first_round
        member.begun = True
        member.max_lag = _MAX_LAG + self._config.staleness + self._oldest - member.updates_from
        self._absent.discard(member.seat)
        self._transport.send_message(
            member.link, protocol.Begin(first_round=first_round, updates_from=member.updates_from)
        )

    def _is_needed(self, newcomer: Member) -> bool:
        """Whether the oldest open round cannot reach its quorum without this member, who could still take part."""
        if self._oldest == self._config.rounds:
            return False
        round = self._round(self._oldest)
        training = {m.seat for m in self._members.values() if m.begun and m.first_round <= round.index}
        reachable = round.uploads.keys() | (round.cohort & training - round.refused.keys())
        return len(reachable) < self._config.quorum_size and newcomer.seat in round.cohort - round.uploads.keys()

    def _dismiss(self, link: int, error: ParaBlockError) -> None:
        """Tells a client why its conversation ends, and ends it."""
        log.warning("dismissing a client: %s", error)
        self._transport.send_message(link, protocol.Failure(error=type(error).__name__, reason=str(error)))
        self._transport.native.close_link(link, str(error))
        self._candidates.pop(link, None)
        if link in self._members:
            self._lose(self._members[link], str(error))

    def _lose(self, member: Member, reason: str) -> None:
        del self._members[member.link]
        for posted in member.posted.values():
            self._stager.buffers.give_back(posted.buffer)
        if member.goodbye is None or member.goodbye.reason:
            self.outcome.left.append(f"client {member.seat}: {reason}")
            log.warning("client %d is gone: %s", member.seat, reason)

    # ---- Rounds

    def _round(self, index: int) -> Round:
        if index not in self._rounds:
            block = self._block_of(index)
            cohort = cohort_of(self._config.seed, index, self._config.clients, self._config.cohort_size)
            self._rounds[index] = Round(index, block, cohort, self._take_sum(block))
        return self._rounds[index]

    def _take_sum(self, block: int) -> Accumulator:
        numel = self._master.blocks[block].block.flat_numel
        for i, spare in enumerate(self._spare_sums):
            if spare.numel == numel:
                return self._spare_sums.pop(i)
        return Accumulator(numel)

    def _expected(self, round: Round) -> set[int]:
        """The seats whose delivery the round waits for: a seat may be vacant for a while, or begin later."""
        not_yet = {m.seat for m in self._members.values() if m.first_round > round.index}
        return set(round.cohort) - self._absent - not_yet

    def _close_rounds(self) -> None:
        """Closes the oldest open rounds, in order, as long as nothing more is expected for them."""
        while self._started_at is not None and self._oldest < self._config.rounds:
            round = self._round(self._oldest)
            waited_for = self._expected(round) - round.uploads.keys() - round.refused.keys()
            overdue = time.monotonic() - self._oldest_since >= self._deadline.seconds
            if waited_for and not overdue:
                return
            if len(round.uploads) < self._config.quorum_size:
                open_s = time.monotonic() - self._oldest_since
                raise RoundError(
                    f"round {round.index} cannot be closed: {len(round.uploads)} of {len(round.cohort)} clients "
                    f"delivered in the {open_s:.1f} s it was open, at least {self._config.quorum_size} are needed "
                    f"({self._who_is_missing(round)}); restart them, or set a lower --quorum or a longer --deadline"
                )
            present = {member.seat for member in self._members.values()}
            self._absent |= waited_for - present
            self._close(round)

    def _who_is_missing(self, round: Round) -> str:
        missing = sorted(round.cohort - round.uploads.keys() - round.refused.keys())
        parts = [f"missing: {missing}"] if missing else []
        parts += [f"rejected: client {seat} ({reason})" for seat, reason in sorted(round.refused.items())]
        parts += [f"gone: {'; '.join(self.outcome.left)}"] if self.outcome.left else []
        return "; ".join(parts)

    def _close(self, round: Round) -> None:
        config = self._config
        start_ns = time.monotonic_ns()
        encoding = self._master.fold_mean(
            round.block, round.accumulator.mean(), self._stager, self._transport, config.chunk
        )
        receivers = [m for m in self._members.values() if m.ready and m.updates_from <= round.index]
        for member in receivers:
            self._transport.native.send(member.link, Kind.UPDATE, round.index, round.block, encoding.source)
        value = self._master.land(round.block, encoding)
        uploads = list(round.uploads.values())
        for member in receivers:
            self._refuse_late(member, round)
            self._transport.send_message(
                member.link,
                protocol.Update(
                    round=round.index,
                    block=round.block,
                    fingerprint=value,
                    contributions=len(uploads),
                    bad_groups=round.accumulator.bad_groups,
                ),
            )
        self._bytes_down += encoding.nbytes * len(receivers)
        self._stager.release(encoding)
        self.timeline.add("close", f"round {round.index}", start_ns, time.monotonic_ns(), block=round.block)
        now = time.monotonic()
        open_s = now - self._oldest_since
        self._deadline.saw(open_s)
        closed = ClosedRound(
            round=round.index,
            block=round.block,
            loss=sum(u.loss * u.weight for u in uploads) / sum(u.weight for u in uploads),
            contributions=len(uploads),
            weight=round.accumulator.total_weight,
            bad_groups=round.accumulator.bad_groups + encoding.bad_groups,
            compute_s=sum(u.compute_s for u in uploads) / len(uploads),
            exposed_s=sum(u.exposed_s for u in uploads) / len(uploads),
            open_s=open_s,
            skew_s=round.skew_s,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            fingerprint=value,
        )
        self.outcome.rounds.append(closed)
        del self._rounds[round.index]
        round.accumulator.reset()  # now, when nobody waits for it
        self._spare_sums.append(round.accumulator)
        self._oldest += 1
        self._oldest_since = now
        if self._on_round is not None:
            self._on_round(closed)

    def _refuse_late(self, member: Member, round: Round) -> None:
        """Tells a member that its upload of a round that closes is not wanted any more, if one may still come."""
        if member.begun and member.next_post <= round.index and member.seat in round.cohort:
            self._post(member, round.index)  # never let in for want of room; only what is posted can be cancelled
        posted = member.posted.pop(round.index, None)
        if posted is None:
            return
        member.announced.pop(posted.round, None)
        self._transport.native.cancel_receive(member.link, Kind.UPLOAD, posted.round, posted.block)
        self._stager.buffers.give_back(posted.buffer)
        self._send_verdict(member, posted, f"round {posted.round} was closed at its deadline without this upload")

    def _post_uploads(self) -> None:
        """Lets members send: the uploads of the oldest open round first, then, within the byte budget, those ahead.

        Of the oldest open round one upload that is ready to come is always let in, whatever the others hold.
        """
        if self._started_at is None:
            return
        held = sum(p.nbytes for m in self._members.values() for p in m.posted.values())
        for index in range(self._oldest, min(self._oldest + self._config.staleness + 2, self._config.rounds)):
            cohort = cohort_of(self._config.seed, index, self._config.clients, self._config.cohort_size)
            for member in self._members.values():
                if not member.begun or member.next_post > index or member.seat not in cohort:
                    continue
                full = held + self._upload_bytes(index) > self._budget
                if full and not (index == self._oldest and self._is_next_in_line(member)):
                    continue
                self._post(member, index)
                held += self._upload_bytes(index)

    def _is_next_in_line(self, member: Member) -> bool:
        """Whether a member's upload of the oldest open round is ready, and none that is ready has been let in."""
        ready = [m for m in self._members.values() if self._oldest in m.announced]
        return member in ready and not any(self._oldest in m.posted for m in ready)

    def _post(self, member: Member, index: int) -> None:
        block = self._block_of(index)
        nbytes = self._upload_bytes(index)
        buffer = self._stager.buffers.take(nbytes)
        member.posted[index] = Posted(index, block, buffer, nbytes)
        member.next_post = index + 1
        numel = self._master.blocks[block].block.flat_numel
        layout = body_layout(self._config.format, numel, self._config.chunk)
        self._transport.native.receive(member.link, Kind.UPLOAD, index, block, buffer, layout)

    def _block_of(self, round: int) -> int:
        return block_of(self._config.schedule, self._config.seed, round, len(self._master.blocks))

    def _upload_bytes(self, round: int) -> int:
        return codec.body_bytes(self._master.blocks[self._block_of(round)].block.flat_numel, self._config.format)

    # ---- Time

    def _check_clock(self) -> None:
        now = time.monotonic()
        for candidate in [c for c in self._candidates.values() if now - c.since > _HANDSHAKE_S]:
            self._dismiss(candidate.link, HandshakeError(f"the handshake took longer than {_HANDSHAKE_S:g} s"))
        for member in [m for m in self._members.values() if m.begun and self._oldest - 1 - m.applied > m.max_lag]:
            self._dismiss(
                member.link, RoundError(f"this client fell {member.max_lag} rounds behind; join again for a snapshot")
            )
        if self._started_at is None:
            if now - self._oldest_since > self._config.join_timeout:
                self._start_if_complete(at_deadline=True)
        elif self._members or self._oldest == self._config.rounds:
            self._lonely_since = None
        else:
            self._lonely_since = self._lonely_since or now
            if now - self._lonely_since > min(_NOBODY_LEFT_S, self._deadline.seconds):
                raise RoundError(f"no client is left ({'; '.join(self.outcome.left)}); start them and the server again")

    def _over(self) -> bool:
        if self._oldest < self._config.rounds:
            return False
        waiting = [m for m in self._members.values() if m.begun and m.goodbye is None]
        limit = max(_GOODBYE_S, self._deadline.seconds)
        if waiting and time.monotonic() - self._oldest_since <= limit:
            return False
        for member in waiting:
            self.outcome.unfinished.append(member.seat)
            self._dismiss(member.link, RoundError(f"the last aggregate was not applied within {limit:g} s"))
        return True
