"""The seats of a run and their holders.

When a holder's connection breaks, its seat is kept; the holder comes back by proving that it knows the seat's secret.
For the first few seconds newcomers cannot take the seat; after that, the first client that asks gets it.

Knows nothing of rounds. Only the server's thread may call this module.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from parablock_rt.errors import HandshakeError, ParaBlockError, TransportError
from parablock_rt.server.members import Candidate, Identity, Member
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.transport import Transport

HANDSHAKE_S = 20.0
SEAT_KEPT_S = 10.0  # how long newcomers cannot take it; less than HANDSHAKE_S, so that they can wait that long


class Seating(Protocol):
    """Callbacks for when seats change hands, implemented by `Participants`."""

    def seated(self, member: Member) -> None:
        """A newcomer got a seat and is about to be told."""

    def vacated(self, member: Member, reason: str) -> None:
        """A seat is free again; everything kept for its holder may be dropped."""

    def dismiss(self, link: int, error: ParaBlockError) -> None:
        """Tells the peer why its connection ends, and ends it."""


class Roster:
    """The candidates and the members of one run."""

    def __init__(self, transport: Transport, identity: Identity, seating: Seating) -> None:
        self._transport = transport
        self._identity = identity
        self._seating = seating
        self._candidates: dict[int, Candidate] = {}
        self._seats: dict[int, Member] = {}
        self._by_link: dict[int, Member] = {}
        self._most_bytes = protocol.bytes_of_member(identity.plan, identity.frozen_digests, identity.config.staleness)

    # ---- Members

    @property
    def members(self) -> list[Member]:
        """All holders of a seat, connected or not."""
        return list(self._seats.values())

    @property
    def here(self) -> list[Member]:
        """The members to which messages can be sent now."""
        return [member for member in self._seats.values() if member.here]

    def on(self, link: int) -> Member | None:
        """The member at the other end of a link."""
        return self._by_link.get(link)

    def holder(self, seat: int) -> Member | None:
        """The member that holds a seat, or None."""
        return self._seats.get(seat)

    def say(self, member: Member, message: protocol.Message) -> None:
        """Sends a member a message; drops the message if the member is not `here`."""
        if member.here:
            assert member.link is not None
            self._transport.send_message(member.link, message)

    def restore(self, member: Member) -> None:
        """Adds a member that an earlier server had; it has no connection yet."""
        self._seats[member.seat] = member

    def lose(self, member: Member, why: str, unfinished: list[tuple[int, int, int, int]], now: float) -> None:
        """A member's connection broke; its seat is kept."""
        assert member.link is not None
        del self._by_link[member.link]
        member.broke(why, unfinished, now)

    def vacate(self, member: Member, reason: str) -> None:
        """Frees a member's seat."""
        if member.link is not None:
            del self._by_link[member.link]
        del self._seats[member.seat]
        self._seating.vacated(member, reason)

    # ---- Candidates

    def connected(self, link: int, address: str, now: float) -> None:
        """Adds a candidate for a new connection."""
        self._candidates[link] = Candidate(link, address, now)

    def forget(self, link: int) -> Candidate | None:
        """Removes and returns the candidate at the other end of a link; None if there is no candidate."""
        return self._candidates.pop(link, None)

    def candidate(self, link: int) -> Candidate | None:
        """The candidate at the other end of a link."""
        return self._candidates.get(link)

    def take(self, candidate: Candidate, message: protocol.Message, now: float) -> None:
        """Handles a message of the handshake. Raises HandshakeError when the candidate must not be let in.

        A proved candidate that wants no seat (a visitor) stays a candidate; the caller takes it over.
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
        """Admits candidates for which a seat has become free, and dismisses those that take too long."""
        for candidate in list(self._candidates.values()):
            try:
                if candidate.proved:
                    self._admit(candidate, now)
                if candidate.link in self._candidates and now - candidate.since > HANDSHAKE_S:
                    raise TransportError(f"the handshake took longer than {HANDSHAKE_S:g} s")
            except TransportError as error:
                self._seating.dismiss(candidate.link, error)

    def _secret_of(self, seat: int, *, begun: bool = True) -> bytes | None:
        """The seat's secret, or None. With `begun`, only if the member has begun: it can continue, or get its farewell.
        Without, only if the member has not said goodbye: it can give the seat up and join anew."""
        member = self._seats.get(seat)
        if member is None or (not member.begun if begun else member.goodbye is not None):
            return None
        return member.secret

    def _hang_up(self, member: Member) -> None:
        """Closes the old connection of a member that has given it up, at once: nothing more may be written to it."""
        if member.link is not None:
            self._transport.native.close_link(member.link, "the client has come back on another connection", 0.0)

    def _admit(self, candidate: Candidate, now: float) -> None:
        """Gives a proved candidate its seat if the seat is available by now. Raises HandshakeError when it will not
        become available."""
        if candidate.purpose == "rejoin":
            assert candidate.seat is not None
            member = self._seats.get(candidate.seat)
            if member is None or self._secret_of(candidate.seat) is None:
                raise HandshakeError(f"seat {candidate.seat} was given up meanwhile: join again to get a snapshot")
            if member.link is None:  # otherwise the CLOSED event of the old connection has not come yet
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
        self._transport.native.trust(candidate.link, self._identity.run, *self._most_bytes)

    def _free_seat(self, now: float) -> int | None:
        """A seat for a newcomer: a seat without a holder, otherwise the seat whose holder has been away longest. One
        that has said goodbye keeps its seat: its result counts.

        Returns None when a seat will be free within seconds. Raises HandshakeError when there will be none.
        """
        clients = self._identity.config.clients
        for seat in range(clients):
            if seat not in self._seats:
                return seat
        lost = [member for member in self._seats.values() if member.link is None and member.goodbye is None]
        if not lost:
            raise HandshakeError(
                f"all {clients} seats of this run are taken. The seat of a client whose network broke is free a minute "
                "later: try again then; for one client more, start the server with more clients"
            )
        longest = min(lost, key=lambda member: member.lost_at)
        return longest.seat if now - longest.lost_at >= SEAT_KEPT_S else None
