"""Connections that take no seat: clients that measure their link, and observers that watch the run.

Serves them once they have proved themselves. Decides nothing about the run. Only the server's thread may call this
module.
"""

from __future__ import annotations

from collections.abc import Callable

from parablock_rt.errors import HandshakeError
from parablock_rt.server.members import Candidate
from parablock_rt.server.probe import ProbeDesk
from parablock_rt.server.watch import Watch
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import Transport

PURPOSES = ("probe", "observe")
"""The purposes of connections that take no seat."""


class Visitors:
    """All peers that are connected, have proved themselves and hold no seat."""

    def __init__(self, transport: Transport, run: int, watch: Watch, status: Callable[[], protocol.Status]) -> None:
        """`run`: the run's id. `status`: returns the run's current status."""
        self._transport = transport
        self._run = run
        self._watch = watch
        self._status = status
        self._probes = ProbeDesk(transport)

    def admit(self, candidate: Candidate) -> None:
        """Welcomes a candidate that has proved itself. Raises HandshakeError when there are too many of its kind."""
        if candidate.purpose == "probe":
            self._probes.admit(candidate.link, self._run, candidate.mac())
            return
        self._watch.admit(candidate.link, candidate.mac())
        self._transport.native.trust(candidate.link, self._run, protocol.CONTROL_BYTES_BEFORE_PROOF)
        self._show(candidate.link)

    def serves(self, link: int) -> bool:
        """Whether a visitor is at the other end of the link."""
        return self._watch.serves(link) or self._probes.serves(link)

    def take(self, link: int, message: protocol.Message) -> None:
        """Answers a visitor. Raises HandshakeError for a request that is not allowed."""
        if self._probes.serves(link):
            self._probes.take(message)
        elif isinstance(message, protocol.Observe):
            self._show(link)
        else:
            raise HandshakeError(f"expected Observe from an observer, found {type(message).__name__}")

    def disconnected(self, link: int) -> None:
        """Forgets the visitor whose link has ended; does nothing for other links."""
        self._watch.disconnected(link)
        self._probes.disconnected(link)

    def overdue(self) -> int | None:
        """The link of a visitor that has measured for too long."""
        return self._probes.overdue()

    def _show(self, link: int) -> None:
        self._transport.send_message(link, self._watch.signed(link, self._status()))
