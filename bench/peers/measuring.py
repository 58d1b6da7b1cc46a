"""What every peer's script needs: a payload, its digest, memory, and two processes that exchange it.

Runs inside of foreign environments: nothing beyond the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

MIB = 2**20
REPLY_BYTES = 4096  # says that all is there, where the payload goes one way


def fill(memory: Any) -> None:
    """Bytes that no compression and no shared page makes smaller."""
    view = memoryview(memory).cast("B")
    pattern = random.Random(0).randbytes(MIB)
    for index, at in enumerate(range(0, len(view), MIB)):
        shift = index % MIB
        part = pattern[shift:] + pattern[:shift]
        view[at : at + MIB] = part[: min(MIB, len(view) - at)]


def payload(nbytes: int) -> bytearray:
    """Memory with such bytes."""
    data = bytearray(nbytes)
    fill(data)
    return data


def digest(data: Any) -> str:
    """With which a receiver proves what it has."""
    return hashlib.sha256(data).hexdigest()


def memory_bytes(field: str, process: int | str = "self") -> int:
    """VmRSS (now) or VmHWM (the peak so far) of a process; 0 when it has gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


class Memory:
    """A process's peak beyond what it held when this was made."""

    def __init__(self, process: int | str = "self") -> None:
        self._process = process
        self._base = memory_bytes("VmRSS", process)

    def peak_beyond_base(self) -> int:
        """In bytes."""
        return max(0, memory_bytes("VmHWM", self._process) - self._base)


def arguments() -> argparse.ArgumentParser:
    """The command line that every peer's script has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--legs", type=int, choices=[1, 2], required=True, help="1: there; 2: there and back")
    parser.add_argument("--respond", metavar="WHERE", help="be the other end (used by the script itself)")
    return parser


def report(seconds: float, moved: bool, sender_bytes: int, receiver_bytes: int) -> None:
    """Prints a script's result: seconds, whether digests agreed, each side's peak memory beyond its base."""
    result = {"seconds": seconds, "moved": moved, "sender_bytes": sender_bytes, "receiver_bytes": receiver_bytes}
    print(json.dumps(result), flush=True)


class End(ABC):
    """One end of a connection between two processes that know nothing but each other."""

    @abstractmethod
    def listen(self) -> str:
        """Opens an end; returns what the other one needs to find it."""

    @abstractmethod
    def accept(self) -> None:
        """Waits for the other one."""

    @abstractmethod
    def connect(self, where: str) -> None:
        """Finds the end that listens."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Any:
        """Memory that can be sent from and received into."""

    @abstractmethod
    def send(self, memory: Any) -> None:
        """Returns when the memory may be used again."""

    @abstractmethod
    def receive(self, memory: Any) -> None:
        """Returns when the memory is full."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""


def exchange(make: type[End]) -> None:
    """The main function of a script for such ends: starts the other process, moves the payload once, reports."""
    options = arguments().parse_args()
    nbytes = options.mib * MIB
    if options.respond:
        respond(make(), nbytes, options.legs)
        return
    command = [sys.executable, *sys.orig_argv[1:], "--respond", "yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        end = make()
        end.connect(json.loads(other.stdout.readline()))
        small = end.allocate(REPLY_BYTES)
        end.send(small)
        end.receive(small)
        memory = Memory()
        data = end.allocate(nbytes)
        fill(data)
        back = end.allocate(nbytes) if options.legs == 2 else small
        start = time.monotonic()
        end.send(data)
        end.receive(back)
        seconds = time.monotonic() - start
        sent = digest(data)
        theirs = json.loads(other.stdout.readline())
        moved = theirs["digest"] == sent and (options.legs == 1 or digest(back) == sent)
        report(seconds, moved, memory.peak_beyond_base(), theirs["memory"])
        end.close()


def respond(end: End, nbytes: int, legs: int) -> None:
    """The other process."""
    print(json.dumps(end.listen()), flush=True)
    end.accept()
    small = end.allocate(REPLY_BYTES)
    end.receive(small)
    end.send(small)
    memory = Memory()
    data = end.allocate(nbytes)
    end.receive(data)
    end.send(data if legs == 2 else small)
    print(json.dumps({"digest": digest(data), "memory": memory.peak_beyond_base()}), flush=True)
    end.close()
