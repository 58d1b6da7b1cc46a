"""The clients of a run as the server sees them, from the first byte of a connection until after its end.

A `Candidate` is a connection that has no seat yet. A `Member` is the holder of a seat; its connection may break and be
replaced. The server's side of the handshake is here, without I/O: it maps messages to answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from parablock_rt import _C
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError, PlanMismatchError
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.protocol import Kind, Message


@dataclass(frozen=True)
class Identity:
    """What all conversations of one server share. `epoch`: how often the run's server was restarted."""

    run: int
    token: str | None = field(repr=False)
    config: RunConfig
    plan: PlanSpec
    plan_digest: str
    frozen: str
    frozen_digests: Mapping[str, str] = field(default_factory=dict)  # what `frozen` combines, shortened
    certificate_suffices: bool = False  # a client with a valid certificate need not know the token
    epoch: int = 0


class Candidate:
    """A connection on its way to a seat: Hello → Challenge, Proof → (proved) → Welcome or WelcomeBack."""

    def __init__(self, link: int, address: str, now: float) -> None:
        self.link = link
        self.address = address
        self.since = now
        self.proved = False
        self.purpose: protocol.Purpose = "join"
        self.seat: int | None = None  # the seat that it proved to hold, to come back to or to give up and join anew
        self._token: str | None = None  # the token that it must prove to know; None: no token is required of it
        self._conversation: handshake.Conversation | None = None

    def challenge(self, hello: Message, identity: Identity, tls: _C.TlsInfo | None) -> protocol.Challenge:
        """Answers the first message. Raises HandshakeError when it is not a Hello of this version."""
        if not isinstance(hello, protocol.Hello) or self._conversation is not None:
            raise HandshakeError(f"expected Hello as the first message, found {type(hello).__name__}")
        if hello.version != protocol.VERSION:
            raise HandshakeError(
                f"the server speaks protocol version {protocol.VERSION}, this client version {hello.version}: install "
                "the same release on both"
            )
        if len(hello.nonce) != handshake.NONCE_BYTES:
            raise HandshakeError(f"expected a nonce of {handshake.NONCE_BYTES} bytes, found {len(hello.nonce)}")
        self.purpose = hello.purpose
        binding = tls.binding if tls is not None else b""
        self._conversation = handshake.Conversation(identity.run, hello.nonce, handshake.nonce(), binding)
        has_certificate = tls is not None and tls.subject != ""
        self._token = None if identity.certificate_suffices and has_certificate else identity.token
        return protocol.Challenge(
            run=identity.run, nonce=self._conversation.server_nonce, token_required=self._token is not None
        )

    def prove(self, proof: Message, secret_of: Callable[[int], bytes | None] = lambda seat: None) -> None:
        """Checks the second message. `secret_of`: maps a seat to its secret, or to None when nobody holds the seat.

        Raises HandshakeError for a wrong token and for a seat that is not the sender's.
        """
        if not isinstance(proof, protocol.Proof) or self._conversation is None or self.proved:
            raise HandshakeError(f"expected Proof after the challenge, found {type(proof).__name__}")
        if not handshake.is_proof(proof.mac, self._token, self.purpose, self._conversation):
            relayed = ", or its proof was made for another TLS connection" if self._conversation.binding else ""
            raise HandshakeError(
                f"wrong token: this client does not know the token of the run{relayed}; give it the token that the "
                f"server was started with, by --token-file or {handshake.TOKEN_VARIABLE}"
            )
        if self.purpose in ("join", "rejoin"):
            secret = secret_of(proof.seat)
            mac, conversation = proof.seat_mac, self._conversation
            if secret is not None and handshake.is_seat_proof(mac, secret, proof.seat, "client", conversation):
                self.seat = proof.seat
        if self.purpose == "rejoin" and self.seat is None:
            raise HandshakeError(
                f"seat {proof.seat} is not this client's (any more): while it was away the seat was given up or "
                "taken by a newcomer. Join again to get a snapshot"
            )
        self.proved = True

    @property
    def greeted(self) -> bool:
        """Whether the challenge has been sent."""
        return self._conversation is not None

    def welcome(self, seat: int, secret: bytes, identity: Identity) -> protocol.Welcome:
        """The answer to a newcomer that has proved itself."""
        return protocol.Welcome(
            client=seat,
            config=identity.config,
            plan=identity.plan,
            mac=self.mac(),
            secret=secret,
            epoch=identity.epoch,
            frozen=dict(identity.frozen_digests),
        )

    def welcome_back(self, seat: int, secret: bytes, identity: Identity) -> protocol.WelcomeBack:
        """The answer to the holder of a seat that has proved itself."""
        assert self._conversation is not None
        seat_mac = handshake.seat_proof(secret, seat, "server", self._conversation)
        return protocol.WelcomeBack(mac=self.mac(), seat_mac=seat_mac, epoch=identity.epoch)

    def mac(self) -> bytes:
        """The server's own proof that it knows the token."""
        assert self._conversation is not None
        return handshake.proof(self._token, "server", self._conversation)


@dataclass(eq=False)
class UploadSlot:
    """An upload that a member may send, and the server's buffer that is posted for it.

    `inspector`: checks its chunks as they arrive. `received`: the bytes that had arrived when the last connection
    broke.
    """

    round: int
    block: int
    buffer: _C.Buffer
    nbytes: int
    inspector: _C.Inspector
    received: int = 0
    moved: tuple[int, float] = (-1, 0.0)  # payload bytes that the member's link has moved, and since when that many
    arrived: _C.Event | None = None  # the event for its last byte, if that overtook the upload's announcement


class Phase(IntEnum):
    """How far a member has come on its way into the run. It only moves forward, also across connections."""

    SEATED = 0  # it has a seat, and its Ready has not been checked yet
    READY = 1  # its model fits; it is being sent the blocks that it lacks
    SYNCED = 2  # it holds the whole reference, and waits for its first round
    BEGUN = 3


@dataclass(eq=False)
class Member:
    """A client with a seat. The seat outlives the connection: `link` is None while the connection is broken."""

    seat: int
    secret: bytes = field(repr=False)
    link: int | None
    address: str
    lost_at: float = 0.0  # when the connection broke
    lost_why: str = ""
    anew: bool = False  # it had this seat before, and its connection broke before it could begin
    seated_at: float = 0.0  # when it got the seat, or came back to it
    rejoining: bool = False  # connected again, but its Rejoin has not come yet
    phase: Phase = Phase.SEATED
    to_send: list[int] = field(default_factory=list)  # blocks of the snapshot not sent yet
    sending: int | None = None  # the block in flight
    first_round: int = 0
    updates_from: int = 0
    applied: int = -1
    catching_up: bool = False  # it is being sent the parts of the model that it lacks
    gathered_rounds: int = 0  # rounds that closed while it was catching up: its lag limit is raised by as many
    gathered_bytes: int = 0  # the size of their aggregates
    next_post: int = 0  # the first round for which no upload was posted yet
    posted: dict[int, UploadSlot] = field(default_factory=dict)
    announced: dict[int, protocol.Upload] = field(default_factory=dict)
    verdicts: dict[int, protocol.Verdict] = field(default_factory=dict)  # the last ones on arrived uploads, to repeat
    goodbye: protocol.Goodbye | None = None

    @property
    def here(self) -> bool:
        """Whether messages and transfers of the run may go to it now."""
        return self.link is not None and not self.rejoining

    @property
    def ready(self) -> bool:
        """Whether its model was found to fit."""
        return self.phase >= Phase.READY

    @property
    def synced(self) -> bool:
        """Whether it got all the blocks that it lacked before its first round."""
        return self.phase >= Phase.SYNCED

    @property
    def begun(self) -> bool:
        """Whether it was told its first round."""
        return self.phase is Phase.BEGUN

    def left_lying(self, oldest: int) -> range:
        """The closed rounds whose aggregates were sent to the member as they closed but that it has not applied yet.
        `oldest`: the oldest open round."""
        return range(max(self.applied + 1, self.updates_from), oldest)

    def check(self, ready: protocol.Ready, identity: Identity, blocks: int) -> None:
        """Raises PlanMismatchError when the client's model cannot take part."""
        if ready.plan_digest != identity.plan_digest:
            raise PlanMismatchError(
                f"the client lays out the plan differently (digest {ready.plan_digest[:12]}, here "
                f"{identity.plan_digest[:12]}); install the same release on both"
            )
        if ready.frozen != identity.frozen:
            raise PlanMismatchError(
                "what is not trained (frozen parameters and buffers) differs between server and client (an earlier "
                "run may have changed a buffer), or weights are tied on one side only; start both from the same "
                "checkpoint"
            )
        if len(ready.fingerprints) != blocks:
            raise PlanMismatchError(f"expected {blocks} block fingerprints, found {len(ready.fingerprints)}")

    def broke(self, why: str, unfinished: Iterable[tuple[int, int, int, int]], now: float) -> None:
        """Notes that the connection broke. `unfinished`: the receives that were posted on it, and where to resume."""
        self.link = None
        self.rejoining = False
        self.sending = None
        self.lost_at, self.lost_why = now, why
        for kind, round, _, received in unfinished:
            if kind == Kind.UPLOAD and round in self.posted:
                self.posted[round].received = received
        for posted in self.posted.values():
            posted.arrived = None  # its announcement never arrived, so the client sends the upload again
        # The client announces again what it sends again. With several lanes the rest of a body may come before that.
        self.announced.clear()

    def remember(self, verdict: protocol.Verdict, at_most: int) -> None:
        """Keeps the last `at_most` verdicts, in case the connection breaks before the client gets them. A client never
        has more uploads without a verdict than that."""
        self.verdicts[verdict.round] = verdict
        while len(self.verdicts) > at_most:
            del self.verdicts[min(self.verdicts)]
