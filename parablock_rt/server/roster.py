"""The seats of a run, and who holds them.

A seat whose connection broke is kept for its holder, who proves itself with the seat's secret. For a short while it is
kept from newcomers, too; after that, whoever asks first gets it.

Knows nothing of rounds. The server's thread alone uses it.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from parablock_rt.errors import HandshakeError, ParaBlockError, TransportError
from parablock_rt.server.members import Candidate, Identity, Member
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.transport import Transport

HANDSHAKE_S = 20.0
SEAT_KEPT_S = 10.0  # from newcomers; less than a handshake may take, so that they can wait for it


class Seating(Protocol):
    """What happens when seats change hands, for whoever keeps more about them."""

    def seated(self, member: Member) -> None:
        """A newcomer is about to be told its seat."""

    def vacated(self, member: Member, reason: str) -> None:
        """A seat is free again; what was kept of its holder may go."""

    def dismiss(self, link: int, error: ParaBlockError) -> None:
        """A connection is to be told why it ends."""


class Roster:
    """The candidates and the members of one run."""

    def __init__(self, transport: Transport, identity: Identity, seating: Seating) -> None:
        self._transport = transport
        self._identity = identity
        self._seating = seating
        self._candidates: dict[int, Candidate] = {}
        self._seats: dict[int, Member] = {}
        self._by_link: dict[int, Member] = {}

    # ---- Members

    @property
    def members(self) -> list[Member]:
        """Everybody with a seat, connected or not."""
        return list(self._seats.values())

    @property
    def here(self) -> list[Member]:
        """The members whom messages reach."""
        return [member for member in self._seats.values() if member.here]

    def on(self, link: int) -> Member | None:
        """The member at the other end of a link."""
        return self._by_link.get(link)

    def holder(self, seat: int) -> Member | None:
        """Who holds a seat."""
        return self._seats.get(seat)

    def say(self, member: Member, message: protocol.Message) -> None:
        """Sends a member a message, if messages reach it."""
        if member.here:
            assert member.link is not None
            self._transport.send_message(member.link, message)

    def restore(self, member: Member) -> None:
        """Puts back a member of an earlier server's; its connection is broken."""
        self._seats[member.seat] = member

    def lose(self, member: Member, why: str, unfinished: list[tuple[int, int, int, int]], now: float) -> None:
        """A member's connection broke; its seat is kept."""
        assert member.link is not None
        del self._by_link[member.link]
        member.broke(why, unfinished, now)

    def vacate(self, member: Member, reason: str) -> None:
        """The seat is free."""
        if member.link is not None:
            del self._by_link[member.link]
        del self._seats[member.seat]
        self._seating.vacated(member, reason)

    # ---- Candidates

    def connected(self, link: int, address: str, now: float) -> None:
        """Somebody connected."""
        self._candidates[link] = Candidate(link, address, now)

    def forget(self, link: int) -> Candidate | None:
        """Whoever is at the other end of a link is no candidate any more; returns it if it was one."""
        return self._candidates.pop(link, None)

    def candidate(self, link: int) -> Candidate | None:
        """The candidate at the other end of a link."""
        return self._candidates.get(link)

    def take(self, candidate: Candidate, message: protocol.Message, now: float) -> None:
        """Takes a message of the handshake. Raises HandshakeError when the candidate is not to be let in.

        One that is proved and does not want a seat stays a candidate: it is somebody else's then.
        """
        if not candidate.greeted:
            tls = self._transport.native.tls_info(candidate.link)
            self._transport.send_message(candidate.link, candidate.challenge(message, self._identity, tls))
            return
        candidate.prove(message, partial(self._secret_of, begun=candidate.purpose == "rejoin"))
        if candidate.seat is not None:
            self._hang_up(self._seats[candidate.seat])
            if candidate.purpose == "join":
                self.vacate(self._seats[candidate.seat], "its connection broke before it began, and it joined anew")
        if candidate.purpose in ("join", "rejoin"):
            self._admit(candidate, now)

    def check_clock(self, now: float) -> None:
        """Lets in who has waited for a seat, and dismisses who takes too long."""
        for candidate in list(self._candidates.values()):
            try:
                if candidate.proved:
                    self._admit(candidate, now)
                if candidate.link in self._candidates and now - candidate.since > HANDSHAKE_S:
                    raise TransportError(f"the handshake took longer than {HANDSHAKE_S:g} s")
            except TransportError as error:
                self._seating.dismiss(candidate.link, error)

    def _secret_of(self, seat: int, *, begun: bool = True) -> bytes | None:
        """What its holder proves a seat with; `begun`: only of one who has begun, and can go on or hear a farewell."""
        member = self._seats.get(seat)
        if member is None or (not member.begun if begun else member.goodbye is not None):
            return None
        return member.secret

    def _hang_up(self, member: Member) -> None:
        """Ends a member's old connection, which it has given up: nothing more may be written through it."""
        if member.link is not None:
            self._transport.native.close_link(member.link, "the client has come back on another connection", 0.0)

    def _admit(self, candidate: Candidate, now: float) -> None:
        """Gives a proved candidate its seat, if that is free by now. Raises HandshakeError when it will not be."""
        if candidate.purpose == "rejoin":
            assert candidate.seat is not None
            member = self._seats.get(candidate.seat)
            if member is None or self._secret_of(candidate.seat) is None:
                raise HandshakeError(f"seat {candidate.seat} was given up meanwhile: join again to get a snapshot")
            if member.link is None:  # else the end of the old connection is on its way
                member.rejoining = True
                self._seat(candidate, member, now)
                answer = candidate.welcome_back(member.seat, member.secret, self._identity)
                self._transport.send_message(candidate.link, answer)
                self._offer_lanes(candidate.link)
            return
        former = candidate.seat
        seat = former if former is not None and former not in self._seats else self._free_seat(now)
        if seat is None:
            return
        if seat in self._seats:
            self.vacate(self._seats[seat], f"{self._seats[seat].lost_why}; a newcomer has taken the seat")
        member = Member(seat, handshake.secret(), candidate.link, candidate.address, anew=seat == former)
        self._seats[seat] = member
        self._seating.seated(member)
        self._seat(candidate, member, now)
        self._transport.send_message(candidate.link, candidate.welcome(seat, member.secret, self._identity))
        self._offer_lanes(candidate.link)

    def _offer_lanes(self, link: int) -> None:
        if (lanes := self._transport.offer_lanes(link)) is not None:
            self._transport.send_message(link, lanes)

    def _seat(self, candidate: Candidate, member: Member, now: float) -> None:
        del self._candidates[candidate.link]
        member.seated_at = now
        member.link, member.address = candidate.link, candidate.address
        self._by_link[candidate.link] = member
        self._transport.native.trust(candidate.link, self._identity.run, protocol.CONTROL_BYTES)

    def _free_seat(self, now: float) -> int | None:
        """A seat for a newcomer: one that nobody holds, else the one whose holder has been away longest.

        None: one may be free in a moment. Raises HandshakeError when none will be.
        """
        clients = self._identity.config.clients
        for seat in range(clients):
            if seat not in self._seats:
                return seat
        lost = [member for member in self._seats.values() if member.link is None]
        if not lost:
            raise HandshakeError(
                f"all {clients} seats of this run are taken. The seat of a client whose network broke is free a minute "
                "later: try again then; for one client more, start the server with more clients"
            )
        longest = min(lost, key=lambda member: member.lost_at)
        return longest.seat if now - longest.lost_at >= SEAT_KEPT_S else None
