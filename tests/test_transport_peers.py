"""The transport and peers that vanish, babble, flood or fall silent."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import select
import signal
import socket
import struct
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tls_cases import client_tls, deployment, needs_tls, server_tls
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
    frame,
    frame_of,
    join,
    listen,
    make_transports,
    next_event,
    no_descriptor_free,
    read_exactly,
    read_to_end,
    resident_bytes,
    stranger_to,
)

from parablock_rt import _C
from parablock_rt._C import Buffer
from parablock_rt.wire import certs

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
        frame(99),
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


def forged(hosts: bytes) -> certs.Issued:
    """A certificate in the name of our CA, signed by nobody, whose hosts are these bytes (DER)."""
    ca = deployment().ca.certificate
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(
        issuer_name=ca.subject,
        subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "anybody")]),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=1),
        not_valid_after=now + datetime.timedelta(days=1),
        extensions=[
            x509.Extension(
                x509.SubjectAlternativeName.oid,
                False,
                x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, hosts),
            )
        ],
    ).sign(key, hashes.SHA256())
    folder = Path(tempfile.mkdtemp(prefix="parablock-forged-"))
    issued = certs.Issued(made, key, folder / "forged.pem", folder / "forged.key")
    pem = serialization.Encoding.PEM
    issued.certificate_file.write_bytes(made.public_bytes(pem))
    issued.key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return issued


@needs_tls
@pytest.mark.parametrize(
    ("hosts", "shown"),
    [
        (bytes.fromhex("30028700"), "an address of 0 bytes"),
        (bytes.fromhex("3003870101"), "an address of 1 bytes"),
        (bytes.fromhex("30138711") + bytes(17), "an address of 17 bytes"),
        (bytes.fromhex("300c820a") + b"\x1b[31m\nERR!", "?[31m?ERR!"),
        (bytes.fromhex("3005820361ff20"), "a??"),
    ],
    ids=["empty address", "one-byte address", "long address", "control characters", "no ascii"],
)
def test_hosts_in_a_forged_certificate_are_shown_harmlessly_and_not_recommended(
    make: Make, hosts: bytes, shown: str
) -> None:
    client, server = make(tls=client_tls().for_client()), make(tls=server_tls(forged(hosts)).for_server())
    client.connect("127.0.0.1", server.listen("127.0.0.1", 0), 5.0)
    (closed,) = expect(client, T.CLOSED)
    assert closed.text == (
        f"expected a certificate for 127.0.0.1, found one for {shown}: check the address; "
        "if it is right, its server needs a certificate for 127.0.0.1"
    )


def test_a_silent_peer_is_closed_after_the_idle_timeout(make: Make) -> None:
    transport = make(idle_timeout=1.0)
    with stranger_to(transport.listen("127.0.0.1", 0)) as stranger:
        expect(transport, T.CONNECTED)
        (closed,) = expect(transport, T.CLOSED)
        assert closed.text == "nothing was heard from the peer for 1 s"
        received = read_to_end(stranger)  # pings, then the end
    assert len(received) >= HEADER_BYTES
    assert len(received) % HEADER_BYTES == 0


def test_a_flood_that_nobody_reads_stops_at_a_bound_and_other_links_go_on(
    make: Make, listening: tuple[_C.Transport, int]
) -> None:
    transport, port = listening
    message = frame(1, bytes(1000))
    accepted = 0
    with stranger_to(port) as stranger:
        (connected,) = expect(transport, T.CONNECTED)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        stranger.setblocking(False)
        flood = memoryview(message * 1000)
        while accepted < 256 * MIB:
            if select.select([], [stranger], [], 0.5)[1]:
                accepted += stranger.send(flood[accepted % len(message) :])
            elif transport.stats(connected.link).bytes_in >= 8 << 10:  # or it is only late in reading
                break
        assert accepted < 64 * MIB  # what the sockets hold
        assert transport.stats(connected.link).bytes_in < 128 << 10, "of a stranger's messages few are kept"
        friend = make()
        link = friend.connect("127.0.0.1", port, 5.0)
        friend.send_control(link, b"from a friend")
        taken = 0
        heard = False
        while not heard:  # although the flood does not end
            event = next_event(transport)
            if event.type == T.CONTROL and event.message == b"from a friend":
                heard = True
            elif event.type == T.CONTROL:
                assert event.message == bytes(1000)
                taken += 1
            with contextlib.suppress(BlockingIOError):
                accepted += stranger.send(flood[accepted % len(message) :])
            assert accepted < 1024 * MIB
        while taken < accepted // len(message):
            (flooding,) = expect(transport, T.CONTROL)
            assert flooding.message == bytes(1000)
            taken += 1


def trust_now(transport: _C.Transport, link: int, peer: socket.socket) -> None:
    """Returns when the loop has done so, and has come to the end of its accepting."""
    transport.trust(link, 0, 4096)
    peer.sendall(frame(1, b"trusted"))
    assert expect(transport, T.CONTROL)[0].message == b"trusted"


def test_a_server_out_of_descriptors_accepts_again_when_some_are_free(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    first = stranger_to(port)
    (known,) = expect(transport, T.CONNECTED)
    trust_now(transport, known.link, first)  # or it would go for the newcomer
    with socket.socket() as stranger:
        with no_descriptor_free():
            stranger.connect(("127.0.0.1", port))  # the kernel completes it; accepting it needs a descriptor
            first.sendall(frame(1, b"while none is free"))
            (message,) = expect(transport, T.CONTROL)
            assert message.message == b"while none is free"
        expect(transport, T.CONNECTED)
    first.close()
    expect(transport, T.CLOSED, count=2)


def test_a_server_out_of_descriptors_drops_the_oldest_stranger_for_a_newcomer(
    listening: tuple[_C.Transport, int],
) -> None:
    transport, port = listening
    known, *strangers = [stranger_to(port) for _ in range(3)]
    links = [event.link for event in expect(transport, T.CONNECTED, count=3)]
    trust_now(transport, links[0], known)
    with socket.socket() as newcomer, no_descriptor_free():
        newcomer.connect(("127.0.0.1", port))
        gone = next_event(transport)
        assert (gone.type, gone.link) == (T.CLOSED, links[1])
        assert gone.text == "closed for a newcomer: no descriptor is left, and it has not said who it is"
        expect(transport, T.CONNECTED)
        newcomer.sendall(frame(1, b"in"))
        assert expect(transport, T.CONTROL)[0].message == b"in"
    for each in (known, *strangers):
        each.close()
    expect(transport, T.CLOSED, count=3)


# ---- Broken frames and broken connections

DATA, ACK, CANCEL, PING, RESEND = 2, 3, 4, 5, 8
CHUNK = 65536


def waiting_for_data(transport: _C.Transport, port: int) -> tuple[socket.socket, int, Buffer]:
    """A raw connection whose other end waits for a transfer of four chunks and has said so."""
    stranger = stranger_to(port)
    (connected,) = expect(transport, T.CONNECTED)
    target = Buffer(4 * CHUNK)
    transport.receive(connected.link, 1, 0, 0, target, flat(4 * CHUNK, CHUNK))
    read_exactly(stranger, HEADER_BYTES + 8)
    return stranger, connected.link, target


def chunk_frame(index: int, content: bytes) -> bytes:
    return frame_of(DATA, (1, 0, 0), offset=index * CHUNK, payload=content[index * CHUNK : (index + 1) * CHUNK])


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, HEADER_BYTES + 1000])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_connection_that_ends_in_a_frame_closes_its_link_and_frees_the_buffer(
    listening: tuple[_C.Transport, int], cut: int, how: str
) -> None:
    transport, port = listening
    stranger, link, target = waiting_for_data(transport, port)
    stranger.sendall(chunk_frame(0, bytes(4 * CHUNK)) + chunk_frame(1, bytes(4 * CHUNK))[:cut])
    while transport.stats(link).bytes_in < HEADER_BYTES + CHUNK + cut:
        assert transport.next_event(0.01) is None
    if how == "reset":
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
    else:
        stranger.shutdown(socket.SHUT_WR)
    (closed,) = expect(transport, T.CLOSED)
    assert ("Connection reset" if how == "reset" else "the peer closed the connection") in closed.text
    assert closed.unfinished == [(1, 0, 0, CHUNK)]
    assert target.owners == 1
    stranger.close()


def test_an_over_long_frame_ends_its_link_before_anything_of_it_is_read(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    for wire, message in (
        (frame_of(DATA, (1, 0, 0), length=CHUNK + 1), f"{CHUNK + 1} bytes at 0 are none of its chunks"),
        (frame_of(DATA, (1, 0, 0), length=2**32 - 1), "4294967295 bytes at 0 are none of its chunks"),
        (frame_of(1, length=2**32 - 1), "4294967295 bytes where at most 4096"),
    ):
        stranger, link, target = waiting_for_data(transport, port)
        stranger.sendall(wire)
        (closed,) = expect(transport, T.CLOSED)
        assert closed.link == link
        assert message in closed.text
        assert target.owners == 1
        stranger.close()


def test_a_flipped_bit_on_the_way_is_caught_counted_and_mended(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    content = os.urandom(4 * CHUNK)
    stranger, link, target = waiting_for_data(transport, port)
    damaged = bytearray(chunk_frame(1, content))
    damaged[HEADER_BYTES + 12345] ^= 0x20
    stranger.sendall(chunk_frame(0, content) + bytes(damaged) + chunk_frame(2, content) + chunk_frame(3, content))
    while (request := read_exactly(stranger, HEADER_BYTES))[5] == PING:
        pass
    assert request[5] == RESEND
    assert struct.unpack_from("<Q", request, 24) == (CHUNK,)
    stranger.sendall(chunk_frame(1, content))
    expect(transport, T.RECEIVED)
    assert bytes(memoryview(target)) == content
    assert transport.stats(link).corrupt_chunks == 1
    stranger.close()
    expect(transport, T.CLOSED)


def test_a_transfer_that_stops_in_the_middle_is_reported_as_stalled_while_the_link_lives(
    listening: tuple[_C.Transport, int],
) -> None:
    transport, port = listening
    content = bytes(4 * CHUNK)
    stranger, link, _ = waiting_for_data(transport, port)
    stranger.sendall(chunk_frame(0, content) + chunk_frame(1, content)[:1000])
    (stalled,) = expect(transport, T.STALLED)
    assert (stalled.link, stalled.kind, stalled.round, stalled.block) == (link, 1, 0, 0)
    assert f"with {CHUNK} of {4 * CHUNK} bytes here" in stalled.text
    stranger.sendall(chunk_frame(1, content)[1000:] + chunk_frame(2, content) + chunk_frame(3, content))
    expect(transport, T.RECEIVED)
    stranger.close()
    expect(transport, T.CLOSED)


def test_a_withdrawn_transfer_is_reported_to_the_receiver_and_frees_both_buffers(make: Make) -> None:
    a, b = make(), make()
    link, other = join(a, b)
    source_buffer, target = Buffer(8 * MIB), Buffer(8 * MIB)
    source = a.make_source(source_buffer, flat(8 * MIB), False)
    source.raise_watermark(64)
    b.receive(other, 1, 0, 0, target, flat(8 * MIB))
    a.send(link, 1, 0, 0, source)
    while b.stats(other).bytes_in < MIB:
        assert b.next_event(0.01) is None
    a.cancel_send(link, 1, 0, 0)
    (withdrawn,) = expect(b, T.WITHDRAWN)
    assert (withdrawn.kind, withdrawn.round) == (1, 0)
    assert target.owners == 1
    del source
    a.send_control(link, b"sent after")
    expect(b, T.CONTROL)
    assert source_buffer.owners == 1


def _say_hello_and_wait(port: int) -> None:
    transport = _C.Transport(idle_timeout=1.0)
    link = transport.connect("127.0.0.1", port, 5.0)
    transport.send_control(link, b"hello")
    event = transport.next_event(DEADLINE_S)
    assert event is not None
    assert event.type == T.CLOSED
    os._exit(0)


def test_a_peer_that_is_stopped_for_longer_than_the_idle_time_is_closed_and_finds_out(make: Make) -> None:
    transport = make(idle_timeout=1.0)
    port = transport.listen("127.0.0.1", 0)
    peer = multiprocessing.get_context("spawn").Process(target=_say_hello_and_wait, args=(port,))
    peer.start()
    assert peer.pid is not None
    try:
        expect(transport, T.CONNECTED)
        expect(transport, T.CONTROL)
        os.kill(peer.pid, signal.SIGSTOP)
        (closed,) = expect(transport, T.CLOSED)
        assert closed.text == "nothing was heard from the peer for 1 s"
    finally:
        os.kill(peer.pid, signal.SIGCONT)
    peer.join(DEADLINE_S)
    assert peer.exitcode == 0


def _hear_everybody_again(pipe: Connection, links: int) -> None:
    """Takes a message of each of its links, twice; says which of them ended before."""
    transport = _C.Transport(idle_timeout=3.0)
    pipe.send(transport.listen("127.0.0.1", 0))
    heard, ended = 0, []
    while heard < 2 * links and not ended:
        event = transport.next_event(DEADLINE_S)
        assert event is not None
        heard += event.type == T.CONTROL
        if event.type == T.CLOSED and "nothing was heard" in event.text:
            ended.append(event.text)
        if heard == links and event.type == T.CONTROL:
            pipe.send("all heard")
    pipe.send(ended)
    os._exit(0)


def test_what_came_while_this_process_was_stopped_is_read_before_silence_is_judged(make: Make) -> None:
    links = 150  # more than the kernel reports at once
    pipe, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hear_everybody_again, args=(theirs, links))
    process.start()
    assert process.pid is not None
    with contextlib.ExitStack() as here:
        port = pipe.recv()
        clock = make(idle_timeout=5.0)  # longer than theirs
        clock.connect("127.0.0.1", port, 5.0)
        strangers = [here.enter_context(stranger_to(port)) for _ in range(links)]
        for stranger in strangers:
            stranger.sendall(frame(1, b"here"))
        assert pipe.recv() == "all heard"
        os.kill(process.pid, signal.SIGSTOP)
        try:
            for stranger in strangers:
                stranger.sendall(frame(1, b"still here"))
            assert "nothing was heard" in expect(clock, T.CLOSED)[0].text
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert pipe.recv() == []
    process.join(DEADLINE_S)
    assert process.exitcode == 0


@needs_tls
def test_a_link_that_closes_in_the_handshake_waits_for_its_end_asleep(make: Make) -> None:
    server = make(tls=server_tls().for_server(), opening_timeout=0.5)
    with stranger_to(server.listen("127.0.0.1", 0)):
        (connected,) = expect(server, T.CONNECTED)
        server.send_control(connected.link, b"can leave only in TLS")
        before = cpu_s_of_transports()
        server.close_link(connected.link, "enough", 3.0)
        expect(server, T.CLOSED)
        assert cpu_s_of_transports() - before < 0.5


# ---- Slow readers


def test_messages_to_a_peer_that_does_not_read_end_its_link_at_a_bound(listening: tuple[_C.Transport, int]) -> None:
    transport, port = listening
    with stranger_to(port):
        (connected,) = expect(transport, T.CONNECTED)
        transport.trust(connected.link, 5, MIB, queue_bytes=2 * MIB)
        before = resident_bytes()
        message = bytes(256 * 1024)
        for _ in range(10_000):
            transport.send_control(connected.link, message)
            if (event := transport.next_event(0.0)) is not None:
                break
        else:
            event = next_event(transport)
        assert event.type == T.CLOSED
        assert "more than 2097152 bytes of messages wait" in event.text
        assert resident_bytes() - before < 64 * MIB


def test_a_slow_reader_of_a_large_transfer_costs_no_memory_and_holds_nobody_up(make: Make) -> None:
    transport = make()
    port = transport.listen("127.0.0.1", 0)
    nbytes = 256 * MIB
    buffer = Buffer(nbytes)
    memoryview(buffer)[:] = bytes(MIB) * 256
    source = transport.make_source(buffer, flat(nbytes), True)
    with stranger_to(port) as slow:
        (connected,) = expect(transport, T.CONNECTED)
        before = resident_bytes()
        transport.send(connected.link, 1, 0, 0, source)
        slow.sendall(frame_of(ACK, (1, 0, 0), payload=struct.pack("<Q", nbytes)))
        friend = make()
        link, there = join(friend, transport, port)
        friend.receive(link, 1, 0, 0, Buffer(4 * MIB), flat(4 * MIB))
        transport.send(there, 1, 0, 0, transport.make_source(Buffer(4 * MIB), flat(4 * MIB), True))
        expect(friend, T.RECEIVED)
        expect(transport, T.SENT)
        assert transport.stats(connected.link).bytes_out < nbytes // 4
        assert resident_bytes() - before < 32 * MIB
        slow.sendall(frame_of(CANCEL, (1, 0, 0)))
        expect(transport, T.REFUSED)


# ---- Misuse


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
