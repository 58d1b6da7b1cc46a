"""Writes the seed corpus and the dictionary from real conversations: `python tests/hardening/seeds.py`.

Each seed is a program in the little language of its fuzz target, see there. What fuzzing finds goes into the same
folders under a name that says what it showed; this script writes only what begins with `seed-`.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import torch

from parablock_rt import _C, codec
from parablock_rt.wire import protocol

CORPUS = Path(__file__).parent / "corpus"
LAYOUTS = [(10, 2, 7, 3), (5, 0, 16, 2), (3, 2, 64, 8), (1, 0, 1, 1)]  # as in fuzz_session.cc
POST, SEND, CANCEL, RAISE, PULL, FEED, PING, CONTROL, _, _, _, READ, FORGE = range(13)
CONNECT, CLOSE, SAY, CHANGED, SNAPSHOT_SENT, DELIVER, _, HONEST = range(8)  # as in hostile.py


def write(target: str, name: str, data: bytes) -> None:
    """Writes one seed."""
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data)


def conversation(layout: int, rounds: int) -> tuple[list[bytes], list[bytes]]:
    """What the receiver and the sender of `rounds` transfers read, frame by frame."""
    receiver, sender = _C.Session(window_bytes=100), _C.Session(window_bytes=100)
    shape = _C.Layout(*LAYOUTS[layout])
    receiver.send_control(b"hello")
    sender.ping(1000)
    for round in range(rounds):
        buffer = _C.Buffer(shape.nbytes)
        memoryview(buffer)[:] = random.Random(round).randbytes(shape.nbytes)
        receiver.receive(1, round, 0, _C.Buffer(shape.nbytes), shape)
        sender.send(1, round, 0, _C.Source(buffer, shape, True))
    to_receiver: list[bytes] = []
    to_sender: list[bytes] = []
    said = True
    while said:
        said = False
        for here, there, wire in ((sender, receiver, to_receiver), (receiver, sender, to_sender)):
            while (frame := here.next_frame()) is not None:
                there.feed(frame)
                wire.append(frame)
                said = True
    return to_receiver, to_sender


def feed(frames: list[bytes], split: int) -> bytes:
    """The program that reads these frames, at most `split` bytes at a time."""
    wire = b"".join(frames)
    pieces = [wire[at : at + 255] for at in range(0, len(wire), 255)]
    return b"".join(bytes([FEED, len(piece)]) + piece + bytes([split]) for piece in pieces)


def session_seeds() -> None:
    """Both sides of transfers in every layout, in several splits; cancels and forged frames between."""
    for layout in range(len(LAYOUTS)):
        for rounds, split in ((1, 0), (2, 1), (4, 13)):
            to_receiver, to_sender = conversation(layout, rounds)
            posts = b"".join(bytes([POST, round, layout, 0]) for round in range(rounds))
            write(
                "session",
                f"receive-{layout}-{rounds}",
                b"\0" + posts + feed(to_receiver, split) + bytes([PULL, 7, *range(7)]),
            )
            sends = b"".join(bytes([SEND, round, layout, 0, RAISE, round, 9]) for round in range(rounds))
            pulls = bytes([PULL, 7, 0, 0, 0, 0, 1, 2, 3]) * 4
            half = len(to_sender) // 2
            talk = feed(to_sender[:half], split) + pulls + feed(to_sender[half:], split)
            write("session", f"send-{layout}-{rounds}", b"\0" + sends + talk)
            middle = len(to_receiver[0]) + len(to_receiver[1]) // 2
            wire = b"".join(to_receiver)
            cut = feed([wire[:middle]], split) + bytes([CANCEL, 0]) + feed([wire[middle:]], split)
            write("session", f"cancel-{layout}-{rounds}", b"\0" + posts + cut)
    begin = bytes([1, POST, 0, 0, 0, SEND, 0, 0, 4, PING, CONTROL, 5])
    forged = [bytes([FORGE, kind, 0, 0, 0, 0, 0]) for kind in range(9)]
    write("session", "forged", begin + b"".join(forged * 4))
    # Chunks on all lanes, out of order, half of each and then the rest.
    chunks = b"".join(bytes([FORGE, 1, 0, 1 | 16 | 32, 3 - lane, lane, 9, 9]) for lane in range(4))
    halves = b"".join(bytes([READ, lane, 127 + 50]) for lane in range(4))
    write(
        "session",
        "lanes",
        begin + chunks + halves + bytes([CANCEL, 1]) + b"".join(bytes([READ, i, 3]) for i in range(4)),
    )


def frame_seeds() -> None:
    """One header of each type."""
    to_receiver, to_sender = conversation(0, 1)
    seen = {frame[5]: frame[:44] for frame in [*to_receiver, *to_sender]}
    session = _C.Session()
    session.receive(1, 2, 3, _C.Buffer(90), _C.Layout(*LAYOUTS[0]))
    session.cancel_receive(1, 2, 3)
    while (frame := session.next_frame()) is not None:
        seen.setdefault(frame[5], frame[:44])
    for kind, header in seen.items():
        write("frame", f"type-{kind}", header)


def codec_seeds() -> None:
    """Bodies of every format, and blocks for the encoder."""
    generator = torch.Generator().manual_seed(0)
    now, ref = (torch.randn(256, generator=generator) * 0.02 for _ in range(2))
    now[7], now[130] = float("nan"), float("inf")
    for index, format in enumerate(codec.FORMATS):
        body = codec.encode(now, ref, None, format=format).body.numpy().tobytes()
        write("codec", f"fold-{format}", bytes([index, 1]) + body + struct.pack("<dB", 3.0, 1))
        blocks = now.numpy().tobytes() + ref.numpy().tobytes()
        write("codec", f"pack-{format}", bytes([index | 4, 1, 0, 0]) + blocks)


def message_seeds() -> None:
    """A run of two clients from the first connection to the last goodbye, in every format, with and without a token."""
    join = bytes([CONNECT, 0]) + bytes([CONNECT, 0]) + bytes([HONEST, 0, HONEST, 1] * 2)
    ready = bytes([HONEST, 0, HONEST, 1])
    round = b"".join(bytes([HONEST, seat, 7, DELIVER, seat, 2, 1, 0]) for seat in range(2))
    applied = b"".join(bytes([HONEST, seat, 1]) for seat in range(2))
    goodbye = b"".join(bytes([HONEST, seat, 0, 0]) for seat in range(2))
    for settings in range(0, 32, 3):
        write("messages", f"run-{settings}", bytes([settings]) + join + ready + (round + applied) * 3 + goodbye)
    # A client whose connection breaks comes back before the first or the last round, and says where it is, or lies.
    back = bytes([CLOSE, 0, CONNECT, 3, HONEST, 2, 1, 0, HONEST, 2])
    for settings, done in ((0, 0), (8, 0), (8, 2)):
        begun = bytes([settings]) + join + ready + (round + applied) * done + back
        for behind, undecided in ((0, 0), (0, 1), (1, 1)):
            position = bytes([HONEST, 2, behind, undecided, DELIVER, 2, 1])
            write("messages", f"back-{settings}-{done}-{behind}-{undecided}", begun + position)
        for field in range(4):
            for number in (2, 3, 4):
                lie = bytes([CHANGED, 2, 0, 0, field, number])
                write("messages", f"astray-{settings}-{done}-{field}-{number}", begun + lie)
    for message in (
        protocol.Hello(version=protocol.VERSION, release="1", nonce=b"n" * 32),
        protocol.Proof(mac=b""),
        protocol.Ready(plan_digest="", frozen="", fingerprints=[1, 2]),
        protocol.Goodbye(digest="", reason="bye", compute_s=0.0, exposed_s=0.0),
    ):
        data = protocol.encode(message)
        name = type(message).__name__.lower()
        write("messages", f"say-{name}", b"\0" + bytes([CONNECT, 0, SAY, 0, len(data)]) + data)


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def dictionary() -> None:
    """What stands in headers and messages, for libFuzzer."""
    words = {
        "magic": b"PBLK",
        "version": bytes([protocol.VERSION]),
        "run": struct.pack("<Q", 7),
        "nan_scale": b"\xc0\x7f",
        "largest_bf16": b"\x7f\x7f",
        "largest_double": struct.pack("<d", 1.7e308),
        "smallest_double": struct.pack("<d", 5e-324),
        "tag": b"\xa4type",
    }
    words |= {
        name.lower(): name.encode() for name in ("Hello", "Proof", "Rejoin", "Ready", "Upload", "Applied", "Goodbye")
    }
    lines = [f'{name}="{_escaped(word)}"' for name, word in words.items()]
    (CORPUS / "words.dict").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for old in CORPUS.glob("*/seed-*"):
        old.unlink()
    session_seeds()
    frame_seeds()
    codec_seeds()
    message_seeds()
    dictionary()
