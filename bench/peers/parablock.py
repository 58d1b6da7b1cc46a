"""This project's transport, as the package uses it, with a CRC-32C on both sides."""

from __future__ import annotations

from typing import Any

from measuring import MIB, End, exchange

from parablock_rt import _C
from parablock_rt.wire.transport import Transport, raw_layout

CHUNK = 2**18  # bytes, about what the default of a run is in int8
DEADLINE_S = 120.0


class ParaBlockEnd(End):
    """One end. Each transfer has a number of its own in each direction."""

    def __init__(self) -> None:
        self._transport = Transport()
        self._sent = self._received = 0

    def listen(self) -> str:
        return self._transport.listen("127.0.0.1:0", protected=False)

    def accept(self) -> None:
        self._link = self._wait(_C.Event.Type.CONNECTED).link

    def connect(self, where: str) -> None:
        self._link = self._transport.connect(where)

    def allocate(self, nbytes: int) -> Any:
        buffer = _C.Buffer(nbytes)
        for at in range(0, nbytes, MIB):  # every page is touched before the clock runs, as in a bytearray
            memoryview(buffer)[at : at + MIB] = bytes(min(MIB, nbytes - at))
        return buffer

    def send(self, memory: Any) -> None:
        source = self._transport.native.make_source(memory, raw_layout(memory.nbytes, CHUNK), True)
        self._transport.native.send(self._link, 1, self._sent, 0, source)
        self._sent += 1
        self._wait(_C.Event.Type.SENT)

    def receive(self, memory: Any) -> None:
        layout = raw_layout(memory.nbytes, CHUNK)
        self._transport.native.receive(self._link, 1, self._received, 0, memory, layout)
        self._received += 1
        self._wait(_C.Event.Type.RECEIVED)

    def close(self) -> None:
        self._transport.close()

    def _wait(self, kind: _C.Event.Type) -> _C.Event:
        event = self._transport.next_event(DEADLINE_S)
        if event is None or event.type != kind:
            raise RuntimeError(f"expected {kind}, found {event and (event.type, event.text)}")
        return event


if __name__ == "__main__":
    exchange(ParaBlockEnd)
