"""A client without a model: speaks the real client's protocol, with uploads that were encoded in advance.

One thread runs several of them against one server, each over its own link. They compute nothing, so that a benchmark
measures only the server and the network, but they send everything that a server waits for.
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
    """The Ready message of a client that holds the same weights as the server. Materialises the plan."""
    fingerprints = [fingerprint(block) for block in plan.materialise(model)]
    return protocol.Ready(plan_digest=plan.digest, frozen=plan.frozen_fingerprint(model), fingerprints=fingerprints)


def buffer_of(body: Tensor) -> _C.Buffer:
    """A buffer of the transport with a copy of a packed body."""
    buffer = _C.Buffer(body.numel())
    as_tensor(buffer, body.numel()).copy_(body)
    return buffer


@dataclass
class _Recording:
    """A body that was encoded in advance, in the form that `ServerLink.send_upload` takes."""

    source: Any
    nbytes: int


class LightClient:
    """One client; used as a context manager."""

    def __init__(self, address: str, ready: protocol.Ready) -> None:
        """Takes a seat. The client already has the server's weights, so the server sends no block before the run."""
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
        """Waits until all clients have joined."""
        self._link.opening()

    def expect(self, round: int, block: int, layout: _C.Layout) -> None:
        """Posts a buffer for the aggregate of a round."""
        self._link.post_update(round, block, Landing(self._buffers.take(layout.nbytes), layout))

    def upload(self, round: int, block: int, buffer: _C.Buffer, layout: _C.Layout) -> None:
        """Announces and sends the body for a round; its bytes leave as the server grants credit."""
        recording = _Recording(self._transport.native.make_source(buffer, layout, True), layout.nbytes)
        announcement = protocol.Upload(round=round, block=block, weight=1.0, loss=0.0, compute_s=0.0, exposed_s=0.0)
        self._link.send_upload(announcement, cast(Encoding, recording))

    def apply(self, round: int) -> int:
        """Waits for the aggregate; returns the fingerprint of the reference with the aggregate applied."""
        self._link.wait(lambda: self._link.arrived(round), f"the aggregate of round {round}")
        arrival = self._link.take_arrival(round)
        assert isinstance(arrival.message, protocol.Update)
        self._link.passed(round)
        self._link.report_applied(round, arrival.message.fingerprint)
        self._buffers.give_back(arrival.landing.buffer)
        return arrival.message.fingerprint

    def end(self, digest: str) -> None:
        """Says goodbye with the digest of the final model."""
        self._link.farewell(protocol.Goodbye(digest=digest, reason="", compute_s=0.0, exposed_s=0.0))
