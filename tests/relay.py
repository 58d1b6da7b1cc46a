"""A bad network: a process between clients and a server, which forwards bytes until it is told to do harm.

Whoever started it tells it what to do with `Process.tell`: `(when, nbytes, harm)`, where `when` is "up" (towards the
server) or "down", and the harm is done when so many more bytes have passed that way, exactly there; or, where `nbytes`
are bytes themselves, just behind these. It reports ("armed", None) once it counts, and ("fired", harm) when it is done.
`("mend",)` makes the network whole again; it reports ("mended", None). `("reroute",)` lets new connections pass, and
what is held stays so; it reports ("rerouted", None). `("count",)` makes it report ("passed", bytes) with the bytes that
have passed each way, and the connections that there were.

Harms: `cut` ends the connections (FIN) and refuses new ones, `reset` does so with RST, `hold` lets nothing pass any
more but keeps everything open, `flip` changes one bit of the next byte, once.

`(when, nbytes, harm, index)` counts the bytes of one connection, and harms it alone: the network stays up for others.
They are numbered as they come, from 0.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

_RESET = struct.pack("ii", 1, 0)  # closing sends RST


@dataclass
class _Harm:
    """To be done when `nbytes` more have passed, or these bytes; `index`: of one connection, and to that one."""

    when: str
    nbytes: int | bytes
    kind: str
    index: int | None
    seen: bytes = b""  # at the end of what has passed

    def strikes(self, data: bytes) -> int | None:
        """After how many of these bytes, which pass next; None: not yet."""
        if isinstance(self.nbytes, bytes):
            before, self.seen = self.seen, (self.seen + data)[1 - len(self.nbytes) :]
            at = (before + data).find(self.nbytes)
            return None if at < 0 else at + len(self.nbytes) - len(before)
        at = min(self.nbytes, len(data))
        self.nbytes -= at
        done = at < len(data) or (self.nbytes == 0 and self.kind != "flip")  # which takes a byte
        return at if done else None


class _Network:
    """What is shared by the threads of the relay. A harm is armed, then fires."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._changed = threading.Condition()
        self._armed: _Harm | None = None
        self._down = False  # connections are refused
        self._held: set[int | None] = set()  # connections that nothing passes; None: all
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        self.passed = {"up": 0, "down": 0, "connections": 0}

    def report(self, kind: str, value: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send((kind, value))

    def arm(self, when: str, nbytes: int | bytes, harm: str, index: int | None = None) -> None:
        with self._changed:
            self._armed = _Harm(when, nbytes, harm, index)

    def mend(self) -> None:
        with self._changed:
            self._down = False
            self._held.clear()
            self._changed.notify_all()

    def reroute(self) -> None:
        with self._changed:
            self._down = False
            self._held = set(range(len(self._connections))) if self._held else set()

    def enter(self, near: socket.socket, far: socket.socket) -> int | None:
        """Takes in a connection's two ends and returns its number, unless the network is down."""
        with self._changed:
            if self._down:
                return None
            self._connections.append((near, far))
            self.passed["connections"] += 1
            return len(self._connections) - 1

    def wait_while_held(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held & {None, index})

    def pass_on(self, index: int, way: str, data: bytes, to: socket.socket) -> None:
        """Sends a connection's bytes on, up to where the harm is to be done."""
        self.wait_while_held(index)
        with self._changed:
            harm, at = self._armed, None
            if harm is not None and harm.when == way and harm.index in (None, index):
                at = harm.strikes(data)
                self._armed = harm if at is None else None
        to.sendall(data[:at])
        rest = b"" if at is None else data[at:]
        if harm is not None and at is not None:
            rest = self._do_harm(harm, rest)
        self.wait_while_held(index)
        to.sendall(rest)
        with self._changed:
            self.passed[way] += len(data)

    def _do_harm(self, harm: _Harm, rest: bytes) -> bytes:
        with self._changed:
            if harm.kind == "hold":
                self._held.add(harm.index)
            elif harm.kind == "flip":
                rest = bytes([rest[0] ^ 4]) + rest[1:] if rest else rest
            else:
                self._down = harm.index is None
                harmed = self._connections if harm.index is None else [self._connections[harm.index]]
                for end in [end for connection in harmed for end in connection]:
                    with contextlib.suppress(OSError):  # some have ended long ago
                        if harm.kind == "reset":
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                            end.shutdown(socket.SHUT_RD)  # whoever waits to read keeps it open
                        else:
                            end.shutdown(socket.SHUT_RDWR)
                    end.close()
        self.report("fired", harm.kind)
        return rest


def _forward(network: _Network, index: int, way: str, source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(16384):
            network.pass_on(index, way, data, to)
    except OSError:
        pass
    finally:
        network.wait_while_held(index)  # the end does not get through either
        for end in (source, to):  # the other direction ends with it
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _accept(network: _Network, listener: socket.socket, target: tuple[str, int]) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(target, timeout=5.0)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (index := network.enter(near, far)) is None:
            near.close()
            far.close()
            continue
        threading.Thread(target=_forward, args=(network, index, "up", near, far), daemon=True).start()
        threading.Thread(target=_forward, args=(network, index, "down", far, near), daemon=True).start()


def relay(pipe: Connection, target: str) -> None:
    """The body of a relay process. Reports address, then what happens."""
    host, _, port = target.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    network = _Network(pipe)
    threading.Thread(target=_accept, args=(network, listener, (host, int(port))), daemon=True).start()
    pipe.send(("address", f"127.0.0.1:{listener.getsockname()[1]}"))
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        if command[0] == "count":
            network.report("passed", network.passed)
        elif command[0] == "reroute":
            network.reroute()
            network.report("rerouted", None)
        elif command[0] == "mend":
            network.mend()
            network.report("mended", None)
        else:
            network.arm(*command)
            network.report("armed", None)
