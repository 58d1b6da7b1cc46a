"""Who may take part: the token, its proof, what of it anybody can see, and where a server may listen without one."""

from __future__ import annotations

import base64
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import WAIT_S, Process, client, make_batches, make_model, sgd, start_server, starter

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.errors import ConfigError, HandshakeError
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.handshake import Conversation
from parablock_rt.wire.transport import Transport

Start = Callable[..., Process]

TOKEN = "correct-horse-battery-staple"
NONCES = bytes(32), bytes(range(32))
HERE = Conversation(7, *NONCES)


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


def join(address: str, token: str | None) -> None:
    pb.join(address, make_model(), torch.optim.SGD, token=token).close()


# ---- The proof


def test_a_proof_is_worth_nothing_in_another_conversation_role_or_run() -> None:
    mac = handshake.proof(TOKEN, "client", HERE)
    assert len(mac) == 32
    assert handshake.is_proof(mac, TOKEN, "client", HERE)
    assert not handshake.is_proof(mac, TOKEN + "x", "client", HERE)
    assert not handshake.is_proof(mac, TOKEN, "server", HERE)
    assert not handshake.is_proof(mac, TOKEN, "client", replace(HERE, run=8))
    assert not handshake.is_proof(mac, TOKEN, "client", Conversation(7, *reversed(NONCES)))
    assert not handshake.is_proof(mac, TOKEN, "client", Conversation(7, NONCES[0], NONCES[0]))
    assert not handshake.is_proof(mac, TOKEN, "client", replace(HERE, binding=bytes(32)))
    assert not handshake.is_proof(b"", TOKEN, "client", HERE)


@given(st.binary(min_size=1, max_size=40))
def test_without_a_token_only_the_empty_proof_holds(mac: bytes) -> None:
    assert handshake.is_proof(b"", None, "client", HERE)
    assert not handshake.is_proof(mac, None, "client", HERE)


def test_nonces_are_fresh() -> None:
    assert len({handshake.nonce() for _ in range(100)}) == 100


# ---- Where the token comes from


def test_the_token_comes_from_the_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(handshake.TOKEN_VARIABLE, raising=False)
    assert handshake.read_token(None) is None
    monkeypatch.setenv(handshake.TOKEN_VARIABLE, "e" * 16)
    assert handshake.read_token(None) == "e" * 16
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert handshake.read_token(file) == TOKEN


def test_a_token_that_is_missing_or_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match=f"cannot read the token file {file}: No such file"):
        handshake.read_token(file)
    file.write_text("fifteen chars..\n")
    with pytest.raises(ConfigError, match=f"the token file {file} must hold at least 16 characters"):
        handshake.read_token(file)
    monkeypatch.setenv(handshake.TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match=f"the environment variable {handshake.TOKEN_VARIABLE} must hold at least 16"):
        handshake.read_token(None)


# ---- Both sides must know it


def test_only_who_knows_the_token_gets_a_seat(start: Start) -> None:
    with start_server(clients=1, token=TOKEN) as running:
        with pytest.raises(
            HandshakeError, match=r"wrong token: this client does not know .* --token-file or PARABLOCK"
        ):
            join(running.address, TOKEN + "x")
        with pytest.raises(HandshakeError, match=rf"the server at {running.address} asks for a token: .*--token-file"):
            join(running.address, None)
        digest = start(client, running.address, token=TOKEN).expect("done")["digest"]
        assert running.wait(WAIT_S).digest == digest


def test_a_client_with_a_token_does_not_talk_to_a_server_without() -> None:
    with (
        start_server(clients=1) as running,
        pytest.raises(HandshakeError, match=f"a token is set here, but the server at {running.address} asks for none"),
    ):
        join(running.address, TOKEN)


@pytest.mark.parametrize("proof", [b"", bytes(32), "the client's own"], ids=["none", "a guess", "echoed"])
def test_a_server_that_does_not_know_the_token_is_refused(proof: bytes | str) -> None:
    """It asks for the token and takes any proof for a good one; what it cannot do is prove that it knows it."""
    with Transport() as transport:
        address = transport.listen("127.0.0.1:0", protected=True)
        messages: queue.Queue[tuple[int, protocol.Message]] = queue.Queue()
        failed: list[HandshakeError] = []

        def join_it() -> None:
            try:
                join(address, TOKEN)
            except HandshakeError as error:
                failed.append(error)

        victim = threading.Thread(target=join_it, daemon=True)
        victim.start()

        def hear() -> tuple[int, protocol.Message]:
            while messages.empty():
                event = transport.next_event(WAIT_S)
                assert event is not None
                if event.type == _C.Event.Type.CONTROL:
                    messages.put((event.link, protocol.decode(event.message)))
            return messages.get()

        link, hello = hear()
        assert isinstance(hello, protocol.Hello)
        transport.send_message(link, protocol.Challenge(run=1, nonce=bytes(32), token_required=True))
        link, answer = hear()
        assert isinstance(answer, protocol.Proof)
        mac = answer.mac if isinstance(proof, str) else proof
        settings = pb.RunConfig(rounds=1, clients=1)
        welcome = {"client": 0, "config": settings, "plan": PlanSpec(blocks=()), "secret": b"", "epoch": 0}
        transport.send_message(link, protocol.Welcome(mac=mac, **welcome))
        victim.join(WAIT_S)
    assert [str(error) for error in failed] == [
        f"the server at {address} does not know the token: it is not the intended one"
    ]


# ---- What anybody on the way can see


class Relay:
    """Passes one connection on and keeps what went through. `sent`: by the client, `received`: by it."""

    def __init__(self, target: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = bytearray()
        self.received = bytearray()
        host, port = target.split(":")
        self._target = host, int(port)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        back = threading.Thread(target=self._pump, args=(far, near, self.received), daemon=True)
        back.start()
        self._pump(near, far, self.sent)
        back.join(WAIT_S)
        near.close()
        far.close()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
        try:
            while data := source.recv(65536):
                seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # either side may be gone at the end

    def close(self) -> None:
        self._thread.join(WAIT_S)
        self._listener.close()


def test_the_token_never_crosses_the_wire() -> None:
    with start_server(clients=1, rounds=3, token=TOKEN) as running:
        relay = Relay(running.address)
        with pb.join(relay.address, make_model(), sgd, token=TOKEN) as run:
            for batch in run.stream(make_batches(0)):
                run.train_step(batch, lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
        assert run.digest == running.wait(WAIT_S).digest
        relay.close()
    seen = bytes(relay.sent) + bytes(relay.received)
    assert len(relay.sent) > 3 * 4096  # all of the conversation, uploads too
    assert b"Hello" in seen
    assert b"Welcome" in seen
    secret = TOKEN.encode()
    for form in (secret, secret.hex().encode(), base64.b64encode(secret)[:-4], secret[::-1], secret[:12]):
        assert form not in seen


def test_a_replayed_proof_is_refused_because_the_servers_nonce_is_new() -> None:
    """The thief repeats a good Hello and a good Proof in the right order, to the very server that took them before."""
    with start_server(clients=2, token=TOKEN) as running:
        nonce = handshake.nonce()
        macs: list[bytes] = []
        for attempt in range(2):
            with Transport() as transport:
                link = transport.connect(running.address, tries=1)

                def hear(transport: Transport = transport) -> protocol.Message:
                    while True:
                        event = transport.next_event(WAIT_S)
                        assert event is not None
                        if event.type == _C.Event.Type.CONTROL:
                            return protocol.decode(event.message)

                transport.send_message(link, protocol.Hello(version=protocol.VERSION, release="0", nonce=nonce))
                challenge = hear()
                assert isinstance(challenge, protocol.Challenge)
                conversation = Conversation(challenge.run, nonce, challenge.nonce)
                macs.append(handshake.proof(TOKEN, "join", conversation))
                transport.native.trust(link, challenge.run, protocol.CONTROL_BYTES)
                transport.send_message(link, protocol.Proof(mac=macs[0]))
                answer = hear()
            if attempt == 0:
                assert isinstance(answer, protocol.Welcome)
            else:
                assert isinstance(answer, protocol.Failure)
                assert answer.reason.startswith("wrong token")


# ---- Listening beyond loopback


def test_listening_to_everybody_takes_protection_or_the_users_word() -> None:
    for address in ("0.0.0.0:0", "[::]:0", ":0"):
        with pytest.raises(ConfigError) as failure:
            start_server(address=address)
        assert f"refusing to listen on {address} without protection" in str(failure.value)
        for part in ("--token-file", "--tls-client-ca", "--tls-cert and --tls-key", "127.0.0.1", "--insecure"):
            assert part in str(failure.value)  # all that is missing, at once
        with pytest.raises(ConfigError, match="without TLS: the token keeps strangers out, but") as failure:
            start_server(address=address, token=TOKEN)
        assert "--tls-cert and --tls-key" in str(failure.value)
    with start_server(address="0.0.0.0:0", insecure=True) as running:
        assert running.address.startswith("0.0.0.0:")
        assert running.running
    with start_server(address="localhost:0") as running:
        assert running.running
