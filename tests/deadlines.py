"""Deadlines of rounds for tests: they pass once all have delivered who can, however long that takes on a busy machine.

Set one before the first client starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import parablock_rt as pb
from parablock_rt.server.progress import Deadline

_NEVER_S = 300.0


class _WithoutSeats(Deadline):
    """Passes when an open round lacks only seats that need not be waited for. Looked at by the server's thread alone,
    between two events, so that what it goes by does not change meanwhile."""

    def __init__(self, server: pb.Server, given_up: Callable[[int], Collection[int]]) -> None:
        super().__init__(None)
        self._coordinator = server._coordinator
        self._given_up = given_up

    @property
    def seconds(self) -> float:
        server = self._coordinator
        index = server._progress.oldest
        if not server._progress.started or server._progress.all_closed:
            return _NEVER_S
        round = server._run.rounds[index]
        missing = round.cohort - round.uploads.keys() - round.refused.keys()
        return 0.0 if missing and missing <= set(self._given_up(index)) else _NEVER_S

    @property
    def without_quorum(self) -> float:
        return self.seconds


def do_not_wait_for(server: pb.Server, seats: Callable[[int], Collection[int]]) -> None:
    """The deadline of a round passes when only these seats' uploads are missing. `seats` of a round: asked whenever
    the server looks at the clock."""
    server._coordinator._progress.deadline = _WithoutSeats(server, seats)


def do_not_wait_for_the_gone(server: pb.Server) -> None:
    """The deadline of a round passes when only those are missing who have no connection to the run."""
    coordinator = server._coordinator

    def gone(round: int) -> Collection[int]:
        present = {member.seat for member in coordinator._roster.here if member.begun}
        return coordinator._run.rounds[round].cohort - present

    do_not_wait_for(server, gone)
