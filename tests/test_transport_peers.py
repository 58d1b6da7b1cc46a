"""The transport and peers that vanish, babble, flood or fall silent."""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import signal
import socket

import pytest
from transport_cases import (
    HEADER_BYTES,
    MIB,
    Make,
    T,
    expect,
    filled,
    flat,
    frame,
    join,
    listen,
    make_transports,
    next_event,
    read_to_end,
    stranger_to,
)

from parablock_rt import _C
from parablock_rt._C import Buffer

make = pytest.fixture(make_transports)
listening = pytest.fixture(listen)

# ---- Peers that fail


def _send_for_ever(port: int) -> None:
    transport = _C.Transport()
    link = transport.connect("127.0.0.1", port, 5.0)
    layout = flat(64 * MIB)
    source = transport.make_source(Buffer(64 * MIB), layout, False)
    source.raise_watermark(layout.chunks // 2)
    transport.send(link, 1, 0, 0, source)
    signal.pause()


def test_a_peer_killed_in_mid_transfer_closes_its_link_with_a_reason(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    peer = multiprocessing.get_context("spawn").Process(target=_send_for_ever, args=(port,))
    peer.start()
    (connected,) = expect(transport, T.CONNECTED)
    target = Buffer(64 * MIB)
    transport.receive(connected.link, 1, 0, 0, target, flat(64 * MIB))
    while transport.stats(connected.link).bytes_in < MIB:
        assert peer.is_alive()
    assert peer.pid is not None
    os.kill(peer.pid, signal.SIGKILL)
    (closed,) = expect(transport, T.CLOSED)
    assert closed.link == connected.link
    assert "the peer closed the connection" in closed.text or "reading failed" in closed.text
    assert target.owners == 1
    peer.join()


@pytest.mark.parametrize(
    "babble",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: */*\r\n\r\n",
        bytes(100),
        os.urandom(5000),
        frame(9),
        frame(1)[:-1] + b"?",
    ],
    ids=["http", "zeros", "noise", "unknown type", "bad checksum"],
)
def test_a_babbling_peer_is_dropped_while_others_go_on(
    make: Make, listening: tuple[_C.Transport, int], babble: bytes
) -> None:
    transport, port = listening
    friend = make()
    link, there = join(friend, transport, port)
    with stranger_to(port) as stranger:
        (connected,) = expect(transport, T.CONNECTED)
        stranger.sendall(babble)
        (closed,) = expect(transport, T.CLOSED)
        assert closed.link == connected.link
        assert closed.text
    buffer, content = filled(MIB)
    target = Buffer(MIB)
    transport.receive(there, 1, 0, 0, target, flat(MIB))
    friend.send(link, 1, 0, 0, friend.make_source(buffer, flat(MIB), True))
    expect(transport, T.RECEIVED)
    assert bytes(memoryview(target)) == content


def test_a_peer_of_another_version_gets_a_frame_that_names_ours(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    with stranger_to(port) as stranger:
        expect(transport, T.CONNECTED)
        stranger.sendall(frame(1, b"hello", version=_C.PROTOCOL_VERSION + 1))
        answer = read_to_end(stranger)
        assert len(answer) == HEADER_BYTES
        assert answer[:5] == b"PBLK" + bytes([_C.PROTOCOL_VERSION])
    (closed,) = expect(transport, T.CLOSED)
    assert f"version {_C.PROTOCOL_VERSION + 1}, this side version {_C.PROTOCOL_VERSION}" in closed.text


def test_a_silent_peer_is_closed_after_the_idle_timeout(make: Make) -> None:
    transport = make(idle_timeout=0.05)
    with stranger_to(transport.listen("127.0.0.1", 0)) as stranger:
        expect(transport, T.CONNECTED)
        (closed,) = expect(transport, T.CLOSED)
        assert closed.text == "nothing was heard from the peer for 0.05 s"
        received = read_to_end(stranger)  # pings, then the end
    assert len(received) >= HEADER_BYTES
    assert len(received) % HEADER_BYTES == 0


def test_idle_but_living_peers_keep_each_other_awake(make: Make) -> None:
    a, b = make(idle_timeout=2.0), make(idle_timeout=2.0)
    link, _ = join(a, b)
    assert a.next_event(2.5) is None
    assert a.stats(link).round_trip_ns > 0


def test_a_flood_that_nobody_reads_stops_at_a_bound_and_other_links_go_on(
    make: Make, listening: tuple[_C.Transport, int]
) -> None:
    transport, port = listening
    message = frame(1, bytes(1000))
    accepted = 0
    with stranger_to(port) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        stranger.setblocking(False)
        flood = memoryview(message * 1000)
        while select.select([], [stranger], [], 0.5)[1] and accepted < 256 * MIB:
            accepted += stranger.send(flood[accepted % len(message) :])
        assert accepted < 64 * MIB  # what the sockets and the event queue hold
        friend = make()
        link = friend.connect("127.0.0.1", port, 5.0)
        friend.send_control(link, b"from a friend")
        taken = 0
        whole = accepted // len(message)
        friends = []
        while taken < whole or not friends:
            event = next_event(transport)
            if event.type == T.CONTROL and event.message == b"from a friend":
                friends.append(taken)
            elif event.type == T.CONTROL:
                assert event.message == bytes(1000)
                taken += 1
        assert friends[0] < whole  # it did not wait for the end of the flood


def test_a_server_out_of_descriptors_accepts_again_when_some_are_free(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    first = stranger_to(port)
    expect(transport, T.CONNECTED)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    stranger = socket.socket()
    try:
        lowest_free = os.dup(stranger.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        stranger.connect(("127.0.0.1", port))  # the kernel completes it; accepting it needs a descriptor
        first.sendall(frame(1, b"while none is free"))
        (message,) = expect(transport, T.CONTROL)
        assert message.message == b"while none is free"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    expect(transport, T.CONNECTED)
    stranger.close()
    first.close()
    expect(transport, T.CLOSED, count=2)


def test_connections_beyond_the_limit_are_closed_at_once(make: Make) -> None:
    transport = make(max_links=2)
    port = transport.listen("127.0.0.1", 0)
    strangers = [stranger_to(port) for _ in range(3)]
    expect(transport, T.CONNECTED, count=2)
    assert read_to_end(strangers[2]) == b""
    for stranger in strangers:
        stranger.close()
    expect(transport, T.CLOSED, count=2)


def test_misuse_of_a_link_closes_it_with_the_reason_and_leaves_the_thread_running(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    b.receive(other, 1, 0, 0, Buffer(10), flat(10))
    b.receive(other, 1, 0, 0, Buffer(10), flat(10))
    (closed,) = expect(b, T.CLOSED)
    assert "already posted" in closed.text
    expect(a, T.CLOSED)
    with pytest.raises(ValueError, match="only 9 bytes"):
        a.receive(link, 1, 0, 0, Buffer(9), flat(10))
    with pytest.raises(TypeError):
        a.send(link, 1, 0, 0, None)  # type: ignore[arg-type]
    join(a, b)
