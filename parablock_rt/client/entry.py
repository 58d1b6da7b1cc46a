"""From the first connection to the first round; if the connection breaks before that, the client joins again.

A client that has not started its first round loses nothing with its connection. It joins again, keeps the parts of the
reference that it has received, and gives up the seat that the server may still hold for it. Nothing here knows what the
client does between the welcome and the first round.
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
    """One client's way into a run. For use by one thread."""

    def __init__(self, address: str, token: str | None, reconnect: float, patience: float) -> None:
        """`reconnect`: seconds after a break within which another connection must have reached the welcome.
        `patience`: seconds after the first break within which the first round must have begun."""
        self._address = address
        self._token = token
        self._reconnect_s = reconnect
        self._patience_s = patience
        self._first_broke_at: float | None = None
        self._former: Seat | None = None
        self._answered = False  # whether a ParaBlock server has answered, in this try or an earlier one
        self._broke_at: float | None = None
        self._tries = 0

    def until_begun(
        self, make_transport: Callable[[], Transport], begin: Callable[[Connection, protocol.Welcome], R]
    ) -> R:
        """Connects, then returns the result of `begin`, which takes part until the first round can be trained.

        Tries again if the connection breaks on the way, within the times that `reconnect` and `patience` allow. The
        caller owns the transport of the successful try; the transports of failed tries are closed here.

        Raises ConnectError, HandshakeError, PeerLostError and what `begin` raises.
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
                # Retry only network errors, and only after a ParaBlock server has answered once.
                if not (self._answered and isinstance(error, ParaBlockError) and self._may_try_again(error)):
                    raise
                log.warning("%s; the first round had not started here, joining again", error)
            time.sleep(pause_before(self._tries))
            self._tries += 1

    def _may_try_again(self, error: ParaBlockError) -> bool:
        """Whether the network caused the error (neither a refusal nor a timeout) and there is time left to retry."""
        if not isinstance(error, TransportError) or isinstance(error, HandshakeError | WaitTimeoutError):
            return False
        now = time.monotonic()
        self._broke_at = now if self._broke_at is None else self._broke_at
        self._first_broke_at = now if self._first_broke_at is None else self._first_broke_at
        return now - self._broke_at < self._reconnect_s and now - self._first_broke_at < self._patience_s
