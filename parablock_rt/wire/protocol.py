"""The control messages between server and client: typed and encoded as MessagePack. Sizes are checked before decoding.

The messages travel in control frames; payload bytes never do. The conversation:

    Hello → Challenge → Proof → Welcome → Ready → [Snapshot + data]* → Begin
    then, for each round:  Upload + data → Verdict      Update + data → Applied
    after Welcome, if the server allows it: Lanes → (the client opens further connections)
    and at the end:        Goodbye → Farewell → (the client closes)      Failure ends it at any time
    to measure the link:   Hello ("probe") → Challenge → Proof → ProbeWelcome → [Measure → Measured [+ data]]*
    to watch the run:      Hello ("observe") → Challenge → Proof → Status → [Observe → Status]*

A client whose connection broke comes back on a new one; its seat and its transfers in flight outlive the old one:

    Hello ("rejoin") → Challenge → Proof → WelcomeBack → Rejoin → [Verdict]* → RejoinAnswer → [Update + data]* …

Nothing here touches a socket, and nothing is ever pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from parablock_rt import _C
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.config import MAX_ROUNDS, RunConfig
from parablock_rt.errors import HandshakeError
from parablock_rt.stages import NO_TIME, Seconds, StageSeconds

VERSION: int = _C.PROTOCOL_VERSION
CONTROL_BYTES_BEFORE_PROOF = 4096
CONTROL_BYTES = 16 * 2**20  # of a message to a client: a Welcome has the whole plan
DIGEST_CHARS = 64
FROZEN_CHARS = 16  # of the digest of a tensor that is not trained: enough to tell two tensors apart
REASON_CHARS = 500  # of what is kept, or shown to others: why a client leaves, why an upload does not count
PROBE_CHUNK = 2**16  # bytes per chunk of a measurement's transfers


class Kind(IntEnum):
    """What a transfer carries. Kind, round and block together identify a transfer on its link."""

    UPLOAD = 1  # client to server: one client's packed change of a block
    UPDATE = 2  # server to client: the packed change of the reference
    SNAPSHOT = 3  # server to client: a block's reference, raw (round: the version)
    PROBE = 4  # either way: meaningless bytes (round: the index of their Measure)


Purpose = Literal["join", "rejoin", "probe", "observe"]
Round: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_ROUNDS)]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Reason: TypeAlias = Annotated[str, Meta(max_length=REASON_CHARS)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Hello(_Message, frozen=True, kw_only=True, tag=True):
    """Opens the conversation. `nonce` makes the server's proof fresh."""

    version: int
    release: str
    nonce: bytes
    purpose: Purpose = "join"


class Challenge(_Message, frozen=True, kw_only=True, tag=True):
    """The server's part of the challenge. Every later frame must carry `run`."""

    run: Annotated[int, Meta(ge=1)]
    nonce: bytes
    token_required: bool


class Proof(_Message, frozen=True, kw_only=True, tag=True):
    """`mac`: the HMAC that proves knowledge of the token without sending it; empty if no token is required.

    `seat`: the seat that the sender holds, either to rejoin it or to give it up and join anew. `seat_mac` proves it
    with the seat's secret.
    """

    mac: bytes
    seat: int = -1
    seat_mac: bytes = b""


class Welcome(_Message, frozen=True, kw_only=True, tag=True):
    """The seat, the run's settings and the partition. `mac` proves that the server knows the token too.

    `secret`: lets the client prove on another connection that it holds the seat. `epoch`: how often the server was
    restarted. `frozen`: the beginning of the digest of each tensor that the plan does not train, so that a client can
    say which of its own differs.
    """

    client: Count
    config: RunConfig
    plan: PlanSpec
    mac: bytes
    secret: bytes
    epoch: int
    frozen: dict[str, str] = {}

    def __repr__(self) -> str:  # without the secret
        return f"Welcome(client={self.client}, epoch={self.epoch})"


class WelcomeBack(_Message, frozen=True, kw_only=True, tag=True):
    """The client still holds its seat. The server's proofs, as in `Proof`."""

    mac: bytes
    seat_mac: bytes
    epoch: int


class Rejoin(_Message, frozen=True, kw_only=True, tag=True):
    """The client's position: the last round whose aggregate it applied, and the last round that it handed over.

    `held`: later rounds whose bodies it has completely. `undecided`: hand-overs for which it has no verdict.
    """

    applied: int
    handed_over: int
    held: list[int]
    undecided: list[int]


class RejoinAnswer(_Message, frozen=True, kw_only=True, tag=True):
    """How the client continues. All rounds before `updates_from` are closed: the server sends the aggregates that the
    client lacks again, except those of the blocks in `snapshots`, which it sends whole.

    `uploads`: the hand-overs that the server still needs, and how many bytes of each it has.
    """

    updates_from: Round
    snapshots: list[Count]
    uploads: dict[int, Count]


class Lanes(_Message, frozen=True, kw_only=True, tag=True):
    """The client may spread its link over up to `most` connections; each further connection starts by sending `key`."""

    most: int
    key: bytes


class ProbeWelcome(_Message, frozen=True, kw_only=True, tag=True):
    """The Welcome for a client that only measures: the most bytes per transfer, and in total per direction."""

    max_bytes: int
    max_total: int
    mac: bytes


class Measure(_Message, frozen=True, kw_only=True, tag=True):
    """Asks for the server's time and, with `nbytes`, asks it to receive ("up") or send ("down") that many bytes.

    `index` grows from message to message and identifies the transfer.
    """

    index: int
    nbytes: int = 0
    direction: Literal["up", "down"] = "up"


class Measured(_Message, frozen=True, kw_only=True, tag=True):
    """The answer to the Measure with the same index. `clock_ns`: the server's wall clock."""

    index: int
    clock_ns: int


class Ready(_Message, frozen=True, kw_only=True, tag=True):
    """What the client holds: its plan's digest, and the fingerprints of everything frozen and of each block."""

    plan_digest: str
    frozen: str
    fingerprints: list[int]


class Snapshot(_Message, frozen=True, kw_only=True, tag=True):
    """Announces a raw block: the reference after `version` closed rounds."""

    block: Count
    version: Round
    fingerprint: Count


class Begin(_Message, frozen=True, kw_only=True, tag=True):
    """The client's first round, and the first round whose update the server will send it."""

    first_round: Count
    updates_from: Round


class Upload(_Message, frozen=True, kw_only=True, tag=True):
    """A hand-over: the weight of the contribution (tokens or examples), and the client's loss and times in the round.

    `stages`: time per stage, for everything that ended on the client since its last hand-over.
    """

    round: Round
    block: Count
    weight: float
    loss: float
    compute_s: Seconds
    exposed_s: Seconds
    stages: StageSeconds = NO_TIME


class Verdict(_Message, frozen=True, kw_only=True, tag=True):
    """Whether an upload counts in its round. If not, `reason` says why and the client keeps its old residual."""

    round: Round
    block: Count
    accepted: bool
    reason: Reason


class Update(_Message, frozen=True, kw_only=True, tag=True):
    """Announces a round's aggregate. `fingerprint`: of the block's reference once the aggregate is applied.

    If the client had an upload in the round, `fold_s` is the seconds that folding it took, and `wait_s` the seconds
    from its arrival until the round began to close, without folding.
    """

    round: Round
    block: Count
    fingerprint: Count
    contributions: Count
    bad_groups: Count
    fold_s: Seconds = 0.0
    wait_s: Seconds = 0.0


class Applied(_Message, frozen=True, kw_only=True, tag=True):
    """The client applied a round's update. `fingerprint`: of the bits that it then has."""

    round: int
    fingerprint: int


class Goodbye(_Message, frozen=True, kw_only=True, tag=True):
    """A client's last message: its final digest, or why it leaves early. `rounds`: how many rounds it has trained.

    `reconnects`: how often it came back. `resumed_bytes`, `resent_bytes`: of the transfers that were interrupted, the
    bytes that were kept and the bytes that were sent after the break.
    """

    digest: Annotated[str, Meta(max_length=DIGEST_CHARS)]
    reason: Reason
    compute_s: Seconds
    exposed_s: Seconds
    rounds: Count = 0
    reconnects: Count = 0
    resumed_bytes: Count = 0
    resent_bytes: Count = 0
    stages: StageSeconds = NO_TIME


class Farewell(_Message, frozen=True, kw_only=True, tag=True):
    """The server has noted the goodbye; the client may close."""


class Failure(_Message, frozen=True, kw_only=True, tag=True):
    """The conversation cannot go on. `error` is the name of a class in `parablock_rt.errors`.

    `resumable`: only the server's process ends, and another process may resume the run. A client may wait for that
    process, as it does after a server was killed.
    """

    error: str
    reason: str
    resumable: bool = False


class Observe(_Message, frozen=True, kw_only=True, tag=True):
    """An observer, which has no seat, asks for the status again."""


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client in a Status. The seconds are those of its last round; `late_s`: how long its upload arrived after that
    round's first."""

    client: int
    state: str  # joining, training, uploading or delivered
    behind: int  # closed rounds whose update it has not applied
    compute_s: float
    exposed_s: float
    late_s: float


class Status(_Message, frozen=True, kw_only=True, tag=True):
    """The run's status: means over the last rounds, or None before there are any. `round`: how many rounds are closed.

    `exposed_s`: how long training waited in a round or before it, leaving out the first rounds, which never wait;
    `others_s`: the part of that spent waiting for other clients. `exchange_s`: how long an upload plus an update were
    in flight. `clients`: the slowest of the connected clients.
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


def bytes_of_member(plan: PlanSpec, frozen: Mapping[str, str], staleness: int) -> tuple[int, int]:
    """The most bytes of one message that a client with a seat may send, and of the messages to it that may wait until
    it reads them.

    A Ready has at most 9 bytes for each block, a Rejoin at most 10 for each round that may be open. A Welcome has the
    plan and `frozen`.
    """
    return (
        CONTROL_BYTES_BEFORE_PROOF + 9 * len(plan.blocks) + 10 * (staleness + 3),
        2**20 + 2 * len(msgspec.msgpack.encode((plan, frozen))),
    )


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message in `data`. Raises HandshakeError when this version does not know such a message."""
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HandshakeError(
            f"the peer sent a control message that this version does not understand ({error}); "
            "install the same release of parablock-rt on both sides"
        ) from error
    return message
