"""Certificates for a first deployment: a private CA, one certificate for the server, and one for each client.

Does nothing but write files. A site that already has a CA does not need this module.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parablock_rt.errors import ConfigError

_CA_DAYS = 3650
_BACKDATED = datetime.timedelta(hours=1)  # clocks differ
MAX_CLIENTS = 1000


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, and the files for both. `fingerprint`: SHA-256 in hex."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    certificate_file: Path
    key_file: Path

    @property
    def fingerprint(self) -> str:
        """The certificate's SHA-256 in hex, as `--tls-fingerprint` takes it."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True)
class Deployment:
    """All certificates that `create` wrote."""

    ca: Issued
    server: Issued
    clients: Sequence[Issued]


def create(folder: Path, hosts: Sequence[str], *, clients: int = 0, days: int = 365, force: bool = False) -> Deployment:
    """Writes ca.pem, server.pem and client-N.pem with their .key files (mode 0600) into `folder`.

    Args:
        hosts: the names and IP addresses by which clients reach the server.
        clients: how many client certificates to make.
        days: how long the certificates of server and clients are valid; the CA's is valid for ten years.
        force: replace existing files.

    Raises ConfigError for an invalid host, and when a file exists and `force` is not set; then nothing is written. Also
    for a folder or file that cannot be written.
    """
    if not hosts or isinstance(hosts, str):
        raise ConfigError(f"expected a list of at least one host by which clients reach the server, found {hosts!r}")
    if not 1 <= days <= _CA_DAYS:
        raise ConfigError(f"days must be from 1 to {_CA_DAYS}; found {days}")
    if not 0 <= clients <= MAX_CLIENTS:
        raise ConfigError(f"clients must be from 0 to {MAX_CLIENTS}; found {clients}")
    names = [_general_name(host) for host in hosts]
    stems = ["ca", "server", *(f"client-{i}" for i in range(1, clients + 1))]
    files = [folder / f"{stem}.{kind}" for stem in stems for kind in ("pem", "key")]
    if existing := [file.name for file in files if file.exists() and not force]:
        raise ConfigError(
            f"{folder} already has {', '.join(existing)}; say --force to replace them, which shuts out whoever has "
            "a certificate made before"
        )
    ca = _issue(folder, "ca", None, [], _CA_DAYS)
    server = _issue(folder, "server", ca, names, days)
    deployment = Deployment(ca, server, [_issue(folder, stem, ca, [], days) for stem in stems[2:]])
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
    for issued in (ca, server, *deployment.clients):
        _write(issued)
    return deployment


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    bare = host.removeprefix("*.")
    if not host.isascii() or not all(part and part.replace("-", "").isalnum() for part in bare.split(".")):
        raise ConfigError(
            f"a host is a name such as server.example.org or an IP address, without a port; found {host!r}"
        )
    return x509.DNSName(host)


def _issue(folder: Path, stem: str, ca: Issued | None, names: Sequence[x509.GeneralName], days: int) -> Issued:
    """A new key and its certificate, signed by the CA, or self-signed if `ca` is None."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = key if ca is None else ca.key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"parablock {stem}")])
    now = datetime.datetime.now(datetime.timezone.utc)
    is_ca = ca is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if ca is None else ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(_key_usage(is_ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if not is_ca:
        role = ExtendedKeyUsageOID.SERVER_AUTH if stem == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([role]), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Issued(builder.sign(signer, hashes.SHA256()), key, folder / f"{stem}.pem", folder / f"{stem}.key")


def _key_usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(issued: Issued) -> None:
    private = issued.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = issued.certificate.public_bytes(serialization.Encoding.PEM)
    for file, content, mode in ((issued.key_file, private, 0o600), (issued.certificate_file, public, 0o644)):
        try:
            file.unlink(missing_ok=True)  # a new file: the old one may still be open or hard-linked elsewhere
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as output:
                output.write(content)
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def as_dict(deployment: Deployment) -> dict[str, Any]:
    """The deployment as JSON-compatible data, for programs."""

    def one(issued: Issued) -> dict[str, str]:
        return {
            "certificate": str(issued.certificate_file),
            "key": str(issued.key_file),
            "fingerprint": issued.fingerprint,
        }

    return {
        "ca": one(deployment.ca),
        "server": one(deployment.server),
        "clients": [one(issued) for issued in deployment.clients],
    }


def render(deployment: Deployment) -> str:
    """The deployment and how to use it, as text for people."""
    ca, server = deployment.ca, deployment.server
    lines = [
        f"The server keeps {server.certificate_file.name} and {server.key_file.name}:",
        f"  parablock serve --tls-cert {server.certificate_file} --tls-key {server.key_file} ...",
        f"Each client gets {ca.certificate_file.name}, which is no secret:",
        f"  parablock join HOST:PORT --tls-ca {ca.certificate_file} ...",
        f"  or no file at all: --tls-fingerprint {server.fingerprint}",
    ]
    if deployment.clients:
        first = deployment.clients[0]
        lines += [
            f"With --tls-client-ca {ca.certificate_file} the server lets in only who has a client's certificate.",
            "Each client gets the two files of its own, by a safe way:",
            f"  --tls-cert {first.certificate_file} --tls-key {first.key_file}",
        ]
    lines.append(f"{ca.key_file.name} signs all of them: keep it off the machines of the run, or delete it.")
    return "\n".join(lines)
