"""Decides what to tell a client that comes back on a new connection: pure functions of the client's and run's state.

A hand-over without a verdict is in one of three states: decided while the client was away; still wanted, from the byte
at which the transfer broke off; or already accepted, with the verdict to follow when the round closes. The server never
asks again for an upload that it has accepted.
"""

from __future__ import annotations

from parablock_rt.errors import HandshakeError
from parablock_rt.server.members import Member
from parablock_rt.server.rounds import OpenRounds
from parablock_rt.wire import protocol

LATE = "round {} was closed at its deadline without this upload"


def check(member: Member, message: protocol.Rejoin, oldest: int, newest: int, staleness: int) -> None:
    """Raises HandshakeError when the position that the client claims is impossible. `oldest`, `newest`: of the rounds
    that are open."""
    possible = -1 <= message.applied < oldest and max(message.handed_over, *message.undecided, -1) <= newest
    too_many = max(len(message.undecided), len(message.held)) > staleness + 3
    if not possible or min(message.undecided, default=0) < 0 or too_many:
        raise HandshakeError(f"client {member.seat} says that it is where it cannot be; join again for a snapshot")


def verdicts_owed(member: Member, message: protocol.Rejoin, oldest: int) -> dict[int, str | None]:
    """The client's undecided hand-overs that are decided on the server, by round. Each value is the reason for a
    refusal, an empty text for an acceptance, or None if the round closed before the upload arrived."""
    known = {round: verdict.reason for round, verdict in member.verdicts.items()}
    return {r: known.get(r) for r in message.undecided if r in known or r < oldest}


def uploads_wanted(member: Member, message: protocol.Rejoin, oldest: int, rounds: OpenRounds) -> dict[int, int]:
    """The hand-overs that the server still needs, by round, and how many bytes of each have arrived."""
    still_open = [r for r in message.undecided if r >= oldest and r not in member.verdicts]
    return {
        r: member.posted[r].received if r in member.posted else 0
        for r in still_open
        if member.seat not in rounds.uploads_of(r)
    }


def uploads_lost(member: Member, message: protocol.Rejoin, oldest: int, rounds: OpenRounds) -> list[int]:
    """Open rounds for which the client will send nothing more: the earlier server refused its upload, told the client,
    and was killed before it recorded the refusal."""
    handed_over = range(max(oldest, member.first_round), message.handed_over + 1)
    return [r for r in handed_over if r not in message.undecided and member.seat not in rounds.uploads_of(r)]
