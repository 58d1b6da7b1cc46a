"""TLS settings of one side: its identity, and how it recognises the right peer. The native module does the rest.

The only secret is the content of the key file, which only native code reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parablock_rt import _C
from parablock_rt.errors import ConfigError

SYSTEM = "system"

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tls:
    """TLS 1.3 for a server or a client. All files are PEM.

    A server needs `certificate` and `key`; with `ca` it asks its clients for certificates signed by that CA. A client
    needs `ca` or `fingerprint` to recognise its server; if both are given, both must match. With a CA, the server's
    certificate must also be valid for the host to which the client connects. A client needs `certificate` and `key`
    only if the server asks for a client certificate.

    Args:
        certificate: this side's certificate, followed by intermediate certificates.
        key: the certificate's private key, without a passphrase.
        ca: the CA certificates that must have signed the peer's; "system" means the CAs that this machine trusts.
        fingerprint: the SHA-256 of the peer's certificate in hex, with or without colons.
        clients: on a server with `ca`: "required", or "optional", which also admits clients that know the token.
    """

    certificate: Path | str | None = None
    key: Path | str | None = None
    ca: Path | str | None = None
    fingerprint: str | None = None
    clients: Literal["required", "optional"] = "required"

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a TLS certificate and its key go together: give both --tls-cert and --tls-key")
        if self.clients not in ("required", "optional"):
            raise ConfigError(f"client certificates are required or optional; found {self.clients!r}")
        if self.fingerprint is not None and not _FINGERPRINT.fullmatch(_bare(self.fingerprint)):
            raise ConfigError(
                "a fingerprint is the SHA-256 of a certificate, 64 hexadecimal digits; found "
                f"{self.fingerprint!r}. `parablock certs` prints it, and so does `openssl x509 -noout -fingerprint "
                "-sha256 -in FILE`"
            )

    @property
    def asks_for_certificates(self) -> bool:
        """Whether a server with these settings asks its clients for certificates."""
        return self.ca is not None or self.fingerprint is not None

    def for_server(self) -> _C.TlsContext:
        """The native settings of a server. Raises ConfigError."""
        if self.certificate is None:
            raise ConfigError("a server with TLS needs a certificate and its key: --tls-cert and --tls-key")
        return self._native()

    def for_client(self) -> _C.TlsContext:
        """The native settings of a client. Raises ConfigError."""
        if self.ca is None and self.fingerprint is None:
            raise ConfigError(
                "a client with TLS must know its server: give the CA file with --tls-ca, the certificate's fingerprint "
                f"with --tls-fingerprint, or --tls-ca {SYSTEM} for a certificate that this machine trusts anyway"
            )
        return self._native()

    def _native(self) -> _C.TlsContext:
        try:
            return _C.TlsContext(
                certificate=str(self.certificate or ""),
                key=str(self.key or ""),
                ca=str(self.ca or ""),
                fingerprint=bytes.fromhex(_bare(self.fingerprint or "")),
                peer_may_be_anonymous=self.clients == "optional",
            )
        except _C.TlsError as error:
            raise ConfigError(str(error)) from error


def _bare(fingerprint: str) -> str:
    return fingerprint.strip().replace(":", "").lower()
