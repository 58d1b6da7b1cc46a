"""A client's end of the conversation with the server, which outlives the individual connections.

A separate thread (`pb-link`) consumes all events: it dispatches incoming messages and transfers, and replaces a broken
connection while the training thread computes. It sleeps in native code and wakes a few times per round. The training
thread calls everything else, and waits here for whatever has not arrived yet. Decides nothing about training; `Transit`
keeps the state of transfers in flight and knows what to resume on a new connection.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from parablock_rt import _C, exits
from parablock_rt.client.transit import Arrival, PendingUpload, Transit
from parablock_rt.errors import (
    HandshakeError,
    ParaBlockError,
    PeerLostError,
    PlanMismatchError,
    TransportError,
    WaitTimeoutError,
)
from parablock_rt.staging.stager import Encoding, Landing
from parablock_rt.units import printable
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import LONGEST_PAUSE_S, Connection, error_from, pause_before
from parablock_rt.wire.patience import Patience
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport, describe

log = logging.getLogger("parablock")

_FAREWELL_S = 10.0
_MOST_UNREAD = 4096  # verdicts, and aggregates that are announced early, that wait for the training thread
_EVENT_WAIT_S = 0.5  # short, so that the thread notices when its link was dropped without being closed


class ServerLink:
    """One client's link to the server."""

    def __init__(
        self, connection: Connection, token: str | None, welcome: protocol.Welcome, *, patience: float, reconnect: float
    ) -> None:
        """`patience`: the longest time in seconds that a wait may take before it is an error, unless at least a chunk
        of payload moves meanwhile. `reconnect`: for how many seconds to retry to replace a broken connection."""
        self.transport = connection.transport
        self.address = connection.address
        self.bytes_up = 0
        self.bytes_down = 0
        self.reconnects = 0
        self.resumed_bytes = 0
        self.resent_bytes = 0
        self._token = token
        self._run = connection.run
        self._seat = welcome.client
        self._secret = welcome.secret
        self._epoch = welcome.epoch
        self._config = welcome.config
        self._patience = patience
        self._reconnect_s = reconnect
        self._least_moved = welcome.config.chunk  # bytes within `patience` that extend a wait

        # Guards all attributes below. A condition's own `with` is Python code, which Ctrl-C can interrupt once it has
        # the lock and before it will give it back.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._connection: Connection | None = connection  # None: broken
        self._open = True  # messages and transfers of the run may use it
        self._begin: protocol.Begin | None = None
        self._goodbye: protocol.Goodbye | None = None
        self._farewell = False
        self._lanes: protocol.Lanes | None = None  # an offer that has not been taken yet
        self._closing = False
        self._error: ParaBlockError | None = None  # the server's failure, or why the conversation cannot go on
        self._lost: str | None = None  # why the connection is lost for good
        self._stopped = ""  # the reason that a stopped, resumable server gave
        self._lost_at = 0.0  # when the connection broke
        self._tries = 0  # tries to replace it so far

        self._transit = Transit(welcome.config.chunk)
        self._verdicts: list[protocol.Verdict] = []
        self._sent: list[tuple[int, int]] = []

        self._thread = threading.Thread(
            target=_attend, args=(weakref.ref(self), self.transport), name="pb-link", daemon=True
        )
        self._thread.start()
        exits.register(self)

    # ---- Opening and closing

    def ready(self, message: protocol.Ready, block_bytes: list[int]) -> None:
        """Tells the server what the client holds. `block_bytes`: the size of each block, in case it is sent whole."""
        with self._lock:
            self._transit.block_bytes = block_bytes
            self._send(message)

    def opening(self) -> protocol.Begin | None:
        """Waits for the start of the run. Returns None if a whole block has arrived first: take it and call again."""
        self.wait(lambda: self._transit.snapshot_is_here() or self._begin is not None, "the other clients to join")
        with self._lock:
            return None if self._transit.snapshot_is_here() else self._begin

    def farewell(self, goodbye: protocol.Goodbye) -> None:
        """Says goodbye and waits until the server has noted it, but not for long: the client already has the result."""
        with self._lock:
            self._goodbye = goodbye
            self._reconnect_s = min(self._reconnect_s, _FAREWELL_S)
            if self._open:
                self._send(goodbye)
        try:
            self.wait(lambda: self._farewell, "its farewell", min(self._patience, 2 * _FAREWELL_S))
        except (PeerLostError, HandshakeError) as error:  # the server is gone, or a newcomer has taken the seat
            log.warning("the run is complete here, but the server may not know: %s", error)

    def close(self, goodbye: protocol.Goodbye | None) -> None:
        """Ends the conversation. `goodbye`: sent if the conversation ends early."""
        if exits.is_inherited(self):
            return
        with self._lock:
            if goodbye is not None and self._open:
                self._send(goodbye)
            self._closing = True
            self._changed.notify_all()
        self.transport.close()
        self._thread.join(LONGEST_PAUSE_S + 1)

    def close_at_exit(self) -> None:
        """Called at interpreter exit if the program has not closed the link."""
        self.close(None)

    # ---- Hand-overs

    def send_upload(self, message: protocol.Upload, encoding: Encoding) -> None:
        """Queues a hand-over; its chunks leave as they are encoded and as the server grants credit."""
        with self._lock:
            self._transit.handed_over = message.round
            self.bytes_up += encoding.nbytes
            if self._transit.closed(message.round):
                late = f"round {message.round} was closed before this client had trained it"
                refusal = protocol.Verdict(round=message.round, block=message.block, accepted=False, reason=late)
                self._verdicts.append(refusal)
                return
            upload = PendingUpload(message, encoding.source, encoding.nbytes)
            self._transit.uploads[message.round] = upload
            if self._open:
                self._send_upload(upload)

    def stats(self) -> _C.LinkStats | None:
        """Current statistics of the connection; None while it is broken. Any thread may call it."""
        connection = self._connection
        return None if connection is None else self.transport.native.stats(connection.link)

    def is_undecided(self, round: int) -> bool:
        """Whether the hand-over's body may still have to be sent (again), so that its buffer must be kept."""
        with self._lock:
            return round in self._transit.uploads

    def take_sent(self) -> Sequence[tuple[int, int]]:
        """Uploads acknowledged since the last call, as pairs: when the first byte left and when the last byte was
        acknowledged."""
        with self._lock:
            sent, self._sent = self._sent, []
            return sent

    def take_verdicts(self) -> Sequence[protocol.Verdict]:
        """The verdicts that came since the last call."""
        with self._lock:
            verdicts, self._verdicts = self._verdicts, []
            return verdicts

    # ---- Aggregates

    def post_update(self, round: int, block: int, landing: Landing) -> None:
        """Posts a landing for a round's aggregate, so that the server can send the aggregate at once. The link owns the
        landing until `take_arrival`."""
        with self._lock:
            arrival = self._transit.open_to(round, block, landing)
            if self._open and not self._transit.replaced(round, block):
                self._receive(Kind.UPDATE, round, arrival)

    def closed(self, round: int) -> bool:
        """Whether the server is known to have closed the round."""
        with self._lock:
            return self._transit.closed(round)

    def arrived(self, round: int) -> bool:
        """Whether the round's aggregate has arrived completely."""
        with self._lock:
            return self._transit.arrived(round)

    def replaced(self, round: int, block: int) -> bool:
        """Whether the round's aggregate will not come because the server sends its block whole."""
        with self._lock:
            return self._transit.replaced(round, block)

    def take_arrival(self, round: int) -> Arrival:
        """A round's aggregate, or the part of a replaced one that arrived. The caller owns the landing again."""
        with self._lock:
            arrival = self._transit.arrivals.pop(round)
            self.bytes_down += arrival.nbytes if arrival.complete else 0
            return arrival

    def take_snapshot(self) -> Arrival | None:
        """The whole block that has arrived, or None. Afterwards the next block can be received."""
        with self._lock:
            arrival = self._transit.take_snapshot()
            if arrival is not None:
                self.bytes_down += arrival.nbytes
                self._make_room_for_snapshot()
            return arrival

    def snapshot_is_here(self) -> bool:
        """Whether `take_snapshot` would return a block."""
        with self._lock:
            return self._transit.snapshot_is_here()

    def spoiled(self) -> list[tuple[int, int]]:
        """The rounds, with their blocks, whose landing must be renewed before the aggregate can be received."""
        with self._lock:
            return self._transit.spoiled()

    def renew(self, round: int, landing: Landing) -> Landing:
        """Replaces the spoiled landing of a round's aggregate and returns it to the caller."""
        with self._lock:
            arrival = self._transit.arrivals[round]
            spoiled, arrival.landing = arrival.landing, landing
            arrival.spoiled = False
            if self._open and not self._transit.replaced(round, arrival.block):
                self._receive(Kind.UPDATE, round, arrival)
            return spoiled

    def passed(self, round: int) -> None:
        """Notes that the round's aggregate is applied, or its block came whole: the server need not send it again."""
        with self._lock:
            self._transit.applied = round

    def report_applied(self, round: int, fingerprint: int) -> None:
        """Tells the server the fingerprint after an aggregate was applied. A report lost with a broken connection is
        not repeated: Rejoin, or the next report, says that this aggregate is applied."""
        with self._lock:
            if self._open:
                self._send(protocol.Applied(round=round, fingerprint=fingerprint))

    # ---- Waiting

    def check(self) -> None:
        """Raises the failure that the server has reported, and ParaBlockError when the link is closed."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ParaBlockError("this run was closed while it still waited for the server")

    def wait(self, holds: Callable[[], bool], what: str, timeout: float | None = None) -> float:
        """Waits until `holds()` and returns the seconds that this thread was blocked. `what` is named in errors.

        Raises the failure that the server reports, PeerLostError when the server is gone for good, and WaitTimeoutError
        when the wait takes too long.
        """
        with self._lock:
            self.check()
            if holds():
                return 0.0
            start = time.monotonic()
            limit = self._patience if timeout is None else timeout
            patience = Patience(limit, self._least_moved, start, self._moved_bytes())
            while not holds():
                self.check()
                if self._lost is not None:
                    raise PeerLostError(f"lost the server at {self.address} while waiting for {what}: {self._lost}")
                if patience.over(time.monotonic(), self._moved_bytes()):
                    raise WaitTimeoutError(
                        f"waited {limit:g} s for {what} from the server at {self.address}; it may be overloaded or "
                        "stuck"
                    )
                self._changed.wait(patience.left(time.monotonic()))
            return time.monotonic() - start

    def _moved_bytes(self) -> int:
        stats = self.stats()
        return 0 if stats is None else stats.moved_bytes

    # ---- The link's thread. The lock is held in all methods below, except in the first two and `_come_back`: they take
    # it themselves.

    def attend(self, event: _C.Event | None) -> bool:
        """Handles one event, and replaces the connection if it is broken. Returns whether the thread should go on."""
        try:
            return self._handle(event)
        except Exception as error:
            with self._lock:
                if self._closing:  # the transport is closed
                    return False
                self._fail(error)
                self._changed.notify_all()
            return True

    def _handle(self, event: _C.Event | None) -> bool:
        with self._lock:
            if self._closing:
                return False
            if event is not None:
                self._take(event)
                self._changed.notify_all()
            if self._lost is not None:
                return False
            broken = self._connection is None and self._error is None
            connection, lanes, self._lanes = self._connection, self._lanes, None
        if broken:
            self._come_back()
        elif lanes is not None and connection is not None:
            self.transport.open_lanes(connection.link, lanes)  # waits for the network
        return True

    def _take(self, event: _C.Event) -> None:
        kinds = _C.Event.Type
        if self._connection is None or event.link != self._connection.link:
            return  # an event of a connection that was given up
        if event.type == kinds.CLOSED:
            self._break(event)
        elif event.type == kinds.CONTROL:
            self._take_message(protocol.decode(event.message))
        elif event.type == kinds.STALLED:
            log.warning("%s, with the server at %s: %s", describe(event), self.address, event.text)
        elif event.type == kinds.SENT:
            self._sent.append((event.first_byte_ns, event.at_ns))
        elif event.type == kinds.RECEIVED:
            self._transit.received(event)

    def _take_message(self, message: protocol.Message) -> None:
        match message:
            case protocol.Failure(resumable=True):
                reason = printable(message.reason)
                self._stopped = f"; it had said: {reason}"
                log.warning(
                    "the server at %s has stopped, and may be resumed in the %g s that this client waits for it: %s",
                    *(self.address, self._reconnect_s, reason),
                )
            case protocol.Failure():
                raise error_from(message)
            case protocol.Lanes():
                self._lanes = message
            case protocol.Verdict() if message.round < self._config.rounds:
                self._transit.decided(message.round)
                self._verdicts.append(message)
                self._bound(max(len(self._verdicts), len(self._transit.decided_early)), "verdicts")
            case protocol.Update() if message.round < self._config.rounds:
                self._transit.update_announced(message)
                self._bound(len(self._transit.early_updates), "aggregates")
            case protocol.Snapshot() if self._transit.lacks(message.block):
                self._transit.snapshot_announced(message)
                self._make_room_for_snapshot()
            case protocol.Begin() if self._begin is None and self._may_begin(message):
                self._begin = message
                self._transit.applied = message.updates_from - 1
            case protocol.RejoinAnswer() if not self._open:
                self._resume(message)
            case protocol.Farewell():
                self._farewell = True
            case _:
                name = type(message).__name__
                raise PlanMismatchError(f"the server at {self.address} sent a {name} that has no place here")

    def _may_begin(self, message: protocol.Begin) -> bool:
        return message.updates_from <= message.first_round and message.updates_from <= self._config.rounds

    def _bound(self, unread: int, what: str) -> None:
        """Ends the conversation with a server that says more than this client will ever need."""
        if unread > _MOST_UNREAD:
            raise HandshakeError(f"the server at {self.address} has sent {unread} {what} that nobody waits for")

    def _fail(self, error: Exception) -> None:
        """Notes why the conversation cannot go on: the training thread raises it."""
        if not isinstance(error, ParaBlockError):  # a mistake of ours, or something new that a server has thought of
            log.error("the conversation with the server at %s has failed", self.address, exc_info=error)
            error = ParaBlockError(
                f"the conversation with the server at {self.address} has failed ({type(error).__name__}: {error}); "
                "join again, and please report the log's traceback"
            )
        self._error = self._error or error

    def _send(self, message: protocol.Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _send_upload(self, upload: PendingUpload) -> None:
        assert self._connection is not None
        message = upload.message
        self._connection.send(message)
        self.transport.native.send(self._connection.link, Kind.UPLOAD, message.round, message.block, upload.source)

    def _receive(self, kind: Kind, round: int, arrival: Arrival) -> None:
        assert self._connection is not None
        self.transport.native.receive(
            self._connection.link,
            kind,
            round,
            arrival.block,
            arrival.landing.buffer,
            arrival.landing.layout,
            arrival.received,
            arrival.landing.watermark,
        )

    def _make_room_for_snapshot(self) -> None:
        arrival = self._transit.next_snapshot()
        if arrival is not None:
            self.resumed_bytes += arrival.received
            self._receive(Kind.SNAPSHOT, 0, arrival)

    # ---- Losing the connection and coming back

    def _break(self, event: _C.Event) -> None:
        self._connection = None
        was_open, self._open = self._open, False
        if self._begin is None or self._reconnect_s <= 0 or self._farewell:
            self._lost = event.text
        elif was_open and self._error is None:
            self._lost_at = time.monotonic()
            log.warning("lost the server at %s (%s); trying to come back", self.address, event.text)
        self._transit.interrupted(event.unfinished)

    def _come_back(self) -> None:
        """Replaces the connection. Gives up when that takes too long or the server refuses the client."""
        while True:
            pause = pause_before(self._tries)
            self._tries += 1
            with self._lock:
                if self._changed.wait_for(lambda: self._closing, pause):
                    return
            connection = None
            try:
                connection = Connection(self.transport, self.address, tries=1)
                welcome = connection.rejoin(self._token, self._run, self._seat, self._secret)
            except (ParaBlockError, RuntimeError) as error:
                if not isinstance(error, ParaBlockError):  # the transport was closed meanwhile
                    return
                if connection is not None:
                    connection.close("gave up")
                log.debug("try %d to come back: %s", self._tries, error)
                final = isinstance(error, HandshakeError) or not isinstance(error, TransportError)
                if not final and time.monotonic() - self._lost_at < self._reconnect_s:
                    continue
                with self._lock:
                    if final:
                        self._error = error
                    else:
                        self._lost = f"it did not come back within {self._reconnect_s:g} s ({error}){self._stopped}"
                    self._changed.notify_all()
                return
            with self._lock:
                self._rejoin(connection, welcome)
            return

    def _rejoin(self, connection: Connection, welcome: protocol.WelcomeBack) -> None:
        """Tells the server this client's position on a new connection; the server answers with RejoinAnswer."""
        self._connection = connection
        if welcome.epoch != self._epoch:
            self._epoch = welcome.epoch
            self._transit.server_restarted()
        connection.send(self._transit.rejoin())

    def _resume(self, message: protocol.RejoinAnswer) -> None:
        """Resumes all transfers that were in flight."""
        self._open = True
        self._stopped = ""
        self._tries = 0
        self.reconnects += 1
        resumption = self._transit.resume(message)
        for round, arrival in resumption.receive:
            self._receive(Kind.UPDATE, round, arrival)
        for upload in resumption.send:
            self._send_upload(upload)
        if self._goodbye is not None:
            self._send(self._goodbye)
        self.resumed_bytes += resumption.resumed_bytes
        self.resent_bytes += resumption.resent_bytes
        log.warning(
            "back at the server at %s after %.1f s: %d bytes under way are kept, %d are to go, %d blocks come whole",
            *(self.address, time.monotonic() - self._lost_at, resumption.resumed_bytes, resumption.resent_bytes),
            len(message.snapshots),
        )


def _attend(link: weakref.ref[ServerLink], transport: Transport) -> None:
    """The body of the thread. Holds no reference to the link while it waits for events, so that a link that was dropped
    without being closed can be garbage-collected; `_come_back` holds one for as long as it tries."""
    while True:
        event = transport.native.next_event(_EVENT_WAIT_S)
        alive = link()
        if alive is None or not alive.attend(event):
            return
        del alive
