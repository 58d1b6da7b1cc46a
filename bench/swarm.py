"""Many clients without a model: they speak the real clients' protocol, with uploads that were encoded in advance.

Each has a link of its own to the server, all in one transport and one thread. They compute nothing and take as little
CPU time as possible from the server on the same machine, so that a benchmark measures only the server and the network.
But they send everything that a server waits for.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from parablock_rt import _C
from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection, error_from
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor

DEADLINE_S = 600.0
M = TypeVar("M", bound=protocol.Begin | protocol.Update | protocol.Farewell)


def ready_of(model: nn.Module, plan: BlockPlan) -> protocol.Ready:
    """The Ready message of a client that holds the same weights as the server. Materialises the plan."""
    fingerprints = [fingerprint(block) for block in plan.materialise(model)]
    return protocol.Ready(plan_digest=plan.digest, frozen=plan.frozen_fingerprint(model), fingerprints=fingerprints)


def buffer_of(body: Tensor) -> _C.Buffer:
    """A buffer of the transport with a copy of a packed body."""
    buffer = _C.Buffer(body.numel())
    as_tensor(buffer, body.numel()).copy_(body)
    return buffer


class Swarm:
    """All clients of a run; used as a context manager. Every call is for all of them."""

    def __init__(self, address: str, ready: protocol.Ready, clients: int) -> None:
        """Takes the seats. The clients already have the server's weights, so the server sends no block before the
        run."""
        self._transport = Transport()
        self._buffers = BufferPool()
        self._landings: list[_C.Buffer] = []
        self._connections: list[Connection] = []
        for _ in range(clients):
            self._connections.append(Connection(self._transport, address))
            self._connections[-1].introduce(None)
        for connection in self._connections:
            connection.send(ready)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *exception: object) -> None:
        self._transport.close()

    def begin(self) -> None:
        """Waits until all clients have joined."""
        self._collect(protocol.Begin)

    def expect(self, round: int, block: int, layout: _C.Layout) -> None:
        """Posts buffers for the aggregate of a round."""
        for connection in self._connections:
            self._landings.append(self._buffers.take(layout.nbytes))
            landing = self._landings[-1]
            self._transport.native.receive(connection.link, Kind.UPDATE, round, block, landing, layout)

    def upload(self, round: int, block: int, buffer: _C.Buffer, layout: _C.Layout) -> None:
        """Announces and sends the body for a round; its bytes leave as the server grants credit. Each client has its
        own source, which computes its checksums."""
        announcement = protocol.Upload(round=round, block=block, weight=1.0, loss=0.0, compute_s=0.0, exposed_s=0.0)
        for connection in self._connections:
            connection.send(announcement)
            source = self._transport.native.make_source(buffer, layout, True)
            self._transport.native.send(connection.link, Kind.UPLOAD, round, block, source)

    def apply(self, round: int) -> int:
        """Waits for the aggregate; returns the fingerprint of the reference with the aggregate applied."""
        updates = self._collect(protocol.Update, bodies=len(self._connections))
        (value,) = {update.fingerprint for update in updates if update.round == round}
        for connection in self._connections:
            connection.send(protocol.Applied(round=round, fingerprint=value))
        for landing in self._landings:
            self._buffers.give_back(landing)
        self._landings.clear()
        return value

    def end(self, digest: str) -> None:
        """Says goodbye with the digest of the final model. Once the server has the last goodbye it closes all links, so
        one may be closed before another has its farewell."""
        for connection in self._connections:
            connection.send(protocol.Goodbye(digest=digest, reason="", compute_s=0.0, exposed_s=0.0))
        said_farewell: set[int] = set()
        while len(said_farewell) < len(self._connections):
            event = self._next_event("Farewell")
            if event.type == _C.Event.Type.CLOSED or _message_of(event, protocol.Farewell):
                said_farewell.add(event.link)

    def _collect(self, kind: type[M], bodies: int = 0) -> list[M]:
        """Waits for a message of this kind to each client, and for so many bodies. Skips other messages.

        Raises RuntimeError when the server is gone or silent, and the failure that it reports.
        """
        messages: list[M] = []
        while len(messages) < len(self._connections) or bodies > 0:
            event = self._next_event(kind.__name__)
            if event.type == _C.Event.Type.CLOSED:
                raise RuntimeError(f"waiting for {kind.__name__}: {event.text}")
            if event.type == _C.Event.Type.RECEIVED:
                bodies -= 1
            elif (message := _message_of(event, kind)) is not None:
                messages.append(message)
        return messages

    def _next_event(self, what: str) -> _C.Event:
        event = self._transport.next_event(DEADLINE_S)
        if event is None:
            raise RuntimeError(f"waited {DEADLINE_S:g} s for {what}: the server is silent")
        return event


def _message_of(event: _C.Event, kind: type[M]) -> M | None:
    """The event's message if it is of this kind. Raises the failure that the server reports."""
    message = protocol.decode(event.message) if event.type == _C.Event.Type.CONTROL else None
    if isinstance(message, protocol.Failure):
        raise error_from(message)
    return message if isinstance(message, kind) else None
