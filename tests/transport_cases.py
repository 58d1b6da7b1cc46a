"""Transports on loopback, forged frames and raw peers, for the tests of the transport."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parablock_rt import _C
from parablock_rt._C import Buffer, Event, Layout

DEADLINE_S = 90.0  # what takes a second on an idle machine may take long on a busy one
HEADER_BYTES = 44
MIB = 2**20
T = Event.Type


def flat(nbytes: int, chunk: int = 65536) -> Layout:
    """A transfer of exactly `nbytes` bytes."""
    return Layout(units=nbytes, scale_bytes=0, code_bytes=1, chunk_units=chunk)


def filled(nbytes: int, seed: int = 0) -> tuple[Buffer, bytes]:
    """A buffer with random bytes, and these."""
    buffer = Buffer(nbytes)
    content = random.Random(seed).randbytes(nbytes)
    memoryview(buffer)[:] = content
    return buffer, content


def next_event(transport: _C.Transport) -> Event:
    event = transport.next_event(DEADLINE_S)
    assert event is not None, f"nothing happened for {DEADLINE_S:g} s"
    return event


def expect(transport: _C.Transport, *types: Event.Type, count: int = 1) -> list[Event]:
    """The next `count` events, which must be of these types, in any order."""
    events = []
    for _ in range(count):
        events.append(next_event(transport))
        assert events[-1].type in types, (events[-1].type, events[-1].text)
    return events


def frame(type: int, payload: bytes = b"", version: int = _C.PROTOCOL_VERSION) -> bytes:
    """A frame as a stranger would forge it."""
    head = struct.pack("<4sBBBBQIIQII", b"PBLK", version, type, 0, 0, 0, 0, 0, 0, len(payload), _C.crc32c(payload))
    return head + struct.pack("<I", _C.crc32c(head)) + payload


def read_exactly(stranger: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = stranger.recv(nbytes - len(data))
        assert piece, "the connection ended too early"
        data += piece
    return data


def read_to_end(stranger: socket.socket) -> bytes:
    data = b""
    while piece := stranger.recv(65536):
        data += piece
    return data


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def cpu_s_of_transports() -> float:
    """The processor's time that the transport threads of this process have taken."""
    threads = [task for task in Path("/proc/self/task").iterdir() if "pb-transport" in (task / "comm").read_text()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e9


def freed_memory_is_used_again() -> bool:
    """Not under the address sanitizer, which holds it back to notice who still uses it; it finds leaks by itself."""
    with open("/proc/self/maps") as file:
        return "libasan" not in file.read()


Make = Callable[..., _C.Transport]


def make_transports() -> Iterator[Make]:
    """Body of a fixture: makes native transports and closes them."""
    made: list[_C.Transport] = []

    def transport(**options: Any) -> _C.Transport:
        made.append(_C.Transport(**options))
        return made[-1]

    yield transport
    for each in made:
        each.close(0.0)


def join(a: _C.Transport, b: _C.Transport, port: int | None = None) -> tuple[int, int]:
    """Connects a to b; returns a's and b's link."""
    if port is None:
        port = b.listen("127.0.0.1", 0)
    link = a.connect("127.0.0.1", port, 5.0)
    (connected,) = expect(b, T.CONNECTED)
    return link, connected.link


def listen(make: Make) -> tuple[_C.Transport, int]:
    """Body of a fixture: a transport that listens, and its port."""
    transport = make()
    return transport, transport.listen("127.0.0.1", 0)


def stranger_to(port: int) -> socket.socket:
    """A raw connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(DEADLINE_S)
    return connection


def frame_of(
    type: int,
    key: tuple[int, int, int] = (0, 0, 0),
    *,
    offset: int = 0,
    payload: bytes = b"",
    length: int | None = None,
) -> bytes:
    """Any frame of our version, also one whose header lies about the length."""
    kind, round, block = key
    size = len(payload) if length is None else length
    fields = (b"PBLK", _C.PROTOCOL_VERSION, type, kind, 0, 0, round, block, offset, size, _C.crc32c(payload))
    head = struct.pack("<4sBBBBQIIQII", *fields)
    return head + struct.pack("<I", _C.crc32c(head)) + payload


@contextlib.contextmanager
def no_descriptor_free() -> Iterator[None]:
    """For this process; whatever it closes meanwhile is one that it may use again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
