"""Who takes part in which round: whose upload it waits for, who is missing, who may still come back.

Answers from the roster and from the rounds; seats that are vacant, or whose holder was given up, are the one thing it
keeps itself. Says nothing to anybody and knows no clock. The server's thread alone uses it.
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
        """The run begins with these; rounds do not wait for the other seats until somebody takes them."""
        self._absent = set(range(self._config.clients)) - {member.seat for member in members}

    def resume_with(self, members: Iterable[Member], given_up: Iterable[int]) -> None:
        """The run goes on with these after its server has ended. `given_up`: by that server.

        Where a seat had changed hands, an open round may have had the former holder's upload, which went with the
        server: nobody can deliver it again.
        """
        self._later = {member.seat: member.first_round for member in members}
        self._absent = set(range(self._config.clients)) - self._later.keys() | set(given_up)

    def takes_part(self, member: Member) -> None:
        """A member begins, is back or has trained a round: rounds wait for it."""
        self._absent.discard(member.seat)

    def give_up(self, seats: Iterable[int]) -> None:
        """A round was closed without these: later ones do not wait for them until they take part again."""
        self._absent |= set(seats)

    def expected(self, round: Round) -> set[int]:
        """The seats whose delivery a round waits for: a seat may be vacant for a while, or begin later."""
        return self._able(round) - self._absent

    def outstanding(self, round: Round) -> set[int]:
        """Those of the expected that neither delivered nor were refused."""
        return self.expected(round) - round.uploads.keys() - round.refused.keys()

    def missing(self, round: Round) -> set[int]:
        """All seats that may still deliver to a round: those with them that it does not wait for if it has a quorum."""
        return self._able(round) - round.uploads.keys() - round.refused.keys()

    def _able(self, round: Round) -> set[int]:
        """The seats of a round's cohort but for those whose holder begins with a later round."""
        return set(round.cohort) - {member.seat for member in self._roster.members if member.first_round > round.index}

    def is_needed(self, newcomer: Member, round: Round) -> bool:
        """Whether a round cannot reach its quorum without this member, who could still take part in it."""
        training = {m.seat for m in self._roster.here if m.begun and m.first_round <= round.index}
        reachable = round.uploads.keys() | (round.cohort & training - round.refused.keys())
        return len(reachable) < self.quorum(round) and newcomer.seat in round.cohort - round.uploads.keys()

    def quorum(self, round: Round) -> int:
        """How many uploads a round must have to be closed. After a resume no more than can still come."""
        possible = sum(self._later.get(seat, 0) <= round.index for seat in round.cohort)
        return min(self._config.quorum_size, max(possible, 1))

    @property
    def given_up(self) -> list[int]:
        """The seats that no round waits for."""
        return sorted(self._absent)

    @property
    def lost(self) -> list[Member]:
        """Those whose connection broke and who are not back yet: one that is connected again, and has not said where it
        stands, is still on its way."""
        return [m for m in self._roster.members if not m.here and m.goodbye is None]

    def gone(self, left: Iterable[str]) -> list[str]:
        """Who is not there any more, and why. `left`: those whose seats are free again."""
        return [*left, *(f"client {member.seat}: {member.lost_why}" for member in self.lost)]

    def unfinished(self) -> list[Member]:
        """Those whose goodbye is still to come; not who was given up and has no connection."""
        waiting = [m for m in self._roster.members if m.begun and m.goodbye is None]
        return [m for m in waiting if m.link is not None or m.seat not in self._absent]

    def who_is_missing(self, round: Round, left: Iterable[str]) -> str:
        """For a reader, why a round has fewer uploads than clients."""
        missing = sorted(round.cohort - round.uploads.keys() - round.refused.keys())
        parts = [f"missing: {missing}"] if missing else []
        parts += [f"rejected: client {seat} ({reason})" for seat, reason in sorted(round.refused.items())]
        gone = self.gone(left)
        parts += [f"gone: {'; '.join(gone)}"] if gone else []
        return "; ".join(parts)
