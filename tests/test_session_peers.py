"""The protocol without a socket: peers that break its rules, layouts and checksums."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_cases import (
    ACK,
    ATTACH,
    CANCEL,
    CONTROL,
    DATA,
    HEADER_BYTES,
    PING,
    RESEND,
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

from parablock_rt._C import (
    PROTOCOL_VERSION,
    Buffer,
    Event,
    Layout,
    ProtocolError,
    Session,
    Source,
    crc32c,
    crc32c_every_way,
)

# ---- Peers that break the rules


def assert_refused(session: Session, data: bytes, message: str | None) -> None:
    with pytest.raises(ProtocolError, match=message):
        session.feed(data)


@pytest.mark.parametrize("at", range(HEADER_BYTES))
def test_a_changed_byte_anywhere_in_a_header_is_detected(at: int) -> None:
    _, frames = sending(small_layout())
    wire = bytearray(frames[0].encode())
    wire[at] ^= 0x10
    session, _ = expecting(small_layout())
    assert_refused(session, bytes(wire), None)


@pytest.mark.parametrize("bit", range(27 * 8))
def test_a_flipped_bit_anywhere_in_a_chunk_is_detected_and_the_chunk_sent_again(bit: int) -> None:
    layout = small_layout()
    sender, frames = sending(layout)
    receiver, buffer = expecting(layout)
    wire = bytearray(frames[1].encode())
    wire[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
    receiver.feed(frames[0].encode() + bytes(wire) + frames[2].encode() + frames[3].encode())
    assert receiver.corrupt_chunks == 1
    assert receiver.take_events() == []
    settle(receiver, sender)
    assert [event.type for event in receiver.take_events()] == [Event.Type.RECEIVED]
    assert [event.type for event in sender.take_events()] == [Event.Type.SENT]
    _, content = make_source(layout, 0)
    assert bytes(memoryview(buffer)) == content


def test_a_line_that_damages_every_chunk_ends_the_link_after_a_bounded_number_of_tries() -> None:
    layout = small_layout()
    sender, frames = sending(layout)
    receiver, _ = expecting(layout)
    damaged = frames[0].encode()[:-1] + bytes([frames[0].payload[-1] ^ 1])
    for tries in range(1, 17):
        receiver.feed(damaged)
        sender.feed(receiver.next_frame() or b"")
        assert sender.next_frame() == frames[0].encode()
        assert receiver.corrupt_chunks == tries
    assert_refused(receiver, damaged, "damages data")


def test_a_peer_that_asks_again_for_ever_is_cut_off() -> None:
    sender, _ = sending(small_layout())
    again = Frame(RESEND, (1, 2, 3), offset=27).encode()
    for _ in range(64):
        sender.feed(again)
        assert [frame.offset for frame in frames_of(sender)] == [27]
    assert_refused(sender, again, "asked again for a chunk 65 times")


@pytest.mark.parametrize("offset", [1, 90, 2**64 - 1, 0])
def test_a_peer_may_ask_again_only_for_chunks_under_way(offset: int) -> None:
    sender, _ = sending(small_layout())
    sender.feed(Frame(ACK, (1, 2, 3), offset=27, payload=struct.pack("<Q", 90)).encode())
    assert_refused(sender, Frame(RESEND, (1, 2, 3), offset=offset).encode(), "no chunk at that offset is under way")


@pytest.mark.parametrize("type", [CONTROL, ACK])
def test_a_changed_byte_in_a_message_is_detected(type: int) -> None:
    wire = bytearray(Frame(type, payload=b"\1" * 8).encode())
    wire[-1] ^= 0x80
    assert_refused(Session(), bytes(wire), "checksum")


def test_another_version_is_told_with_both_numbers_whatever_follows() -> None:
    wire = Frame(CONTROL, version=PROTOCOL_VERSION + 1).encode()[:8] + os.urandom(36)
    assert_refused(Session(), wire, f"version {PROTOCOL_VERSION + 1}, this side version {PROTOCOL_VERSION}")


def test_frames_no_session_sends_are_refused() -> None:
    layout = small_layout()
    key = (1, 2, 3)
    chunk = bytes(27)
    cases = [
        (Frame(CONTROL, magic=b"HTTP"), "does not speak"),
        (Frame(0), "unknown frame type 0"),
        (Frame(10), "unknown frame type 10"),
        (Frame(255), "unknown frame type 255"),
        (Frame(CONTROL, flags=1), "flags"),
        (Frame(CONTROL, payload=bytes(4097)), "4097 bytes where at most 4096"),
        (Frame(CONTROL, length=2**32 - 1), "4294967295 bytes"),
        (Frame(PING, payload=b"x"), "at most 0"),
        (Frame(CANCEL, payload=b"x"), "at most 0"),
        (Frame(ACK, key, payload=bytes(9)), "at most 8"),
        (Frame(ACK, key, payload=bytes(7)), "without its credit"),
        (Frame(ACK, key), "without its credit"),
        (Frame(DATA, (1, 2, 4), payload=chunk), "nobody here asked for"),
        (Frame(DATA, key, payload=b""), "0 bytes at 0 are none of its chunks of 27 bytes below 90"),
        (Frame(DATA, key, payload=bytes(26)), "26 bytes at 0 are none"),
        (Frame(DATA, key, length=2**32 - 1), "are none of its chunks"),
        (Frame(DATA, key, offset=1, payload=chunk), "27 bytes at 1 are none"),
        (Frame(DATA, key, offset=81, payload=chunk), "27 bytes at 81 are none"),
        (Frame(DATA, key, offset=90, payload=bytes(9)), "9 bytes at 90 are none"),
        (Frame(DATA, key, offset=2**64 - 27, payload=chunk), "are none of its chunks"),
        (Frame(RESEND, key, payload=b"x"), "at most 0"),
        (Frame(RESEND, (9, 9, 9)), "which is not being sent"),
        (Frame(WITHDRAW, key, payload=b"x"), "at most 0"),
        (Frame(ATTACH, payload=bytes(33)), "at most 32"),
        (Frame(DATA, key, run=5, payload=chunk), "another run"),
    ]
    for frame, message in cases:
        session, _ = expecting(layout)
        session.set_run(0 if frame.run == 0 else 4)
        assert_refused(session, frame.encode(), message)


def test_a_chunk_sent_twice_is_dropped_and_one_after_the_end_is_refused() -> None:
    layout = small_layout()
    _, frames = sending(layout)
    session, buffer = expecting(layout)
    session.feed(frames[0].encode())
    before = bytes(memoryview(buffer))
    session.feed(Frame(DATA, (1, 2, 3), payload=bytes(27)).encode())
    assert bytes(memoryview(buffer)) == before
    session, _ = expecting(layout)
    session.feed(b"".join(frame.encode() for frame in frames))
    assert_refused(session, frames[0].encode(), "nobody here asked for")


def test_data_for_a_cancelled_transfer_is_dropped_only_in_sizes_that_were_asked_for() -> None:
    for size, allowed in ((27, True), (28, False), (0, False)):
        session, _ = expecting(small_layout())
        session.cancel_receive(1, 2, 3)
        wire = Frame(DATA, (1, 2, 3), payload=bytes(size)).encode()
        if allowed:
            session.feed(wire)
        else:
            assert_refused(session, wire, "nobody here asked for")


def test_acknowledgements_of_what_was_not_sent_or_not_granted_are_refused() -> None:
    layout = small_layout()  # 90 bytes, chunks of 27
    cases = [
        (91, 90, "never sent"),
        (2**64 - 1, 90, "never sent"),
        (27, 91, "room for at least 91"),
    ]
    for offset, limit, message in cases:
        session, frames = sending(layout)
        assert len(frames) == 4
        ack = Frame(ACK, (1, 2, 3), offset=offset, payload=struct.pack("<Q", limit))
        assert_refused(session, ack.encode(), message)
    session = Session()
    source, _ = make_source(layout, 0)
    session.send(1, 2, 3, source)
    no_room = Frame(ACK, (1, 2, 3), payload=struct.pack("<Q", 26)).encode()
    assert_refused(session, no_room, "no room for the next chunk of 27")
    waiting = Session()
    waiting.feed(no_room)
    with pytest.raises(ProtocolError, match="no room"):
        waiting.send(1, 2, 3, source)


def test_sides_that_cut_a_block_differently_find_out() -> None:
    for other in (small_layout(units=9), small_layout(units=11), small_layout(chunk_units=4), small_layout(code=8)):
        a, b = Session(), Session()
        source, _ = make_source(small_layout(), 0)
        a.send(1, 0, 0, source)
        b.receive(1, 0, 0, Buffer(other.nbytes), other)
        with pytest.raises(ProtocolError):
            settle(a, b)


def test_transfers_of_another_run_and_of_none_are_refused_once_the_run_is_known() -> None:
    layout = small_layout()
    for run in (0, 6):
        session, _ = expecting(layout)
        session.set_run(5)
        session.feed(Frame(CONTROL, run=0, payload=b"hi").encode())
        assert_refused(session, Frame(DATA, (1, 2, 3), run=run, payload=bytes(27)).encode(), "another run")
    session = Session()
    session.set_run(5)
    assert_refused(session, Frame(CONTROL, run=6).encode(), "another run")


def test_the_first_run_named_by_the_peer_is_adopted() -> None:
    session = Session()
    session.feed(Frame(CONTROL, run=5).encode())
    session.send_control(b"")
    assert decode(session.next_frame() or b"").run == 5
    assert_refused(session, Frame(CONTROL, run=6).encode(), "another run")


def test_a_peer_that_asks_but_never_listens_is_cut_off() -> None:
    session = Session()
    flood = b"".join(Frame(PING, offset=number).encode() for number in range(5000))
    assert_refused(session, flood, "does not read")


def test_credit_for_too_many_transfers_is_cut_off_and_refusals_are_forgotten() -> None:
    session = Session()
    credit = struct.pack("<Q", 10)
    flood = b"".join(Frame(ACK, (1, number, 0), payload=credit).encode() for number in range(5000))
    assert_refused(session, flood, "too many transfers")
    session = Session()
    for number in range(5000):
        session.feed(Frame(CANCEL, (1, number, 0)).encode())
    source, _ = make_source(small_layout(), 0)
    session.send(1, 4999, 0, source)
    session.send(1, 0, 0, source)  # long forgotten: it waits for credit
    assert [event.round for event in session.take_events()] == [4999]


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused_and_never_delivered(data: bytes) -> None:
    session, buffer = expecting(small_layout())
    try:
        session.feed(data)
    except ProtocolError:
        pass
    else:
        assert len(data) < HEADER_BYTES
    assert session.take_events() == []
    assert session.next_frame() is None
    assert bytes(memoryview(buffer)) == bytes(90)


frames_of_any_kind = st.builds(
    Frame,
    type=st.integers(CONTROL, WITHDRAW),
    key=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(2, 4)),
    run=st.integers(0, 1),
    offset=st.sampled_from([0, 27, 54, 81, 90, 2**64 - 1]),
    payload=st.one_of(st.binary(max_size=40), st.just(bytes(27)), st.just(bytes(9)), st.just(bytes(8))),
)


@settings(deadline=None, max_examples=300)
@given(
    conversation=st.lists(st.tuples(frames_of_any_kind, st.sampled_from([0, 0, 0, 1, 3])), max_size=30),
    cancel_at=st.integers(0, 30),
)
def test_well_formed_nonsense_never_crashes_a_session_or_makes_it_grow(
    conversation: list[tuple[Frame, int]], cancel_at: int
) -> None:
    session, _ = sending(small_layout(), (1, 1, 2))
    session.receive(1, 2, 3, Buffer(90), small_layout())
    try:
        for index, (frame, lane) in enumerate(conversation):
            if index == cancel_at:
                session.cancel_receive(1, 2, 3)
            session.feed(frame.encode(), lane=lane)
    except ProtocolError:
        pass
    assert len(session.take_events()) <= len(conversation)
    assert len(frames_of(session)) <= len(conversation) + 2


# ---- Layouts and checksums


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ((0, 1, 1, 1), 10),
        ((1, 0, 0, 1), 10),
        ((1, 1, 1, 0), 10),
        ((6, 1, 1, 1), 11),
        ((2**63, 1, 1, 1), 10),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), 10),
        ((1, 2**31, 2**31, 1), 10),
    ],
)
def test_layouts_that_do_not_fit_their_buffer_are_refused(layout: tuple[int, int, int, int], size: int) -> None:
    with pytest.raises(ValueError, match="transfer"):
        Session().receive(1, 0, 0, Buffer(size), Layout(*layout))
    with pytest.raises(ValueError, match="transfer"):
        Source(Buffer(size), Layout(*layout), True)


def test_crc32c_matches_published_vectors() -> None:
    # RFC 3720, appendix B.4, and the usual check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(reversed(range(32)))) == 0x113FDB5C
    assert crc32c(b"") == 0


def test_every_crc32c_equals_the_portable_one_at_every_length() -> None:
    data = os.urandom(30_000)
    for length in (*range(0, 1100), *range(1100, 14_000, 7), *range(6130, 6160), *range(12_280, 12_300)):
        portable, *others = crc32c_every_way(data[:length])
        assert [*others, crc32c(data[:length])] == [portable] * (len(others) + 1), length


def test_no_crc32c_depends_on_alignment() -> None:
    content = os.urandom(20_000)
    expected = crc32c_every_way(content)[0]
    for shift in range(65):
        moved = memoryview(bytes(shift) + content)[shift:]
        assert set(crc32c_every_way(moved)) == {expected}
