"""Proof of identity: both sides show that they know the pre-shared token, and neither ever sends it.

Each proof is an HMAC-SHA256 over the role, the run and both nonces, so it is worth nothing in another conversation or
in the other direction. No I/O here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from parablock_rt.errors import ConfigError

NONCE_BYTES = 32
TOKEN_VARIABLE = "PARABLOCK_TOKEN"


def nonce() -> bytes:
    """Fresh random bytes for one conversation."""
    return os.urandom(NONCE_BYTES)


def proof(token: str | None, role: str, run: int, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """What `role` ("client" or "server") sends to prove that it knows `token`; empty without a token."""
    if token is None:
        return b""
    parts = (b"parablock-rt", role.encode(), run.to_bytes(8, "little"), client_nonce, server_nonce)
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.new(token.encode(), message, hashlib.sha256).digest()


def is_proof(mac: bytes, token: str | None, role: str, run: int, client_nonce: bytes, server_nonce: bytes) -> bool:
    """Whether `mac` is that proof, compared in constant time."""
    return hmac.compare_digest(mac, proof(token, role, run, client_nonce, server_nonce))


def read_token(file: Path | None) -> str | None:
    """The token from `file`, else from the environment variable PARABLOCK_TOKEN, else None.

    Never taken from a command line, where every user of the machine could read it. Raises ConfigError.
    """
    if file is None:
        text = os.environ.get(TOKEN_VARIABLE, "").strip() or None
        source = f"the environment variable {TOKEN_VARIABLE}"
    else:
        try:
            text = file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read the token file {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"the token file {file} must be UTF-8 text, such as `openssl rand -hex 32` makes"
            ) from error
        source = f"the token file {file}"
    if text is not None and len(text) < 16:
        raise ConfigError(f"{source} must hold at least 16 characters, so that the token cannot be guessed")
    return text
