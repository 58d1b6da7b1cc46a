"""A run over TLS: the bits of one without, proofs that hold in one connection alone, and no secret left anywhere."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from federations import Case
from processes import WAIT_S, make_model, start_server
from tls_cases import TOKEN, Middle, client_tls, deployment, needs_tls, server_tls

import parablock_rt as pb
from parablock_rt.errors import ConfigError, HandshakeError, PeerLostError
from parablock_rt.wire import certs, handshake

pytestmark = needs_tls


def join(address: str, **options: object) -> None:
    pb.join(address, make_model(), torch.optim.SGD, **options).close()  # type: ignore[arg-type]


def test_a_run_over_tls_has_the_bits_of_one_in_the_clear() -> None:
    case = Case(settings={"staleness": 1, "format": "int8"})
    plain = case.run()
    theirs = {"tls": server_tls(ca=deployment().ca.certificate_file), "token": TOKEN}
    ours = {"tls": client_tls(deployment().clients[0]), "token": TOKEN}
    encrypted = case.run(links=[ours] * case.clients, server_link=theirs)
    assert encrypted.outcome.digest == plain.outcome.digest
    assert encrypted.fingerprints == plain.fingerprints
    assert {client.digest for client in encrypted.clients} == {plain.outcome.digest}


# ---- Who gets a seat


def test_the_token_is_asked_for_in_tls_too() -> None:
    with start_server(token=TOKEN, tls=server_tls()) as running:
        with pytest.raises(HandshakeError, match=r"wrong token: .* or its proof was made for another TLS connection"):
            join(running.address, token=TOKEN + "x", tls=client_tls())
        with pytest.raises(HandshakeError, match="asks for a token"):
            join(running.address, tls=client_tls())


def test_a_certificate_stands_in_for_the_token_where_it_is_optional() -> None:
    tls = server_tls(ca=deployment().ca.certificate_file, clients="optional")
    with start_server(token=TOKEN, tls=tls) as running:
        address = running.address
        for refused in ({}, {"token": TOKEN + "x"}):
            with pytest.raises(HandshakeError, match="token"):
                join(address, tls=client_tls(), **refused)
        probes = [{"tls": client_tls(deployment().clients[0])}, {"tls": client_tls(), "token": TOKEN}]
        probes.append({"tls": client_tls(deployment().clients[0]), "token": TOKEN})
        for accepted in probes:
            from parablock_rt.link_check import check_link

            assert check_link(address, **accepted).tls is not None  # type: ignore[arg-type]


def test_a_client_in_tls_and_one_in_the_clear_are_told_what_does_not_fit() -> None:
    with start_server(token=TOKEN) as running, pytest.raises(HandshakeError) as failure:
        join(running.address, token=TOKEN, tls=client_tls())
    assert f"cannot talk to the server at {running.address}: expected TLS, found something else" in str(failure.value)
    with start_server(token=TOKEN, tls=server_tls()) as running, pytest.raises(HandshakeError) as failure:
        join(running.address, token=TOKEN)
    assert "expected a ParaBlock peer without TLS, found one that uses TLS" in str(failure.value)


def test_a_server_that_is_not_trusted_never_sees_a_proof(caplog: pytest.LogCaptureFixture) -> None:
    with start_server(token=TOKEN, tls=server_tls(deployment("theirs").server)) as running:
        with pytest.raises(
            HandshakeError, match=r"cannot talk to the server at .*: the certificate .* was not signed by"
        ):
            join(running.address, token=TOKEN, tls=client_tls())
        deadline = time.monotonic() + WAIT_S
        while "the peer refused this side's certificate" not in caplog.text:
            assert time.monotonic() < deadline
    assert "ended before it had a seat" in caplog.text


def test_tls_and_proof_of_identity_are_needed_beyond_loopback() -> None:
    with pytest.raises(ConfigError, match="anyone who reaches it could join the run"):
        start_server(address="0.0.0.0:0", tls=server_tls())
    asking = server_tls(ca=deployment().ca.certificate_file)
    for options in ({"tls": server_tls(), "token": TOKEN}, {"tls": asking}):
        with start_server(address="0.0.0.0:0", **options) as running:
            assert running.running
    for incomplete in ({}, {"token": TOKEN}):
        with pytest.raises(ConfigError, match=r"optional client certificates take a CA .* and a token"):
            start_server(tls=server_tls(clients="optional"), **incomplete)


# ---- Somebody in the middle


class Impostor:
    """Has a certificate that the client believes, a TLS connection to each side, and passes on what it reads."""

    def __init__(self, server: str) -> None:
        host, port = server.split(":")
        ours = deployment()
        towards_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        towards_client.load_cert_chain(ours.server.certificate_file, ours.server.key_file)
        towards_server = ssl.create_default_context(cafile=str(ours.ca.certificate_file))
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.read = bytearray()

        def relay() -> None:
            with listener, listener.accept()[0] as near:
                client = towards_client.wrap_socket(near, server_side=True)
                far = socket.create_connection((host, int(port)))
                with towards_server.wrap_socket(far, server_hostname="localhost") as to_server:
                    self._pass_on(client, to_server)

        self._thread = threading.Thread(target=relay, daemon=True)
        self._thread.start()

    def _pass_on(self, client: ssl.SSLSocket, server: ssl.SSLSocket) -> None:
        def pump(source: ssl.SSLSocket, target: ssl.SSLSocket) -> None:
            try:
                while data := source.recv(65536):
                    self.read += data
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        back = threading.Thread(target=pump, args=(server, client), daemon=True)
        back.start()
        pump(client, server)
        back.join(WAIT_S)

    def close(self) -> None:
        self._thread.join(WAIT_S)


def test_a_proof_that_somebody_in_the_middle_passes_on_is_worth_nothing() -> None:
    with start_server(token=TOKEN, tls=server_tls(), clients=1) as running:
        middle = Impostor(running.address)
        with pytest.raises(HandshakeError, match=r"wrong token: .* or its proof was made for another TLS connection"):
            join(middle.address, token=TOKEN, tls=client_tls())
        middle.close()
        assert b"Proof" in middle.read  # it came as far as that
        assert b"Welcome" not in middle.read


def test_who_only_passes_bytes_on_sees_nothing_and_stops_nothing() -> None:
    with start_server(token=TOKEN, tls=server_tls(), clients=1, rounds=1) as running:
        middle = Middle(int(running.address.split(":")[1]))
        join(f"127.0.0.1:{middle.port}", token=TOKEN, tls=client_tls())
        middle.close()
    assert b"Hello" not in middle.sent
    assert len(middle.sent) > 400


def test_a_server_that_vanishes_in_a_run_is_reported_as_lost_and_not_as_refusing() -> None:
    with start_server(token=TOKEN, tls=server_tls(), clients=2) as running:
        host, port = running.address.split(":")
        middle = Middle(int(port), cut_when(lambda seen: seen > 900))
        with pytest.raises(PeerLostError, match=r"cut|closed"):
            join(f"{host}:{middle.port}", token=TOKEN, tls=client_tls(), patience=WAIT_S, reconnect=0.0)
        middle.close()


def cut_when(enough: Callable[[int], bool]) -> Callable[[bytes], bytes]:
    seen = 0

    def change(data: bytes) -> bytes:
        nonlocal seen
        seen += len(data)
        return data[:-1] if enough(seen) else data

    return change


def test_the_demonstration_in_tls_keeps_no_key(tmp_path: Path) -> None:
    options = ["--model", "tiny", "--rounds", "2", "--eval-examples", "0", "--rate", "none", "--delay", "0ms"]
    command = [sys.executable, "-m", "parablock_rt", "demo", *options, "--tls", "--run-dir", "run", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3 * WAIT_S, check=True)
    assert "in TLS" in result.stderr
    summary = json.loads(result.stdout)
    assert set(summary["parallel"]["digest"]["clients"]) == {summary["parallel"]["digest"]["server"]}
    left = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"PRIVATE KEY" not in left


# ---- What is left behind


def test_no_secret_is_in_outputs_process_lists_or_run_folders(tmp_path: Path) -> None:
    """A server and a client as users start them, with every kind of secret there is."""
    ours = certs.create(tmp_path / "tls", ["127.0.0.1"], clients=1)
    token = handshake.nonce().hex()
    (tmp_path / "token").write_text(token)
    common = ["--model", "tiny", "--token-file", "token", "--threads", "1"]
    serve = ["--address", "127.0.0.1:0", "--clients", "1", "--rounds", "2", "--eval-examples", "0"]
    serve += ["--tls-cert", "tls/server.pem", "--tls-key", "tls/server.key", "--tls-client-ca", "tls/ca.pem"]
    take_part = ["--tls-ca", "tls/ca.pem", "--tls-cert", "tls/client-1.pem", "--tls-key", "tls/client-1.key"]
    processes = []
    command_lines = ""
    try:
        address = ""
        for name, arguments in (("serve", serve), ("join", take_part)):
            arguments = [name, *([address] if address else []), *arguments]
            command = [sys.executable, "-m", "parablock_rt", *arguments, *common, "--run-dir", f"{name}-run"]
            with (tmp_path / f"{name}.out").open("w") as output:
                processes.append(
                    psutil.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)  # type: ignore[no-untyped-call]
                )
            deadline = time.monotonic() + 2 * WAIT_S
            while not (words := processes[-1].cmdline()):  # it has none for a moment while its program is loaded
                assert time.monotonic() < deadline
            command_lines += " ".join(words)
            while not (said := re.search(r"Listening on (\S+) ", (tmp_path / "serve.out").read_text())):
                assert time.monotonic() < deadline
                assert processes[0].poll() is None, (tmp_path / "serve.out").read_text()
                time.sleep(0.05)
            address = said[1]
        for process, name in zip(processes, ("serve", "join"), strict=True):
            assert process.wait(2 * WAIT_S) == 0, (tmp_path / f"{name}.out").read_text()
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "tls" not in path.parts and path.name != "token"]
    assert {"serve.out", "join.out", "summary.json", "metrics.jsonl", "trace.json"} <= {path.name for path in left}
    content = command_lines.encode() + b"".join(path.read_bytes() for path in left)
    assert b"--token-file" in content
    keys = [issued.key_file.read_text() for issued in (ours.ca, ours.server, *ours.clients)]
    secrets = [token, *(line for key in keys for line in re.findall(r"^[A-Za-z0-9+/=]{20,}$", key, re.MULTILINE))]
    assert len(secrets) > 8
    for secret in secrets:
        assert secret.encode() not in content
        assert secret[:20].encode() not in content
