"""The server's end of a measurement of a link's latency and bandwidth, for a client that holds no seat.

Serves one client at a time, for a bounded time and a bounded number of bytes, so that measuring costs a run little. The
bytes are noise and contain no data of the run; a buffer that a client uploaded into is never sent to anyone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from parablock_rt import _C
from parablock_rt.errors import HandshakeError
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import Transport, raw_layout

MAX_BYTES = 8 * 2**20
MAX_TOTAL = 64 * 2**20  # in one direction
_MAX_MESSAGES = 1024
_MAX_S = 60.0


@dataclass(eq=False)
class _Visit:
    """The client that measures. Its buffers are allocated on first use and serve all of its transfers."""

    link: int
    since: float
    index: int = 0
    left: dict[str, int] = field(default_factory=lambda: {"up": MAX_TOTAL, "down": MAX_TOTAL})
    incoming: _C.Buffer | None = None  # its contents are never read
    noise: _C.Buffer | None = None


class ProbeDesk:
    """Serves the client that measures, if there is one. Only the server's thread may call it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._visit: _Visit | None = None

    def serves(self, link: int) -> bool:
        """Whether the measuring client is at the other end of this link."""
        return self._visit is not None and self._visit.link == link

    def admit(self, link: int, run: int, mac: bytes) -> None:
        """Welcomes a client that has proved itself. Raises HandshakeError when another one is measuring."""
        if self._visit is not None:
            raise HandshakeError("another client is measuring its link to this server: try again in a minute")
        self._visit = _Visit(link, time.monotonic())
        self._transport.native.trust(link, run, protocol.CONTROL_BYTES_BEFORE_PROOF)
        self._transport.send_message(link, protocol.ProbeWelcome(max_bytes=MAX_BYTES, max_total=MAX_TOTAL, mac=mac))

    def take(self, message: protocol.Message) -> None:
        """Answers a message of the client that measures. Raises HandshakeError for a request that is not allowed."""
        visit = self._visit
        assert visit is not None
        if not isinstance(message, protocol.Measure):
            raise HandshakeError(f"{type(message).__name__} has no place in a measurement")
        if not visit.index < message.index <= _MAX_MESSAGES:
            raise HandshakeError(f"expected an index from {visit.index + 1} to {_MAX_MESSAGES}, found {message.index}")
        allowed = min(MAX_BYTES, visit.left[message.direction])
        if not 0 <= message.nbytes <= allowed or message.nbytes % 256:
            raise HandshakeError(f"expected a multiple of 256 bytes, at most {allowed}; found {message.nbytes}")
        visit.index = message.index
        visit.left[message.direction] -= message.nbytes
        self._transport.send_message(visit.link, protocol.Measured(index=message.index, clock_ns=time.time_ns()))
        if message.nbytes:
            self._move(visit, message)

    def disconnected(self, link: int) -> None:
        """Forgets the measuring client if this was its link; otherwise does nothing."""
        if self.serves(link):
            self._visit = None

    def overdue(self) -> int | None:
        """The link of a client that has measured for too long."""
        visit = self._visit
        return visit.link if visit is not None and time.monotonic() - visit.since > _MAX_S else None

    def _move(self, visit: _Visit, message: protocol.Measure) -> None:
        layout = raw_layout(message.nbytes, protocol.PROBE_CHUNK)
        native = self._transport.native
        if message.direction == "up":
            visit.incoming = visit.incoming or _C.Buffer(MAX_BYTES)
            native.receive(visit.link, Kind.PROBE, message.index, 0, visit.incoming, layout)
            return
        if visit.noise is None:
            visit.noise = _C.Buffer(MAX_BYTES)
            memoryview(visit.noise)[:] = os.urandom(MAX_BYTES)  # nothing on the way can compress it
        source = native.make_source(visit.noise, layout, True)
        native.send(visit.link, Kind.PROBE, message.index, 0, source)
