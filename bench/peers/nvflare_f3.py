"""NVFlare's F3: one cell sends the payload as a request, the other one replies. Runs in an environment of its own."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from measuring import MIB, REPLY_BYTES, Memory, arguments, digest, payload, report
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.message import Message

CHANNEL, TOPIC = "bench", "payload"
SERVER, CLIENT = "server", "client"  # F3 wants the cell that listens to be called "server"
DEADLINE_S = 300.0


def respond(url: str, legs: int) -> None:
    """The cell that listens: answers the small request, then the payload, and says what came."""
    memory: list[Memory] = []
    done = threading.Event()
    cell = Cell(fqcn=SERVER, root_url=url, secure=False, credentials={})

    def answer(request: Message) -> Message:
        if not memory:
            memory.append(Memory())
            return Message({}, bytes(REPLY_BYTES))
        received.append(request.payload)
        done.set()
        return Message({}, request.payload if legs == 2 else bytes(REPLY_BYTES))

    received: list[Any] = []
    cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=answer)
    cell.start()
    print(json.dumps("listening"), flush=True)
    if not done.wait(DEADLINE_S):
        raise RuntimeError(f"no payload within {DEADLINE_S:g} s")
    sys.stdin.readline()  # until the reply is there
    print(json.dumps({"digest": digest(received[0]), "memory": memory[0].peak_beyond_base()}), flush=True)
    cell.stop()


def request(url: str, legs: int, nbytes: int, other: subprocess.Popen[str]) -> None:
    """The cell that connects."""
    connected = threading.Event()
    cell = Cell(fqcn=CLIENT, root_url=url, secure=False, credentials={})
    cell.core_cell.set_cell_connected_cb(lambda agent: connected.set())
    cell.start()
    if not connected.wait(DEADLINE_S):
        raise RuntimeError("the cells did not find each other")

    def send(data: Any) -> Any:
        reply = cell.send_request(
            channel=CHANNEL, topic=TOPIC, target=SERVER, request=Message({}, data), timeout=DEADLINE_S
        )
        if reply.payload is None:
            raise RuntimeError(f"no reply: {reply.headers}")
        return reply.payload

    send(bytes(REPLY_BYTES))
    memory = Memory()
    data = payload(nbytes)
    start = time.monotonic()
    back = send(data)
    seconds = time.monotonic() - start
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("there\n")
    other.stdin.flush()
    theirs = json.loads(other.stdout.readline())
    sent = digest(data)
    moved = theirs["digest"] == sent and (legs == 1 or digest(back) == sent)
    report(seconds, moved, memory.peak_beyond_base(), theirs["memory"])
    cell.stop()


def main() -> None:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    options = arguments().parse_args()
    if options.respond:
        respond(options.respond, options.legs)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, *sys.argv, "--respond", url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            json.loads(other.stdout.readline())
            request(url, options.legs, options.mib * MIB, other)
    sys.stdout.flush()
    os._exit(0)  # F3's threads do not end by themselves


if __name__ == "__main__":
    main()
