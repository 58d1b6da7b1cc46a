"""A link between two network namespaces of this machine, shaped by the kernel's token bucket.

Without a delay the link is a pair of virtual Ethernet devices. With a delay it is a pair of TUN devices and a process
that forwards packets when they are due, since not every kernel has netem. Any program can send over the link. Needs
root and Linux; `why_not` says what is missing.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ADDRESSES = ("198.18.0.1", "198.18.0.2")  # the network for benchmarks (RFC 2544); stays inside the namespaces
DEVICE = "link0"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_TUN_MTU = 9000  # fewer packets for the process in between
_QUEUE_S = 0.1  # the longest that packets wait in the token bucket's queue
_BURST_S = 0.004  # a tick of the kernel at 250 Hz
_LEAST_BURST = 20_000  # more than one packet


@dataclass(frozen=True)
class Shape:
    """The link in each direction: bits per second, and the delay of a packet in seconds."""

    rate: float
    delay: float = 0.0


def why_not() -> str | None:
    """Why no shaped link can be made here; None if it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} (Debian: iproute2) is not installed"
    try:
        with link(Shape(10e6)):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        output = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        return f"the kernel or this container does not let us: {output}"


@contextlib.contextmanager
def link(shape: Shape) -> Iterator[tuple[str, str]]:
    """Two namespaces with ADDRESSES and a link between them while the context lasts; yields their names."""
    names = (f"parablock-link-{os.getpid()}-a", f"parablock-link-{os.getpid()}-b")
    relay = None
    try:
        for namespace in names:
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if shape.delay > 0:
            relay = _start_relay(names, shape.delay)
        else:
            peer = ["peer", "name", DEVICE, "netns", names[1]]
            _run("ip", "-n", names[0], "link", "add", DEVICE, "type", "veth", *peer)
        burst = max(int(shape.rate / 8 * _BURST_S), _LEAST_BURST)
        for i, namespace in enumerate(names):
            to = [ADDRESSES[i], "peer", ADDRESSES[1 - i]] if relay else [f"{ADDRESSES[i]}/24"]
            _run("ip", "-n", namespace, "address", "add", *to, "dev", DEVICE)
            if relay:
                _run("ip", "-n", namespace, "link", "set", DEVICE, "mtu", str(_TUN_MTU))
            _run("ip", "-n", namespace, "link", "set", DEVICE, "up")
            bucket = ["rate", f"{int(shape.rate)}bit", "burst", str(burst), "latency", f"{_QUEUE_S * 1e3:g}ms"]
            _run("tc", "-n", namespace, "qdisc", "add", "dev", DEVICE, "root", "tbf", *bucket)
        yield names
    finally:
        if relay is not None:
            relay.terminate()
            relay.join()
        for namespace in names:
            if Path(f"/run/netns/{namespace}").exists():
                _run("ip", "netns", "delete", namespace)


def enter(namespace: str) -> None:
    """Moves this thread into a namespace. Call before starting threads: new threads inherit the namespace, but existing
    ones stay outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _start_relay(names: tuple[str, str], delay: float) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    relay = context.Process(target=_relay, args=(names, delay, theirs), daemon=True)
    relay.start()
    theirs.close()
    if not ours.poll(30.0) or not ours.recv():
        raise OSError("the process that delays packets did not start; is there a /dev/net/tun?")
    return relay


def _relay(names: tuple[str, str], delay: float, ready: Connection) -> None:
    """Forwards every packet from one namespace to the other, `delay` seconds later."""
    tuns = []
    for namespace in names:
        enter(namespace)
        tuns.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(tuns[-1], _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    ready.send(True)
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()  # due, to, packet
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for source in select.select(tuns, [], [], wait)[0]:
            target = tuns[1] if source == tuns[0] else tuns[0]
            with contextlib.suppress(BlockingIOError):
                while True:
                    under_way.append((time.monotonic() + delay, target, os.read(source, 65536)))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, target, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # the device is full or not up: a packet is lost, as on any link
                os.write(target, packet)
