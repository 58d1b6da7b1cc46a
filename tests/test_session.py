"""The protocol without a socket: two sessions that feed each other."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_cases import (
    ACK,
    CONTROL,
    DATA,
    HEADER_BYTES,
    PING,
    PONG,
    Frame,
    Key,
    decode,
    expecting,
    frames_of,
    make_source,
    sending,
    settle,
    small_layout,
)

from parablock_rt._C import (
    Buffer,
    Event,
    Layout,
    ProtocolError,
    Session,
    Source,
)

# ---- Delivery


@dataclass
class Side:
    """One of two sessions, with what it should deliver and what it has delivered."""

    session: Session
    wire: bytearray = field(default_factory=bytearray)  # sent, not yet at the other side
    messages: list[bytes] = field(default_factory=list)
    received: set[Key] = field(default_factory=set)
    sent: set[Key] = field(default_factory=set)

    def collect(self) -> None:
        for event in self.session.take_events():
            key = (event.kind, event.round, event.block)
            if event.type == Event.Type.CONTROL:
                self.messages.append(event.message)
            elif event.type == Event.Type.RECEIVED:
                self.received.add(key)
            elif event.type == Event.Type.SENT:
                self.sent.add(key)
            else:
                pytest.fail(f"unexpected {event.type}")


layouts = st.builds(
    Layout,
    units=st.integers(1, 40),
    scale_bytes=st.integers(0, 3),
    code_bytes=st.integers(1, 9),
    chunk_units=st.integers(1, 50),
)
block_lists = st.lists(st.tuples(layouts, st.booleans()), max_size=4)  # and whether all of it is ready at once
text_lists = st.lists(st.binary(max_size=40), max_size=4)


@settings(deadline=None, max_examples=150)
@given(
    window=st.integers(0, 300),
    blocks=st.tuples(block_lists, block_lists),
    texts=st.tuples(text_lists, text_lists),
    seed=st.integers(0, 2**32),
)
def test_two_sessions_deliver_everything_intact_whatever_the_interleaving(
    window: int,
    blocks: tuple[list[tuple[Layout, bool]], ...],
    texts: tuple[list[bytes], ...],
    seed: int,
) -> None:
    rng = random.Random(seed)  # of the interleaving
    sides = [Side(Session(window_bytes=window)), Side(Session(window_bytes=window))]
    todo: list[tuple[str, int, object]] = []
    expected: list[dict[Key, tuple[Buffer, bytes]]] = [{}, {}]
    messages: list[list[bytes]] = [[], []]
    rising: list[tuple[Source, int]] = []
    for sender in (0, 1):
        for block, (layout, complete) in enumerate(blocks[sender]):
            key = (sender, 7, block)
            source, content = make_source(layout, block, complete)
            buffer = Buffer(layout.nbytes)
            expected[1 - sender][key] = (buffer, content)
            if not complete:
                rising.append((source, layout.chunks))
            todo += [("send", sender, (key, source)), ("receive", 1 - sender, (key, buffer, layout))]
        todo += [("message", sender, text) for text in texts[sender]]
    rng.shuffle(todo)
    while todo or rising or any(side.wire for side in sides):
        step = rng.randrange(4)
        if step == 0 and todo:
            what, index, arguments = todo.pop()
            if what == "message":
                messages[1 - index].append(arguments)
                sides[index].session.send_control(arguments)
            elif what == "send":
                sides[index].session.send(*arguments[0], arguments[1])
            else:
                sides[index].session.receive(*arguments[0], *arguments[1:])
        elif step == 1 and rising:
            source, chunks = rng.choice(rising)
            source.raise_watermark(source.ready_chunks + 1)
            if source.ready_chunks == chunks:
                rising.remove((source, chunks))
        else:
            here = rng.randrange(2)
            frame = sides[here].session.next_frame()
            sides[here].wire += frame or b""
            count = rng.choice([1, 2, 43, 44, 45, 1000])
            piece, sides[here].wire = bytes(sides[here].wire[:count]), sides[here].wire[count:]
            sides[1 - here].session.feed(piece)
    settle(sides[0].session, sides[1].session)
    for index, side in enumerate(sides):
        side.collect()
        assert side.messages == messages[index]
        assert side.received == set(expected[index])
        assert side.sent == set(expected[1 - index])
        for buffer, content in expected[index].values():
            assert bytes(memoryview(buffer)) == content


def test_a_conversation_fed_byte_by_byte_is_delivered() -> None:
    a, b = Session(), Session()
    layout = small_layout()
    source, content = make_source(layout, 1)
    buffer = Buffer(layout.nbytes)
    b.receive(1, 2, 3, buffer, layout)
    a.send(1, 2, 3, source)
    a.send_control(b"hello")
    a.feed(b.next_frame() or b"")
    while (frame := a.next_frame()) is not None:
        for byte in frame:
            b.feed(bytes([byte]))
    assert [event.type for event in b.take_events()] == [Event.Type.CONTROL, Event.Type.RECEIVED]
    assert bytes(memoryview(buffer)) == content


def test_control_overtakes_data_and_an_empty_message_is_one() -> None:
    session, _ = sending(small_layout())
    source, _ = make_source(small_layout(), 0)
    session.feed(Frame(ACK, (1, 9, 9), payload=struct.pack("<Q", 90)).encode())
    session.send(1, 9, 9, source)
    session.send_control(b"")
    assert [frame.type for frame in frames_of(session)] == [CONTROL, DATA, DATA, DATA, DATA]
    receiver = Session()
    receiver.feed(Frame(CONTROL).encode())
    (event,) = receiver.take_events()
    assert event.message == b""


def test_ping_measures_the_round_trip_and_only_its_own_answer_counts() -> None:
    a, b = Session(), Session()
    a.ping(1000)
    b.feed(a.next_frame() or b"")
    pong = b.next_frame() or b""
    a.feed(Frame(PONG, offset=17).encode(), 1100)
    assert a.round_trip_ns == 0
    a.feed(pong, 1500)
    assert a.round_trip_ns == 500


def test_a_round_trip_longer_than_the_time_between_pings_is_measured() -> None:
    a, b = Session(), Session()
    for at in (1000, 2000, 3000):
        a.ping(at)
        b.feed(a.next_frame() or b"")
    pongs = [b.next_frame() or b"" for _ in range(3)]
    a.feed(pongs[0], 3500)
    assert a.round_trip_ns == 2500
    a.feed(pongs[1], 9000)  # of no further use
    assert a.round_trip_ns == 2500
    a.ping(10_000)
    b.feed(a.next_frame() or b"")
    a.feed(pongs[2], 10_001)
    a.feed(b.next_frame() or b"", 10_700)
    assert a.round_trip_ns == 700


# ---- Credit and watermark


def test_a_round_trip_that_grows_does_not_stop_a_sender_that_was_granted_less_before() -> None:
    a, b = Session(), Session()
    layout = Layout(units=16 * 2**20, scale_bytes=0, code_bytes=1, chunk_units=2**16)
    source, content = make_source(layout, 4)
    buffer = Buffer(layout.nbytes)
    b.receive(1, 0, 0, buffer, layout)
    a.feed(b.next_frame() or b"")
    a.send(1, 0, 0, source)
    b.ping(1)
    assert decode(b.next_frame() or b"").type == PING
    ms = 1_000_000
    for at in range(3):
        b.feed(a.next_frame() or b"", at * ms)
    assert b.next_frame() is None  # too little to acknowledge
    now = 400 * ms  # too early to acknowledge for the time that has passed
    b.feed(Frame(PONG, offset=1).encode(), now)
    while frame := a.next_frame():
        b.feed(frame, now)
        while answer := b.next_frame():
            a.feed(answer, now)
    assert bytes(memoryview(buffer)) == content


@settings(deadline=None, max_examples=100)
@given(
    window=st.integers(0, 2000),
    units=st.integers(1, 200),
    chunk_units=st.integers(1, 60),
    order=st.randoms(use_true_random=False),
)
def test_unacknowledged_data_stays_within_the_window_and_small_windows_do_not_stop_the_sender(
    window: int, units: int, chunk_units: int, order: random.Random
) -> None:
    layout = small_layout(units, 2, 7, chunk_units)
    chunk_bytes = min(units, chunk_units) * 9
    allowed = max(window, 2 * chunk_bytes)
    a, b = Session(), Session(window_bytes=window)
    source, content = make_source(layout, 3)
    buffer = Buffer(layout.nbytes)
    a.send(1, 0, 0, source)
    assert a.next_frame() is None  # no credit yet
    b.receive(1, 0, 0, buffer, layout)
    to_a: list[bytes] = []
    to_b: list[bytes] = []
    sent = acknowledged = 0
    done = False
    while not done:
        moved = False
        if order.random() < 0.5 and (frame := a.next_frame()) is not None:
            to_b.append(frame)
            sent += len(decode(frame).payload)
            assert sent - acknowledged <= allowed
            moved = True
        if order.random() < 0.5 and to_b:
            b.feed(to_b.pop(0))
            moved = True
        if (frame := b.next_frame()) is not None:
            to_a.append(frame)
            moved = True
        if order.random() < 0.5 and to_a:
            acknowledged = max(acknowledged, decode(to_a[0]).offset)
            a.feed(to_a.pop(0))
            moved = True
        done = any(event.type == Event.Type.SENT for event in a.take_events())
        if not (done or moved or to_a or to_b):
            frame = a.next_frame()
            assert frame is not None, f"the sender is stuck at {sent} of {layout.nbytes} bytes"
            to_b.append(frame)
            sent += len(decode(frame).payload)
            assert sent - acknowledged <= allowed
    assert bytes(memoryview(buffer)) == content


@given(raises=st.lists(st.integers(0, 6), max_size=6))
def test_no_chunk_above_the_watermark_is_ever_sent(raises: list[int]) -> None:
    layout = small_layout()  # 4 chunks
    session = Session()
    source, content = make_source(layout, 5, ready=False)
    session.send(1, 0, 0, source)
    session.feed(Frame(ACK, (1, 0, 0), payload=struct.pack("<Q", layout.nbytes)).encode())
    sent: list[bytes] = []
    highest = 0
    for level in [0, *raises, 4]:
        source.raise_watermark(level)
        highest = max(highest, min(level, 4))
        sent += [frame.payload for frame in frames_of(session)]
        assert len(sent) == highest
    assert b"".join(chunk[: 2 * (len(chunk) // 9)] for chunk in sent) == content[:20]  # the scales' plane, in order


def test_the_watermark_never_falls_and_is_clipped_to_the_chunks() -> None:
    source, _ = make_source(small_layout(), 0, ready=False)
    for level, expected in ((2, 2), (1, 2), (99, 4), (0, 4)):
        source.raise_watermark(level)
        assert source.ready_chunks == expected


def test_one_source_serves_several_sessions() -> None:
    layout = small_layout(units=500)
    source, content = make_source(layout, 9, ready=False)
    pairs = [(Session(), Session(), Buffer(layout.nbytes)) for _ in range(3)]
    for a, b, buffer in pairs:
        a.send(2, 1, 0, source)
        b.receive(2, 1, 0, buffer, layout)
        settle(a, b)
    source.raise_watermark(layout.chunks)
    for a, b, buffer in pairs:
        settle(a, b)
        assert [event.type for event in a.take_events()] == [Event.Type.SENT]
        assert bytes(memoryview(buffer)) == content


# ---- Cancel and refuse


def test_cancel_before_anything_was_sent_refuses_the_transfer_when_it_is_posted() -> None:
    a, b = Session(), Session()
    buffer = Buffer(90)
    b.receive(1, 0, 0, buffer, small_layout())
    b.cancel_receive(1, 0, 0)
    settle(a, b)
    source, _ = make_source(small_layout(), 0)
    a.send(1, 0, 0, source)
    assert [event.type for event in a.take_events()] == [Event.Type.REFUSED]
    assert a.next_frame() is None
    assert buffer.owners == 1


@pytest.mark.parametrize("arrived", [1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 27, 2 * HEADER_BYTES + 30])
def test_cancel_in_mid_transfer_drops_what_is_under_way_and_the_link_goes_on(arrived: int) -> None:
    layout = small_layout()
    a, b = Session(), Session()
    source, _ = make_source(layout, 0)
    buffer = Buffer(layout.nbytes)
    a.send(1, 0, 0, source)
    b.receive(1, 0, 0, buffer, layout)
    a.feed(b.next_frame() or b"")
    wire = b"".join(frame.encode() for frame in frames_of(a))
    b.feed(wire[:arrived])
    b.cancel_receive(1, 0, 0)
    assert buffer.owners == 1  # at once: nothing writes into it any more
    before = bytes(memoryview(buffer))
    b.feed(wire[arrived:])
    assert bytes(memoryview(buffer)) == before
    assert b.take_events() == []
    a.send_control(b"still there")
    settle(a, b)
    assert [event.type for event in a.take_events()] == [Event.Type.REFUSED]
    assert [event.message for event in b.take_events()] == [b"still there"]


def test_cancel_of_a_complete_or_unknown_transfer_does_nothing() -> None:
    layout = small_layout()
    a, b = Session(), Session()
    source, _ = make_source(layout, 0)
    b.receive(1, 0, 0, Buffer(layout.nbytes), layout)
    a.send(1, 0, 0, source)
    settle(a, b)
    b.cancel_receive(1, 0, 0)
    b.cancel_receive(1, 0, 1)
    assert b.next_frame() is None
    assert [event.type for event in a.take_events()] == [Event.Type.SENT]


@pytest.mark.parametrize("sender_knows_it", [False, True])
def test_a_transfer_that_was_never_posted_can_be_refused_without_room_for_it(sender_knows_it: bool) -> None:
    a, b = Session(), Session()
    source, _ = make_source(small_layout(), 0)
    if sender_knows_it:
        a.send(1, 0, 0, source)
    b.refuse_receive(1, 0, 0)
    settle(a, b)
    if not sender_knows_it:
        a.send(1, 0, 0, source)
    assert [event.type for event in a.take_events()] == [Event.Type.REFUSED]
    assert a.next_frame() is None
    with pytest.raises(ValueError, match="was cancelled on this link and cannot be posted again"):
        b.receive(1, 0, 0, Buffer(90), small_layout())


def test_refusing_a_transfer_that_is_posted_changes_nothing() -> None:
    a, b = Session(), Session()
    source, content = make_source(small_layout(), 0)
    buffer = Buffer(90)
    b.receive(1, 0, 0, buffer, small_layout())
    b.refuse_receive(1, 0, 0)
    a.send(1, 0, 0, source)
    settle(a, b)
    assert [event.type for event in a.take_events()] == [Event.Type.SENT]
    assert bytes(memoryview(buffer))[: len(content)] == content


def test_a_peer_that_has_not_proved_itself_cannot_have_this_side_remember_many_keys() -> None:
    a, b = Session(), Session()
    for index in range(64):
        b.receive(1, index, 0, Buffer(90), small_layout())
    settle(a, b)
    b.receive(1, 64, 0, Buffer(90), small_layout())
    with pytest.raises(ProtocolError, match="the peer asks for too many transfers at once"):
        settle(a, b)


def test_a_cancelled_key_cannot_be_posted_again_while_old_chunks_may_be_under_way() -> None:
    session, buffer = expecting(small_layout())
    session.cancel_receive(1, 2, 3)
    with pytest.raises(ValueError, match=r"round 2.*cancelled"):
        session.receive(1, 2, 3, buffer, small_layout())


def test_posting_a_transfer_twice_is_an_error_that_names_it() -> None:
    session, buffer = expecting(small_layout())
    with pytest.raises(ValueError, match="kind 1, round 2, block 3"):
        session.receive(1, 2, 3, buffer, small_layout())
    source, _ = make_source(small_layout(), 0)
    session.send(1, 2, 3, source)
    with pytest.raises(ValueError, match="kind 1, round 2, block 3"):
        session.send(1, 2, 3, source)


def test_a_key_is_free_again_after_its_transfer() -> None:
    layout = small_layout()
    a, b = Session(), Session()
    for seed in range(3):
        source, content = make_source(layout, seed)
        buffer = Buffer(layout.nbytes)
        a.send(3, 0, 0, source)
        b.receive(3, 0, 0, buffer, layout)
        settle(a, b)
        assert bytes(memoryview(buffer)) == content
        assert [event.type for event in (*a.take_events(), *b.take_events())] == [Event.Type.SENT, Event.Type.RECEIVED]
