"""The control messages between server and client: typed, MessagePack, sizes checked before anything is decoded.

They travel in control frames; payload bytes never do. The conversation:

    Hello → Challenge → Proof → Welcome → Ready → [Snapshot + data]* → Begin
    then, for each round:  Upload + data → Verdict      Update + data → Applied
    and at the end:        Goodbye → (the client closes)      Failure ends it at any time

Nothing here touches a socket, and nothing is ever pickled.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias, TypeVar

import msgspec

from parablock_rt import _C
from parablock_rt.blocks import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError

VERSION: int = _C.PROTOCOL_VERSION
CONTROL_BYTES_BEFORE_PROOF = 4096
CONTROL_BYTES = 16 * 2**20


class Kind(IntEnum):
    """What a transfer carries. With round and block it names the transfer on its link."""

    UPLOAD = 1  # client to server: one client's packed change of a block
    UPDATE = 2  # server to client: the packed change of the reference
    SNAPSHOT = 3  # server to client: a block's reference, raw (round: the version)


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Hello(_Message, frozen=True, kw_only=True, tag=True):
    """Opens the conversation. `nonce` makes the server's proof fresh."""

    version: int
    release: str
    nonce: bytes


class Challenge(_Message, frozen=True, kw_only=True, tag=True):
    """The server's part of the challenge; `run` must stand in every later frame."""

    run: int
    nonce: bytes
    token_required: bool


class Proof(_Message, frozen=True, kw_only=True, tag=True):
    """HMAC that proves the token without sending it; empty where none is required."""

    mac: bytes


class Welcome(_Message, frozen=True, kw_only=True, tag=True):
    """The seat, the run's settings and the partition. `mac` proves that the server knows the token too."""

    client: int
    config: RunConfig
    plan: PlanSpec
    mac: bytes


class Ready(_Message, frozen=True, kw_only=True, tag=True):
    """What the client holds: its plan, the fingerprint of what is frozen and of each block."""

    plan_digest: str
    frozen: str
    fingerprints: list[int]


class Snapshot(_Message, frozen=True, kw_only=True, tag=True):
    """Announces a raw block: the reference after `version` closed rounds."""

    block: int
    version: int
    fingerprint: int


class Begin(_Message, frozen=True, kw_only=True, tag=True):
    """The client's first round, and the first round whose update it will be sent."""

    first_round: int
    updates_from: int


class Upload(_Message, frozen=True, kw_only=True, tag=True):
    """A hand-over: the weight of the contribution (tokens or examples) and how the round went on the client."""

    round: int
    block: int
    weight: float
    loss: float
    compute_s: float
    exposed_s: float


class Verdict(_Message, frozen=True, kw_only=True, tag=True):
    """Whether an upload was folded into its round. If not, `reason` says why and the client keeps its old residual."""

    round: int
    block: int
    accepted: bool
    reason: str


class Update(_Message, frozen=True, kw_only=True, tag=True):
    """Announces a round's aggregate. `fingerprint`: the reference's bits once it is applied."""

    round: int
    block: int
    fingerprint: int
    contributions: int
    bad_groups: int


class Applied(_Message, frozen=True, kw_only=True, tag=True):
    """The client applied a round's update and got these bits."""

    round: int
    fingerprint: int


class Goodbye(_Message, frozen=True, kw_only=True, tag=True):
    """The last message of a client: its final digest, or why it leaves early."""

    digest: str
    reason: str
    compute_s: float
    exposed_s: float


class Failure(_Message, frozen=True, kw_only=True, tag=True):
    """The conversation cannot go on. `error` is the name of a class in `parablock_rt.errors`."""

    error: str
    reason: str


M = TypeVar("M", bound=_Message)

Message: TypeAlias = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Ready
    | Snapshot
    | Begin
    | Upload
    | Verdict
    | Update
    | Applied
    | Goodbye
    | Failure
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message in `data`. Raises HandshakeError when it is none that this version knows."""
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HandshakeError(
            f"the peer sent a control message that this version does not understand ({error}); "
            "install the same release of parablock-rt on both sides"
        ) from error
    return message
