"""The Python interface of the native transport: buffers, events, addresses. Payload bytes never pass through Python.

Any thread may call any function here, but only one thread may use an object at a time.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parablock_rt import _C
from parablock_rt.codec import FORMATS
from parablock_rt.config import parse_address
from parablock_rt.errors import ConfigError, ConnectError, TransportError
from parablock_rt.wire import protocol

log = logging.getLogger("parablock")

MAX_LANES: int = _C.MAX_LANES
DEFAULT_LANES = 1  # connections per client; `parablock bench links --only lanes` measures the effect of more
_LANE_TIMEOUT_S = 5.0
_LONGEST_DELAY_S = 60.0
_LEAST_IDLE_S = 0.1

_RAW_UNIT = 256  # bytes; every flat block is a multiple of this: 128 elements of at least 2 bytes

# A thread that waits in native code sees Ctrl-C only when it returns to Python.
_LONGEST_WAIT_S = 0.1


def body_layout(format: str, numel: int, chunk: int) -> _C.Layout:
    """How the packed body of `numel` elements is cut into chunks of `chunk` elements (both multiples of 128)."""
    return _C.body_layout(FORMATS.index(format), numel, chunk)


def inspector(format: str, layout: _C.Layout) -> _C.Inspector:
    """What checks the chunks of a body as they arrive; pass it to `native.receive`."""
    return _C.Inspector(layout, FORMATS.index(format))


def raw_layout(nbytes: int, chunk: int) -> _C.Layout:
    """How a raw block of `nbytes` bytes (a multiple of 256) is cut, in chunks of about `chunk` bytes."""
    return _C.Layout(
        units=nbytes // _RAW_UNIT, scale_bytes=0, code_bytes=_RAW_UNIT, chunk_units=max(1, chunk // _RAW_UNIT)
    )


def as_tensor(buffer: _C.Buffer, nbytes: int) -> Tensor:
    """The first `nbytes` bytes of a buffer as a uint8 tensor that shares its memory and keeps it alive."""
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes)


def describe(event: _C.Event) -> str:
    """Describes an event's transfer, such as "upload of round 3"."""
    return f"{protocol.Kind(event.kind).name.lower()} of round {event.round}"


class BufferPool:
    """Buffers that are reused, so that a run in steady state allocates nothing.

    The caller may give a buffer back while native code still reads it (a cancelled transfer drains): the pool hands a
    buffer out again only when it is the buffer's only owner. The pool never holds more buffers than were in use at
    once: if all idle buffers are too small, the smallest is replaced by a larger one.
    """

    def __init__(self, allocate: Callable[[int], _C.Buffer] = _C.Buffer) -> None:
        """`allocate`: returns a new buffer of the given number of bytes."""
        self._allocate = allocate
        self._free: list[_C.Buffer] = []
        self._least = 0
        self.allocated_bytes = 0

    def take(self, nbytes: int) -> _C.Buffer:
        """A buffer of at least `nbytes` bytes with arbitrary contents. The caller owns it until `give_back`."""
        idle = self._idle()
        for buffer in idle:
            if buffer.nbytes >= nbytes:
                self._free.remove(buffer)
                return buffer
        if idle:
            self._free.remove(idle[0])
            self.allocated_bytes -= idle.pop(0).nbytes
        buffer = self._allocate(max(nbytes, self._least))
        self.allocated_bytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: _C.Buffer) -> None:
        """Takes back a buffer that the caller will no longer touch."""
        self._free.append(buffer)

    def fit(self, nbytes: int) -> None:
        """Makes every new buffer at least `nbytes` long, so that each fits any block, and drops all free buffers."""
        self._least = nbytes
        self.allocated_bytes -= sum(buffer.nbytes for buffer in self._free)
        self._free = []

    def _idle(self) -> list[_C.Buffer]:
        """The buffers that nothing else owns, smallest first; of equal sizes the last returned, which is still in the
        caches."""
        return sorted((b for b in reversed(self._free) if b.owners == 1), key=lambda b: b.nbytes)


@dataclass(frozen=True)
class Shape:
    """Slows down everything that this side sends: bytes per second (0: unlimited) and one-way delay in seconds.

    Raises ConfigError for other values than numbers from 0 on, and for a delay of more than a minute.
    """

    rate: float = 0.0
    delay: float = 0.0

    def __post_init__(self) -> None:
        _require_number("rate", self.rate, 0.0, math.inf, "bytes per second")
        _require_number("delay", self.delay, 0.0, _LONGEST_DELAY_S, "seconds")


class Transport:
    """One native thread with its links. `close`, or leaving the context manager, ends the thread."""

    def __init__(
        self,
        shape: Shape | None = None,
        *,
        tls: _C.TlsContext | None = None,
        idle_timeout: float = 60.0,
        lanes: int = DEFAULT_LANES,
    ) -> None:
        """`tls`: encrypts every connection, see `Tls.for_server` and `Tls.for_client`; None: no TLS.

        `lanes`: the most connections per link, 1 to MAX_LANES, that a client opens or a server offers.

        Raises ConfigError for another number of lanes, and for an idle timeout of less than 0.1 seconds.
        """
        if not isinstance(lanes, int | np.integer) or not 1 <= lanes <= MAX_LANES:
            raise ConfigError(f"lanes must be from 1 to {MAX_LANES}; found {lanes!r}")
        _require_number("idle_timeout", idle_timeout, _LEAST_IDLE_S, math.inf, "seconds")
        shape = shape or Shape()
        self.encrypted = tls is not None
        self._lanes = int(lanes)
        self.native = _C.Transport(
            bytes_per_second=float(shape.rate), delay=float(shape.delay), idle_timeout=float(idle_timeout), tls=tls
        )

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def listen(self, address: str, *, protected: bool, insecure: bool = False) -> str:
        """Listens on "host:port" (port 0: any free port) and returns the address with the actual port.

        An address that other machines can reach needs both TLS and `protected` (clients must prove who they are, with a
        token or a certificate), or `insecure`. Raises ConfigError otherwise, and TransportError when the port is taken
        or the host is not this machine's.
        """
        host, port = parse_address(address)
        check_protection(address, protected=protected, encrypted=self.encrypted, insecure=insecure)
        try:
            taken = self.native.listen(host, port)
        except OSError as error:
            raise _cannot_listen(address, _why(error)) from error
        return f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}"

    def connect(self, address: str, *, tries: int = 8, timeout: float = 5.0) -> int:
        """Connects to "host:port" and returns the link. Backs off between tries: 0.1 s, doubled up to 5 s.

        Raises ConnectError with the address when all tries fail.
        """
        host, port = parse_address(address)
        for attempt in range(1, tries + 1):
            try:
                return self.native.connect(host or "127.0.0.1", port, timeout)
            except OSError as error:
                if attempt == tries:
                    raise ConnectError(
                        f"no server at {address} after {tries} tries ({_why(error)}); is `parablock serve` running "
                        "there, and does a firewall let this port through?"
                    ) from error
                if attempt == 1:
                    log.info("no server at %s yet (%s); trying again for a while", address, _why(error))
                time.sleep(min(0.1 * 2 ** (attempt - 1), 5.0))
        raise ConfigError(f"tries must be at least 1; found {tries}")

    def offer_lanes(self, link: int) -> protocol.Lanes | None:
        """Lets a peer that has proved itself open further lanes, and returns the message that offers them; None if the
        link may have only one."""
        if self._lanes == 1:
            return None
        return protocol.Lanes(most=self._lanes, key=self.native.offer_lanes(link, self._lanes - 1))

    def open_lanes(self, link: int, offer: protocol.Lanes) -> None:
        """Opens as many further lanes as the server offers and this side wants, and blocks until they are connected.

        Failures are only logged: the link works with one connection.
        """
        more = min(self._lanes, offer.most) - 1
        if more <= 0:
            return
        try:
            self.native.attach_lanes(link, offer.key, more, _LANE_TIMEOUT_S)
        except OSError as error:
            log.warning("going on with one connection to the server: no further one could be opened (%s)", error)
        except ValueError as error:
            log.warning("no further connections to the server: %s", error)

    def send_message(self, link: int, message: protocol.Message) -> None:
        """Queues a control message; it overtakes queued data."""
        self.native.send_control(link, protocol.encode(message))

    def next_event(self, timeout: float) -> _C.Event | None:
        """The next event, or None after `timeout` seconds. Waiting releases the GIL, and Ctrl-C can interrupt it."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            event = self.native.next_event(max(0.0, min(left, _LONGEST_WAIT_S)))
            if event is not None or left <= _LONGEST_WAIT_S:
                return event

    def close(self, flush: float = 5.0) -> None:
        """Sends queued messages for at most `flush` seconds, then closes every link and ends the thread."""
        self.native.close(flush)


def _require_number(name: str, value: object, least: float, most: float, unit: str) -> None:
    """Raises ConfigError for what is no number within these bounds; both bounds are allowed."""
    if not isinstance(value, int | float | np.number) or not least <= float(value) <= most:
        up_to = "" if most == math.inf else f" to {most:g}"
        raise ConfigError(f"expected {name} to be a number of {unit} from {least:g}{up_to}; found {value!r}")


def check_protection(address: str, *, protected: bool, encrypted: bool, insecure: bool = False) -> None:
    """Raises ConfigError for an address that other machines can reach, unless the server uses TLS (`encrypted`) and
    clients must prove who they are (`protected`), or `insecure` is set."""
    if insecure or (protected and encrypted) or _is_loopback(parse_address(address)[0]):
        return
    if protected:
        lacks = (
            "without TLS: the token keeps strangers out, but whoever is on the way could read and change everything, "
            "and take over a connection that has proved it"
        )
    else:
        lacks = "without protection: anyone who reaches it could join the run"
        lacks += "" if encrypted else ", and whoever is on the way could read and change everything"
    wanted = [] if protected else ["a token (--token-file) or client certificates (--tls-client-ca)"]
    wanted += [] if encrypted else ["TLS (--tls-cert and --tls-key; `parablock certs` makes them)"]
    raise ConfigError(
        f"refusing to listen on {address} {lacks}. Give {', and '.join(wanted)}; or listen on 127.0.0.1, or say "
        "--insecure when the network itself is trusted"
    )


def check_free(address: str) -> None:
    """Raises TransportError if `Transport.listen` could not listen on the address now. No peer can connect during the
    check, which binds the address but does not listen."""
    host, port = parse_address(address)
    failure: OSError | None = None
    try:
        for family, kind, protocol_number, _, at in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                with socket.socket(family, kind, protocol_number) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(at)
                return
            except OSError as error:
                failure = error
    except OSError as error:
        failure = error
    if failure is not None:
        raise _cannot_listen(address, str(failure.strerror)) from failure


def _cannot_listen(address: str, why: str) -> TransportError:
    return TransportError(f"cannot listen on {address}: {why}; is another server running there?")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _why(error: OSError) -> str:
    """Only the reason of a native error, whose message also has the address. A resolver's reason is in parentheses."""
    _, opened, reason = str(error.strerror).partition("(")
    return reason.partition(")")[0] if opened else os.strerror(error.errno or 0)
