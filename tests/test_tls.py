"""TLS on the links: who is believed, what each side is told, and bytes that arrive however they are cut."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_cases import ACK
from tls_cases import Middle, client_tls, deployment, expired, needs_tls, server_tls
from transport_cases import (
    DEADLINE_S,
    MIB,
    Make,
    T,
    expect,
    filled,
    flat,
    frame,
    frame_of,
    join,
    make_transports,
    next_event,
    read_exactly,
    stranger_to,
)

from parablock_rt import _C
from parablock_rt._C import Buffer, Event
from parablock_rt.errors import ConfigError
from parablock_rt.wire.tls import Tls

pytestmark = needs_tls
make = pytest.fixture(make_transports)
Pair = tuple[_C.Transport, _C.Transport]


@pytest.fixture
def pair(make: Make) -> Pair:
    """A client's and a server's transport that believe each other."""
    return make(tls=client_tls().for_client()), make(tls=server_tls().for_server())


def refused(client: _C.Transport, server: _C.Transport, host: str = "127.0.0.1") -> tuple[str, str]:
    """Connects; neither side gets a message through. What each is told, the client first; for it, there is no use in
    trying again."""
    link = client.connect(host, server.listen("127.0.0.1", 0), 5.0)
    client.send_control(link, b"not to be heard")
    (there,) = expect(client, T.CLOSED)
    expect(server, T.CONNECTED)
    (here,) = expect(server, T.CLOSED)
    assert there.permanent
    return there.text, here.text


# ---- What goes through


def test_a_link_in_tls_carries_messages_and_transfers_both_ways(pair: Pair) -> None:
    client, server = pair
    link, there = join(client, server)
    client.send_control(link, b"up")
    assert expect(server, T.CONTROL)[0].message == b"up"
    server.send_control(there, b"down")
    assert expect(client, T.CONTROL)[0].message == b"down"
    for sender, at, receiver, to in ((client, link, server, there), (server, there, client, link)):
        buffer, content = filled(3 * MIB + 17)
        target = Buffer(buffer.nbytes)
        receiver.receive(to, 1, 0, 0, target, flat(buffer.nbytes, 100_003))
        sender.send(at, 1, 0, 0, sender.make_source(buffer, flat(buffer.nbytes, 100_003), True))
        expect(receiver, T.RECEIVED)
        expect(sender, T.SENT)
        assert bytes(memoryview(target)) == content


@pytest.mark.parametrize("lanes", [1, 4])
def test_both_directions_at_once_do_not_wait_for_each_other(pair: Pair, lanes: int) -> None:
    """More each way than the sockets hold, so that both sides have to read before either can go on writing."""
    client, server = pair
    link, there = join(client, server)
    if lanes > 1:
        client.attach_lanes(link, server.offer_lanes(there, lanes - 1), lanes - 1, 10.0)
    ends = ((client, link), (server, there))
    sent = [filled(128 * MIB, seed) for seed in range(2)]
    targets = [Buffer(128 * MIB) for _ in range(2)]
    layout = flat(128 * MIB, 2**18)
    for (end, at), target in zip(ends, targets, strict=True):
        end.receive(at, 1, 0, 0, target, layout)
    for (end, at), (buffer, _) in zip(ends, sent, strict=True):
        end.send(at, 1, 0, 0, end.make_source(buffer, layout, True))
    for each in pair:
        done: list[Event.Type] = []
        while set(done) != {T.RECEIVED, T.SENT}:
            event = next_event(each)
            assert event.type in (T.RECEIVED, T.SENT, T.CONNECTED) or "became a lane" in event.text, event.text
            done += [event.type] if event.type in (T.RECEIVED, T.SENT) else []
    assert [bytes(memoryview(target)) for target in targets] == [sent[1][1], sent[0][1]]


def test_a_message_is_heard_while_what_this_side_has_to_say_waits_for_the_socket(make: Make) -> None:
    server = make(tls=server_tls().for_server())
    trust = ssl.create_default_context(cafile=str(deployment().ca.certificate_file))
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(DEADLINE_S)
        raw.connect(("127.0.0.1", server.listen("127.0.0.1", 0)))
        with trust.wrap_socket(raw, server_hostname="localhost") as peer:
            (connected,) = expect(server, T.CONNECTED)
            buffer, _ = filled(16 * MIB)
            layout = flat(buffer.nbytes, 2**18)
            server.send(connected.link, 1, 0, 0, server.make_source(buffer, layout, True))
            peer.sendall(frame_of(ACK, (1, 0, 0), payload=struct.pack("<Q", buffer.nbytes)))  # all of it may come
            read_exactly(peer, 2**18)
            for message in (b"and I?", b"still there"):  # the rest is more than the sockets hold
                peer.sendall(frame(1, message))
                assert expect(server, T.CONTROL)[0].message == message


def test_keys_are_changed_when_they_have_sealed_many_records_and_nothing_is_lost(make: Make) -> None:
    """Eight times in 64 MiB."""
    ca = str(deployment().ca.certificate_file)
    client, server = make(tls=_C.TlsContext(ca=ca, records_per_key=512)), make(tls=server_tls().for_server())
    link, there = join(client, server)
    buffer, content = filled(64 * MIB)
    target = Buffer(buffer.nbytes)
    layout = flat(buffer.nbytes, 2**18)
    server.receive(there, 1, 0, 0, target, layout)
    client.send(link, 1, 0, 0, client.make_source(buffer, layout, True))
    expect(server, T.RECEIVED)
    expect(client, T.SENT)
    assert bytes(memoryview(target)) == content


def test_a_peer_that_does_nothing_but_change_its_keys_is_shut_out(make: Make) -> None:
    ca = str(deployment().ca.certificate_file)
    client, server = make(tls=_C.TlsContext(ca=ca, records_per_key=1)), make(tls=server_tls().for_server())
    link, _ = join(client, server)
    for _ in range(1000):
        client.send_control(link, b"")
        event = next_event(server)
        if event.type != T.CONTROL:
            break
    assert event.type == T.CLOSED
    assert "changes its TLS keys all the time" in event.text


def test_both_ends_and_nobody_else_know_the_binding_and_who_the_server_is(pair: Pair) -> None:
    client, server = pair
    port = server.listen("127.0.0.1", 0)
    bindings = []
    for _ in range(2):
        link, there = join(client, server, port)
        client.send_control(link, b"")
        expect(server, T.CONTROL)
        ours, theirs = client.tls_info(link), server.tls_info(there)
        assert ours is not None
        assert theirs is not None
        assert ours.version == theirs.version == "TLSv1.3"
        assert ours.cipher == theirs.cipher == "TLS_AES_128_GCM_SHA256"
        assert ours.binding == theirs.binding
        assert len(ours.binding) == 32
        assert ours.subject == "CN=parablock server"
        assert ours.issuer == "CN=parablock ca"
        assert ours.fingerprint == deployment().server.fingerprint
        assert ours.not_after == int(deployment().server.certificate.not_valid_after_utc.timestamp())
        assert theirs.subject == ""
        bindings.append(ours.binding)
    assert bindings[0] != bindings[1]
    assert client.tls_info(99) is None


def test_messages_that_share_a_record_are_all_read_though_the_socket_is_empty(make: Make) -> None:
    """The loop takes a few frames at a time, and the socket will not wake it for those that TLS has taken already."""
    server = make(tls=server_tls().for_server())
    trust = ssl.create_default_context(cafile=str(deployment().ca.certificate_file))
    with stranger_to(server.listen("127.0.0.1", 0)) as raw, trust.wrap_socket(raw, server_hostname="localhost") as peer:
        expect(server, T.CONNECTED)
        record = b"".join(frame(1, b"%03d" % i) for i in range(300))
        assert len(record) < 16384
        peer.sendall(record)
        assert [int(expect(server, T.CONTROL)[0].message) for _ in range(300)] == list(range(300))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=6), chunk=st.integers(1, 40_000))
def test_transfers_of_any_size_arrive_whole(pair: Pair, sizes: list[int], chunk: int) -> None:
    client, server = pair
    link, there = join(client, server)
    targets = [Buffer(size) for size in sizes]
    contents = []
    for i, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        buffer, content = filled(size, seed=i)
        contents.append(content)
        server.receive(there, 1, i, 0, target, flat(size, max(chunk, size // 100)))
        client.send(link, 1, i, 0, client.make_source(buffer, flat(size, max(chunk, size // 100)), True))
    expect(server, T.RECEIVED, count=len(sizes))
    expect(client, T.SENT, count=len(sizes))
    assert [bytes(memoryview(target)) for target in targets] == contents
    client.close_link(link, "done")
    expect(server, T.CLOSED)
    expect(client, T.CLOSED)


def test_bytes_may_come_one_at_a_time(pair: Pair) -> None:
    client, server = pair
    middle = Middle(server.listen("127.0.0.1", 0), piece=1)
    link, there = join(client, server, middle.port)
    client.send_control(link, b"letter by letter")
    assert expect(server, T.CONTROL)[0].message == b"letter by letter"
    server.send_control(there, b"and back")
    assert expect(client, T.CONTROL)[0].message == b"and back"
    client.close_link(link, "done")
    assert expect(server, T.CLOSED)[0].text == "the peer closed the connection"
    middle.close()


def test_what_was_queued_leaves_before_the_end_and_the_end_is_no_truncation(pair: Pair) -> None:
    client, server = pair
    link, _ = join(client, server)
    client.trust(link, 1, 4096)
    for i in range(200):
        client.send_control(link, bytes([i]) * 3000)
    client.close_link(link, "done", flush=DEADLINE_S)
    assert [expect(server, T.CONTROL)[0].message[0] for _ in range(200)] == list(range(200))
    (closed,) = expect(server, T.CLOSED)
    assert closed.text == "the peer closed the connection"
    assert not closed.permanent


def test_what_was_queued_before_the_handshake_is_over_leaves_before_the_end_too(pair: Pair) -> None:
    client, server = pair
    port = server.listen("127.0.0.1", 0)
    for i in range(20):
        link = client.connect("127.0.0.1", port, 5.0)
        client.send_control(link, bytes([i]))
        client.close_link(link, "done", flush=DEADLINE_S)
        expect(server, T.CONNECTED)
        assert expect(server, T.CONTROL)[0].message == bytes([i])
        assert expect(server, T.CLOSED)[0].text == "the peer closed the connection"
        expect(client, T.CLOSED)


# ---- Who is believed


def test_a_server_whose_ca_is_another_is_refused(make: Make) -> None:
    strange = deployment("theirs")
    client = make(tls=client_tls().for_client())
    there, here = refused(client, make(tls=server_tls(strange.server).for_server()))
    assert f"was not signed by the CA of {deployment().ca.certificate_file}" in there
    assert '"CN=parablock server"' in there
    assert here.startswith(
        "the peer refused this side's certificate: it was signed by a CA that the peer does not trust"
    )


def test_a_server_whose_certificate_has_expired_is_refused_with_the_date(make: Make) -> None:
    old = expired(deployment().server, deployment().ca)
    server = server_tls(old).for_server()
    for trust in (client_tls(), client_tls(fingerprint=old.fingerprint)):
        there, here = refused(make(tls=trust.for_client()), make(tls=server))
        assert 'the certificate "CN=parablock server" expired on ' in there
        assert "it must be renewed" in there
        assert here == "the peer refused this side's certificate: it has expired and must be renewed"


def test_a_certificate_for_another_host_is_refused_and_both_hosts_are_named(make: Make) -> None:
    elsewhere = deployment("elsewhere", ("example.org", "10.1.2.3", "fd00::7"))
    trust = client_tls(ca=elsewhere.ca.certificate_file).for_client()
    server = server_tls(elsewhere.server).for_server()
    for host in ("127.0.0.1", "localhost"):
        there, _ = refused(make(tls=trust), make(tls=server), host)
        assert there.startswith(f"expected a certificate for {host}, found one for example.org, 10.1.2.3, fd00::7:")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_host_is_known_by_its_name_or_its_address(pair: Pair, host: str) -> None:
    client, server = pair
    link = client.connect(host, server.listen("127.0.0.1", 0), 5.0)
    client.send_control(link, b"hello")
    expect(server, T.CONNECTED)
    assert expect(server, T.CONTROL)[0].message == b"hello"


def test_a_pinned_certificate_is_believed_whoever_signed_it_and_no_other(make: Make) -> None:
    strange = deployment("elsewhere", ("example.org", "10.1.2.3", "fd00::7")).server
    pretty = ":".join(strange.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    client = make(tls=client_tls(fingerprint=pretty).for_client())
    server = make(tls=server_tls(strange).for_server())
    link, _ = join(client, server)
    client.send_control(link, b"hello")
    expect(server, T.CONTROL)
    there, here = refused(client, make(tls=server_tls().for_server()))
    assert f"expected the certificate with the SHA-256 fingerprint {strange.fingerprint}" in there
    assert f"found {deployment().server.fingerprint} (CN=parablock server)" in there
    assert here.startswith("the peer refused this side's certificate")


def test_a_client_s_certificate_is_no_server_s(make: Make) -> None:
    """It was signed by the right CA, and pretends to be the server."""
    impostor = make(tls=server_tls(deployment().clients[0]).for_server())
    there, _ = refused(make(tls=client_tls().for_client()), impostor)
    assert "cannot be used" in there


def asking_server(make: Make, **options: object) -> _C.Transport:
    return make(tls=server_tls(ca=deployment().ca.certificate_file, **options).for_server())


def test_a_server_that_asks_for_certificates_takes_only_good_ones(make: Make) -> None:
    good = make(tls=client_tls(deployment().clients[1]).for_client())
    server = asking_server(make)
    link, there = join(good, server)
    good.send_control(link, b"hello")
    expect(server, T.CONTROL)
    info = server.tls_info(there)
    assert info is not None
    assert info.subject == "CN=parablock client-2"

    said, noted = refused(make(tls=client_tls().for_client()), asking_server(make))
    assert said == "the server asks for a client certificate: set --tls-cert and --tls-key"
    assert noted == "expected a client certificate, found none: the client needs --tls-cert and --tls-key"
    said, noted = refused(make(tls=client_tls(deployment("theirs").clients[0]).for_client()), asking_server(make))
    assert said.startswith(
        "the peer refused this side's certificate: it was signed by a CA that the peer does not trust"
    )
    assert '"CN=parablock client-1" was not signed by the CA of' in noted
    late = expired(deployment().clients[0], deployment().ca)
    said, noted = refused(make(tls=client_tls(late).for_client()), asking_server(make))
    assert said == "the peer refused this side's certificate: it has expired and must be renewed"
    assert 'the certificate "CN=parablock client-1" expired on' in noted


def test_where_certificates_are_optional_none_is_let_in_and_a_bad_one_is_not(make: Make) -> None:
    anonymous, server = make(tls=client_tls().for_client()), asking_server(make, clients="optional")
    link, _ = join(anonymous, server)
    anonymous.send_control(link, b"hello")
    expect(server, T.CONTROL)
    late = make(tls=client_tls(expired(deployment().clients[0], deployment().ca)).for_client())
    refused(late, asking_server(make, clients="optional"))


# ---- Peers that do not fit


def test_a_client_in_tls_and_a_server_in_the_clear_tell_their_users_so(make: Make) -> None:
    there, here = refused(make(tls=client_tls().for_client()), make())
    assert there.startswith("expected TLS, found something else: the peer does not use TLS")
    assert here.startswith("expected a ParaBlock peer without TLS, found one that uses TLS")
    assert "give both sides TLS options, or neither" in there
    assert "give both sides TLS options, or neither" in here


def test_a_client_in_the_clear_and_a_server_in_tls_tell_their_users_so(make: Make) -> None:
    there, here = refused(make(), make(tls=server_tls().for_server()))
    assert there.startswith("expected a ParaBlock peer without TLS, found one that uses TLS")
    assert here.startswith("expected TLS, found something else: the peer does not use TLS")


def test_older_versions_of_tls_are_refused(make: Make) -> None:
    server = make(tls=server_tls().for_server())
    old = ssl.create_default_context(cafile=str(deployment().ca.certificate_file))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with stranger_to(server.listen("127.0.0.1", 0)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname="localhost")
    expect(server, T.CONNECTED)
    assert expect(server, T.CLOSED)[0].text.startswith("one side does not speak TLS 1.3")


@pytest.mark.parametrize(
    "babble", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\xff\xff" + bytes(300), b"\x15"]
)
def test_a_babbling_stranger_is_dropped_while_others_go_on(pair: Pair, babble: bytes) -> None:
    client, server = pair
    port = server.listen("127.0.0.1", 0)
    link, _ = join(client, server, port)
    with stranger_to(port) as stranger:
        (connected,) = expect(server, T.CONNECTED)
        stranger.sendall(babble)
        stranger.shutdown(socket.SHUT_WR)
        (closed,) = expect(server, T.CLOSED)
        assert closed.link == connected.link
        assert closed.text
    client.send_control(link, b"still here")
    assert expect(server, T.CONTROL)[0].message == b"still here"


def test_a_stranger_that_says_nothing_is_closed_when_its_time_for_the_handshake_is_over(make: Make) -> None:
    server = make(tls=server_tls().for_server(), opening_timeout=0.05)
    with stranger_to(server.listen("127.0.0.1", 0)) as stranger:
        expect(server, T.CONNECTED)
        assert expect(server, T.CLOSED)[0].text == "the TLS handshake was not over after 0.05 s"
        assert stranger.recv(1) == b""


# ---- Somebody on the way


def cut_after(nbytes: int) -> Callable[[bytes], bytes]:
    """Lets `nbytes` bytes through, then cuts the connection."""
    left = nbytes

    def change(data: bytes) -> bytes:
        nonlocal left
        data = data[:left]
        left -= len(data)
        return data

    return change


@pytest.mark.parametrize("nbytes", [100, 100_000], ids=["in the handshake", "in a transfer"])
def test_a_stream_that_is_cut_is_told_apart_from_one_that_ends(pair: Pair, nbytes: int) -> None:
    client, server = pair
    middle = Middle(server.listen("127.0.0.1", 0), cut_after(nbytes))
    link, there = join(client, server, middle.port)
    target = Buffer(MIB)
    server.receive(there, 1, 0, 0, target, flat(MIB))
    client.send(link, 1, 0, 0, client.make_source(filled(MIB)[0], flat(MIB), True))
    (closed,) = expect(server, T.CLOSED)
    assert closed.text in (
        "the peer closed the connection in the TLS handshake",
        "the connection was cut: expected TLS's close_notify, found none, so bytes may be missing",
    )
    assert closed.text.endswith("handshake") == (nbytes == 100)
    assert not closed.permanent  # the next connection may well hold
    middle.close()


def test_a_bit_that_is_flipped_on_the_way_ends_the_link(pair: Pair) -> None:
    client, server = pair
    seen = 0

    def flip(data: bytes) -> bytes:
        nonlocal seen
        before, seen = seen, seen + len(data)
        if before <= 50_000 < seen:
            at = 50_000 - before
            data = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
        return data

    middle = Middle(server.listen("127.0.0.1", 0), flip)
    link, there = join(client, server, middle.port)
    server.receive(there, 1, 0, 0, Buffer(MIB), flat(MIB))
    client.send(link, 1, 0, 0, client.make_source(filled(MIB)[0], flat(MIB), True))
    (closed,) = expect(server, T.CLOSED)
    assert seen > 50_000
    assert closed.text == "a TLS record was changed in transit"


def test_a_recorded_connection_cannot_be_played_again(pair: Pair) -> None:
    client, server = pair
    port = server.listen("127.0.0.1", 0)
    middle = Middle(port)
    link, _ = join(client, server, middle.port)
    client.send_control(link, b"pay 100")
    assert expect(server, T.CONTROL)[0].message == b"pay 100"
    client.close_link(link, "done")
    expect(server, T.CLOSED)
    middle.close()
    assert len(middle.sent) > 300
    with stranger_to(port) as thief:
        expect(server, T.CONNECTED)
        thief.sendall(bytes(middle.sent))
        (closed,) = expect(server, T.CLOSED)  # and no message before
    assert closed.text


def test_nothing_readable_is_on_the_wire(pair: Pair) -> None:
    client, server = pair
    middle = Middle(server.listen("127.0.0.1", 0))
    link, _ = join(client, server, middle.port)
    client.send_control(link, b"a message in the clear" * 50)
    expect(server, T.CONTROL)
    client.close_link(link, "done")
    expect(server, T.CLOSED)
    middle.close()
    assert len(middle.sent) > 1000
    assert b"clear" not in middle.sent
    assert frame(1)[:4] not in middle.sent


# ---- Settings that cannot be used


def test_settings_that_cannot_be_used_are_an_error_that_says_why(tmp_path: Path) -> None:
    ours, theirs = deployment(), deployment("theirs")
    files = ours.server.certificate_file, ours.server.key_file
    with pytest.raises(ConfigError, match="a TLS certificate and its key go together"):
        Tls(files[0])
    with pytest.raises(ConfigError, match="64 hexadecimal digits; found 'abc'"):
        Tls(fingerprint="abc")
    with pytest.raises(ConfigError, match="required or optional; found 'maybe'"):
        Tls(clients="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a server with TLS needs a certificate"):
        Tls().for_server()
    with pytest.raises(ConfigError, match="a client with TLS must know its server"):
        Tls(*files).for_client()
    with pytest.raises(ConfigError, match=f"cannot read a PEM certificate from {tmp_path}/none.pem"):
        Tls(tmp_path / "none.pem", files[1]).for_server()
    with pytest.raises(ConfigError, match=f"cannot read a PEM certificate from the CA file {tmp_path}/none.pem"):
        Tls(ca=tmp_path / "none.pem").for_client()
    with pytest.raises(
        ConfigError, match=r"cannot read the private key .* belong|does not belong to|key values mismatch"
    ):
        Tls(files[0], theirs.server.key_file).for_server()
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(files[1]), "-out", str(locked), "-passout", "pass:secret"]
    subprocess.run(command, check=True)
    with pytest.raises(ConfigError, match=f"PEM without a passphrase, from {locked}"):
        Tls(files[0], locked).for_server()
    assert Tls(ca="system").for_client() is not None


def test_events_wait_for_nobody_after_the_end(pair: Pair) -> None:
    """A link that is closed while its handshake still goes on ends, and the port serves the next one."""
    client, server = pair
    port = server.listen("127.0.0.1", 0)
    with stranger_to(port) as stranger:
        (connected,) = expect(server, T.CONNECTED)
        server.close_link(connected.link, "not now")
        assert next_event(server).type == T.CLOSED
        assert stranger.recv(10) == b""
    link, _ = join(client, server, port)
    client.send_control(link, b"hello")
    expect(server, T.CONTROL)


def test_every_lane_of_a_link_is_in_tls(pair: Pair) -> None:
    client, server = pair
    link, there = join(client, server)
    for transport, id in ((client, link), (server, there)):
        transport.trust(id, 1, 4096)
    client.attach_lanes(link, server.offer_lanes(there, 2), 2, 5.0)
    expect(server, T.CONNECTED, T.CLOSED, count=4)  # newcomers that became lanes
    size = 16 * MIB
    buffer, content = filled(size)
    for round in range(20):
        target = Buffer(size)
        server.receive(there, 1, round, 0, target, flat(size))
        client.send(link, 1, round, 0, client.make_source(buffer, flat(size), True))
        expect(server, T.RECEIVED)
        expect(client, T.SENT)
        assert bytes(memoryview(target)) == content
        lanes = server.stats(there).lanes
        if all(lane.bytes_in > MIB for lane in lanes):
            break
    assert len(lanes) == 3
    assert all(lane.bytes_in > MIB for lane in lanes)
