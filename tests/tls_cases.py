"""Certificates, TLS transports and people in the middle, for the tests of TLS."""

from __future__ import annotations

import datetime
import functools
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from parablock_rt import _C
from parablock_rt.wire import certs
from parablock_rt.wire.tls import Tls

WAIT_S = 90.0
TOKEN = "correct-horse-battery-staple"

needs_tls = pytest.mark.skipif(not _C.TLS_LIBRARY, reason="this build lacks TLS: libssl-dev was missing")


@functools.cache
def deployment(name: str = "ours", hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> certs.Deployment:
    """A CA with a server's and two clients' certificates, made once for each name. Names are different CAs."""
    return certs.create(Path(tempfile.mkdtemp(prefix=f"parablock-{name}-")), hosts, clients=2)


def expired(issued: certs.Issued, ca: certs.Issued) -> certs.Issued:
    """The same certificate, but over since yesterday."""
    now = datetime.datetime.now(datetime.timezone.utc)
    old = issued.certificate
    builder = x509.CertificateBuilder(
        issuer_name=old.issuer,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=9),
        not_valid_after=now - datetime.timedelta(days=1),
        extensions=list(old.extensions),
    )
    file = issued.certificate_file.with_name(f"expired-{issued.certificate_file.name}")
    certificate = builder.sign(ca.key, hashes.SHA256())
    made = certs.Issued(certificate, issued.key, file, issued.key_file)
    file.write_bytes(certificate.public_bytes(certs.serialization.Encoding.PEM))
    return made


def server_tls(issued: certs.Issued | None = None, **options: object) -> Tls:
    issued = issued or deployment().server
    return Tls(issued.certificate_file, issued.key_file, **options)  # type: ignore[arg-type]


def client_tls(issued: certs.Issued | None = None, ca: str | Path | None = None, **options: object) -> Tls:
    """By default a client that trusts our CA and shows no certificate."""
    own = (issued.certificate_file, issued.key_file) if issued else (None, None)
    ca = ca or (None if "fingerprint" in options else deployment().ca.certificate_file)
    return Tls(*own, ca=ca, **options)  # type: ignore[arg-type]


def both_ends(lanes: int, encrypted: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a server and its clients are started with, for links of so many lanes, in TLS or not."""
    theirs: dict[str, Any] = {"lanes": lanes}
    ours: dict[str, Any] = {"lanes": lanes}
    if encrypted:
        theirs |= {"tls": server_tls(), "token": TOKEN}
        ours |= {"tls": client_tls(), "token": TOKEN}
    return theirs, ours


class Middle:
    """Stands between a client and a server, for one connection. `change` sees each piece of what the client sends and
    returns what goes on in its place; less than there was cuts the connection. `sent`: what the client sent."""

    def __init__(self, port: int, change: Callable[[bytes], bytes] = lambda data: data, piece: int = 65536) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = bytearray()
        self._server_port = port
        self._change = change
        self._piece = piece
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(("127.0.0.1", self._server_port)) as far:
            for side in (near, far):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._pump, args=(far, near, lambda data: data), daemon=True)
            back.start()
            self._pump(near, far, self._note_and_change)
            back.join(WAIT_S)

    def _note_and_change(self, data: bytes) -> bytes:
        self.sent += data
        return self._change(data)

    def _pump(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        try:
            while data := source.recv(65536):
                changed = change(data)
                for at in range(0, len(changed), self._piece):
                    target.sendall(changed[at : at + self._piece])
                if len(changed) < len(data):
                    break
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # either side may be gone at the end

    def close(self) -> None:
        self._thread.join(WAIT_S)
        self._listener.close()
