"""Getting into a run: from the first connection to the first round, anew where the connection breaks in between.

A client that has not begun has nothing that would be lost with its connection. So it joins once more, with what it
holds of the reference by then, and gives up the seat that the server may still keep for it. Knows nothing of what the
client does between its welcome and its first round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from parablock_rt.errors import HandshakeError, ParaBlockError, TransportError, WaitTimeoutError
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection, Seat, pause_before
from parablock_rt.wire.transport import Transport

log = logging.getLogger("parablock")
R = TypeVar("R")


class Entry:
    """One client's way into a run. One thread uses it."""

    def __init__(self, address: str, token: str | None, reconnect: float) -> None:
        """`reconnect`: seconds after a break within which another connection must have come as far as the welcome."""
        self._address = address
        self._token = token
        self._reconnect_s = reconnect
        self._former: Seat | None = None
        self._answered = False  # there is a server of ours, as an earlier try has shown if not this one
        self._broke_at: float | None = None
        self._tries = 0

    def until_begun(
        self, make_transport: Callable[[], Transport], begin: Callable[[Connection, protocol.Welcome], R]
    ) -> R:
        """What `begin` returns, which takes part until the first round can be trained, or raises. The transport of the
        last try is the caller's; the others are closed.

        Raises ConnectError, HandshakeError, PeerLostError and what `begin` raises, other than that its link broke.
        """
        while True:
            transport = make_transport()
            try:
                connection = Connection(transport, self._address, tries=8 if self._broke_at is None else 1)
                try:
                    welcome = connection.introduce(self._token, self._former)
                finally:
                    self._answered = self._answered or connection.run != 0
                self._former, self._broke_at = Seat(welcome.client, welcome.secret), None
                return begin(connection, welcome)
            except BaseException as error:
                transport.close(flush=1.0)
                if not (self._answered and isinstance(error, ParaBlockError) and self._may_try_again(error)):
                    raise
                log.warning("%s; the run had not begun here, joining once more", error)
            time.sleep(pause_before(self._tries))
            self._tries += 1

    def _may_try_again(self, error: ParaBlockError) -> bool:
        """Only what the network did can be mended by trying, and only a server that is one was lost."""
        if not isinstance(error, TransportError) or isinstance(error, HandshakeError | WaitTimeoutError):
            return False
        if self._broke_at is None:
            self._broke_at = time.monotonic()
        return time.monotonic() - self._broke_at < self._reconnect_s
