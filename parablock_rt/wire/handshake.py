"""Proof of identity: both sides prove that they know the pre-shared token without ever sending it. In the same way, a
client that comes back to its seat proves that it knows the secret that it got with the seat.

Each proof is an HMAC-SHA256 over the role, the run, both nonces and the TLS connection in which it is sent. So a proof
is useless in another conversation, in the other direction, and to a man in the middle with a TLS connection to each
side. This module does no I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from parablock_rt.errors import ConfigError

NONCE_BYTES = 32
SECRET_BYTES = 32
TOKEN_VARIABLE = "PARABLOCK_TOKEN"
LEAST_TOKEN_CHARS = 16


def nonce() -> bytes:
    """Fresh random bytes for one conversation."""
    return os.urandom(NONCE_BYTES)


def secret() -> bytes:
    """A random secret for a new seat."""
    return os.urandom(SECRET_BYTES)


@dataclass(frozen=True)
class Conversation:
    """The values that both sides of a conversation share and that make it unique.

    `binding`: the channel binding of their TLS connection (RFC 9266), empty without TLS.
    """

    run: int
    client_nonce: bytes
    server_nonce: bytes
    binding: bytes = field(default=b"", repr=False)


def proof(token: str | None, role: str, conversation: Conversation) -> bytes:
    """What `role` ("server", or a client's purpose) sends to prove that it knows `token`; empty without a token."""
    return b"" if token is None else _mac(token.encode(), role, conversation)


def seat_proof(secret: bytes, seat: int, role: str, conversation: Conversation) -> bytes:
    """What `role` ("server" or "client") sends to prove that it knows the secret of a seat."""
    return _mac(secret, f"{role} of seat {seat}", conversation)


def _mac(key: bytes, role: str, conversation: Conversation) -> bytes:
    run = conversation.run.to_bytes(8, "little")
    nonces = conversation.client_nonce, conversation.server_nonce
    parts = (b"parablock-rt", role.encode(), run, *nonces, conversation.binding)
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.new(key, message, hashlib.sha256).digest()


def is_proof(mac: bytes, token: str | None, role: str, conversation: Conversation) -> bool:
    """Whether `mac` equals `proof(...)` for the same arguments, compared in constant time."""
    return hmac.compare_digest(mac, proof(token, role, conversation))


def is_seat_proof(mac: bytes, secret: bytes, seat: int, role: str, conversation: Conversation) -> bool:
    """Whether `mac` equals `seat_proof(...)` for the same arguments, compared in constant time."""
    return hmac.compare_digest(mac, seat_proof(secret, seat, role, conversation))


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
    return check_token(text, source)


def check_token(token: str | None, source: str = "the token") -> str | None:
    """The same token. Raises ConfigError, which does not show it, if it is no text or could be guessed."""
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"expected {source} to be text, such as token.hex(), found {type(token).__name__}")
    if token is not None and len(token) < LEAST_TOKEN_CHARS:
        raise ConfigError(
            f"{source} must hold at least {LEAST_TOKEN_CHARS} characters, so that the token cannot be guessed"
        )
    return token
