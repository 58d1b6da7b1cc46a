"""A client without a model: the real client's end of the conversation, with uploads that were encoded before.

Several of them load one server, each over a link of its own, from one thread. They compute nothing, so that what is
measured is the server and the way to it; they leave out nothing that a server waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from parablock_rt import _C
from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.server_link import ServerLink
from parablock_rt.staging.stager import Encoding, Landing
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor

DEADLINE_S = 600.0


def ready_of(model: nn.Module, plan: BlockPlan) -> protocol.Ready:
    """What every client says that holds the server's bits. Materialises the plan."""
    fingerprints = [fingerprint(block) for block in plan.materialise(model)]
    return protocol.Ready(plan_digest=plan.digest, frozen=plan.frozen_fingerprint(model), fingerprints=fingerprints)


def buffer_of(body: Tensor) -> _C.Buffer:
    """A packed body where the transport can send it from."""
    buffer = _C.Buffer(body.numel())
    as_tensor(buffer, body.numel()).copy_(body)
    return buffer


@dataclass
class _Recording:
    """A body that was encoded before, as a `ServerLink` sends it."""

    source: Any
    nbytes: int


class LightClient:
    """One client; used as a context manager."""

    def __init__(self, address: str, ready: protocol.Ready) -> None:
        """Takes a seat. The model is the server's already, so that no block has to come before the run."""
        self._transport = Transport()
        self._buffers = BufferPool()
        connection = Connection(self._transport, address)
        welcome = connection.introduce(None)
        self._link = ServerLink(connection, None, welcome, patience=DEADLINE_S, reconnect=0.0)
        self._link.ready(ready, [])

    def __enter__(self) -> LightClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._link.close(None)

    def begin(self) -> None:
        """Waits until all clients are there."""
        self._link.opening()

    def expect(self, round: int, block: int, layout: _C.Layout) -> None:
        """Makes room for a round's aggregate."""
        self._link.post_update(round, block, Landing(self._buffers.take(layout.nbytes), layout))

    def upload(self, round: int, block: int, buffer: _C.Buffer, layout: _C.Layout) -> None:
        """Announces and sends the body for a round; it leaves as the server makes room."""
        recording = _Recording(self._transport.native.make_source(buffer, layout, True), layout.nbytes)
        announcement = protocol.Upload(round=round, block=block, weight=1.0, loss=0.0, compute_s=0.0, exposed_s=0.0)
        self._link.send_upload(announcement, cast(Encoding, recording))

    def apply(self, round: int) -> int:
        """Waits for the aggregate; returns the fingerprint that the reference has with it."""
        self._link.wait(lambda: self._link.arrived(round), f"the aggregate of round {round}")
        arrival = self._link.take_arrival(round)
        assert isinstance(arrival.message, protocol.Update)
        self._link.passed(round)
        self._link.report_applied(round, arrival.message.fingerprint)
        self._buffers.give_back(arrival.landing.buffer)
        return arrival.message.fingerprint

    def end(self, digest: str) -> None:
        """Says goodbye as one whose model has these bits."""
        self._link.farewell(protocol.Goodbye(digest=digest, reason="", compute_s=0.0, exposed_s=0.0))
