"""The server's event loop: dispatches each event to the module responsible, and folds and closes rounds in between.

One thread runs the loop and owns every object that the loop dispatches to. Other threads may call `stop` and
`link_stats`, and read `config`, `outcome` and `timeline`. Native code moves the payload bytes: this thread only sees
that an upload is complete, never the bytes in flight.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from parablock_rt import _C
from parablock_rt.blocks.fingerprint import digest
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.errors import CheckpointError, HandshakeError, ParaBlockError, RoundError, StoppedError
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.closing import Closing
from parablock_rt.server.downlink import Downlink
from parablock_rt.server.durability import Durability
from parablock_rt.server.journal import Past
from parablock_rt.server.master import Master
from parablock_rt.server.members import Candidate, Identity
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.server.participants import Participants
from parablock_rt.server.run_state import new_run
from parablock_rt.server.visitors import PURPOSES, Visitors
from parablock_rt.server.watch import Watch
from parablock_rt.stages import total
from parablock_rt.staging.stager import Stager
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport, describe

log = logging.getLogger("parablock")

_GOODBYE_S = 60.0
_TURN_S = 0.05  # the longest that the loop waits for an event, and between checks of the clock
_EVENTS_AT_ONCE = 32  # events per turn, before rounds are checked again


class Coordinator:
    """One run, from the first connection to the last goodbye."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        plan: BlockPlan,
        master: Master,
        upload_budget: int,
        on_round: Callable[[ClosedRound], None] | None = None,
        state: Checkpoint | None = None,
        past: Past | None = None,
        trace: bool = True,
    ) -> None:
        """`state`: where the run's durable state is kept; None keeps none. `past`: what an earlier server left there;
        the caller has restored `master` from it."""
        self._run = run = new_run(identity, (block.flat_numel for block in plan.blocks), trace=trace)
        self._progress = run.progress
        config = run.config
        transport.native.record(self.timeline.transfer_ring("pb-transport", plan, config, config.cohort_size))
        self._transport = transport
        self._plan = plan
        self._master = master
        stager = Stager(self.timeline.transfer_ring("pb-encode", plan, config, links=1))
        downlink = Downlink(transport, master, config.chunk, stager, self.timeline)
        self._durability = durability = Durability(state, master, self.timeline)
        self._watch = Watch(config)
        self._participants = Participants(
            transport, run, downlink, durability, self._watch, self._digest, upload_budget
        )
        self._roster = self._participants.roster
        self._closing = Closing(run, self._participants, downlink, durability, on_round)
        self._visitors = Visitors(transport, identity.run, self._watch, self._status)
        self._stop_reason: str | None = None
        self._clock_at = 0.0  # when the clock was last checked; 0: it is due
        if past is not None and state is not None:
            self._participants.restore(past, state)

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._run.config

    @property
    def outcome(self) -> Outcome:
        """The run's results so far."""
        return self._run.outcome

    @property
    def timeline(self) -> Timeline:
        """The server's spans. Read it only after the run has ended."""
        return self._run.timeline

    def link_stats(self) -> dict[str, _C.LinkStats]:
        """Current statistics of the link to each client. Any thread may call it."""
        native = self._transport.native
        links = [(member.seat, member.link) for member in self._roster.members]  # once: `link` may change meanwhile
        return {f"client-{seat}": native.stats(link) for seat, link in links if link is not None}

    @property
    def listeners(self) -> list[Callable[[ClosedRound], None]]:
        """Called after each round that closes. Any thread may change the list."""
        return self._closing.listeners

    @property
    def plan(self) -> BlockPlan:
        """The partition of the model."""
        return self._plan

    def stop(self, reason: str) -> None:
        """Ends the run soon; every client is told why. Any thread may call it."""
        self._stop_reason = reason

    def run(self) -> None:
        """Returns when every client has said goodbye. Raises RoundError or another ParaBlockError; `outcome` is
        valid in any case."""
        try:
            while not self._over():
                if self._stop_reason is not None:
                    raise StoppedError(f"the server was stopped: {self._stop_reason}")
                self._progress.turn(_TURN_S)
                for at_once in range(_EVENTS_AT_ONCE):
                    event = self._transport.next_event(0.0 if at_once else _TURN_S)
                    if event is None:
                        break
                    self._take(event)
                self._after_events(idle=event is None and at_once == 0)
        except ParaBlockError as error:
            self._tell_all(error)
            raise
        except Exception as error:
            self._tell_all(ParaBlockError(f"the server failed with {type(error).__name__}; its own output says why"))
            raise
        finally:
            earlier = self.outcome.rounds[: self.outcome.resumed_from or 0]
            if self._progress.started_at is not None:
                before_s = sum(closed.open_s for closed in earlier)
                self.outcome.wall_s = before_s + time.monotonic() - self._progress.started_at
            closed_stages = [closed.server_stages for closed in earlier]
            self.outcome.server_stages = total([*closed_stages, self.timeline.stages.total()])
            self.outcome.digest = self._digest()
            self.outcome.left = self._participants.attendance.gone(self.outcome.left)

    def _digest(self) -> str:
        return digest(self._plan, self._master.fingerprints)

    def _after_events(self, *, idle: bool = False) -> None:
        """Folds, checks the clocks if that is due, closes rounds and lets uploads in. `idle`: the last wait brought no
        event."""
        self._participants.uplink.fold(idle=idle)
        now = time.monotonic()
        # A check looks at all clients, so not after every few events. But with each round that closes a client may have
        # fallen too far behind.
        if idle or now - self._clock_at >= _TURN_S or self._progress.opened_at > self._clock_at:
            self._clock_at = now
            self._check_clock(now)
        self._closing.close_due()
        if self._progress.started:
            self._participants.intake.let_in(self._progress.oldest)

    def _tell_all(self, error: ParaBlockError) -> None:
        """Tells all clients why the run ends. With a durable state another process may resume it."""
        resumable = self._durability.is_kept
        failure = protocol.Failure(error=type(error).__name__, reason=str(error), resumable=resumable)
        for member in self._roster.members:
            if member.link is not None:
                self._transport.send_message(member.link, failure)

    # ---- Events

    def _take(self, event: _C.Event) -> None:
        kinds = _C.Event.Type
        member = self._roster.on(event.link)
        if event.type == kinds.CONNECTED:
            self._roster.connected(event.link, event.text, time.monotonic())
        elif event.type == kinds.CLOSED:
            self._visitors.disconnected(event.link)
            self._participants.gone(event, time.monotonic())
            self._clock_at = 0.0  # somebody may wait for the seat
            if not self.timeline.on:  # a trace needs to know until the end whose link this was
                self.timeline.seats.pop(event.link, None)
        elif event.type == kinds.CONTROL:
            self._take_message(event.link, event.message)
        elif member is not None:
            if event.type == kinds.RECEIVED:
                self._participants.upload_arrived(member, event)
            elif event.type == kinds.SENT and event.kind == Kind.SNAPSHOT:
                self._participants.catch_up.send_snapshot(member)
            elif event.type == kinds.STALLED:
                log.warning("client %d, %s: %s", member.seat, describe(event), event.text)
            elif event.type == kinds.SENT and event.kind == Kind.UPDATE:
                self._watch.updated(event.first_byte_ns, event.at_ns)
                self.timeline.stages.add("send", event.first_byte_ns, event.at_ns)

    def _take_message(self, link: int, data: bytes) -> None:
        """Dispatches a message. A client's error ends its link, never the run."""
        candidate, member = self._roster.candidate(link), self._roster.on(link)
        visits = self._visitors.serves(link)
        if candidate is None and member is None and not visits:
            return  # the sender was dismissed; the message was sent before that
        try:
            message = protocol.decode(data)
            if candidate is not None:
                self._take_candidate(candidate, message)
            elif visits:
                self._visitors.take(link, message)
            elif member is not None:
                self._participants.take(member, message)
                if member.begun:  # a trace covers only members that have begun
                    self.timeline.seats[link] = member.seat
        except ParaBlockError as error:
            if isinstance(error, CheckpointError):
                raise
            self._dismiss(link, error)

    def _take_candidate(self, candidate: Candidate, message: protocol.Message) -> None:
        self._roster.take(candidate, message, time.monotonic())
        if candidate.proved and candidate.purpose in PURPOSES:
            self._visitors.admit(candidate)
            self._roster.forget(candidate.link)

    def _dismiss(self, link: int, error: ParaBlockError) -> None:
        self._visitors.disconnected(link)
        self._participants.dismiss(link, error)

    def _status(self) -> protocol.Status:
        present = [member for member in self._roster.members if member.link is not None]
        return self._watch.status(present, self.outcome, self._progress.started_at, self._progress.oldest_since)

    # ---- Time

    def _check_clock(self, now: float) -> None:
        self._roster.check_clock(now)
        if (overdue := self._visitors.overdue()) is not None:
            self._dismiss(overdue, HandshakeError("measuring this link took longer than the server allows"))
        self._participants.eviction.dismiss_overdue(now)
        self._participants.eviction.refuse_silent(now)
        attendance = self._participants.attendance
        if not self._progress.started:
            if self._progress.open_s > self.config.join_timeout:
                self._participants.catch_up.start_if_complete(at_deadline=True)
        elif self._progress.deserted(anybody=bool(self._roster.here), may_return=bool(attendance.lost)):
            gone = "; ".join(attendance.gone(self.outcome.left))
            raise RoundError(f"no client is left ({gone}); start them and the server again")

    def _over(self) -> bool:
        if not self._progress.all_closed:
            return False
        waiting = self._participants.attendance.unfinished()
        limit = max(_GOODBYE_S, self._progress.deadline.seconds)
        if waiting and self._progress.open_s <= limit:
            return False
        for member in waiting:
            self.outcome.unfinished.append(member.seat)
            if member.link is not None:
                self._dismiss(member.link, RoundError(f"the last aggregate was not applied within {limit:g} s"))
        return True
