"""The Python face of the native transport: buffers, events, addresses. Payload bytes never pass through here.

Every function may be called from any thread; each object is used by one thread at a time.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parablock_rt import _C, protocol
from parablock_rt.codec import FORMATS
from parablock_rt.config import parse_address
from parablock_rt.errors import ConfigError, ConnectError, TransportError

_RAW_UNIT = 256  # bytes; every flat block is a multiple: 128 elements of at least 2 bytes

# Ctrl-C reaches a thread that waits in native code only when it comes back to Python.
_LONGEST_WAIT_S = 0.1


def body_layout(format: str, numel: int, chunk: int) -> _C.Layout:
    """How the packed body of `numel` elements is cut into chunks of `chunk` elements (both multiples of 128)."""
    return _C.body_layout(FORMATS.index(format), numel, chunk)


def raw_layout(nbytes: int, chunk: int) -> _C.Layout:
    """How a raw block of `nbytes` bytes (a multiple of 256) is cut, in chunks of about `chunk` bytes."""
    return _C.Layout(
        units=nbytes // _RAW_UNIT, scale_bytes=0, code_bytes=_RAW_UNIT, chunk_units=max(1, chunk // _RAW_UNIT)
    )


def as_tensor(buffer: _C.Buffer, nbytes: int) -> Tensor:
    """The first `nbytes` bytes of a buffer as a uint8 tensor that shares its memory and keeps it alive."""
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes)


class BufferPool:
    """Buffers that are used again, so that a run in steady state allocates nothing.

    `give_back` may come while native code still reads the buffer (a cancelled transfer drains): it is handed out again
    only when nobody else owns it.
    """

    def __init__(self) -> None:
        self._free: list[_C.Buffer] = []
        self.allocated_bytes = 0

    def take(self, nbytes: int) -> _C.Buffer:
        """A buffer of at least `nbytes` bytes; its contents are arbitrary."""
        fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes and buffer.owners == 1]
        if fitting:
            smallest = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free.remove(smallest)
            return smallest
        self.allocated_bytes += nbytes
        return _C.Buffer(nbytes)

    def give_back(self, buffer: _C.Buffer) -> None:
        """The caller will not touch `buffer` any more."""
        self._free.append(buffer)


@dataclass(frozen=True)
class Shape:
    """An artificial link: bytes a second (0: unlimited) and one-way delay in seconds, for what this side sends."""

    rate: float = 0.0
    delay: float = 0.0


class Transport:
    """One native thread with its links. Closing it ends the thread; a context manager does so."""

    def __init__(self, shape: Shape | None = None, *, idle_timeout: float = 60.0, max_links: int = 1024) -> None:
        shape = shape or Shape()
        self.native = _C.Transport(
            bytes_per_second=shape.rate, delay=shape.delay, idle_timeout=idle_timeout, max_links=max_links
        )

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def listen(self, address: str, *, protected: bool, insecure: bool = False) -> str:
        """Listens on "host:port" (port 0: any free one) and returns the address with the port taken.

        Raises ConfigError for an address that others can reach without `protected` (a token is required of clients)
        or `insecure`, and TransportError when the port is taken or the host is not this machine's.
        """
        host, port = parse_address(address)
        if not (protected or insecure or _is_loopback(host)):
            raise ConfigError(
                f"refusing to listen on {address} without protection: anyone who reaches it could join the run. Set a "
                "token, listen on 127.0.0.1, or say --insecure when the network itself is trusted"
            )
        try:
            taken = self.native.listen(host, port)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {address}: {_why(error)}; is another server running there?"
            ) from error
        return f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}"

    def connect(self, address: str, *, tries: int = 8, timeout: float = 5.0) -> int:
        """Connects to "host:port" and returns the link. Waits between tries: 0.1 s, doubled up to 5 s.

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
                time.sleep(min(0.1 * 2 ** (attempt - 1), 5.0))
        raise ConfigError(f"tries must be at least 1; found {tries}")

    def send_message(self, link: int, message: protocol.Message) -> None:
        """Queues a control message; it overtakes data that waits."""
        self.native.send_control(link, protocol.encode(message))

    def next_event(self, timeout: float) -> _C.Event | None:
        """The next event, or None after `timeout` seconds. The GIL is free while waiting, and Ctrl-C is seen."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            event = self.native.next_event(max(0.0, min(left, _LONGEST_WAIT_S)))
            if event is not None or left <= _LONGEST_WAIT_S:
                return event

    def waiting_events(self) -> Iterator[_C.Event]:
        """Every event that is there already; never waits."""
        while (event := self.native.next_event(0.0)) is not None:
            yield event

    def close(self, flush: float = 5.0) -> None:
        """Lets queued messages leave for at most `flush` seconds, closes every link and ends the thread."""
        self.native.close(flush)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _why(error: OSError) -> str:
    """The reason alone: the native message has the address, and so has ours. A resolver's reason stands in brackets."""
    _, opened, reason = str(error.strerror).partition("(")
    return reason.partition(")")[0] if opened else os.strerror(error.errno or 0)
