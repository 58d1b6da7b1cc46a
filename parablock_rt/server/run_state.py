"""The state of one run in the server's memory, which most modules of the server work on.

Has no behaviour, sockets or threads of its own. Only the server's thread may change it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parablock_rt.config import RunConfig
from parablock_rt.observe.timeline import Timeline
from parablock_rt.schedule import Schedule
from parablock_rt.server.members import Identity
from parablock_rt.server.outcome import Outcome
from parablock_rt.server.progress import Progress
from parablock_rt.server.rounds import OpenRounds


@dataclass(frozen=True, eq=False)
class RunState:
    """`identity`, `schedule`: what never changes; `progress`, `rounds`: which rounds are open, and what they have;
    `outcome`: what has come of the closed ones; `timeline`: how long everything took."""

    identity: Identity
    schedule: Schedule
    progress: Progress
    rounds: OpenRounds
    outcome: Outcome
    timeline: Timeline

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.identity.config


def new_run(identity: Identity, numels: Iterable[int], *, trace: bool) -> RunState:
    """The state of a run that has not begun. `numels`: the elements of each block; `trace`: keep records of all
    transfers."""
    schedule = Schedule(identity.config, list(numels))
    timeline = Timeline("server", "pb-server", on=trace)
    timeline.run = identity.run
    return RunState(identity, schedule, Progress(identity.config), OpenRounds(schedule), Outcome(), timeline)
