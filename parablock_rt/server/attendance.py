"""Which clients take part in which round: whose upload a round waits for, who is missing, who may still come back.

Derives its answers from the roster and the rounds. Its own state is only the set of absent seats (vacant, or given up)
and, after a resume, each seat's first possible round. Sends no messages and reads no clock. Only the server's thread
may call this module.
"""

from __future__ import annotations

from collections.abc import Iterable

from parablock_rt.config import RunConfig
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.server.rounds import Round


class Attendance:
    """The presence of one run's clients."""

    def __init__(self, roster: Roster, config: RunConfig) -> None:
        self._roster = roster
        self._config = config
        self._absent: set[int] = set()  # seats that no round waits for
        self._later: dict[int, int] = {}  # since a resume: the first round for which a seat can deliver

    def begin_with(self, members: Iterable[Member]) -> None:
        """Begins the run with `members`; rounds do not wait for the other seats until a client takes them."""
        self._absent = set(range(self._config.clients)) - {member.seat for member in members}

    def resume_with(self, members: Iterable[Member], given_up: Iterable[int]) -> None:
        """Resumes the run with `members` on a new server. `given_up`: the seats that the earlier server had given up.

        If a seat had changed hands, an open round may have held an upload of the former holder. That upload was lost
        with the earlier server, and no client can deliver it again.
        """
        self._later = {member.seat: member.first_round for member in members}
        self._absent = set(range(self._config.clients)) - self._later.keys() | set(given_up)

    def takes_part(self, member: Member) -> None:
        """Makes rounds wait for a member that begins, has come back or has trained a round."""
        self._absent.discard(member.seat)

    def give_up(self, seats: Iterable[int]) -> None:
        """A round was closed without these seats: later rounds do not wait for them until they take part again."""
        self._absent |= set(seats)

    def expected(self, round: Round) -> set[int]:
        """The seats whose upload a round waits for. Leaves out absent seats and those that begin with a later round."""
        return self._able(round) - self._absent

    def outstanding(self, round: Round) -> set[int]:
        """The expected seats that have neither delivered nor been refused."""
        return self.expected(round) - round.uploads.keys() - round.refused.keys()

    def missing(self, round: Round) -> set[int]:
        """All seats that may still deliver to a round, including the ones that it does not wait for once it has a
        quorum."""
        return self._able(round) - round.uploads.keys() - round.refused.keys()

    def _able(self, round: Round) -> set[int]:
        """The seats of a round's cohort, except those whose holder begins with a later round."""
        return set(round.cohort) - {member.seat for member in self._roster.members if member.first_round > round.index}

    def is_needed(self, newcomer: Member, round: Round) -> bool:
        """Whether a round cannot reach its quorum without this member, which could still take part in it."""
        training = {m.seat for m in self._roster.here if m.begun and m.first_round <= round.index}
        reachable = round.uploads.keys() | (round.cohort & training - round.refused.keys())
        return len(reachable) < self.quorum(round) and newcomer.seat in round.cohort - round.uploads.keys()

    def quorum(self, round: Round) -> int:
        """How many uploads a round needs before it can be closed. After a resume: at most as many as can still come."""
        possible = sum(self._later.get(seat, 0) <= round.index for seat in round.cohort)
        return min(self._config.quorum_size, max(possible, 1))

    @property
    def given_up(self) -> list[int]:
        """The seats that no round waits for."""
        return sorted(self._absent)

    @property
    def lost(self) -> list[Member]:
        """The members whose connection broke and who are not back yet. A member that has reconnected but has not sent
        its Rejoin yet still counts as lost."""
        return [m for m in self._roster.members if not m.here and m.goodbye is None]

    def gone(self, left: Iterable[str]) -> list[str]:
        """The clients that are no longer connected, and why. `left`: the entries for clients whose seats are free."""
        return [*left, *(f"client {member.seat}: {member.lost_why}" for member in self.lost)]

    def unfinished(self) -> list[Member]:
        """The members whose goodbye is still to come, except those that were given up and have no connection."""
        waiting = [m for m in self._roster.members if m.begun and m.goodbye is None]
        return [m for m in waiting if m.link is not None or m.seat not in self._absent]

    def who_is_missing(self, round: Round, left: Iterable[str]) -> str:
        """Explains to a human reader why a round has fewer uploads than clients."""
        missing = sorted(round.cohort - round.uploads.keys() - round.refused.keys())
        parts = [f"missing: {missing}"] if missing else []
        parts += [f"rejected: client {seat} ({reason})" for seat, reason in sorted(round.refused.items())]
        gone = self.gone(left)
        parts += [f"gone: {'; '.join(gone)}"] if gone else []
        return "; ".join(parts)
