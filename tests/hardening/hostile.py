"""A server's event loop against clients that may say anything at any time: bytes in, a conversation out.

Each input is a little program: links come and go, send what an honest client would say next, the same with a field
changed, or plain bytes; uploads complete with any body. There is no socket and no clock. A client may end its own
link, never the run; nothing but a ParaBlockError may come out of closing a round.
"""

from __future__ import annotations

import copy
import functools
import math
import struct
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError, ParaBlockError
from parablock_rt.server.coordinator import Coordinator
from parablock_rt.server.master import Master, ServerOptimizer
from parablock_rt.server.members import Identity, Member, UploadSlot
from parablock_rt.server.server import default_upload_budget
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.protocol import Kind, Message
from parablock_rt.wire.transport import body_layout

RUN = 12345
TOKEN = "a token of the fuzzer's own"
CLIENTS = 2
MOST_STEPS = 64
NONCE = bytes(range(handshake.NONCE_BYTES))
NUMBERS = (0.0, 1.0, -1.0, 5e-324, 1e-60, 1.7e308, math.inf, -math.inf, math.nan, 2.0**31)
INTEGERS = (0, 1, 2, -1, 3, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63))
TEXTS = ("", "x", "\n", "\x00", "x" * 3000)


class Input:
    """Reads an input from the front; zeros when it is exhausted."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return self._at >= len(self._data)

    def byte(self, below: int = 256) -> int:
        """A number from 0 to `below` - 1."""
        return (self.bytes(1) or b"\0")[0] % below

    def bytes(self, count: int) -> bytes:
        """At most `count` bytes."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken


class FakeNative:
    """A transport's native side that only remembers what was asked of it."""

    def __init__(self) -> None:
        self.closed: set[int] = set()

    def close_link(self, link: int, reason: str, *rest: object) -> None:
        self.closed.add(link)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(_C.Transport, name):
            raise AttributeError(name)
        return lambda *arguments, **named: None

    def make_source(self, buffer: _C.Buffer, layout: _C.Layout, complete: bool) -> _C.Source:
        return _C.Source(buffer, layout, complete)


class FakeTransport:
    """Keeps the challenges that went out: what an honest client needs to answer."""

    def __init__(self) -> None:
        self.native = FakeNative()
        self.challenges: dict[int, protocol.Challenge] = {}

    def send_message(self, link: int, message: Message) -> None:
        protocol.encode(message)  # must be possible
        if isinstance(message, protocol.Challenge):
            self.challenges[link] = message

    def offer_lanes(self, link: int) -> None:
        """One connection is all that these clients have."""


@functools.cache
def _setting() -> tuple[nn.Module, pb.BlockPlan]:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return model, pb.BlockPlan.from_model(model, [["0"], ["1"]])


class Conversation:
    """One server and the program of its clients."""

    def __init__(self, data: bytes) -> None:
        self._input = Input(data)
        model, plan = _setting()
        model = copy.deepcopy(model)
        settings = self._input.byte()
        self._token = TOKEN if settings & 1 else None
        config = RunConfig(
            rounds=3,
            clients=CLIENTS,
            local_steps=1,
            format=("int8", "int4", "bf16", "fp32")[settings >> 1 & 3],
            staleness=settings >> 3 & 1,
            server_optimizer="adam" if settings & 16 else "average",
            chunk=128,
        )
        blocks = plan.materialise(model)
        identity = Identity(RUN, self._token, config, plan.spec(), plan.digest, plan.frozen_fingerprint(model))
        self._plan = plan
        self._identity = identity
        self._transport = FakeTransport()
        optimizer = ServerOptimizer(config.server_optimizer, config.server_lr)
        self._master = Master(blocks, config.format, optimizer)
        fake: Any = self._transport
        self._coordinator = Coordinator(fake, identity, plan, self._master, default_upload_budget(plan, config))
        self._links = 0
        self._returning: dict[int, Member] = {}  # the member that comes back on a link

    def run(self) -> None:
        """Carries out the whole program."""
        for _ in range(MOST_STEPS):
            if self._input.empty:
                return
            self._step()
            self._check_bounds()
            try:
                self._coordinator._clock_at = 0.0  # the clock is checked after every step, on any machine
                self._coordinator._after_events()
                self._coordinator._over()
            except ParaBlockError:
                return  # a round without its quorum ends the run, with a reason

    def _step(self) -> None:
        operation, link = self._input.byte(10), 1 + self._input.byte(4)
        if operation == 0 or link > self._links:
            self._links += 1
            self._event("CONNECTED", self._links, text="127.0.0.1:1")
        elif operation == 1:
            self._event("CLOSED", link, text="gone")
        elif operation == 2:
            self._say(link, self._input.bytes(self._input.byte()))
        elif operation == 3:
            self._say(link, protocol.encode(self._changed(self._next_honest(link))))
        elif operation == 4:
            self._event("SENT", link, kind=Kind.SNAPSHOT)
        elif operation in (5, 6):
            self._deliver(link)
        else:
            message = self._next_honest(link)
            self._say(link, protocol.encode(message))

    # ---- What clients say

    def _member(self, link: int) -> Member | None:
        return self._coordinator._roster.on(link)

    def _next_honest(self, link: int) -> Message:
        """What a client that does everything right would say now; once it has begun, one of several things."""
        challenge, member = self._transport.challenges.get(link), self._member(link)
        if challenge is None:
            lost = [member for member in self._coordinator._roster.members if member.link is None]
            if lost and self._input.byte(2):
                self._returning[link] = lost[self._input.byte(len(lost))]
            purpose: protocol.Purpose = "rejoin" if link in self._returning else "join"
            return protocol.Hello(version=protocol.VERSION, release="", nonce=NONCE, purpose=purpose)
        if member is None:
            return self._proof(link, challenge)
        if member.rejoining:
            applied = len(self._coordinator.outcome.rounds) - 1 - self._input.byte(2)
            undecided = [applied + 1] if self._input.byte(2) else []
            return protocol.Rejoin(applied=applied, handed_over=applied + 1, held=[], undecided=undecided)
        if not member.ready:
            return protocol.Ready(
                plan_digest=self._identity.plan_digest,
                frozen=self._identity.frozen,
                fingerprints=list(self._master.fingerprints),
            )
        choice, closed = self._input.byte(8), self._coordinator.outcome.rounds
        if choice == 0:
            reason = TEXTS[self._input.byte(len(TEXTS))]
            return protocol.Goodbye(digest=self._coordinator._digest(), reason=reason, compute_s=1.0, exposed_s=0.0)
        if choice == 1 and closed:
            return protocol.Applied(round=len(closed) - 1, fingerprint=closed[-1].fingerprint)
        round = min(member.posted, default=0)
        block = member.posted[round].block if member.posted else 0
        weight = struct.unpack("<d", self._input.bytes(8).ljust(8, b"\0"))[0] if choice == 2 else 1.0
        return protocol.Upload(round=round, block=block, weight=weight, loss=1.0, compute_s=1.0, exposed_s=0.0)

    def _proof(self, link: int, challenge: protocol.Challenge) -> protocol.Proof:
        conversation = handshake.Conversation(challenge.run, NONCE, challenge.nonce)
        if (former := self._returning.get(link)) is None:
            return protocol.Proof(mac=handshake.proof(self._token, "join", conversation))
        return protocol.Proof(
            mac=handshake.proof(self._token, "rejoin", conversation),
            seat=former.seat,
            seat_mac=handshake.seat_proof(former.secret, former.seat, "client", conversation),
        )

    def _changed(self, message: Message) -> Message:
        """The message with one field changed, to a value of its type."""
        names = message.__struct_fields__
        name = names[self._input.byte(len(names))]
        value, pick = getattr(message, name), self._input.byte()
        changed: Any
        if isinstance(value, bool):
            changed = not value
        elif isinstance(value, int):
            changed = INTEGERS[pick % len(INTEGERS)]
        elif isinstance(value, float):
            changed = NUMBERS[pick % len(NUMBERS)]
        elif isinstance(value, str):
            changed = TEXTS[pick % len(TEXTS)]
        elif isinstance(value, bytes):
            changed = self._input.bytes(pick)
        else:
            changed = [INTEGERS[pick % len(INTEGERS)]] * (pick % 4)
        return type(message)(**{field: getattr(message, field) for field in names} | {name: changed})

    def _say(self, link: int, data: bytes) -> None:
        if link in self._transport.native.closed or len(data) > protocol.CONTROL_BYTES_BEFORE_PROOF:
            return
        try:
            decoded = protocol.decode(data)
        except HandshakeError:
            pass
        else:
            again = protocol.decode(protocol.encode(decoded))
            assert again == decoded or "nan" in repr(decoded), "a message is the same after the wire"
        self._event("CONTROL", link, message=data)

    def _deliver(self, link: int) -> None:
        member = self._member(link)
        waiting = [posted for posted in member.posted.values() if posted.arrived is None] if member else []
        if not waiting:
            return
        posted = min(waiting, key=lambda posted: posted.round)
        content = self._input.bytes(self._input.byte())
        repeated = (content * (posted.nbytes // max(1, len(content)) + 1))[: posted.nbytes]
        self._carry(posted, repeated.ljust(posted.nbytes, b"\0"))
        self._event("RECEIVED", link, kind=Kind.UPLOAD, round=posted.round, block=posted.block)

    def _carry(self, posted: UploadSlot, content: bytes) -> None:
        """Brings the bytes to where the server wants them, and past its inspector, as a link would."""
        key = Kind.UPLOAD, posted.round, posted.block
        numel = self._plan.blocks[posted.block].flat_numel
        layout = body_layout(self._identity.config.format, numel, self._identity.config.chunk)
        source = _C.Buffer(len(content))
        memoryview(source)[:] = content
        sender, receiver = _C.Session(), _C.Session()
        receiver.receive(*key, posted.buffer, layout, 0, posted.inspector)
        sender.feed(receiver.next_frame() or b"")
        sender.send(*key, _C.Source(source, layout, True))
        while frame := sender.next_frame():
            receiver.feed(frame)

    def _event(self, type: str, link: int, **fields: Any) -> None:
        if link in self._transport.native.closed and type != "CLOSED":
            return
        defaults = {"kind": 0, "round": 0, "block": 0, "message": b"", "text": "", "at_ns": 1, "first_byte_ns": 1}
        defaults |= {"unfinished": [], "became_lane": False}
        event: Any = SimpleNamespace(type=getattr(_C.Event.Type, type), link=link, **defaults | fields)
        self._coordinator._take(event)

    def _check_bounds(self) -> None:
        coordinator = self._coordinator
        assert len(coordinator._roster.members) <= CLIENTS, "there are no more members than seats"
        seats = [member.seat for member in coordinator._roster.members]
        assert len(seats) == len(set(seats)), "nobody shares a seat"
        for member in coordinator._roster.members:
            proved = self._token is None or member.link is None or member.link in self._transport.challenges
            assert proved, "a member has proved itself"
            assert len(member.announced) <= coordinator.config.staleness + 2, "announcements are bounded"
        open_rounds = coordinator._run.rounds._rounds
        assert all(0 <= round < coordinator.config.rounds for round in open_rounds), "no other rounds are opened"
        roster, intake = coordinator._roster, coordinator._participants.intake
        posted = sum(slot.nbytes for member in roster.members for slot in member.posted.values())
        assert intake._held_bytes == posted + intake.taken_bytes, "every upload's room is given back"
        assert not any(roster.candidate(member.link) for member in roster.members if member.link is not None)
        # Two rounds of the largest values may add up to more; one round's mean is always a number.
        if len(coordinator.outcome.rounds) == 1 and coordinator.config.server_optimizer == "average":
            assert bool(self._master.x(coordinator.outcome.rounds[0].block).isfinite().all()), "a mean is finite"


def one_input(data: bytes) -> None:
    """What a fuzzer calls. Raises whatever a client should not have been able to bring about."""
    Conversation(data).run()
