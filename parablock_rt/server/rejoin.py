"""What a client that comes back on a new connection is told: pure decisions on where it and the run stand.

A hand-over without a verdict is one of three things: decided while the client was away, wanted from the byte where it
broke off, or accepted already, to be told when its round closes. What was accepted is never asked for again.
"""

from __future__ import annotations

from parablock_rt.errors import HandshakeError
from parablock_rt.server.members import Member
from parablock_rt.server.rounds import OpenRounds
from parablock_rt.wire import protocol

LATE = "round {} was closed at its deadline without this upload"


def check(member: Member, message: protocol.Rejoin, oldest: int, staleness: int) -> None:
    """Raises HandshakeError when the client cannot be where it says; `oldest`: the oldest open round."""
    rounds = [message.handed_over, *message.undecided]
    possible = -1 <= message.applied < oldest and max(rounds) <= oldest + staleness
    too_many = max(len(message.undecided), len(message.held)) > staleness + 3
    if not possible or min(rounds[1:], default=0) < 0 or too_many:
        raise HandshakeError(f"client {member.seat} says that it is where it cannot be; join again for a snapshot")


def verdicts_owed(member: Member, message: protocol.Rejoin, oldest: int) -> dict[int, str | None]:
    """The rounds of the client's undecided hand-overs that are decided here: why not, an empty text, or None for one
    that came too late and was never heard of."""
    known = {round: verdict.reason for round, verdict in member.verdicts.items()}
    return {r: known.get(r) for r in message.undecided if r in known or r < oldest}


def uploads_wanted(member: Member, message: protocol.Rejoin, oldest: int, rounds: OpenRounds) -> dict[int, int]:
    """The hand-overs that are still to come, and the bytes of each that are here."""
    still_open = [r for r in message.undecided if r >= oldest and r not in member.verdicts]
    return {
        r: member.posted[r].received if r in member.posted else 0
        for r in still_open
        if member.seat not in rounds.uploads_of(r)
    }


def uploads_lost(member: Member, message: protocol.Rejoin, oldest: int, rounds: OpenRounds) -> list[int]:
    """Open rounds whose upload was refused by a server that died before anybody else knew: nothing more will come."""
    handed_over = range(max(oldest, member.first_round), message.handed_over + 1)
    return [r for r in handed_over if r not in message.undecided and member.seat not in rounds.uploads_of(r)]
