"""Clients that do not keep to the protocol: the server tells them why and lets go of them, the others' run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from deadlines import do_not_wait_for, do_not_wait_for_the_gone
from processes import WAIT_S, Process, client, make_model, start_server, starter
from torch import nn

import parablock_rt as pb
from parablock_rt import _C, codec
from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.errors import HandshakeError, PeerLostError, PlanMismatchError, RoundError
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.protocol import Kind
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, body_layout

Start = Callable[..., Process]

BLOCK = 64 * 64 + 128  # elements of a block of the tests' model, padded


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


class RawClient:
    """A client that says what it is told to. The opening is the right one unless a test departs from it."""

    def __init__(self, address: str) -> None:
        self._transport = Transport()
        self._link = self._transport.connect(address, tries=1)
        self._messages: list[protocol.Message] = []
        self._sent = 0
        self.closed: str | None = None

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._transport.close(flush=1.0)

    def say(self, message: protocol.Message | bytes) -> None:
        data = message if isinstance(message, bytes) else protocol.encode(message)
        self._transport.native.send_control(self._link, data)

    def hear(self, kind: type[protocol.M]) -> protocol.M:
        """The next message of this kind; others are passed over."""
        while True:
            self._wait(lambda: bool(self._messages), kind.__name__)
            message = self._messages.pop(0)
            if isinstance(message, kind):
                return message
            assert not isinstance(message, protocol.Failure), message

    def hear_closed(self) -> str:
        """Why the link is closed. Messages that came before are kept."""
        self._wait(lambda: self.closed is not None, "the end of the link")
        assert self.closed is not None
        return self.closed

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert self.closed is None, f"the link was closed ({self.closed}) before {what} came"
            assert time.monotonic() < deadline, f"{what} did not come in time"
            event = self._transport.next_event(1.0)
            if event is not None and event.type == _C.Event.Type.CONTROL:
                self._messages.append(protocol.decode(event.message))
            elif event is not None and event.type == _C.Event.Type.SENT:
                self._sent += 1
            elif event is not None and event.type == _C.Event.Type.CLOSED:
                self.closed = event.text

    def take_seat(self) -> protocol.Welcome:
        nonce = handshake.nonce()
        self.say(protocol.Hello(version=protocol.VERSION, release="0", nonce=nonce))
        challenge = self.hear(protocol.Challenge)
        self._transport.native.trust(self._link, challenge.run, protocol.CONTROL_BYTES)
        self.say(protocol.Proof(mac=b""))
        return self.hear(protocol.Welcome)

    def ready(self, welcome: protocol.Welcome, **changes: Any) -> protocol.Ready:
        """What a client with the server's own weights would say."""
        model = make_model()
        plan = pb.BlockPlan.from_spec(model, welcome.plan)
        truth = {
            "plan_digest": plan.digest,
            "frozen": plan.frozen_fingerprint(model),
            "fingerprints": [fingerprint(block) for block in plan.materialise(model)],
        }
        return protocol.Ready(**truth | changes)

    def begin(self) -> protocol.Welcome:
        """Takes a seat and waits for the start."""
        welcome = self.take_seat()
        self.say(self.ready(welcome))
        self.hear(protocol.Begin)
        return welcome

    def upload(self, round: int, body: bytes, announcement: protocol.Upload) -> protocol.Verdict:
        """Sends a body for a round and returns what the server says to it."""
        self.say(announcement)
        self.send_body(round, body)
        verdict = self.hear(protocol.Verdict)
        assert verdict.round == round
        return verdict

    def send_body(self, round: int, body: bytes) -> None:
        buffer = BufferPool().take(len(body))
        as_tensor(buffer, len(body)).copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        source = self._transport.native.make_source(buffer, body_layout("int8", BLOCK, 2**18), True)
        self._transport.native.send(self._link, Kind.UPLOAD, round, round % 4, source)

    def until_sent(self) -> None:
        """Returns when the server has all of a body."""
        self._wait(lambda: self._sent > 0, "the acknowledgement of the body")
        self._sent -= 1


def announcement(round: int, **changes: Any) -> protocol.Upload:
    fields = {"round": round, "block": round % 4, "weight": 1.0, "loss": 1.0, "compute_s": 0.0, "exposed_s": 0.0}
    return protocol.Upload(**fields | changes)


def good_body() -> bytes:
    now = torch.ones(BLOCK)
    return bytes(codec.encode(now, torch.zeros(BLOCK), None, format="int8").body.numpy())


# ---- Uploads


def test_bad_uploads_are_rejected_with_a_reason_and_leave_no_trace(start: Start) -> None:
    """One kind in each round. Nobody waits for a client whose upload was refused: the deadline is far away. What is
    left is, bit by bit, the run of the honest client alone."""
    cases: list[tuple[protocol.Upload, bytes, str]] = [
        (announcement(0, weight=-0.0), good_body(), "from 2^-64 to 2^64, such as a count of tokens, found -0.0"),
        (announcement(1, weight=0.0), good_body(), "from 2^-64 to 2^64, such as a count of tokens, found 0.0"),
        (announcement(2, weight=-1.0), good_body(), "from 2^-64 to 2^64, such as a count of tokens, found -1.0"),
        (announcement(3, weight=float("nan")), good_body(), "from 2^-64 to 2^64, such as a count of tokens, found nan"),
        (announcement(4, weight=float("inf")), good_body(), "from 2^-64 to 2^64, such as a count of tokens, found inf"),
        (announcement(5, weight=1e15), good_body(), "expected weight * |value| below 2^31"),
        (announcement(6, block=3), good_body(), "round 6 trains block 2, not 3"),
        (announcement(7), b"\xff" * len(good_body()), "expected a body that an encoder made"),
        (announcement(8), b"\x80" * len(good_body()), "expected a body that an encoder made"),
    ]
    with start_server(rounds=len(cases), quorum=1, deadline=300.0) as running, RawClient(running.address) as hostile:
        honest = start(client, running.address, data=0)
        hostile.begin()
        for round, (message, body, reason) in enumerate(cases):
            verdict = hostile.upload(round, body, message)
            assert not verdict.accepted
            assert reason in verdict.reason
            hostile.hear(protocol.Update)
        hostile.say(protocol.Goodbye(digest="", reason="done with it", compute_s=0.0, exposed_s=0.0))
        digest = honest.expect("done")["digest"]
        outcome = running.wait(WAIT_S)
    assert [closed.contributions for closed in outcome.rounds] == [1] * len(cases)
    with start_server(rounds=len(cases), clients=1) as alone:
        assert start(client, alone.address, data=0).expect("done")["digest"] == digest == outcome.digest


def test_the_upload_that_the_bad_ones_are_made_of_is_accepted() -> None:
    with start_server(rounds=1, clients=1) as running, RawClient(running.address) as raw:
        raw.begin()
        verdict = raw.upload(0, good_body(), announcement(0))
        assert (verdict.round, verdict.block, verdict.accepted, verdict.reason) == (0, 0, True, "")
        assert raw.hear(protocol.Update).contributions == 1


def test_an_upload_whose_body_comes_before_its_announcement_is_folded_when_that_comes() -> None:
    with start_server(rounds=1, clients=1) as running, RawClient(running.address) as raw:
        raw.begin()
        raw.send_body(0, good_body())
        raw.until_sent()
        raw.say(announcement(0))
        assert raw.hear(protocol.Verdict).accepted
        assert raw.hear(protocol.Update).contributions == 1


def test_an_upload_that_is_never_announced_is_refused_at_the_deadline(start: Start) -> None:
    given_up: set[int] = set()
    with start_server(rounds=1, quorum=1) as running, RawClient(running.address) as hostile:
        do_not_wait_for(running, lambda round: given_up)
        honest = start(client, running.address, data=0)
        seat = hostile.begin().client
        hostile.send_body(0, good_body())
        hostile.until_sent()
        given_up.add(seat)
        verdict = hostile.hear(protocol.Verdict)
        assert not verdict.accepted
        assert "without this upload" in verdict.reason
        hostile.say(protocol.Goodbye(digest="", reason="done with it", compute_s=0.0, exposed_s=0.0))
        honest.expect("done")
        assert [closed.contributions for closed in running.wait(WAIT_S).rounds] == [1]


def test_a_client_that_never_sends_an_upload_is_waited_for_until_the_deadline_of_the_settings() -> None:
    with start_server(clients=1, deadline=0.3) as running, RawClient(running.address) as silent:
        silent.begin()
        with pytest.raises(RoundError, match=r"round 0 cannot be closed: 0 of 1 clients delivered in the") as failure:
            running.wait(WAIT_S)
        assert answer(silent).reason == str(failure.value)
    open_s = re.search(r"in the ([0-9.]+) s it was open", str(failure.value))
    assert open_s is not None
    assert float(open_s[1]) >= 0.3


# ---- Messages that have no place, or no sense


def no_place(name: str) -> str:
    return f"{name} has no place here"


AT_THE_OPENING: list[tuple[str, Callable[[RawClient], None], str]] = [
    ("garbage instead of Hello", lambda raw: raw.say(b"\xc1garbage"), "a control message that this version does not"),
    ("an unknown message", lambda raw: raw.say(msgspec.msgpack.encode({"type": "Sudo"})), "this version does not"),
    ("a message without its fields", lambda raw: raw.say(msgspec.msgpack.encode({"type": "Hello"})), "does not"),
    ("deep nesting", lambda raw: raw.say(b"\x91" * 4000), "a control message that this version does not"),
    ("Proof first", lambda raw: raw.say(protocol.Proof(mac=b"")), "expected Hello as the first message, found Proof"),
    (
        "Hello of another version",
        lambda raw: raw.say(protocol.Hello(version=7, release="9.9", nonce=bytes(32))),
        f"the server speaks protocol version {protocol.VERSION}, this client version 7: install the same release",
    ),
    (
        "a short nonce",
        lambda raw: raw.say(protocol.Hello(version=protocol.VERSION, release="0", nonce=b"x")),
        "expected a nonce of 32 bytes, found 1",
    ),
    (
        "Hello twice",
        lambda raw: [raw.say(protocol.Hello(version=protocol.VERSION, release="0", nonce=bytes(32))) for _ in "12"],
        "expected Proof after the challenge, found Hello",
    ),
]


def test_a_wrong_opening_is_answered_with_a_reason(start: Start) -> None:
    """All of them against one server, which then serves an honest client as if nothing had been."""
    with start_server(clients=1) as running:
        for name, offend, reason in AT_THE_OPENING:
            with RawClient(running.address) as raw:
                offend(raw)
                failure = answer(raw)
                assert failure.error == "HandshakeError", name
                assert reason in failure.reason, name
        digest = start(client, running.address).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


def answer(raw: RawClient) -> protocol.Failure:
    """What the server says before it closes the link."""
    raw.hear_closed()
    failures = [message for message in raw._messages if isinstance(message, protocol.Failure)]
    assert len(failures) == 1, raw._messages
    return failures[0]


WITH_A_SEAT: list[tuple[str, Callable[[RawClient, protocol.Welcome], None], str, str]] = [
    ("garbage", lambda raw, _: raw.say(b"\x00"), "HandshakeError", "this version does not understand"),
    ("Welcome", lambda raw, welcome: raw.say(welcome), "HandshakeError", no_place("Welcome")),
    ("an upload before the start", lambda raw, _: raw.say(announcement(0)), "HandshakeError", no_place("Upload")),
    (
        "an aggregate before the start",
        lambda raw, _: raw.say(protocol.Applied(round=0, fingerprint=0)),
        "HandshakeError",
        no_place("Applied"),
    ),
    (
        "a digest before the end",
        lambda raw, _: raw.say(protocol.Goodbye(digest="0", reason="", compute_s=0.0, exposed_s=0.0)),
        "HandshakeError",
        no_place("Goodbye"),
    ),
    (
        "Ready twice",
        lambda raw, welcome: [raw.say(raw.ready(welcome)) for _ in "12"],
        "HandshakeError",
        no_place("Ready"),
    ),
    (
        "another plan",
        lambda raw, welcome: raw.say(raw.ready(welcome, plan_digest="0" * 64)),
        "PlanMismatchError",
        "the client lays out the plan differently (digest 000000000000, here ",
    ),
    (
        "other frozen weights",
        lambda raw, welcome: raw.say(raw.ready(welcome, frozen="0" * 64)),
        "PlanMismatchError",
        "what is not trained (frozen parameters and buffers) differs",
    ),
    (
        "too few fingerprints",
        lambda raw, welcome: raw.say(raw.ready(welcome, fingerprints=[1])),
        "PlanMismatchError",
        "expected 4 block fingerprints, found 1",
    ),
]


def test_a_client_that_breaks_the_rules_loses_its_seat_and_hears_why(start: Start) -> None:
    """All of them before the start of one run, whose seats honest clients take in the end."""
    with start_server() as running:
        for name, offend, error, reason in WITH_A_SEAT:
            with RawClient(running.address) as raw:
                offend(raw, raw.take_seat())
                failure = answer(raw)
                assert failure.error == error, name
                assert reason in failure.reason, name
        honest = [start(client, running.address) for _ in range(2)]
        assert [process.expect("done")["digest"] for process in honest] == [running.wait(WAIT_S).digest] * 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (announcement(1000), "an upload for round 1000 was announced while round 0 is open"),
        (protocol.Applied(round=0, fingerprint=1), "client [01] holds other bits than the server after round 0"),
        (protocol.Applied(round=-1, fingerprint=1), "client [01] holds other bits than the server after round -1"),
    ],
    ids=["a round far ahead", "bits of a round that is open", "no round at all"],
)
def test_a_lie_in_the_middle_of_a_run_ends_the_liar_only(start: Start, message: protocol.Message, reason: str) -> None:
    with start_server(quorum=1, rounds=3) as running, RawClient(running.address) as liar:
        do_not_wait_for_the_gone(running)
        honest = start(client, running.address, stop_before=[0])
        liar.begin()
        liar.say(message)
        failure = answer(liar)
        honest.let_go()
        digest = honest.expect("done")["digest"]
        outcome = running.wait(WAIT_S)
    assert outcome.digest == digest
    assert [*map(str, outcome.left)] == [f"client {outcome.left[0][7]}: {failure.reason}"]
    assert re.fullmatch(reason, failure.reason)


def test_a_huge_message_before_the_proof_ends_the_link(start: Start) -> None:
    with start_server(clients=1) as running:
        with RawClient(running.address) as raw:
            raw.say(bytes(protocol.CONTROL_BYTES_BEFORE_PROOF + 1))
            assert raw.hear_closed()
        digest = start(client, running.address).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


def test_a_frame_of_another_version_is_answered_with_a_frame_that_names_ours() -> None:
    """The version stands at the same place in every version's header, so that either side can say what it found."""
    with start_server(clients=1) as running:
        host, port = running.address.split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
            mine = probe_header()
            raw.sendall(mine[:4] + bytes([9]) + mine[5:])
            answer = raw.makefile("rb").read()
    assert answer[:4] == mine[:4]
    assert answer[4] == protocol.VERSION


def probe_header() -> bytes:
    session = _C.Session()
    session.ping(0)
    frame = session.next_frame(0)
    assert frame is not None
    return frame


@pytest.mark.parametrize(
    ("says", "error", "reason"),
    [
        (
            probe_header()[:4] + bytes([9]) + probe_header()[5:],
            HandshakeError,
            f"the peer speaks protocol version 9, this side version {protocol.VERSION}: install the same release",
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100),
            PeerLostError,
            "the peer does not speak the ParaBlock protocol",
        ),
    ],
    ids=["another version", "a web server"],
)
def test_a_server_that_speaks_something_else_is_refused_with_what_it_speaks(
    says: bytes, error: type[pb.ParaBlockError], reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def speak() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(ConnectionResetError):
                peer.sendall(says)
                while peer.recv(4096):
                    pass

        speaker = threading.Thread(target=speak)
        speaker.start()
        with pytest.raises(error, match=f"the server at {address}") as failure:
            pb.join(address, make_model(), torch.optim.SGD)
        speaker.join(WAIT_S)
    assert reason in str(failure.value)


# ---- Models that do not fit


def join_with(address: str, model: nn.Module, **options: Any) -> None:
    pb.join(address, model, torch.optim.SGD, **options).close()


def test_a_model_that_is_not_the_servers_is_refused_with_the_parameter_that_differs() -> None:
    with start_server() as running:
        with pytest.raises(PlanMismatchError, match=r"'0\.weight' \(64, 64\) 'fp32'.*this model has '0\.weight' \(32"):
            join_with(running.address, make_model(width=32))
        with pytest.raises(PlanMismatchError, match=r"'0\.weight' \(64, 64\) 'bf16'; load the model .*same dtype"):
            join_with(running.address, make_model().to(torch.bfloat16))
        with pytest.raises(PlanMismatchError, match=r"'3\.weight' .*this model \(Sequential\) has none of that name"):
            join_with(running.address, make_model()[:3])


@pytest.mark.parametrize("shape", [(2**20, 2**20), (64, 64, 2**40), (2**62, 4), (0, 64), (-64, -64), (64, 63)])
def test_a_plan_that_lies_about_sizes_is_refused_before_anything_is_allocated(shape: tuple[int, ...]) -> None:
    """A server that lies: its plan is compared with the client's own model, and never the measure of a buffer."""
    with start_server() as running:
        identity = running._coordinator._roster._identity
        first, *others = identity.plan.blocks
        parameters = (msgspec.structs.replace(first.parameters[0], shape=shape), *first.parameters[1:])
        lie = msgspec.structs.replace(
            identity.plan, blocks=(msgspec.structs.replace(first, parameters=parameters), *others)
        )
        running._coordinator._roster._identity = dataclasses.replace(identity, plan=lie)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = make_model()
        with pytest.raises(PlanMismatchError, match=r"'0\.weight'"):
            join_with(running.address, model)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_of_the_clients_own_that_differs_is_refused_with_the_parameter() -> None:
    model = make_model()
    with start_server() as running:
        with pytest.raises(PlanMismatchError, match=r"block 0 is 'block\.0' on the server and '0' here"):
            join_with(running.address, model, plan=pb.BlockPlan.from_model(model, ["0", "1", "2", "3"]))
        with pytest.raises(
            PlanMismatchError, match=r"parameter 2 of block 'block\.0' is absent on the server and '1\."
        ):
            join_with(running.address, model, plan=pb.BlockPlan.from_model(model, blocks=2))


def test_a_frozen_part_that_differs_is_refused() -> None:
    """Not only the trained weights must be those of one checkpoint: the frozen ones are never sent."""
    model, other, extended = make_model(), make_model(), make_model()
    plan = pb.BlockPlan.from_model(model, ["0", "1"])
    with torch.no_grad():
        other[3].bias += 1.0
    extended.register_buffer("seen", torch.zeros(1))
    with start_server(model=model, plan=plan) as running:
        of_four = (
            r"a difference in 1 of 4 tensors: parameter 3\.bias has other bytes, another type or another shape than"
        )
        with pytest.raises(PlanMismatchError, match=of_four):
            join_with(running.address, other)
        with pytest.raises(
            PlanMismatchError, match=r"a difference in 1 of 5 tensors: buffer seen is not on the server"
        ):
            join_with(running.address, extended)
        with pytest.raises(
            PlanMismatchError, match=r"a difference in 2 of 4 tensors: parameter 2\.bias has other bytes"
        ):
            join_with(running.address, nn.Sequential(*model[:2], make_model(seed=5)[2].bfloat16(), model[3]))


def test_a_model_without_blocks_is_refused_with_a_way_to_name_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(pb.ParaBlockError) as failure:
        pb.serve(model, rounds=1, clients=1)
    assert "expected an nn.ModuleList of decoder layers, found none in Sequential" in str(failure.value)
    assert "name the blocks yourself: BlockPlan.from_model(model, blocks=[" in str(failure.value)
    assert "blocks=4" in str(failure.value)
    assert "Give the plan to parablock_rt.serve as plan=; clients need nothing" in str(failure.value)
