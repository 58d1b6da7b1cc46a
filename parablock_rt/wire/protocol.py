"""The control messages between server and client: typed, MessagePack, sizes checked before anything is decoded.

They travel in control frames; payload bytes never do. The conversation:

    Hello → Challenge → Proof → Welcome → Ready → [Snapshot + data]* → Begin
    then, for each round:  Upload + data → Verdict      Update + data → Applied
    after Welcome, if the server allows it: Lanes → (the client opens further connections)
    and at the end:        Goodbye → Farewell → (the client closes)      Failure ends it at any time
    to measure the link:   Hello ("probe") → Challenge → Proof → ProbeWelcome → [Measure → Measured [+ data]]*
    to watch the run:      Hello ("observe") → Challenge → Proof → Status → [Observe → Status]*

A client whose connection broke comes back on a new one; what the seat holds and what was under way outlives the old:

    Hello ("rejoin") → Challenge → Proof → WelcomeBack → Rejoin → [Verdict]* → RejoinAnswer → [Update + data]* …

Nothing here touches a socket, and nothing is ever pickled.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from parablock_rt import _C
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError
from parablock_rt.stages import NO_TIME, StageSeconds

VERSION: int = _C.PROTOCOL_VERSION
CONTROL_BYTES_BEFORE_PROOF = 4096
CONTROL_BYTES = 16 * 2**20
DIGEST_CHARS = 64
REASON_CHARS = 500  # of why a client leaves: the server keeps it, and shows it to others
PROBE_CHUNK = 2**16  # bytes, of what a measurement moves


class Kind(IntEnum):
    """What a transfer carries. With round and block it names the transfer on its link."""

    UPLOAD = 1  # client to server: one client's packed change of a block
    UPDATE = 2  # server to client: the packed change of the reference
    SNAPSHOT = 3  # server to client: a block's reference, raw (round: the version)
    PROBE = 4  # either way: bytes that mean nothing (round: the index of their Measure)


Purpose = Literal["join", "rejoin", "probe", "observe"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Hello(_Message, frozen=True, kw_only=True, tag=True):
    """Opens the conversation. `nonce` makes the server's proof fresh."""

    version: int
    release: str
    nonce: bytes
    purpose: Purpose = "join"


class Challenge(_Message, frozen=True, kw_only=True, tag=True):
    """The server's part of the challenge; `run` must stand in every later frame."""

    run: int
    nonce: bytes
    token_required: bool


class Proof(_Message, frozen=True, kw_only=True, tag=True):
    """HMAC that proves the token without sending it; empty where none is required.

    `seat`: the one that the sender holds, proved by `seat_mac` with the seat's secret; to rejoin, or to join anew and
    give it up.
    """

    mac: bytes
    seat: int = -1
    seat_mac: bytes = b""


class Welcome(_Message, frozen=True, kw_only=True, tag=True):
    """The seat, the run's settings and the partition. `mac` proves that the server knows the token too.

    `secret`: with it the client proves, on another connection, that the seat is its own. `epoch`: how often the server
    was restarted.
    """

    client: int
    config: RunConfig
    plan: PlanSpec
    mac: bytes
    secret: bytes
    epoch: int


class WelcomeBack(_Message, frozen=True, kw_only=True, tag=True):
    """The seat is the client's still. Both proofs as in `Proof`, by the server."""

    mac: bytes
    seat_mac: bytes
    epoch: int


class Rejoin(_Message, frozen=True, kw_only=True, tag=True):
    """Where the client stands: the last round whose aggregate it applied, and the last one that it handed over.

    `held`: later rounds whose body it has. `undecided`: hand-overs on which it has no verdict.
    """

    applied: int
    handed_over: int
    held: list[int]
    undecided: list[int]


class RejoinAnswer(_Message, frozen=True, kw_only=True, tag=True):
    """How it goes on. All rounds before `updates_from` are closed: their aggregates are sent again where they are
    missing, except those of the blocks in `snapshots`, which come whole.

    `uploads`: the hand-overs that the server still wants, and the bytes of each that it has.
    """

    updates_from: int
    snapshots: list[int]
    uploads: dict[int, int]


class Lanes(_Message, frozen=True, kw_only=True, tag=True):
    """The client may spread its link over up to `most` connections; each further one shows `key` first."""

    most: int
    key: bytes


class ProbeWelcome(_Message, frozen=True, kw_only=True, tag=True):
    """The Welcome of a client that only measures: the most bytes of one transfer, and of all in one direction."""

    max_bytes: int
    max_total: int
    mac: bytes


class Measure(_Message, frozen=True, kw_only=True, tag=True):
    """Asks for the server's time and, with `nbytes`, for room for so many bytes ("up") or for the bytes ("down").

    `index` grows from message to message and names the transfer.
    """

    index: int
    nbytes: int = 0
    direction: Literal["up", "down"] = "up"


class Measured(_Message, frozen=True, kw_only=True, tag=True):
    """The answer to the Measure of that index. `clock_ns`: the server's wall clock."""

    index: int
    clock_ns: int


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
    """A hand-over: the weight of the contribution (tokens or examples) and how the round went on the client.

    `stages`: what ended on the client since its last hand-over.
    """

    round: int
    block: int
    weight: float
    loss: float
    compute_s: float
    exposed_s: float
    stages: StageSeconds = NO_TIME


class Verdict(_Message, frozen=True, kw_only=True, tag=True):
    """Whether an upload counts in its round. If not, `reason` says why and the client keeps its old residual."""

    round: int
    block: int
    accepted: bool
    reason: str


class Update(_Message, frozen=True, kw_only=True, tag=True):
    """Announces a round's aggregate. `fingerprint`: the reference's bits once it is applied.

    `fold_s`: seconds that folding this client's upload took, if it had one; `wait_s`: those between its arrival and the
    round's close.
    """

    round: int
    block: int
    fingerprint: int
    contributions: int
    bad_groups: int
    fold_s: float = 0.0
    wait_s: float = 0.0


class Applied(_Message, frozen=True, kw_only=True, tag=True):
    """The client applied a round's update and got these bits."""

    round: int
    fingerprint: int


class Goodbye(_Message, frozen=True, kw_only=True, tag=True):
    """The last message of a client: its final digest, or why it leaves early. `rounds`: those that it has trained.

    `reconnects`: how often it came back. `resumed_bytes`, `resent_bytes`: of the transfers that broke off meanwhile,
    what was kept and what had to travel after the break.
    """

    digest: Annotated[str, Meta(max_length=DIGEST_CHARS)]
    reason: Annotated[str, Meta(max_length=REASON_CHARS)]
    compute_s: float
    exposed_s: float
    rounds: int = 0
    reconnects: int = 0
    resumed_bytes: int = 0
    resent_bytes: int = 0
    stages: StageSeconds = NO_TIME


class Farewell(_Message, frozen=True, kw_only=True, tag=True):
    """The server has noted the goodbye; the client may close."""


class Failure(_Message, frozen=True, kw_only=True, tag=True):
    """The conversation cannot go on. `error` is the name of a class in `parablock_rt.errors`.

    `resumable`: it is the server's process that ends, and another one may take up the run: a client may wait for it as
    for one that was killed.
    """

    error: str
    reason: str
    resumable: bool = False


class Observe(_Message, frozen=True, kw_only=True, tag=True):
    """Asks again how the run stands; of an observer, which has no seat."""


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client in a Status. Seconds are those of its last round; `late_s`: behind that round's first upload."""

    client: int
    state: str  # joining, training, uploading or delivered
    behind: int  # closed rounds whose update it has not applied
    compute_s: float
    exposed_s: float
    late_s: float


class Status(_Message, frozen=True, kw_only=True, tag=True):
    """How the run stands: means over the last rounds, None where there is none yet. `round`: rounds that are closed.

    `exposed_s`: how long training waited before a round, without the first rounds, which never wait; `others_s`: of it,
    for other clients. `exchange_s`: how long an upload and an update were on their way. `clients`: the slowest of those
    present.
    """

    round: int
    rounds: int
    staleness: int
    local_steps: int
    format: str
    wall_s: float | None
    open_s: float
    round_s: float | None
    loss: float | None
    compute_s: float | None
    exposed_s: float | None
    exchange_s: float | None
    bytes_up: int
    bytes_down: int
    seats: int
    present: int
    left: int
    clients: list[ClientStatus]
    others_s: float | None = None
    mac: bytes = b""  # proves that the server knows the token


M = TypeVar("M", bound=_Message)

Message: TypeAlias = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | WelcomeBack
    | Rejoin
    | RejoinAnswer
    | Lanes
    | ProbeWelcome
    | Measure
    | Measured
    | Ready
    | Snapshot
    | Begin
    | Upload
    | Verdict
    | Update
    | Applied
    | Goodbye
    | Farewell
    | Failure
    | Observe
    | Status
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
