"""The transport over real sockets: moving bytes, opening, closing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import select
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
from leftovers import least_growth, settles
from transport_cases import (
    DEADLINE_S,
    HEADER_BYTES,
    MIB,
    Make,
    T,
    expect,
    filled,
    flat,
    frame,
    freed_memory_is_used_again,
    join,
    listen,
    make_transports,
    read_exactly,
    resident_bytes,
    stranger_to,
)

from parablock_rt import _C
from parablock_rt._C import Buffer, Source
from parablock_rt.errors import ConfigError, ConnectError, TransportError
from parablock_rt.wire.transport import Transport, body_layout, raw_layout

make = pytest.fixture(make_transports)
listening = pytest.fixture(listen)


def loopback_addresses() -> list[str]:
    """Those of this machine's loopback, in the order in which they are tried."""
    return [str(info[4][0]) for info in socket.getaddrinfo(None, 0, type=socket.SOCK_STREAM)]


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# ---- Moving bytes


def test_transfers_of_many_sizes_in_both_directions_at_once(make: Make) -> None:
    a, b = make(window_bytes=100_000), make()
    links = join(a, b)
    sizes = [1, 2, 127, 4096, 65535, 65536, 65537, 1_000_003, 5 * MIB]
    expected: list[tuple[Buffer, bytes]] = []
    for index, size in enumerate(sizes):
        for (sender, sender_link), (receiver, receiver_link) in (
            ((a, links[0]), (b, links[1])),
            ((b, links[1]), (a, links[0])),
        ):
            buffer, content = filled(size, index)
            target = Buffer(size)
            layout = flat(size, 1 + size // 7)
            receiver.receive(receiver_link, 1, index, 0, target, layout)
            sender.send(sender_link, 1, index, 0, sender.make_source(buffer, layout, True))
            expected.append((target, content))
    for transport in (a, b):
        events = expect(transport, T.SENT, T.RECEIVED, count=2 * len(sizes))
        assert sorted(e.round for e in events if e.type == T.SENT) == list(range(len(sizes)))
        assert all(0 < e.first_byte_ns <= e.at_ns for e in events)
    for target, content in expected:
        assert bytes(memoryview(target)) == content


def test_control_messages_arrive_complete_and_in_order(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    for side, its in ((a, link), (b, other)):
        side.trust(its, 5, 2**20, queue_bytes=2**21)
    b.send_control(other, b"trusted")
    expect(a, T.CONTROL)
    messages = [os.urandom(size) for size in (0, 1, 43, 4096, 4097, 2**20, 3)]
    for message in messages:
        a.send_control(link, message)
    assert [e.message for e in expect(b, T.CONTROL, count=len(messages))] == messages


def test_a_stranger_may_not_send_long_messages(make: Make) -> None:
    a, b = make(), make()
    link, _ = join(a, b)
    a.send_control(link, bytes(4097))
    (closed,) = expect(b, T.CLOSED)
    assert "4097 bytes where at most 4096" in closed.text


def test_a_broadcast_is_one_buffer_that_every_link_shares(make: Make) -> None:
    server = make()
    port = server.listen("127.0.0.1", 0)
    buffer, content = filled(4 * MIB)
    layout = flat(4 * MIB)
    source = server.make_source(buffer, layout, False)
    clients = []
    for _ in range(8):
        client = make()
        link, there = join(client, server, port)
        target = Buffer(4 * MIB)
        client.receive(link, 2, 0, 0, target, layout)
        server.send(there, 2, 0, 0, source)
        clients.append((client, target))
    assert buffer.owners == 2  # Python and the one source
    source.raise_watermark(layout.chunks)
    expect(server, T.SENT, count=8)
    for client, target in clients:
        expect(client, T.RECEIVED)
        assert bytes(memoryview(target)) == content
    del source
    assert buffer.owners == 1


def test_chunks_leave_as_another_thread_raises_the_watermark(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    layout = flat(64 * 1000, 1000)
    buffer, target = Buffer(64 * 1000), Buffer(64 * 1000)
    content = random.Random(1).randbytes(64 * 1000)
    source = a.make_source(buffer, layout, False)
    b.receive(other, 1, 0, 0, target, layout)
    a.send(link, 1, 0, 0, source)

    def produce() -> None:
        for chunk in range(64):
            memoryview(buffer)[chunk * 1000 : (chunk + 1) * 1000] = content[chunk * 1000 : (chunk + 1) * 1000]
            source.raise_watermark(chunk + 1)

    producer = threading.Thread(target=produce)
    producer.start()
    expect(b, T.RECEIVED)
    expect(a, T.SENT)
    producer.join()
    assert bytes(memoryview(target)) == content


def test_sent_is_reported_only_once_the_peer_has_everything(make: Make, listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    with stranger_to(port) as peer:
        (connected,) = expect(transport, T.CONNECTED)
        buffer, content = filled(1000)
        transport.send(connected.link, 1, 0, 0, transport.make_source(buffer, flat(1000, 500), True))
        ack = struct.Struct("<4sBBBBQIIQII")

        def acknowledge(received: int) -> None:
            credit = struct.pack("<Q", 1000)
            head = ack.pack(b"PBLK", _C.PROTOCOL_VERSION, 3, 1, 0, 0, 0, 0, received, 8, _C.crc32c(credit))
            peer.sendall(head + struct.pack("<I", _C.crc32c(head)) + credit)

        acknowledge(0)
        wire = read_exactly(peer, 2 * HEADER_BYTES + 1000)
        assert wire[HEADER_BYTES : HEADER_BYTES + 500] + wire[-500:] == content
        acknowledge(999)
        peer.sendall(frame(1, b"acknowledged 999"))
        (message,) = expect(transport, T.CONTROL)  # not SENT: the kernel took all bytes, the peer says it lacks one
        assert message.message == b"acknowledged 999"
        acknowledge(1000)
        expect(transport, T.SENT)


def test_a_cancelled_transfer_lets_go_of_its_buffers_and_the_next_one_arrives(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    layout = flat(8 * MIB)
    first, _ = filled(8 * MIB)
    target = Buffer(8 * MIB)
    source = a.make_source(first, layout, False)
    source.raise_watermark(layout.chunks // 2)
    b.receive(other, 1, 0, 0, target, layout)
    a.send(link, 1, 0, 0, source)
    b.cancel_receive(other, 1, 0, 0)
    expect(a, T.REFUSED)
    del source
    second, content = filled(8 * MIB, 2)
    b.receive(other, 1, 1, 0, target, layout)
    a.send(link, 1, 1, 0, a.make_source(second, layout, True))
    expect(b, T.RECEIVED)
    expect(a, T.SENT)
    assert bytes(memoryview(target)) == content
    assert [first.owners, target.owners] == [1, 1]


def test_counters_count_every_byte_on_the_wire(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    a.send_control(link, bytes(100))
    expect(b, T.CONTROL)
    b.send_control(other, b"")
    expect(a, T.CONTROL)
    deadline = time.monotonic() + DEADLINE_S
    while a.stats(link).bytes_out == 0 or b.stats(other).bytes_out == 0:  # a sender counts after the peer may have read
        assert time.monotonic() < deadline
    assert a.stats(link).bytes_out == b.stats(other).bytes_in == HEADER_BYTES + 100
    assert a.stats(link).bytes_in == b.stats(other).bytes_out == HEADER_BYTES
    assert a.stats(99).bytes_in == 0


# ---- The GIL


def _receive_all(pipe: Connection, port: int, nbytes: int) -> None:
    transport = _C.Transport(window_bytes=MIB // 4)  # many acknowledgements: the sender's thread must run throughout
    link = transport.connect("127.0.0.1", port, 5.0)
    target = Buffer(nbytes)
    pipe.recv()
    transport.receive(link, 1, 0, 0, target, flat(nbytes))
    event = transport.next_event(DEADLINE_S)
    pipe.send(_C.crc32c(target) if event is not None and event.type == T.RECEIVED else None)
    transport.close(5.0)


def _hold_the_gil_until_readable(descriptor: int, seconds: float) -> bool:
    """Calls poll(2) without giving up the GIL; no Python thread can run meanwhile. False after `seconds`."""

    class PollFd(ctypes.Structure):
        _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))

    waiting = PollFd(descriptor, select.POLLIN, 0)
    return bool(ctypes.PyDLL(None).poll(ctypes.byref(waiting), 1, int(seconds * 1000)) == 1)


def test_bytes_move_while_the_gil_is_held(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    nbytes = 32 * MIB
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_receive_all, args=(theirs, port, nbytes))
    peer.start()
    try:
        (connected,) = expect(transport, T.CONNECTED)
        buffer, _ = filled(nbytes)
        transport.send(connected.link, 1, 0, 0, transport.make_source(buffer, flat(nbytes), True))
        ours.send("go")
        assert _hold_the_gil_until_readable(ours.fileno(), DEADLINE_S), "the peer got nothing while the GIL was held"
        assert ours.recv() == _C.crc32c(buffer)
        expect(transport, T.SENT)
    finally:
        peer.join()


# ---- Opening and closing


def test_only_on_loopback_the_systems_congestion_control_is_replaced(make: Make) -> None:
    """At each end by the address that it was given: who listens everywhere does not know who will come."""
    with socket.socket() as fresh:
        usual = fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    server, public, client = make(), make(), make()
    far = [(at, at.listen(address, 0)) for at, address in ((server, "127.0.0.1"), (public, "0.0.0.0"))]
    near = [client.connect("127.0.0.1", port, DEADLINE_S) for _, port in far]
    accepted = [expect(at, T.CONNECTED)[0].link for at, _ in far]
    assert settles(lambda: all(client.stats(link).lanes for link in near))
    assert [client.stats(link).lanes[0].congestion_control for link in near] == ["reno", "reno"]
    found = [at.stats(link).lanes[0].congestion_control for (at, _), link in zip(far, accepted, strict=True)]
    assert found == ["reno", usual]


def test_a_port_in_use_is_refused_with_the_address(listening: tuple[_C.Transport, int]) -> None:
    _, port = listening
    with Transport() as other, pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port}.*another server"):
        other.listen(f"127.0.0.1:{port}", protected=False)


def test_a_refused_connection_names_the_address_and_the_tries() -> None:
    with socket.socket() as reserved, Transport() as transport:
        reserved.bind(("127.0.0.1", 0))  # but not listening: nobody else can take the port meanwhile
        port = reserved.getsockname()[1]
        with pytest.raises(ConnectError, match=rf"127\.0\.0\.1:{port} after 2 tries"):
            transport.connect(f"127.0.0.1:{port}", tries=2)
        with pytest.raises(ConnectionRefusedError):
            transport.native.connect("127.0.0.1", port, 5.0)


@pytest.mark.skipif(len(loopback_addresses()) < 2, reason="this machine's loopback has one address")
def test_an_address_that_never_answers_leaves_time_for_the_names_others(make: Make) -> None:
    """No name at all means this machine, by each of its loopback's addresses."""
    silent, answers = loopback_addresses()[:2]
    with contextlib.ExitStack() as full:
        black_hole = full.enter_context(socket.create_server((silent, 0), family=family_of(silent), backlog=0))
        port = black_hole.getsockname()[1]
        for _ in range(3):  # the kernel drops what comes once as many wait as may
            waiting = full.enter_context(socket.socket(family_of(silent)))
            waiting.setblocking(False)
            waiting.connect_ex((silent, port))
        server, client = make(), make()
        server.listen(answers, port)
        client.send_control(client.connect("", port, 4.0), b"hello")
        expect(server, T.CONNECTED)
        assert expect(server, T.CONTROL)[0].message == b"hello"


def test_an_unresolvable_host_is_an_error_that_names_it() -> None:
    with Transport() as transport, pytest.raises(OSError, match=r"cannot resolve no-such-host\.invalid:1"):
        transport.native.connect("no-such-host.invalid", 1, 5.0)


def test_a_server_refuses_to_listen_where_strangers_reach_it_unless_told() -> None:
    with Transport() as transport:
        with pytest.raises(ConfigError, match="--insecure"):
            transport.listen("0.0.0.0:0", protected=False)
        with pytest.raises(ConfigError, match=r"refusing to listen on 0.0.0.0:0 without TLS.*--insecure"):
            transport.listen("0.0.0.0:0", protected=True)
        assert transport.listen("127.0.0.1:0", protected=False) != transport.listen(
            "0.0.0.0:0", protected=False, insecure=True
        )


def test_closing_a_link_delivers_what_was_queued_and_then_the_reason(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    b.trust(other, 5, 4096)
    for number in range(100):
        b.send_control(other, bytes([number]) * 3000)
    b.close_link(other, "you are late")
    assert [e.message[0] for e in expect(a, T.CONTROL, count=100)] == list(range(100))
    (closed,) = expect(a, T.CLOSED)
    assert closed.link == link
    assert "the peer closed" in closed.text
    (closed,) = expect(b, T.CLOSED)
    assert closed.text == "you are late"


def test_close_flushes_is_idempotent_and_may_come_from_several_threads(make: Make) -> None:
    a, b = make(), make()
    link, _ = join(a, b)
    buffer, _ = filled(MIB)
    a.send(link, 1, 0, 0, a.make_source(buffer, flat(MIB), True))  # nobody will ever grant credit
    a.send_control(link, b"the last words")
    closers = [threading.Thread(target=a.close, args=(5.0,)) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    a.close(0.0)
    expect(a, T.CLOSED)
    assert a.next_event(0.0) is None
    assert [e.message for e in expect(b, T.CONTROL)] == [b"the last words"]
    assert buffer.owners == 1


def test_a_closed_transport_refuses_new_work_and_keeps_no_buffers(listening: tuple[_C.Transport, int]) -> None:
    _, port = listening
    closed = _C.Transport()
    closed.close(0.0)
    with pytest.raises(RuntimeError, match="closed"):
        closed.connect("127.0.0.1", port, 5.0)
    with pytest.raises(RuntimeError, match="closed"):
        closed.listen("127.0.0.1", 0)
    buffer, _ = filled(10)
    source = closed.make_source(buffer, flat(10), False)
    closed.send(1, 1, 0, 0, source)
    source.raise_watermark(1)
    del source
    assert buffer.owners == 1


def test_a_source_may_outlive_its_transport() -> None:
    transport = _C.Transport()
    source = transport.make_source(Buffer(10), flat(10, 1), False)
    transport.close(0.0)
    del transport
    source.raise_watermark(5)
    assert source.ready_chunks == 5


def _count(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))


def test_two_hundred_connections_with_transfers_leak_neither_descriptors_nor_threads_nor_memory(make: Make) -> None:
    server = make()
    port = server.listen("127.0.0.1", 0)
    layout = flat(MIB)
    source_buffer, target = filled(MIB)[0], Buffer(MIB)

    def cycle() -> None:
        client = _C.Transport()
        link, other = join(client, server, port)
        client.attach_lanes(link, server.offer_lanes(other, 1), 1, 5.0)
        expect(server, T.CONNECTED, T.CLOSED, count=2)
        server.receive(other, 1, 0, 0, target, layout)
        client.send(link, 1, 0, 0, client.make_source(source_buffer, layout, True))
        expect(server, T.RECEIVED)
        expect(client, T.SENT)
        client.close(5.0)
        expect(server, T.CLOSED)

    def cycles() -> None:
        for _ in range(70):
            cycle()

    for _ in range(20):
        cycle()
    gc.collect()
    descriptors, threads = _count("fd"), _count("task")
    grown = least_growth(resident_bytes, cycles)
    assert settles(lambda: _count("fd") <= descriptors and _count("task") <= threads)
    assert grown < MIB or not freed_memory_is_used_again()
    assert [source_buffer.owners, target.owners] == [1, 1]


# ---- The Python face


def test_layouts_cut_bodies_and_raw_blocks_as_agreed() -> None:
    body = body_layout("int8", 1024, 256)
    assert (body.nbytes, body.chunks) == (1024 + 2 * 8, 4)
    raw = raw_layout(256 * 10, 1000)
    assert (raw.nbytes, raw.chunks) == (2560, 4)
    assert raw_layout(256, 1).chunks == 1
    with pytest.raises(ValueError, match="128"):
        body_layout("int4", 100, 256)
    with pytest.raises(ValueError, match="at least one unit per chunk, found 0"):
        _C.Layout(1, 0, 1, 0)


def test_what_needs_a_buffer_or_a_source_refuses_to_go_without() -> None:
    with pytest.raises(TypeError):
        Source(None, flat(10), True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _C.Encoder().submit([], 0, None)  # type: ignore[arg-type]


def test_a_buffer_shares_its_memory_and_starts_as_zeros() -> None:
    buffer = Buffer(3 * MIB + 1)
    view = np.frombuffer(buffer, np.uint8)
    assert view.size == buffer.nbytes == 3 * MIB + 1
    assert not view.any()
    view[:] = 7
    assert bytes(memoryview(buffer)[-2:]) == b"\7\7"
    assert buffer.address == view.ctypes.data
    assert Source(buffer, flat(10), True).ready_chunks == 1
    assert buffer.owners == 1
