"""One connection to the server, from connecting to the end of the handshake, in which both sides prove who they are.
Measuring the link and watching the run need nothing beyond this.

Consumes the transport's events during the handshake; afterwards ServerLink does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from parablock_rt import _C, errors
from parablock_rt.errors import HandshakeError, ParaBlockError, PeerLostError
from parablock_rt.units import printable
from parablock_rt.version import __version__
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.handshake import Conversation
from parablock_rt.wire.transport import Transport

LONGEST_PAUSE_S = 5.0  # between two tries to connect
_HANDSHAKE_S = 20.0
_REASON_CHARS = 2000  # of the reason that a server gives for a failure
A = TypeVar("A", protocol.Welcome, protocol.WelcomeBack, protocol.ProbeWelcome, protocol.Status)


def pause_before(tries: int) -> float:
    """Seconds to back off after `tries` failed tries to connect. Partly random, so that clients do not reconnect all at
    once."""
    return min(0.05 * 2.0 ** min(tries, 10), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Seat:
    """A seat that the server has given to this client, and the secret with which the client proves that it holds it."""

    number: int
    secret: bytes = field(repr=False)


class Connection:
    """One of the transport's links, connected to the server."""

    def __init__(self, transport: Transport, address: str, *, tries: int = 8) -> None:
        """Connects. Raises ConnectError."""
        self.transport = transport
        self.address = address
        self.link = transport.connect(address, tries=tries)
        self.run = 0
        self._observes = False

    @property
    def tls(self) -> _C.TlsInfo | None:
        """Details of the TLS connection, once the server has answered; None without TLS."""
        return self.transport.native.tls_info(self.link)

    def introduce(self, token: str | None, former: Seat | None = None) -> protocol.Welcome:
        """Asks for a seat. `former`: a seat from an earlier, broken connection that this client may still hold, and
        gives up.

        Raises HandshakeError, PeerLostError.
        """

        def claim(conversation: Conversation) -> dict[str, Any]:
            if former is None:
                return {}
            mac = handshake.seat_proof(former.secret, former.number, "client", conversation)
            return {"seat": former.number, "seat_mac": mac}

        welcome = self._introduce(token, "join", protocol.Welcome, claim)[0]
        if welcome.client >= welcome.config.clients:
            raise HandshakeError(
                f"expected a seat below {welcome.config.clients} from the server at {self.address}, found "
                f"{welcome.client}; install the same release of parablock-rt on both sides"
            )
        return welcome

    def introduce_probe(self, token: str | None) -> protocol.ProbeWelcome:
        """Introduces this side for a measurement, which takes no seat. Raises HandshakeError, PeerLostError."""
        return self._introduce(token, "probe", protocol.ProbeWelcome)[0]

    def observe(self, token: str | None) -> protocol.Status:
        """The run's current status; takes no seat and may be called again. Raises HandshakeError, PeerLostError."""
        if not self._observes:
            status = self._introduce(token, "observe", protocol.Status)[0]
            self._observes = True
            return status
        self.send(protocol.Observe())
        return self._expect(protocol.Status)

    def rejoin(self, token: str | None, run: int, seat: int, secret: bytes) -> protocol.WelcomeBack:
        """Proves that this client holds the seat. Raises HandshakeError when it does not, or when the server has
        another run."""

        def claim(conversation: Conversation) -> dict[str, Any]:
            if conversation.run != run:
                raise HandshakeError(
                    f"the server at {self.address} has another run than before: it was started anew instead of resumed"
                )
            return {"seat": seat, "seat_mac": handshake.seat_proof(secret, seat, "client", conversation)}

        welcome, conversation = self._introduce(token, "rejoin", protocol.WelcomeBack, claim)
        if not handshake.is_seat_proof(welcome.seat_mac, secret, seat, "server", conversation):
            raise HandshakeError(f"the server at {self.address} does not know this client's seat")
        return welcome

    def send(self, message: protocol.Message) -> None:
        """Queues a control message."""
        self.transport.send_message(self.link, message)

    def next_message(self, what: str, timeout: float = _HANDSHAKE_S) -> protocol.Message:
        """Waits for the next message. Raises the failure that the server reports, and PeerLostError when the connection
        ends or no message comes within `timeout`. `what` names the awaited message in errors."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            event = self.transport.next_event(left)
            if event is None or event.link != self.link:  # events of a link given up earlier may still arrive
                continue
            if event.type == _C.Event.Type.CLOSED:
                if event.permanent:
                    raise HandshakeError(f"cannot talk to the server at {self.address}: {event.text}")
                raise PeerLostError(f"lost the server at {self.address} while waiting for {what}: {event.text}")
            if event.type == _C.Event.Type.CONTROL:
                message = protocol.decode(event.message)
                if isinstance(message, protocol.Failure):
                    raise error_from(message)
                return message
        raise PeerLostError(
            f"waited {timeout:g} s for {what} from the server at {self.address}; it may be overloaded or stuck"
        )

    def close(self, reason: str) -> None:
        """Closes the connection at once."""
        self.transport.native.close_link(self.link, reason, 0.0)

    def _introduce(
        self,
        token: str | None,
        purpose: protocol.Purpose,
        answer: type[A],
        claim: Callable[[Conversation], dict[str, Any]] = lambda conversation: {},
    ) -> tuple[A, Conversation]:
        """Performs the handshake. `claim`: returns the fields of Proof beyond the token's proof."""
        handshake.check_token(token)
        nonce = handshake.nonce()
        self.send(protocol.Hello(version=protocol.VERSION, release=__version__, nonce=nonce, purpose=purpose))
        challenge = self._expect(protocol.Challenge)
        binding = self.tls.binding if self.tls is not None else b""
        if challenge.token_required and token is None:
            raise HandshakeError(
                f"the server at {self.address} asks for a token: pass token=..., or on the command line put it into "
                f"the environment variable {handshake.TOKEN_VARIABLE} or a file for --token-file"
            )
        if token is not None and not challenge.token_required:
            if not binding:  # with TLS the server has shown its certificate, and may have accepted ours as proof
                raise HandshakeError(
                    f"a token is set here, but the server at {self.address} asks for none: it may not be the intended "
                    "one"
                )
            token = None
        self.run = challenge.run
        conversation = Conversation(challenge.run, nonce, challenge.nonce, binding)
        proof = protocol.Proof(mac=handshake.proof(token, purpose, conversation), **claim(conversation))
        # The settings and the plan exceed the size limit for unproved peers, and may arrive as soon as the proof is
        # sent, so the limit is raised first. Their contents are checked before use.
        self.transport.native.trust(self.link, challenge.run, protocol.CONTROL_BYTES)
        self.send(proof)
        welcome = self._expect(answer)
        if not handshake.is_proof(welcome.mac, token, "server", conversation):
            raise HandshakeError(f"the server at {self.address} does not know the token: it is not the intended one")
        return welcome, conversation

    def _expect(self, kind: type[protocol.M]) -> protocol.M:
        message = self.next_message(f"{kind.__name__} (handshake)")
        if not isinstance(message, kind):
            raise HandshakeError(
                f"expected {kind.__name__} from the server at {self.address}, found {type(message).__name__}"
            )
        return message


def error_from(failure: protocol.Failure) -> ParaBlockError:
    """The exception for a failure that the server reports."""
    kind = getattr(errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, ParaBlockError)):
        kind = ParaBlockError
    return kind(printable(failure.reason, _REASON_CHARS))
