"""The clients of a run as the server sees them, from the first byte of a connection to its end, and beyond it.

`Candidate` is a connection that has no seat yet, `Member` the holder of a seat, whose connection may break and be
replaced. The conversation of the handshake is here, without I/O: messages in, messages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from parablock_rt import _C
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError, PlanMismatchError
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.protocol import Kind, Message


@dataclass(frozen=True)
class Identity:
    """What every conversation of one server has in common. `epoch`: how often the run's server was restarted."""

    run: int
    token: str | None = field(repr=False)
    config: RunConfig
    plan: PlanSpec
    plan_digest: str
    frozen: str
    certificate_suffices: bool = False  # a client that shows one that is good need not know the token
    epoch: int = 0


class Candidate:
    """A connection on its way to a seat: Hello → Challenge, Proof → (proved) → Welcome or WelcomeBack."""

    def __init__(self, link: int, address: str, now: float) -> None:
        self.link = link
        self.address = address
        self.since = now
        self.proved = False
        self.purpose: protocol.Purpose = "join"
        self.seat: int | None = None  # the one that it has proved to hold: to come back to, or to give up and join anew
        self._token: str | None = None  # what it has to prove
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
        """Checks the second message. `secret_of` a seat: None when nobody holds it.

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
        """What a proved newcomer is told."""
        return protocol.Welcome(
            client=seat,
            config=identity.config,
            plan=identity.plan,
            mac=self.mac(),
            secret=secret,
            epoch=identity.epoch,
        )

    def welcome_back(self, seat: int, secret: bytes, identity: Identity) -> protocol.WelcomeBack:
        """What a proved holder of a seat is told."""
        assert self._conversation is not None
        seat_mac = handshake.seat_proof(secret, seat, "server", self._conversation)
        return protocol.WelcomeBack(mac=self.mac(), seat_mac=seat_mac, epoch=identity.epoch)

    def mac(self) -> bytes:
        """The server's own proof."""
        assert self._conversation is not None
        return handshake.proof(self._token, "server", self._conversation)


@dataclass(eq=False)
class UploadSlot:
    """An upload that a member may send: a buffer of the server's that waits for it.

    `received`: the bytes that were there when the last connection broke.
    """

    round: int
    block: int
    buffer: _C.Buffer
    nbytes: int
    received: int = 0
    moved: tuple[int, float] = (-1, 0.0)  # payload over the member's link when last looked at, and since when
    arrived: _C.Event | None = None  # its last byte, when that overtook the message that announces the upload


@dataclass(eq=False)
class Member:
    """A client with a seat. The seat outlives its connection: `link` is None while that is broken."""

    seat: int
    secret: bytes
    link: int | None
    address: str
    lost_at: float = 0.0  # when the connection broke
    lost_why: str = ""
    anew: bool = False  # it had this seat before, and its connection broke before it could begin
    seated_at: float = 0.0  # when it got the seat, or came back to it
    rejoining: bool = False  # connected again, but it has not said where it stands
    ready: bool = False  # its Ready was checked
    to_send: list[int] = field(default_factory=list)  # blocks of the snapshot not sent yet
    sending: int | None = None  # the one on its way
    synced: bool = False  # it holds the reference: nothing of the snapshot is on its way any more
    begun: bool = False
    first_round: int = 0
    updates_from: int = 0
    applied: int = -1
    catching_up: bool = False  # it is being sent what it lacks of the model
    gathered_rounds: int = 0  # that closed meanwhile: so many more it may be behind
    gathered_bytes: int = 0  # what their aggregates weigh
    next_post: int = 0  # the first round for which no upload was posted yet
    posted: dict[int, UploadSlot] = field(default_factory=dict)
    announced: dict[int, protocol.Upload] = field(default_factory=dict)
    verdicts: dict[int, protocol.Verdict] = field(default_factory=dict)  # on uploads that came; the last, to repeat
    goodbye: protocol.Goodbye | None = None

    @property
    def here(self) -> bool:
        """Whether messages and transfers of the run may go to it now."""
        return self.link is not None and not self.rejoining

    def left_lying(self, oldest: int) -> range:
        """The closed rounds whose aggregates were sent to it as they closed, and that it has not applied. `oldest`: the
        oldest open round."""
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
        """The connection is gone. `unfinished`: the receives that were posted on it, and where to resume them."""
        self.link = None
        self.rejoining = False
        self.sending = None
        self.lost_at, self.lost_why = now, why
        for kind, round, _, received in unfinished:
            if kind == Kind.UPLOAD and round in self.posted:
                self.posted[round].received = received
        for posted in self.posted.values():
            posted.arrived = None  # it was never announced, so the client sends it again
        self.announced.clear()  # likewise: with several lanes the rest of a body may come before it is announced again

    def remember(self, verdict: protocol.Verdict, at_most: int) -> None:
        """Keeps the last `at_most` verdicts in case the connection breaks before they are heard: a client has no more
        uploads without one."""
        self.verdicts[verdict.round] = verdict
        while len(self.verdicts) > at_most:
            del self.verdicts[min(self.verdicts)]
