"""The clients of a run as the server sees them, from the first byte of a connection to its end.

`Candidate` is a connection that has not proved itself yet, `Member` one that holds a seat. The conversation of the
handshake is here, without I/O: messages in, messages out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from parablock_rt import _C, handshake, protocol
from parablock_rt.blocks import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError, PlanMismatchError
from parablock_rt.protocol import Message


@dataclass(frozen=True)
class Identity:
    """What every conversation of one server has in common."""

    run: int
    token: str | None
    config: RunConfig
    plan: PlanSpec
    plan_digest: str
    frozen: str


class Candidate:
    """A connection on its way to a seat: Hello → Challenge, Proof → (proved) → Welcome."""

    def __init__(self, link: int, address: str, now: float) -> None:
        self.link = link
        self.address = address
        self.since = now
        self.proved = False
        self._client_nonce: bytes | None = None
        self._server_nonce = handshake.nonce()

    def challenge(self, hello: Message, identity: Identity) -> protocol.Challenge:
        """Answers the first message. Raises HandshakeError when it is not a Hello of this version."""
        if not isinstance(hello, protocol.Hello) or self._client_nonce is not None:
            raise HandshakeError(f"expected Hello as the first message, found {type(hello).__name__}")
        if hello.version != protocol.VERSION:
            raise HandshakeError(
                f"the server speaks protocol version {protocol.VERSION}, this client version {hello.version}: install "
                "the same release on both"
            )
        if len(hello.nonce) != handshake.NONCE_BYTES:
            raise HandshakeError(f"expected a nonce of {handshake.NONCE_BYTES} bytes, found {len(hello.nonce)}")
        self._client_nonce = hello.nonce
        return protocol.Challenge(run=identity.run, nonce=self._server_nonce, token_required=identity.token is not None)

    def prove(self, proof: Message, identity: Identity) -> None:
        """Checks the second message. Raises HandshakeError for a wrong token."""
        if not isinstance(proof, protocol.Proof) or self._client_nonce is None:
            raise HandshakeError(f"expected Proof after the challenge, found {type(proof).__name__}")
        if not handshake.is_proof(proof.mac, identity.token, "client", *self._fields(identity)):
            raise HandshakeError("wrong token: this client does not know the token of the run")
        self.proved = True

    @property
    def greeted(self) -> bool:
        """Whether the challenge has been sent."""
        return self._client_nonce is not None

    def welcome(self, seat: int, identity: Identity) -> protocol.Welcome:
        """What a proved candidate is told."""
        mac = handshake.proof(identity.token, "server", *self._fields(identity))
        return protocol.Welcome(client=seat, config=identity.config, plan=identity.plan, mac=mac)

    def _fields(self, identity: Identity) -> tuple[int, bytes, bytes]:
        assert self._client_nonce is not None
        return identity.run, self._client_nonce, self._server_nonce


@dataclass(eq=False)
class Posted:
    """An upload that a member may send: a buffer of the server's that waits for it."""

    round: int
    block: int
    buffer: _C.Buffer
    nbytes: int


@dataclass(eq=False)
class Member:
    """A client with a seat."""

    seat: int
    link: int
    address: str
    ready: bool = False  # its Ready was checked
    to_send: list[int] = field(default_factory=list)  # blocks of the snapshot not sent yet
    synced: bool = False  # it holds the reference: nothing of the snapshot is on its way any more
    begun: bool = False
    first_round: int = 0
    updates_from: int = 0
    applied: int = -1
    max_lag: int = 0  # rounds it may be behind
    next_post: int = 0  # the first round for which no upload was posted yet
    posted: dict[int, Posted] = field(default_factory=dict)
    announced: dict[int, protocol.Upload] = field(default_factory=dict)
    goodbye: protocol.Goodbye | None = None

    def check(self, ready: protocol.Ready, identity: Identity, blocks: int) -> None:
        """Raises PlanMismatchError when the client's model cannot take part."""
        if ready.plan_digest != identity.plan_digest:
            raise PlanMismatchError(
                f"the client lays out the plan differently (digest {ready.plan_digest[:12]}, here "
                f"{identity.plan_digest[:12]}); install the same release on both"
            )
        if ready.frozen != identity.frozen:
            raise PlanMismatchError(
                "what is not trained (frozen parameters and buffers) differs between server and client, or weights are "
                "tied on one side only; start both from the same checkpoint"
            )
        if len(ready.fingerprints) != blocks:
            raise PlanMismatchError(f"expected {blocks} block fingerprints, found {len(ready.fingerprints)}")
