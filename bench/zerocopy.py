"""Whether MSG_ZEROCOPY would help: plain sends
 against zero-copy sends of one chunk, over loopback and over a veth pair.

`python -m bench.zerocopy` prints a line per case: MiB/s, the sender's CPU seconds per GiB, and the share of the sends
that the kernel copied nevertheless, which it reports with each completion. Loopback and veth deliver to a socket of the
same machine, for which the kernel must copy; only a real network card can show a gain. The veth pair leads into a
separate network namespace and needs root; without root the case is left out, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import multiprocessing
import os
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from .process import GIB, MIB, cpu_seconds

CHUNK = 260 * 1024  # an int8 chunk of the default size
NAMESPACE, OUTSIDE, INSIDE = "pb-zerocopy", "10.99.77.1", "10.99.77.2"
_SO_ZEROCOPY, _MSG_ZEROCOPY, _MSG_ERRQUEUE = 60, 0x4000000, 0x2000
_COPIED = 1  # SO_EE_CODE_ZEROCOPY_COPIED


def read_all(host: str, pipe: Connection, namespace: str | None) -> None:
    """A child process: reads from one sender after another, each until it closes."""
    if namespace is not None:
        with open(f"/var/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:  # os.setns came with Python 3.12
                raise OSError(ctypes.get_errno(), "setns")
    with socket.create_server((host, 0)) as listener:
        pipe.send(listener.getsockname())
        buffer = bytearray(MIB)
        while pipe.recv():
            connection, _ = listener.accept()
            with connection:
                while connection.recv_into(buffer):
                    pass


class Completions:
    """Reads the kernel's completions of zero-copy sends: how many sends are over, and how many the kernel copied."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.over = self.copied = 0

    def drain(self) -> None:
        """Reads all completions that have arrived."""
        while True:
            try:
                _, ancillary, _, _ = self._connection.recvmsg(0, 512, _MSG_ERRQUEUE)
            except BlockingIOError:
                return
            for _, _, data in ancillary:
                _, _, _, code, _, first, last = struct.unpack_from("=IBBBBII", data)
                self.over += last - first + 1
                self.copied += (last - first + 1) * (code == _COPIED)


def send(address: tuple[str, int], payload: memoryview, zerocopy: bool) -> tuple[float, float, float]:
    """MiB/s, CPU seconds per GiB, and the share of the sends that the kernel copied (0 without zero-copy)."""
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if zerocopy:
            connection.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        completions = Completions(connection)
        sends = 0
        begin, cpu = time.monotonic(), cpu_seconds()
        for start in range(0, len(payload), CHUNK):
            chunk = payload[start : start + CHUNK]
            while len(chunk) > 0:
                try:
                    chunk = chunk[connection.send(chunk, _MSG_ZEROCOPY if zerocopy else 0) :]
                    sends += 1
                except OSError as error:  # ENOBUFS: too much memory is pinned, so wait for completions
                    if error.errno != errno.ENOBUFS:
                        raise
            if zerocopy:
                completions.drain()
        while zerocopy and completions.over < sends:
            completions.drain()
        used, seconds = cpu_seconds() - cpu, time.monotonic() - begin
    return len(payload) / MIB / seconds, used * GIB / len(payload), completions.copied / sends


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """A network namespace at the other end of a veth pair, while the context lasts."""

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)

    ip(f"netns add {NAMESPACE}")
    try:
        ip(f"link add pb-zc0 type veth peer name pb-zc1 netns {NAMESPACE}")
        ip(f"addr add {OUTSIDE}/24 dev pb-zc0")
        ip("link set pb-zc0 up")
        ip(f"-n {NAMESPACE} addr add {INSIDE}/24 dev pb-zc1")
        ip(f"-n {NAMESPACE} link set pb-zc1 up")
        ip(f"-n {NAMESPACE} link set lo up")
        yield
    finally:
        ip(f"netns del {NAMESPACE}")  # also deletes the pair


def measure(path: str, host: str, inside: str | None, payload: memoryview, repetitions: int) -> None:
    """Both kinds of sends, in turns, to a reader at `host`."""
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("spawn").Process(target=read_all, args=(host, theirs, inside))
    reader.start()
    theirs.close()
    address = ours.recv()
    results: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for _ in range(repetitions):
        for zerocopy in (False, True):
            ours.send(True)
            results[zerocopy].append(send(address, payload, zerocopy))
    ours.send(False)
    reader.join()
    for zerocopy, runs in results.items():
        speed, cpu, copied = (statistics.median(column) for column in zip(*runs, strict=True))
        kind = f"zero-copy, {copied:.0%} copied nevertheless" if zerocopy else "plain"
        print(f"{path:<10}{speed:>8.0f} MiB/s  sender {cpu:.2f} CPU s/GiB  {kind}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    payload = memoryview(bytearray(os.urandom(MIB) * options.mib))
    measure("loopback", "127.0.0.1", None, payload, options.repetitions)
    try:
        with namespace():
            measure("veth", INSIDE, NAMESPACE, payload, options.repetitions)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"veth: left out, a network namespace cannot be made here ({getattr(error, 'stderr', '') or error})")


if __name__ == "__main__":
    main()
