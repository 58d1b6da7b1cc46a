"""A client's end of the conversation with the server: opening it, posting receives, sorting what comes in.

Keeps what has arrived until the training thread asks for it; decides nothing about training. The training thread alone
uses it; the native transport thread moves the bytes meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from parablock_rt import _C, codec, errors, handshake, protocol
from parablock_rt.errors import HandshakeError, ParaBlockError, PeerLostError
from parablock_rt.protocol import Kind
from parablock_rt.staging import Encoding
from parablock_rt.transport import BufferPool, Transport, as_tensor, body_layout, raw_layout
from parablock_rt.version import __version__

_HANDSHAKE_S = 20.0


@dataclass(eq=False)
class Arrival:
    """A round's aggregate on its way in. Complete when both the message and the body are there."""

    buffer: _C.Buffer
    nbytes: int
    message: protocol.Update | None = None
    first_byte_ns: int = 0
    last_byte_ns: int = 0

    @property
    def complete(self) -> bool:
        """Whether it can be applied."""
        return self.message is not None and self.last_byte_ns > 0

    @property
    def body(self) -> Tensor:
        """The packed body, uint8 [nbytes]."""
        return as_tensor(self.buffer, self.nbytes)


class ServerLink:
    """One client's link to the server."""

    def __init__(self, transport: Transport, address: str, *, patience: float) -> None:
        """`patience`: the longest time, in seconds, that one wait may take before it is an error."""
        self.transport = transport
        self.address = address
        self._verdicts: list[protocol.Verdict] = []
        self._sent: list[tuple[int, int, int]] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self._link = transport.connect(address)
        self._patience = patience
        self._inbox: list[protocol.Message] = []
        self._arrivals: dict[int, Arrival] = {}
        self._early_updates: dict[int, protocol.Update] = {}
        self._snapshot_received = False
        self._lost: str | None = None
        self._buffers = BufferPool()

    # ---- Opening

    def introduce(self, token: str | None) -> protocol.Welcome:
        """Proves who this is and returns the server's welcome. Raises HandshakeError, PeerLostError."""
        nonce = handshake.nonce()
        self.send(protocol.Hello(version=protocol.VERSION, release=__version__, nonce=nonce))
        challenge = self._expect(protocol.Challenge, _HANDSHAKE_S)
        if challenge.token_required and token is None:
            raise HandshakeError(
                f"the server at {self.address} asks for a token: put it into the environment variable "
                f"{handshake.TOKEN_VARIABLE} or a file for --token-file"
            )
        if token is not None and not challenge.token_required:
            raise HandshakeError(
                f"a token is set here, but the server at {self.address} asks for none: it may not be the intended one"
            )
        fields = (challenge.run, nonce, challenge.nonce)
        # The settings and the plan are larger than what a stranger may send; what they say is checked before use. They
        # may be here as soon as the proof has left.
        self.transport.native.trust(self._link, challenge.run, protocol.CONTROL_BYTES)
        self.send(protocol.Proof(mac=handshake.proof(token, "client", *fields)))
        welcome = self._expect(protocol.Welcome, _HANDSHAKE_S)
        if not handshake.is_proof(welcome.mac, token, "server", *fields):
            raise HandshakeError(f"the server at {self.address} does not know the token: it is not the intended one")
        return welcome

    def receive_snapshot(self, block: int, nbytes: int, chunk: int) -> tuple[_C.Buffer, Tensor]:
        """Waits for a block's raw bytes. The buffer goes back with `give_back`."""
        buffer = self._buffers.take(nbytes)
        self._snapshot_received = False
        self.transport.native.receive(self._link, Kind.SNAPSHOT, 0, block, buffer, raw_layout(nbytes, chunk))
        self.wait(lambda: self._snapshot_received, f"the snapshot of block {block}")
        self.bytes_down += nbytes
        return buffer, as_tensor(buffer, nbytes)

    def give_back(self, buffer: _C.Buffer) -> None:
        """The caller is done with a buffer that came from here."""
        self._buffers.give_back(buffer)

    # ---- Rounds

    def post_update(self, round: int, block: int, numel: int, format: str, chunk: int) -> None:
        """Makes room for a round's aggregate, so that the server may send it the moment it has it."""
        nbytes = codec.body_bytes(numel, format)
        arrival = Arrival(self._buffers.take(nbytes), nbytes, self._early_updates.pop(round, None))
        self._arrivals[round] = arrival
        layout = body_layout(format, numel, chunk)
        self.transport.native.receive(self._link, Kind.UPDATE, round, block, arrival.buffer, layout)

    def closed(self, round: int) -> bool:
        """Whether the server is known to have closed the round."""
        arrival = self._arrivals.get(round)
        return round in self._early_updates or (arrival is not None and arrival.message is not None)

    def arrived(self, round: int) -> bool:
        """Whether the round's aggregate is complete here."""
        return round in self._arrivals and self._arrivals[round].complete

    def take_arrival(self, round: int) -> Arrival:
        """A complete aggregate. Its buffer goes back with `give_back`."""
        arrival = self._arrivals.pop(round)
        self.bytes_down += arrival.nbytes
        return arrival

    def send_upload(self, message: protocol.Upload, encoding: Encoding) -> None:
        """Queues a hand-over; its chunks leave as they are encoded and as the server grants credit."""
        self.send(message)
        self.transport.native.send(self._link, Kind.UPLOAD, message.round, message.block, encoding.source)
        self.bytes_up += encoding.nbytes

    def send(self, message: protocol.Message) -> None:
        """Queues a control message."""
        self.transport.send_message(self._link, message)

    # ---- Waiting

    def poll(self) -> None:
        """Takes in what is there, without waiting."""
        for event in self.transport.waiting_events():
            self._take(event)

    def wait(self, holds: Callable[[], bool], what: str, timeout: float | None = None) -> float:
        """Takes in events until `holds()`, and returns the seconds that this thread was blocked.

        Raises what the server reports as its failure, PeerLostError when the link is gone or the wait takes too long.
        """
        self.poll()
        if holds():
            return 0.0
        start = time.monotonic()
        limit = self._patience if timeout is None else timeout
        while not holds():
            self._raise_if_lost(what)
            left = limit - (time.monotonic() - start)
            if left <= 0:
                raise PeerLostError(
                    f"waited {limit:g} s for {what} from the server at {self.address}; it may be overloaded or stuck"
                )
            event = self.transport.next_event(left)
            if event is not None:
                self._take(event)
            self.poll()
        return time.monotonic() - start

    def next_message(self, what: str, timeout: float | None = None) -> protocol.Message:
        """The next message of the opening conversation."""
        self.wait(lambda: bool(self._inbox), what, timeout)
        return self._inbox.pop(0)

    def _expect(self, kind: type[protocol.M], timeout: float) -> protocol.M:
        message = self.next_message(f"{kind.__name__} (handshake)", timeout)
        if not isinstance(message, kind):
            raise HandshakeError(
                f"expected {kind.__name__} from the server at {self.address}, found {type(message).__name__}"
            )
        return message

    def _raise_if_lost(self, what: str) -> None:
        if self._lost is not None:
            raise PeerLostError(f"lost the server at {self.address} while waiting for {what}: {self._lost}")

    def _take(self, event: _C.Event) -> None:
        if event.type == _C.Event.Type.CLOSED:
            self._lost = event.text
        elif event.type == _C.Event.Type.CONTROL:
            self._take_message(protocol.decode(event.message))
        elif event.type == _C.Event.Type.SENT:
            self._sent.append((event.round, event.first_byte_ns, event.at_ns))
        elif event.type == _C.Event.Type.RECEIVED and event.kind == Kind.UPDATE:
            arrival = self._arrivals[event.round]
            arrival.first_byte_ns, arrival.last_byte_ns = event.first_byte_ns, event.at_ns
        elif event.type == _C.Event.Type.RECEIVED and event.kind == Kind.SNAPSHOT:
            self._snapshot_received = True

    def _take_message(self, message: protocol.Message) -> None:
        match message:
            case protocol.Failure():
                raise _error_from(message)
            case protocol.Verdict():
                self._verdicts.append(message)
            case protocol.Update():
                if message.round in self._arrivals:
                    self._arrivals[message.round].message = message
                else:
                    self._early_updates[message.round] = message
            case _:
                self._inbox.append(message)

    def take_sent(self) -> Sequence[tuple[int, int, int]]:
        """Uploads acknowledged since the last call: round, when the first byte left, when the last was acknowledged."""
        sent, self._sent = self._sent, []
        return sent

    def take_verdicts(self) -> Sequence[protocol.Verdict]:
        """The verdicts that came since the last call."""
        verdicts, self._verdicts = self._verdicts, []
        return verdicts


def _error_from(failure: protocol.Failure) -> ParaBlockError:
    kind = getattr(errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, ParaBlockError)):
        kind = ParaBlockError
    return kind(failure.reason)
