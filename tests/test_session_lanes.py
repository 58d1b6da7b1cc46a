"""The protocol without a socket: several lanes, transfers that are withdrawn or stand still, and the credit window."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_cases import (
    ACK,
    ATTACH,
    CONTROL,
    DATA,
    HEADER_BYTES,
    PING,
    PONG,
    WITHDRAW,
    Frame,
    decode,
    expecting,
    frames_of,
    make_source,
    sending,
    settle,
    small_layout,
)

from parablock_rt import _C
from parablock_rt._C import MAX_LANES, Buffer, Event, Layout, ProtocolError, Session, Source

T = Event.Type

# ---- Lanes


class Wires:
    """Both directions of a link's lanes, each of them a byte stream that keeps its order."""

    def __init__(self, a: Session, b: Session, lanes: int) -> None:
        self.ends = (a, b)
        self.bytes = {(side, lane): bytearray() for side in (0, 1) for lane in range(lanes)}

    def fill(self, side: int, lane: int) -> bool:
        frame = self.ends[side].next_frame(lane=lane)
        self.bytes[side, lane] += frame or b""
        return frame is not None

    def drain(self, side: int, lane: int, count: int) -> bool:
        wire = self.bytes[side, lane]
        piece = bytes(wire[:count])
        del wire[:count]
        self.ends[1 - side].feed(piece, lane=lane)
        return bool(piece)


def any_layout(units: int, chunk_units: int) -> Layout:
    return Layout(units=units, scale_bytes=1, code_bytes=5, chunk_units=chunk_units)


transfers = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20), st.booleans()), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(
    lanes=st.integers(1, MAX_LANES),
    window=st.integers(0, 200),
    transfers=transfers,
    damaged=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_everything_arrives_intact_over_lanes_in_any_interleaving_even_damaged_chunks(
    lanes: int, window: int, transfers: list[tuple[int, int, bool]], damaged: int, seed: int
) -> None:
    order = random.Random(seed)
    a, b = Session(), Session(window_bytes=window)
    wires = Wires(a, b, lanes)
    expected: list[tuple[Buffer, bytes]] = []
    rising: list[tuple[Source, int]] = []
    for index, (units, chunk_units, ready) in enumerate(transfers):
        layout = any_layout(units, chunk_units)
        source, content = make_source(layout, index, ready)
        expected.append((Buffer(layout.nbytes), content))
        b.receive(1, index, 0, expected[-1][0], layout)
        a.send(1, index, 0, source)
        if not ready:
            rising.append((source, layout.chunks))
    a.send_control(b"hello")
    done = 0
    idle = 0
    events: list[Event] = []
    while done < len(transfers) or idle < 50:
        side, lane = order.choice(list(wires.bytes))
        before = len(wires.bytes[side, lane])
        moved = order.random() < 0.5 and wires.fill(side, lane)
        if moved and damaged and decode(bytes(wires.bytes[side, lane][before:])).type == DATA:
            wires.bytes[side, lane][-1] ^= 4
            damaged -= 1
        moved = wires.drain(side, lane, order.choice([1, 7, 43, 44, 45, 500])) or moved
        if rising and order.random() < 0.2:
            source, _ = order.choice(rising)
            source.raise_watermark(source.ready_chunks + 1)
            rising = [(s, n) for s, n in rising if s.ready_chunks < n]
        idle = 0 if moved else idle + 1
        assert idle < 5000, "nothing moves any more"
        done += sum(event.type == T.SENT for event in a.take_events())
        events += b.take_events()
    assert sorted(event.round for event in events if event.type == T.RECEIVED) == list(range(len(transfers)))
    assert [event.message for event in events if event.type == T.CONTROL] == [b"hello"]
    for buffer, content in expected:
        assert bytes(memoryview(buffer)) == content


def test_control_leaves_on_the_first_lane_alone() -> None:
    session, _ = sending(small_layout())
    session.send_control(b"x")
    assert session.next_frame(lane=1) is None
    assert decode(session.next_frame(lane=0) or b"").type == CONTROL
    with pytest.raises(ValueError, match=f"at most {MAX_LANES} lanes"):
        session.next_frame(lane=MAX_LANES)


def test_a_slow_lane_holds_its_own_chunk_up_and_no_other() -> None:
    layout = small_layout()  # 4 chunks
    receiver, buffer = expecting(layout)
    sender, frames = sending(layout)
    slow = frames[0].encode()
    receiver.feed(slow[:50], lane=1)
    for frame in frames[1:]:
        receiver.feed(frame.encode(), lane=0)
    assert [frame.offset for frame in frames_of(receiver)] == []  # what is acknowledged is the contiguous beginning
    receiver.feed(slow[50:], lane=1)
    assert [frame.offset for frame in frames_of(receiver)] == [90]
    assert [event.type for event in receiver.take_events()] == [T.RECEIVED]
    _, content = make_source(layout, 0)
    assert bytes(memoryview(buffer)) == content
    sender.feed(Frame(ACK, (1, 2, 3), offset=90, payload=struct.pack("<Q", 90)).encode())
    assert [event.type for event in sender.take_events()] == [T.SENT]


def test_a_chunk_beyond_what_was_granted_is_refused_on_any_lane() -> None:
    layout = small_layout()
    receiver = Session(window_bytes=0)  # two chunks all the same
    receiver.receive(1, 2, 3, Buffer(layout.nbytes), layout)
    _, frames = sending(layout)
    receiver.feed(frames[1].encode(), lane=1)
    with pytest.raises(ProtocolError, match="27 bytes at 54 are none of its chunks of 27 bytes below 54"):
        receiver.feed(frames[2].encode(), lane=2)


def test_the_same_chunk_on_two_lanes_at_once_is_written_once() -> None:
    layout = small_layout()
    receiver, buffer = expecting(layout)
    _, frames = sending(layout)
    first = frames[0].encode()
    other = Frame(DATA, (1, 2, 3), payload=bytes(27)).encode()
    receiver.feed(first[:50], lane=0)
    receiver.feed(other, lane=1)
    receiver.feed(first[50:], lane=0)
    assert bytes(memoryview(buffer)[:6]) == frames[0].payload[:6]


def test_a_ping_leaves_on_every_lane_and_is_answered_on_the_first_alone() -> None:
    session = Session()
    assert session.next_frame(lane=1) is None
    session.ping(7)
    for lane in range(MAX_LANES):
        assert decode(session.next_frame(lane=lane) or b"") == Frame(PING, offset=7)
        assert session.next_frame(lane=lane) is None
    session.feed(Frame(PING, offset=5).encode(), lane=1)
    assert frames_of(session) == []
    session.feed(Frame(PING, offset=5).encode(), lane=0)
    assert frames_of(session) == [Frame(PONG, offset=5)]


@pytest.mark.parametrize("type", [CONTROL, ACK, PONG, ATTACH, WITHDRAW])
def test_anything_but_chunks_and_pings_on_another_lane_than_the_first_is_refused(type: int) -> None:
    session = Session()
    with pytest.raises(ProtocolError, match="only chunks and pings may come on a lane other than the first"):
        session.feed(Frame(type).encode(), lane=2)


def test_a_connection_may_ask_to_become_a_lane_only_with_its_first_frame() -> None:
    session = Session()
    key = bytes(range(32))
    session.feed(Frame(ATTACH, payload=key).encode())
    assert session.take_attach_key() == key
    assert session.take_attach_key() is None
    session = Session()
    session.feed(Frame(PONG).encode())
    with pytest.raises(ProtocolError, match="only a new connection"):
        session.feed(Frame(ATTACH, payload=key).encode())


def test_what_follows_a_request_to_become_a_lane_is_left_in_the_socket() -> None:
    """`feed` gives a session as many bytes as it has room for: had it room for more, the next frame would be lost."""
    session = Session()
    wire = Frame(ATTACH, payload=bytes(32)).encode()
    session.feed(wire[:HEADER_BYTES])
    assert session.wanted_bytes() == 32


# ---- Resuming


@pytest.mark.parametrize("start", [0, 27, 81])
def test_a_transfer_begins_where_the_receiver_says(start: int) -> None:
    layout = small_layout()
    sender, receiver = Session(), Session()
    source, content = make_source(layout, 0)
    buffer = Buffer(layout.nbytes)
    receiver.receive(1, 2, 3, buffer, layout, start)
    assert receiver.unfinished() == [(1, 2, 3, start)]
    sender.send(1, 2, 3, source)
    sender.feed(receiver.next_frame() or b"")
    sent = frames_of(sender)
    assert [frame.offset for frame in sent] == list(range(start, 90, 27))
    for frame in sent:
        receiver.feed(frame.encode())
    assert [event.type for event in receiver.take_events()] == [T.RECEIVED]
    assert receiver.unfinished() == []
    codes = bytes(memoryview(buffer)[20:])
    assert codes[7 * (start // 9) :] == content[20:][7 * (start // 9) :]


# ---- Withdrawing


@pytest.mark.parametrize("arrived", [0, 1, HEADER_BYTES, HEADER_BYTES + 1, 2 * HEADER_BYTES + 30])
def test_a_withdrawn_transfer_frees_both_buffers_and_the_link_goes_on(arrived: int) -> None:
    layout = small_layout()
    sender, receiver = Session(), Session()
    source, _ = make_source(layout, 0)
    buffer = Buffer(layout.nbytes)
    receiver.receive(1, 2, 3, buffer, layout)
    sender.send(1, 2, 3, source)
    sender.feed(receiver.next_frame() or b"")
    wire = b"".join(frame.encode() for frame in frames_of(sender))
    receiver.feed(wire[:arrived], lane=1)
    sender.cancel_send(1, 2, 3)
    settle(sender, receiver)
    assert [event.type for event in receiver.take_events()] == [T.WITHDRAWN]
    assert buffer.owners == 1
    before = bytes(memoryview(buffer))
    receiver.feed(wire[arrived:], lane=1)  # was under way
    assert bytes(memoryview(buffer)) == before
    receiver.send_control(b"still there")
    settle(sender, receiver)
    assert [event.message for event in sender.take_events()] == [b"still there"]
    with pytest.raises(ValueError, match="withdrawn"):
        sender.send(1, 2, 3, source)


def test_a_transfer_withdrawn_before_it_was_posted_there_is_reported_when_it_is() -> None:
    layout = small_layout()
    sender, receiver = Session(), Session()
    source, _ = make_source(layout, 0)
    sender.send(1, 2, 3, source)
    sender.cancel_send(1, 2, 3)
    settle(sender, receiver)
    buffer = Buffer(layout.nbytes)
    receiver.receive(1, 2, 3, buffer, layout)
    assert [event.type for event in receiver.take_events()] == [T.WITHDRAWN]
    assert buffer.owners == 1
    assert frames_of(receiver) == []


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), by=st.sampled_from(["sender", "receiver", "both"]))
def test_giving_up_at_any_moment_from_either_side_leaves_both_agreed_and_the_link_usable(seed: int, by: str) -> None:
    order = random.Random(seed)
    layout = any_layout(30, 4)
    sender, receiver = Session(), Session(window_bytes=60)
    wires = Wires(sender, receiver, 3)
    source, content = make_source(layout, 0)
    buffer = Buffer(layout.nbytes)
    receiver.receive(1, 0, 0, buffer, layout)
    sender.send(1, 0, 0, source)
    give_up_at = order.randrange(60)
    for step in range(2000):
        if step == give_up_at and by != "receiver":
            sender.cancel_send(1, 0, 0)
        if step == give_up_at and by != "sender":
            receiver.cancel_receive(1, 0, 0)
        side, lane = order.choice(list(wires.bytes))
        wires.fill(side, lane)
        wires.drain(side, lane, order.choice([1, 20, 44, 200]))
    for side, lane in wires.bytes:
        while wires.fill(side, lane) or wires.drain(side, lane, 1000):
            pass
    for side, lane in wires.bytes:
        assert not wires.drain(side, lane, 1000) or side == 1
    received = [event.type for event in receiver.take_events()]
    sent = [event.type for event in sender.take_events()]
    assert received in ([], [T.RECEIVED], [T.WITHDRAWN])
    assert sent in ([], [T.SENT], [T.REFUSED])
    if received == [T.RECEIVED]:
        assert bytes(memoryview(buffer)) == content
    assert buffer.owners == 1
    second, other = make_source(layout, 1)
    target = Buffer(layout.nbytes)
    receiver.receive(1, 1, 0, target, layout)
    sender.send(1, 1, 0, second)
    settle(sender, receiver)
    assert bytes(memoryview(target)) == other


# ---- Stalled, and merely slow

SECOND = 1_000_000_000


def stalls(session: Session, now_ns: int) -> list[str]:
    session.report_stalled(now_ns)
    return [event.text for event in session.take_events() if event.type == T.STALLED]


def test_a_transfer_that_stands_still_is_reported_once_and_again_after_it_moved() -> None:
    receiver, _ = expecting(small_layout())
    _, frames = sending(small_layout())
    assert stalls(receiver, 100 * SECOND) == []  # nothing has come yet: the peer may have nothing to send
    receiver.feed(frames[0].encode(), 100 * SECOND)
    assert stalls(receiver, 101 * SECOND) == []
    assert stalls(receiver, 103 * SECOND) == ["nothing came for 3 s, with 27 of 90 bytes here"]
    assert stalls(receiver, 200 * SECOND) == []
    receiver.feed(frames[1].encode()[:60], 201 * SECOND)
    assert len(stalls(receiver, 900 * SECOND)) == 1


def test_a_slow_transfer_is_not_taken_for_a_stalled_one() -> None:
    receiver, _ = expecting(small_layout())
    _, frames = sending(small_layout())
    wire = b"".join(frame.encode() for frame in frames)
    receiver.feed(wire[:45], 0)
    for at in range(45, 160):  # a byte every second: a chunk takes half a minute
        receiver.feed(wire[at : at + 1], (at - 44) * SECOND)
    now = 115 * SECOND
    assert stalls(receiver, now + 60 * SECOND) == []
    assert len(stalls(receiver, now + 300 * SECOND)) == 1


def test_a_sender_reports_what_nobody_acknowledges_but_not_what_waits_for_credit_or_the_encoder() -> None:
    waiting = Session()
    source, _ = make_source(small_layout(), 0, ready=False)
    waiting.send(1, 2, 3, source)
    assert stalls(waiting, 10_000 * SECOND) == []
    waiting.feed(Frame(ACK, (1, 2, 3), payload=struct.pack("<Q", 90)).encode(), SECOND)
    source.raise_watermark(2)
    assert waiting.next_frame(10 * SECOND) is not None
    assert waiting.next_frame(10 * SECOND) is not None
    waiting.feed(Frame(ACK, (1, 2, 3), offset=27, payload=struct.pack("<Q", 90)).encode(), 11 * SECOND)
    assert stalls(waiting, 12 * SECOND) == []
    assert stalls(waiting, 16 * SECOND) == ["nothing was acknowledged for 5 s, with 27 of 90 bytes there"]
    waiting.feed(Frame(ACK, (1, 2, 3), offset=54, payload=struct.pack("<Q", 90)).encode(), 17 * SECOND)
    assert stalls(waiting, 10_000 * SECOND) == []  # all that is encoded is there


def test_a_slow_transfer_is_acknowledged_at_least_twice_a_second() -> None:
    receiver, _ = expecting(small_layout())
    _, frames = sending(small_layout())
    acknowledged = []
    for index, frame in enumerate(frames[:3]):
        receiver.feed(frame.encode(), 100 * SECOND + index * SECOND)
        acknowledged.append([answer.offset for answer in frames_of(receiver)])
    assert acknowledged == [[], [54], [81]]


# ---- The window

MIB = 2**20


def granted_after(rate: float, round_trip_s: float, window: int = 256 * MIB) -> int:
    """What a receiver grants beyond what it has once it has seen this rate and this round trip."""
    chunk = 65536
    layout = Layout(units=2**31, scale_bytes=0, code_bytes=1, chunk_units=chunk)
    session = Session(window_bytes=window)
    session.ping(SECOND)
    ping = decode(session.next_frame() or b"")
    session.feed(Frame(PONG, offset=ping.offset).encode(), SECOND + int(round_trip_s * SECOND))
    small = Layout(units=64 * chunk, scale_bytes=0, code_bytes=1, chunk_units=chunk)
    buffer = Buffer(small.nbytes)
    payload = bytes(chunk)
    now = 10 * SECOND
    for round in range(4):
        session.receive(1, round, 0, buffer, small)
        frames_of(session)
        for index in range(64):
            now += int(chunk / rate * SECOND)
            session.feed(Frame(DATA, (1, round, 0), offset=index * chunk, payload=payload).encode(), now)
    frames_of(session)
    with pytest.raises(ValueError, match="buffer only"):
        session.receive(1, 9, 0, buffer, layout)
    large = Layout(units=300 * MIB, scale_bytes=0, code_bytes=1, chunk_units=chunk)
    session.receive(1, 10, 0, Buffer(large.nbytes), large)
    (grant,) = frames_of(session)
    limit: int = struct.unpack("<Q", grant.payload)[0]
    return limit


def test_the_window_is_twice_what_a_round_trip_delivers_between_its_bounds() -> None:
    assert granted_after(rate=1e9 / 8, round_trip_s=0.1) == pytest.approx(25e6, rel=0.05)
    assert granted_after(rate=100e6 / 8, round_trip_s=0.1) == pytest.approx(2.5e6, rel=0.05)
    assert granted_after(rate=10e9, round_trip_s=0.0001) == MIB
    assert granted_after(rate=1e9 / 8, round_trip_s=0.1, window=10 * MIB) == 10 * MIB


def grants(sessions: list[Session], chunks: int) -> list[list[int]]:
    """What each session grants beyond what it has, while `chunks` of 64 KiB come to all of them by turns."""
    chunk = 65536
    layout = Layout(units=512 * chunk, scale_bytes=0, code_bytes=1, chunk_units=chunk)
    beyond: list[list[int]] = [[] for _ in sessions]
    for session in sessions:
        session.receive(1, 0, 0, Buffer(layout.nbytes), layout)
    for index in range(chunks):
        for session, seen in zip(sessions, beyond, strict=True):
            for frame in frames_of(session):
                if frame.type == ACK:
                    seen.append(struct.unpack("<Q", frame.payload)[0] - frame.offset)
            session.feed(Frame(DATA, (1, 0, 0), offset=index * chunk, payload=bytes(chunk)).encode(), SECOND + index)
    return beyond


def test_transfers_that_come_at_once_share_the_least_window() -> None:
    """The first grant is made before anybody knows how many they will be, and is taken for a quarter of it."""
    (alone,) = grants([Session()], 100)
    assert alone[0] == MIB
    assert set(alone[1:]) == {4 * MIB}
    incoming = _C.Incoming()
    for seen in grants([Session(incoming=incoming) for _ in range(16)], 100):
        assert seen[0] == MIB
        assert seen[-1] == MIB // 4
    assert incoming.count == 0, "all of the sessions are gone"


def test_a_transfer_that_ends_leaves_its_share_of_the_window_to_the_others() -> None:
    incoming = _C.Incoming()
    going, ending = Session(incoming=incoming), Session(incoming=incoming)
    grants([going, ending], 8)
    assert incoming.count == 2
    ending.cancel_receive(1, 0, 0)
    assert incoming.count == 1


# ---- Bounds


def test_messages_that_the_peer_does_not_read_are_bounded_in_bytes() -> None:
    session = Session(queue_bytes=10_000)
    for _ in range(9):
        session.send_control(bytes(900))
    with pytest.raises(ProtocolError, match="more than 10000 bytes of messages wait"):
        session.send_control(bytes(2000))
    frames_of(session)
    session.send_control(bytes(2000))  # read meanwhile: there is room again
