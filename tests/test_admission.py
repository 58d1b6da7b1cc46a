"""Strangers at the door: how many, how long, at what cost, and that they keep nobody out."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import least_growth
from processes import WAIT_S, client, start_server, starter
from tls_cases import client_tls, needs_tls, server_tls
from transport_cases import MIB, Make, T, expect, frame, join, make_transports, next_event, read_to_end, stranger_to

from parablock_rt.wire.tls import Tls

make = pytest.fixture(make_transports)
TOKEN = "correct-horse-battery-staple"
SILENT = 500


@contextlib.contextmanager
def silent_connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that never send a byte."""
    host, port = address.split(":")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + 2 * count + 256  # both ends are in this process
    assert before[1] == resource.RLIM_INFINITY or before[1] >= needed
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], needed), before[1]))
    made: list[socket.socket] = []
    try:
        for _ in range(count):
            made.append(socket.create_connection((host, int(port)), timeout=WAIT_S))
        yield made
    finally:
        for each in made:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("encrypted", [False, pytest.param(True, marks=needs_tls)], ids=["in the clear", "in TLS"])
def test_hundreds_of_connections_that_send_nothing_do_not_keep_a_client_out(encrypted: bool) -> None:
    ours: dict[str, Tls] = {"tls": client_tls()} if encrypted else {}
    theirs: dict[str, Tls] = {"tls": server_tls()} if encrypted else {}
    with (
        starter() as start,
        start_server(clients=1, token=TOKEN, **theirs) as running,
        silent_connections(running.address, SILENT) as silent,
    ):
        # Those that were dropped see the end; the first of them at once.
        silent[0].settimeout(WAIT_S)
        while silent[0].recv(4096):
            pass
        digest = start(client, running.address, token=TOKEN, **ours).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


@needs_tls
def test_silent_connections_in_tls_hold_little_memory(make: Make) -> None:
    server = make(tls=server_tls().for_server(), max_strangers=300, max_strangers_per_network=300)
    port = server.listen("127.0.0.1", 0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with contextlib.ExitStack() as silent:

        def more(count: int = 80) -> None:
            silent.enter_context(silent_connections(f"127.0.0.1:{port}", count))
            expect(server, T.CONNECTED, count=count)

        more(20)  # what is allocated once is
        assert least_growth(resident, more) < 80 * MIB // 8


def test_the_oldest_stranger_goes_for_a_newcomer_of_its_network(make: Make) -> None:
    server = make(max_strangers_per_network=3)
    port = server.listen("127.0.0.1", 0)
    strangers = [stranger_to(port) for _ in range(3)]
    links = [event.link for event in expect(server, T.CONNECTED, count=3)]
    strangers.append(stranger_to(port))
    gone, new = next_event(server), next_event(server)
    assert (gone.type, gone.link) == (T.CLOSED, links[0])
    assert gone.text == "closed for a newcomer: too many connections have not said who they are"
    assert new.type == T.CONNECTED
    assert read_to_end(strangers[0]) == b""
    for i, stranger in enumerate(strangers[1:]):
        stranger.sendall(frame(1, b"%d" % i))
        assert expect(server, T.CONTROL)[0].message == b"%d" % i
    for stranger in strangers:
        stranger.close()
    expect(server, T.CLOSED, count=3)


def test_a_full_house_of_strangers_loses_those_of_the_network_that_has_most(make: Make) -> None:
    server = make(max_strangers=4)
    port = server.listen("127.0.0.1", 0)

    def come_from(address: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S, source_address=(address, 0))

    lonely = come_from("127.0.0.9")
    crowd = [come_from("127.0.0.2") for _ in range(3)]
    links = [event.link for event in expect(server, T.CONNECTED, count=4)]
    newcomer = come_from("127.0.0.3")
    gone = next_event(server)
    assert (gone.type, gone.link) == (T.CLOSED, links[1])  # the first of the crowd; the lonely one came before
    expect(server, T.CONNECTED)
    for each in (lonely, newcomer, *crowd):
        each.close()
    expect(server, T.CLOSED, count=4)


@pytest.mark.parametrize("addresses", [("127.0.0.2", "127.0.0.9"), ("127.0.0.9", "127.0.0.2")])
def test_of_networks_with_equally_many_strangers_the_oldest_goes_whatever_its_address(
    make: Make, addresses: tuple[str, str]
) -> None:
    server = make(max_strangers=2)
    port = server.listen("127.0.0.1", 0)
    with contextlib.ExitStack() as here:

        def come_from(address: str) -> socket.socket:
            return here.enter_context(
                socket.create_connection(("127.0.0.1", port), timeout=WAIT_S, source_address=(address, 0))
            )

        came = []
        for address in addresses:
            come_from(address)
            came.append(next_event(server).link)
        come_from("127.0.0.3")
        gone = next_event(server)
        assert (gone.type, gone.link) == (T.CLOSED, came[0])
        expect(server, T.CONNECTED)
    expect(server, T.CLOSED, count=2)


def test_who_has_proved_itself_is_never_dropped_for_a_newcomer(make: Make) -> None:
    server, friend = make(max_links=2, max_strangers_per_network=1), make()
    port = server.listen("127.0.0.1", 0)
    friends = []
    for _ in range(2):
        friends.append(join(friend, server, port))
        server.trust(friends[-1][1], 1, 4096)
        server.send_control(friends[-1][1], b"known")
        expect(friend, T.CONTROL)  # so that the server has carried out what it was told before
    with stranger_to(port) as refused:
        assert read_to_end(refused) == b""  # all places are taken by who may be here
    for i, (link, there) in enumerate(friends):
        server.send_control(there, b"%d" % i)
        event = expect(friend, T.CONTROL)[0]
        assert (event.link, event.message) == (link, b"%d" % i)
    friend.close_link(friends[0][0], "done")
    expect(server, T.CLOSED)
    with stranger_to(port):  # its place is free again
        expect(server, T.CONNECTED)
    expect(server, T.CLOSED)


def test_connections_that_come_and_go_while_nobody_looks_wait_in_the_kernel_beyond_a_bound(make: Make) -> None:
    """Each is two events. What is not accepted at first is when the program has taken the others."""
    bound, beyond = 4096, 40
    server = make()
    port = server.listen("127.0.0.1", 0)
    for _ in range(bound // 2):
        with stranger_to(port) as stranger:
            stranger.shutdown(socket.SHUT_WR)
            assert read_to_end(stranger) == b""  # accepted, noticed, closed
    waiting = [stranger_to(port) for _ in range(beyond)]
    looked_ns = time.monotonic_ns()
    seen = [next_event(server).type for _ in range(bound)]
    assert seen.count(T.CONNECTED) == seen.count(T.CLOSED) == bound // 2
    assert all(event.at_ns > looked_ns for event in expect(server, T.CONNECTED, count=beyond))
    for stranger in waiting:
        stranger.close()
    expect(server, T.CLOSED, count=beyond)


def test_a_stranger_may_send_no_more_than_a_small_message(make: Make) -> None:
    server = make()
    with stranger_to(server.listen("127.0.0.1", 0)) as stranger:
        expect(server, T.CONNECTED)
        stranger.sendall(frame(1, bytes(4097)))
        assert "a message of 4097 bytes where at most 4096 are allowed" in expect(server, T.CLOSED)[0].text


def test_a_peer_that_does_not_speak_the_protocol_is_dropped_at_its_fourth_byte(make: Make) -> None:
    server = make()
    with stranger_to(server.listen("127.0.0.1", 0)) as stranger:
        expect(server, T.CONNECTED)
        stranger.sendall(b"PBL")
        assert server.next_event(0.05) is None
        stranger.sendall(b"X")
        assert expect(server, T.CLOSED)[0].text == "the peer does not speak the ParaBlock protocol"
