"""The transport over real sockets: links of several connections."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from functools import partial
from typing import Any

import pytest
from federations import Case, assert_equal
from leftovers import settles
from tls_cases import client_tls, needs_tls, server_tls
from transport_cases import (
    DEADLINE_S,
    HEADER_BYTES,
    MIB,
    Make,
    T,
    cpu_s_of_transports,
    expect,
    filled,
    flat,
    frame_of,
    join,
    listen,
    make_transports,
    next_event,
    no_descriptor_free,
    read_exactly,
    read_to_end,
    stranger_to,
)

from parablock_rt import _C
from parablock_rt._C import Buffer
from parablock_rt.errors import ConfigError
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import Transport

make = pytest.fixture(make_transports)
listening = pytest.fixture(listen)

ACK, DATA, PING, ATTACH = 3, 2, 5, 7


def widen(a: _C.Transport, link: int, b: _C.Transport, other: int, lanes: int) -> None:
    """Gives a link, which a opened, this many lanes."""
    a.attach_lanes(link, b.offer_lanes(other, lanes - 1), lanes - 1, 5.0)
    events = expect(b, T.CONNECTED, T.CLOSED, count=2 * (lanes - 1))
    ended = [e for e in events if e.type == T.CLOSED]
    assert [(e.text, e.became_lane) for e in ended] == [(f"it became a lane of link {other}", True)] * (lanes - 1)


def raw_lane(port: int, key: bytes) -> socket.socket:
    lane = stranger_to(port)
    lane.sendall(frame_of(ATTACH, payload=key))
    return lane


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_transfers_in_both_directions_over_several_lanes(make: Make, lanes: int) -> None:
    a, b = make(), make(window_bytes=300_000)
    link, other = join(a, b)
    widen(a, link, b, other, lanes)

    def each_carried_chunks() -> bool:
        ends = (a.stats(link), b.stats(other))
        return all(lane.bytes_out > 65536 for stats in ends for lane in stats.lanes)

    round, deadline = 0, time.monotonic() + DEADLINE_S
    while round == 0 or not each_carried_chunks():  # which lane takes a chunk is nobody's promise
        assert time.monotonic() < deadline
        transfer_both_ways(a, link, b, other, round)
        round += 1
    for transport, its_link in ((a, link), (b, other)):
        stats = transport.stats(its_link)
        assert len(stats.lanes) == lanes
        assert stats.bytes_in == sum(lane.bytes_in for lane in stats.lanes)
        assert stats.bytes_out == sum(lane.bytes_out for lane in stats.lanes)


def transfer_both_ways(a: _C.Transport, link: int, b: _C.Transport, other: int, round: int) -> None:
    sizes = [1, 65536, 65537, 1_000_003, 16 * MIB]
    expected: list[tuple[Buffer, bytes]] = []
    for index, size in enumerate(sizes):
        for sender, sender_link, receiver, receiver_link in ((a, link, b, other), (b, other, a, link)):
            buffer, content = filled(size, index)
            target = Buffer(size)
            layout = flat(size, 1 + size // 70)
            receiver.receive(receiver_link, 1, round, index, target, layout)
            sender.send(sender_link, 1, round, index, sender.make_source(buffer, layout, True))
            expected.append((target, content))
    for transport in (a, b):
        expect(transport, T.SENT, T.RECEIVED, count=2 * len(sizes))
    for target, content in expected:
        assert bytes(memoryview(target)) == content


def test_a_lane_that_nobody_reads_holds_up_what_it_holds_and_no_more(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    nbytes = 64 * MIB
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        with raw_lane(port, transport.offer_lanes(connected.link, 1)) as second:
            expect(transport, T.CONNECTED, T.CLOSED, count=2)
            buffer, _ = filled(nbytes)
            transport.send(connected.link, 1, 0, 0, transport.make_source(buffer, flat(nbytes), True))
            first.sendall(frame_of(ACK, (1, 0, 0), payload=struct.pack("<Q", nbytes)))
            arrived = 0
            while arrived < nbytes - nbytes // 4:  # the rest is more than the sockets of one connection hold
                arrived += len(first.recv(MIB))
            stuck = 0
            while arrived + stuck < nbytes:
                for lane in select.select([first, second], [], [], DEADLINE_S)[0]:
                    taken = len(lane.recv(MIB))
                    arrived, stuck = arrived + taken * (lane is first), stuck + taken * (lane is second)
    assert stuck > 0


def test_keys_that_open_nothing_are_refused_and_the_link_goes_on(make: Make) -> None:
    a, b = make(), make()
    port = b.listen("127.0.0.1", 0)
    link, other = join(a, b, port)
    late = b.offer_lanes(other, 1, within=0.0)
    with raw_lane(port, late) as lane:
        expect(b, T.CONNECTED)
        assert "unknown or expired key" in expect(b, T.CLOSED)[0].text
        read_to_end(lane)
    key = b.offer_lanes(other, 1)
    assert len(key) == 32
    assert key != late
    for wrong in (os.urandom(32), key[:31], key[:-1] + bytes([key[-1] ^ 1]), b"", late):
        with raw_lane(port, wrong) as lane:
            expect(b, T.CONNECTED)
            assert "unknown or expired key" in expect(b, T.CLOSED)[0].text
            read_to_end(lane)
    a.attach_lanes(link, key, 1, 5.0)
    expect(b, T.CONNECTED, T.CLOSED, count=2)
    with raw_lane(port, key) as one_too_many:
        expect(b, T.CONNECTED)
        assert "unknown or expired key" in expect(b, T.CLOSED)[0].text
        read_to_end(one_too_many)
    assert [len(b.stats(other).lanes), len(a.stats(link).lanes)] == [2, 2]
    with pytest.raises(ValueError, match="at most 3 further lanes"):
        a.attach_lanes(link, key, 4, 5.0)
    with pytest.raises(ValueError, match="link is gone"):
        a.attach_lanes(99, key, 1, 5.0)
    a.send_control(link, b"still there")
    expect(b, T.CONTROL)


@pytest.mark.parametrize("encrypted", [False, pytest.param(True, marks=needs_tls)], ids=["in the clear", "in TLS"])
@pytest.mark.parametrize("why", ["no room", "a wrong key"])
def test_a_lane_that_the_server_refuses_goes_and_the_link_works_without_it(
    make: Make, why: str, encrypted: bool
) -> None:
    ours = {"tls": client_tls().for_client()} if encrypted else {}
    theirs = {"tls": server_tls().for_server()} if encrypted else {}
    a, b = make(**ours), make(max_links=1 if why == "no room" else 9, **theirs)
    link, other = join(a, b)
    b.trust(other, 7, MIB)
    key = b.offer_lanes(other, 2)
    buffer, content = filled(16 * MIB)
    target = Buffer(16 * MIB)
    b.receive(other, 1, 0, 0, target, flat(16 * MIB))
    a.send(link, 1, 0, 0, a.make_source(buffer, flat(16 * MIB), True))
    a.attach_lanes(link, key if why == "no room" else os.urandom(32), 2, 5.0)
    a.send_control(link, b"with what was opened")  # which has become part of the link before
    seen: list[_C.Event] = []
    while not {T.RECEIVED, T.CONTROL} <= {event.type for event in seen}:
        seen.append(next_event(b))
    assert other not in [event.link for event in seen if event.type == T.CLOSED]
    assert bytes(memoryview(target)) == content
    expect(a, T.SENT)
    deadline = time.monotonic() + DEADLINE_S
    while len(a.stats(link).lanes) > 1:
        assert time.monotonic() < deadline
        assert a.next_event(0.01) is None
    a.send_control(link, b"still there")
    while (event := next_event(b)).type != T.CONTROL:
        assert event.link != other
    assert event.message == b"still there"
    a.close_link(link, "done")
    assert expect(a, T.CLOSED)[0].text == "done"


def test_chunks_wait_for_a_lane_to_be_answered_and_take_the_others_meanwhile(make: Make) -> None:
    """A connection that waits in a server's backlog may be refused yet: what is put on it would be lost."""
    client = make()
    nbytes = 16 * MIB
    buffer, content = filled(nbytes)
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = client.connect("127.0.0.1", server.getsockname()[1], 5.0)
        first, _ = server.accept()
        client.attach_lanes(link, bytes(32), 1, 5.0)
        lane, _ = server.accept()
        with first, lane:
            read_exactly(lane, HEADER_BYTES + 32)
            client.send(link, 1, 0, 0, client.make_source(buffer, flat(nbytes), True))
            first.sendall(frame_of(ACK, (1, 0, 0), payload=struct.pack("<Q", nbytes)))
            chunks = nbytes // 65536
            arrived = [read_data(first) for _ in range(chunks)]
            assert b"".join(arrived) == content
            lane.setblocking(False)
            with pytest.raises(BlockingIOError):
                lane.recv(1)


def test_a_lane_that_is_never_answered_goes_and_the_link_works_without_it(make: Make) -> None:
    """As in the backlog of a server that has no descriptors left."""
    client = make(idle_timeout=3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = client.connect("127.0.0.1", server.getsockname()[1], 5.0)
        first, _ = server.accept()
        with first:
            client.attach_lanes(link, bytes(32), 1, 5.0)
            client.send_control(link, b"with the lane")
            read_exactly(first, HEADER_BYTES + 13)
            deadline = time.monotonic() + DEADLINE_S
            while len(client.stats(link).lanes) > 1:
                assert time.monotonic() < deadline
                assert client.next_event(0.05) is None
                first.sendall(frame_of(PING))
            first.sendall(frame_of(1, payload=b"still here"))
            assert expect(client, T.CONTROL)[0].message == b"still here"


def read_data(peer: socket.socket) -> bytes:
    """The payload of the next chunk."""
    while True:
        header = read_exactly(peer, HEADER_BYTES)
        payload = read_exactly(peer, struct.unpack_from("<I", header, 32)[0])
        if header[5] == DATA:
            return payload


def test_a_client_without_a_free_descriptor_gets_no_lane_and_keeps_its_link(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    key = b.offer_lanes(other, 1)
    with no_descriptor_free(), pytest.raises(OSError, match="Too many open files"):
        a.attach_lanes(link, key, 1, 5.0)
    a.send_control(link, b"still here")
    assert expect(b, T.CONTROL)[0].message == b"still here"


def test_on_an_artificial_line_a_message_waits_for_no_more_than_the_chunks_that_are_on_it(make: Make) -> None:
    """The lanes take the line by turns; a message, which has the first lane to itself, must not wait for its turn."""
    a, b = make(bytes_per_second=4e6), make()
    link, other = join(a, b)
    widen(a, link, b, other, 4)
    size, chunk = 8 * MIB, 128 << 10
    source, target = filled(size)[0], Buffer(size)
    b.receive(other, 1, 0, 0, target, flat(size, chunk))
    a.send(link, 1, 0, 0, a.make_source(source, flat(size, chunk), True))
    for i in range(8):
        before = b.stats(other).bytes_in
        a.send_control(link, bytes([i]))
        assert expect(b, T.CONTROL)[0].message == bytes([i])
        assert b.stats(other).bytes_in - before < 6 * chunk
    expect(b, T.RECEIVED)


def test_a_link_that_is_closing_sends_its_messages_and_no_chunk_more(make: Make) -> None:
    a, b = make(bytes_per_second=4e6), make()
    link, other = join(a, b)
    size = 256 * MIB
    b.receive(other, 1, 0, 0, Buffer(size), flat(size))
    a.send(link, 1, 0, 0, a.make_source(Buffer(size), flat(size), True))
    while b.stats(other).bytes_in < MIB:
        assert b.next_event(0.01) is None
    a.send_control(link, b"farewell")
    a.close_link(link, "done", flush=DEADLINE_S)
    assert expect(b, T.CONTROL)[0].message == b"farewell"
    (closed,) = expect(b, T.CLOSED)
    assert closed.text == "the peer closed the connection"
    assert closed.unfinished[0][3] < size // 2


def test_a_server_answers_on_a_new_lane_without_waiting_for_its_next_ping(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        with raw_lane(port, transport.offer_lanes(connected.link, 1)) as lane:
            assert read_exactly(lane, HEADER_BYTES)[5] == PING
            first.setblocking(False)
            with pytest.raises(BlockingIOError):  # a ping would leave here, too
                first.recv(1)
            first.setblocking(True)
            lane.shutdown(socket.SHUT_WR)
            expect(transport, T.CONNECTED, T.CLOSED, count=2)
            expect(transport, T.CLOSED)
            read_to_end(first)


def test_the_key_of_a_link_that_ended_opens_nothing(make: Make) -> None:
    a, b = make(), make()
    port = b.listen("127.0.0.1", 0)
    link, other = join(a, b, port)
    key = b.offer_lanes(other, 3)
    a.close_link(link, "over")
    expect(b, T.CLOSED)
    with raw_lane(port, key) as lane:
        expect(b, T.CONNECTED)
        assert "unknown or expired key" in expect(b, T.CLOSED)[0].text
        read_to_end(lane)


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_lane_that_dies_ends_the_whole_link_with_a_reason(listening: tuple[_C.Transport, int], how: str) -> None:
    transport, port = listening
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        lane = raw_lane(port, transport.offer_lanes(connected.link, 1))
        expect(transport, T.CONNECTED, T.CLOSED, count=2)
        if how == "reset":
            lane.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        read_exactly(lane, HEADER_BYTES)  # closing with unread input resets
        lane.close()
        (closed,) = expect(transport, T.CLOSED)
        assert closed.link == connected.link
        assert ("Connection reset" if how == "reset" else "closed one of the link's lanes") in closed.text
        read_to_end(first)


def pass_time(make: Make, seconds: float) -> None:
    """Until a link to nobody has been silent for so long."""
    clock = make(idle_timeout=seconds)
    with stranger_to(clock.listen("127.0.0.1", 0)):
        expect(clock, T.CONNECTED)
        expect(clock, T.CLOSED)


def test_a_lane_that_ends_while_the_program_is_behind_loses_nothing_of_the_others(make: Make) -> None:
    """What the program has not taken stops the reading; what lies in the sockets then is no less sent. Meanwhile pings
    are due, also on the lane that has ended."""
    transport = make(idle_timeout=3.0)
    port = transport.listen("127.0.0.1", 0)
    message = frame_of(1, payload=bytes(4096))
    count = 2 * MIB // 4096  # half of it is more than the program may leave lying
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        with raw_lane(port, transport.offer_lanes(connected.link, 1)) as lane:
            expect(transport, T.CONNECTED, T.CLOSED, count=2)
            read_exactly(lane, HEADER_BYTES)
            lane.shutdown(socket.SHUT_WR)
            first.sendall(message * count)
            expect(transport, T.CONTROL)  # so the end of the lane has been read, too
            lane.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        before = cpu_s_of_transports()
        pass_time(make, 2.0)
        assert cpu_s_of_transports() - before < 0.5  # a connection that is over wakes nobody again and again
        expect(transport, T.CONTROL, count=count - 1)
        assert "closed one of the link's lanes" in expect(transport, T.CLOSED)[0].text


def test_a_lane_that_falls_silent_ends_the_link_though_the_others_are_alive(make: Make) -> None:
    """A connection half open: one lane's bytes get nowhere, and nothing but silence tells."""
    transport = make(idle_timeout=3.0)
    port = transport.listen("127.0.0.1", 0)
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        with raw_lane(port, transport.offer_lanes(connected.link, 1)):
            expect(transport, T.CONNECTED, T.CLOSED, count=2)
            deadline = time.monotonic() + DEADLINE_S
            while (closed := transport.next_event(0.05)) is None:
                assert time.monotonic() < deadline
                first.sendall(frame_of(PING))
            assert (closed.type, closed.link) == (T.CLOSED, connected.link)
            assert closed.text == "nothing was heard from the peer for 3 s on one of the link's lanes"


def test_idle_but_living_peers_keep_each_other_awake_on_every_lane(make: Make) -> None:
    a, b = make(idle_timeout=5.0), make(idle_timeout=5.0)
    port = b.listen("127.0.0.1", 0)
    narrow, (wide, other) = join(a, b, port)[0], join(a, b, port)
    widen(a, wide, b, other, 3)
    assert a.next_event(6.0) is None
    assert b.next_event(0.0) is None
    for link in (narrow, wide):
        assert a.stats(link).round_trip_ns > 0


def test_closing_a_link_of_several_lanes_loses_nothing_that_was_sent(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    widen(a, link, b, other, 4)
    buffer, content = filled(8 * MIB)
    target = Buffer(8 * MIB)
    layout = flat(8 * MIB)
    b.receive(other, 1, 0, 0, target, layout)
    a.send(link, 1, 0, 0, a.make_source(buffer, layout, True))
    expect(a, T.SENT)
    a.send_control(link, b"the last words")
    a.close_link(link, "done")
    assert [event.type for event in expect(b, T.RECEIVED, T.CONTROL, count=2)] == [T.RECEIVED, T.CONTROL]
    assert "the peer closed the connection" in expect(b, T.CLOSED)[0].text
    assert bytes(memoryview(target)) == content


def test_single_bytes_on_every_lane_make_whole_transfers(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    layout = flat(600, 50)
    content = random.Random(0).randbytes(600)
    chunks = [frame_of(DATA, (1, 0, 0), offset=at, payload=content[at : at + 50]) for at in range(0, 600, 50)]
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        key = transport.offer_lanes(connected.link, 2)
        lanes = [first, *(raw_lane(port, key) for _ in range(2))]
        expect(transport, T.CONNECTED, T.CLOSED, count=4)
        target = Buffer(600)
        transport.receive(connected.link, 1, 0, 0, target, layout)
        read_exactly(first, HEADER_BYTES + 8)
        wires = [b"".join(chunks[index::3]) for index in range(3)]
        for lane in lanes:
            lane.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(max(map(len, wires))):
            for lane, wire in zip(lanes, wires, strict=True):
                lane.sendall(wire[at : at + 1])
        expect(transport, T.RECEIVED)
        assert bytes(memoryview(target)) == content
        for lane in lanes[1:]:
            lane.close()


def test_chunks_that_come_together_with_the_request_to_become_a_lane_are_the_links(
    listening: tuple[_C.Transport, int],
) -> None:
    transport, port = listening
    content = random.Random(0).randbytes(100)
    target = Buffer(100)
    with stranger_to(port) as first:
        (connected,) = expect(transport, T.CONNECTED)
        key = transport.offer_lanes(connected.link, 1)
        transport.receive(connected.link, 1, 0, 0, target, flat(100, 50))
        read_exactly(first, HEADER_BYTES + 8)
        chunks = [frame_of(DATA, (1, 0, 0), offset=at, payload=content[at : at + 50]) for at in (0, 50)]
        with stranger_to(port) as lane:
            lane.sendall(frame_of(ATTACH, payload=key) + b"".join(chunks))  # all in one segment
            events = expect(transport, T.CONNECTED, T.CLOSED, T.RECEIVED, count=3)
    assert [e.text for e in events if e.type == T.CLOSED] == [f"it became a lane of link {connected.link}"]
    assert bytes(memoryview(target)) == content


def test_the_stats_of_a_lane_tell_what_the_kernel_knows(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    buffer, _ = filled(4 * MIB)
    b.receive(other, 1, 0, 0, Buffer(4 * MIB), flat(4 * MIB))
    a.send(link, 1, 0, 0, a.make_source(buffer, flat(4 * MIB), True))
    expect(a, T.SENT)
    (lane,) = a.stats(link).lanes
    assert lane.bytes_out == a.stats(link).bytes_out > 4 * MIB
    assert lane.rtt_us > 0
    assert lane.rttvar_us > 0
    assert lane.delivery_rate > 0
    assert lane.cwnd > 0
    assert lane.unsent_bytes == 0  # all of it is acknowledged
    assert lane.retransmits >= 0
    assert a.stats(99).lanes == []


# ---- The Python face


def has_lanes(transport: _C.Transport, link: int, count: int) -> bool:
    return len(transport.stats(link).lanes) == count


def test_lanes_are_offered_and_opened_as_far_as_both_sides_want(make: Make) -> None:
    for server_lanes, client_lanes, expected in ((4, 3, 3), (2, 4, 2), (4, 1, 1), (1, 4, 1)):
        with Transport(lanes=server_lanes) as server, Transport(lanes=client_lanes) as client:
            link = client.connect(server.listen("127.0.0.1:0", protected=False))
            event = server.next_event(DEADLINE_S)
            assert event is not None
            offer = server.offer_lanes(event.link)
            assert (offer is None) == (server_lanes == 1)
            if offer is not None:
                assert offer == protocol.decode(protocol.encode(offer))
                client.open_lanes(link, offer)
            expect(server.native, T.CONNECTED, T.CLOSED, count=2 * (expected - 1))
            assert settles(partial(has_lanes, server.native, event.link, expected))


def test_a_client_that_cannot_open_further_lanes_goes_on_with_one(caplog: pytest.LogCaptureFixture) -> None:
    with Transport(lanes=4) as server, Transport(lanes=4) as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        event = server.next_event(DEADLINE_S)
        assert event is not None
        offer = server.offer_lanes(event.link)
        assert offer is not None
        server.close()
        closed = next_event(client.native)
        assert closed.type == T.CLOSED
        client.open_lanes(link, offer)
    assert "the link is gone" in caplog.text


def test_a_number_of_lanes_that_cannot_be_is_refused() -> None:
    for lanes in (0, 5):
        with pytest.raises(ConfigError, match="from 1 to 4"):
            Transport(lanes=lanes)


def test_a_federation_over_several_lanes_ends_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    attach = Transport.open_lanes

    def spy(self: Transport, link: int, offer: protocol.Lanes) -> None:
        attach(self, link, offer)
        opened.append(offer.most)

    monkeypatch.setattr(Transport, "open_lanes", spy)
    case = Case(settings={"rounds": 6})
    links: list[dict[str, Any]] = [{"lanes": 3}, {"lanes": 4}, {"lanes": 1}]
    assert_equal(case.run(links=links), case.simulate())
    assert opened == [4, 4, 4]
