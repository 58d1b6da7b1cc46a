"""A server that follows the protocol until a test has it lie: to try what a client makes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from processes import make_model

import parablock_rt as pb
from parablock_rt import _C, codec
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.handshake import Conversation
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, body_layout

RUN = 4242
SECRET = b"s" * 32
CHUNK = 256
_TURN_S = 0.05

Lie = Callable[["HostileServer", int], object]


class HostileServer:
    """Serves one client, with a run of four rounds. `lies`: what to do, by the type of the message that is answered:
    before the honest answer if it returns True, else instead of it. `said`: the types of all messages so far."""

    def __init__(self, lies: Mapping[str, Lie] | None = None) -> None:
        self.said: list[str] = []
        self._lies = dict(lies or {})
        self._transport = Transport()
        self.address = self._transport.listen("127.0.0.1:0", protected=False)
        self._plan = pb.BlockPlan.from_model(make_model(), blocks=4)
        self._hello: dict[int, tuple[bytes, bytes]] = {}
        self._purpose: dict[int, str] = {}
        self._closed = 0  # rounds
        self._fingerprints: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> HostileServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._transport.close(flush=0.0)

    def say(self, link: int, type: str, **fields: Any) -> None:
        """Sends a message that may be none that the protocol allows."""
        self._transport.native.send_control(link, msgspec.msgpack.encode({"type": type, **fields}))

    def hang_up(self, link: int) -> None:
        self._transport.native.close_link(link, "enough", 1.0)

    def welcome(self, link: int, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        settings = {"rounds": 4, "clients": 1, "local_steps": 1, "staleness": 1, "chunk": CHUNK}
        fields = {
            "client": 0,
            "config": settings | dict(config or {}),
            "plan": msgspec.to_builtins(self._plan.spec()),
            "mac": handshake.proof(None, "server", self._conversation(link)),
            "secret": SECRET,
            "epoch": 0,
        }
        self.say(link, "Welcome", **fields | changes)

    def welcome_back(self, link: int) -> None:
        conversation = self._conversation(link)
        mac = handshake.proof(None, "server", conversation)
        self.say(
            link, "WelcomeBack", mac=mac, seat_mac=handshake.seat_proof(SECRET, 0, "server", conversation), epoch=0
        )

    def begin(self, link: int, **changes: Any) -> None:
        self.say(link, "Begin", **{"first_round": 0, "updates_from": 0} | changes)
        self._let_in(link, 0)

    def update(self, link: int, of: int, **changes: Any) -> None:
        """The aggregate of a round, which changes nothing."""
        block = of % 4
        fields = {
            "round": of,
            "block": block,
            "fingerprint": self._fingerprints[block],
            "contributions": 1,
            "bad_groups": 0,
        }
        self.say(link, "Update", **fields | changes)
        numel = self._plan.blocks[block].flat_numel
        body = codec.encode(torch.zeros(numel), torch.zeros(numel), None, format="int8").body
        buffer = BufferPool().take(len(body))
        as_tensor(buffer, len(body)).copy_(body)
        source = self._transport.native.make_source(buffer, body_layout("int8", numel, CHUNK), True)
        self._transport.native.send(link, Kind.UPDATE, of, block, source)

    def accept(self, link: int, round: int) -> None:
        self.say(link, "Verdict", round=round, block=round % 4, accepted=True, reason="")

    def _serve(self) -> None:
        while not self._over.is_set():
            event = self._transport.next_event(_TURN_S)
            if event is not None and event.type == _C.Event.Type.CONTROL:
                self._answer(event.link, protocol.decode(event.message))

    def _answer(self, link: int, message: protocol.Message) -> None:
        self.said.append(type(message).__name__)
        if isinstance(message, protocol.Hello):
            self._hello[link] = message.nonce, handshake.nonce()
            self._purpose[link] = message.purpose
        elif isinstance(message, protocol.Proof):
            self._transport.native.trust(link, RUN, protocol.CONTROL_BYTES, 2**24)
        elif isinstance(message, protocol.Ready):
            self._fingerprints = message.fingerprints
        if (lie := self._lies.get(self.said[-1])) is not None and lie(self, link) is not True:
            return
        match message:
            case protocol.Hello():
                self.say(link, "Challenge", run=RUN, nonce=self._hello[link][1], token_required=False)
            case protocol.Proof() if self._purpose[link] == "rejoin":
                self.welcome_back(link)
            case protocol.Proof():
                self.welcome(link)
            case protocol.Rejoin():
                self.say(link, "RejoinAnswer", updates_from=self._closed, snapshots=[], uploads={})
            case protocol.Ready():
                self.begin(link)
            case protocol.Upload():
                self.accept(link, message.round)
                self._let_in(link, message.round + 1)
                self.update(link, message.round)
                self._closed = message.round + 1
            case protocol.Goodbye():
                self.say(link, "Farewell")

    def _conversation(self, link: int) -> Conversation:
        return Conversation(RUN, *self._hello[link], b"")

    def _let_in(self, link: int, round: int) -> None:
        layout = body_layout("int8", self._plan.blocks[round % 4].flat_numel, CHUNK)
        self._transport.native.receive(link, Kind.UPLOAD, round, round % 4, _C.Buffer(layout.nbytes), layout)
