"""Frames as Python sees them and sessions to try them on, for the tests of the protocol."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from parablock_rt._C import (
    PROTOCOL_VERSION,
    Buffer,
    Layout,
    Session,
    Source,
    crc32c,
)

HEADER_BYTES = 44
CONTROL, DATA, ACK, CANCEL, PING, PONG, ATTACH, RESEND, WITHDRAW = range(1, 10)
MAGIC = b"PBLK"

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Frame:
    """A frame as Python sees it; `encode` writes any, also those that no session would."""

    type: int
    key: Key = (0, 0, 0)
    run: int = 0
    offset: int = 0
    payload: bytes = b""
    length: int | None = None  # what the header says, where that is not the payload's
    magic: bytes = MAGIC
    version: int = PROTOCOL_VERSION
    flags: int = 0

    def encode(self) -> bytes:
        kind, round, block = self.key
        length = len(self.payload) if self.length is None else self.length
        fields = (self.magic, self.version, self.type, kind, self.flags, self.run, round, block, self.offset, length)
        head = struct.pack("<4sBBBBQIIQII", *fields, crc32c(self.payload))
        return head + struct.pack("<I", crc32c(head)) + self.payload


def decode(frame: bytes) -> Frame:
    """The inverse, for what a session sends."""
    magic, version, type, kind, flags, run, round, block, offset, length = struct.unpack_from("<4sBBBBQIIQI", frame)
    assert len(frame) == HEADER_BYTES + length
    return Frame(type, (kind, round, block), run, offset, frame[HEADER_BYTES:], None, magic, version, flags)


def make_source(layout: Layout, seed: int, ready: bool = True) -> tuple[Source, bytes]:
    """A source with random bytes, and these bytes."""
    buffer = Buffer(layout.nbytes)
    content = random.Random(seed).randbytes(layout.nbytes)
    memoryview(buffer)[:] = content
    return Source(buffer, layout, ready), content


def small_layout(units: int = 10, scale: int = 2, code: int = 7, chunk_units: int = 3) -> Layout:
    return Layout(units=units, scale_bytes=scale, code_bytes=code, chunk_units=chunk_units)


def frames_of(session: Session) -> list[Frame]:
    """Everything that the session would send now."""
    frames = []
    while (frame := session.next_frame()) is not None:
        frames.append(decode(frame))
    return frames


def settle(a: Session, b: Session) -> None:
    """Lets both talk until neither has anything to say."""
    quiet = False
    while not quiet:
        quiet = True
        for sender, receiver in ((a, b), (b, a)):
            while (frame := sender.next_frame()) is not None:
                receiver.feed(frame)
                quiet = False


def expecting(layout: Layout, key: Key = (1, 2, 3)) -> tuple[Session, Buffer]:
    """A session that waits for one transfer and has said so."""
    session, buffer = Session(), Buffer(layout.nbytes)
    session.receive(*key, buffer, layout)
    assert [frame.type for frame in frames_of(session)] == [ACK]
    return session, buffer


def sending(layout: Layout, key: Key = (1, 2, 3)) -> tuple[Session, list[Frame]]:
    """A session that was granted everything for one transfer, and the data it then sent."""
    session = Session()
    source, _ = make_source(layout, 0)
    session.send(*key, source)
    session.feed(Frame(ACK, key, payload=struct.pack("<Q", layout.nbytes)).encode())
    return session, frames_of(session)
