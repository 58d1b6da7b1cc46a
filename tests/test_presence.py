"""Who is there, away, on the way back, given up or replaced: what the server waits for, and what it tells them.

The clients here say what they like; what they would be waited for in time is put right before the test begins.
"""

from __future__ import annotations

from typing import Any

import pytest
from leftovers import settles
from processes import start_server
from test_bad_input import RawClient, announcement, good_body
from test_replay import Returning

import parablock_rt as pb
from parablock_rt.server.progress import Progress
from parablock_rt.wire import protocol


def loop_turns(running: pb.Server) -> None:
    """Returns when the server has looked at its clock after this call."""
    progress = running._coordinator._progress
    for _ in range(2):
        before = progress._turn_at
        assert settles(lambda before=before: progress._turn_at > before or not running.running)


def come_back(client: Returning, welcome: protocol.Welcome, **said: Any) -> protocol.RejoinAnswer:
    """Has a client take its seat up again and say where it stands."""
    client.claim(welcome.client, welcome.secret)
    client.hear(protocol.WelcomeBack)
    client.say(protocol.Rejoin(**{"applied": -1, "handed_over": -1, "held": [], "undecided": []} | said))
    return client.hear(protocol.RejoinAnswer)


# ---- On the way back


def test_a_run_does_not_end_while_its_only_client_is_on_its_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for longer than a server waits with nobody to come; between its proof and its Rejoin it is neither
    here nor away."""
    monkeypatch.setattr("parablock_rt.server.progress._NOBODY_LEFT_S", 0.0)
    with start_server(clients=1) as running:
        with RawClient(running.address) as holder:
            welcome = holder.begin()
        with Returning(running.address) as returning:
            returning.claim(welcome.client, welcome.secret)
            returning.hear(protocol.WelcomeBack)
            loop_turns(running)
            assert running.running
            returning.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[]))
            assert returning.hear(protocol.RejoinAnswer).updates_from == 0


@pytest.mark.parametrize("deadline", [60.0, None], ids=["fixed", "adaptive"])
def test_a_slow_close_neither_prolongs_the_next_round_nor_makes_it_begin_later(
    monkeypatch: pytest.MonkeyPatch, deadline: float | None
) -> None:
    """The close takes the seconds from 3 to 21, in a turn of the loop that begins at 2."""
    clock = [0.0]
    monkeypatch.setattr("parablock_rt.server.progress.time.monotonic", lambda: clock[0])
    progress = Progress(pb.RunConfig(rounds=9, clients=2, deadline=deadline))
    progress.start()
    clock[0] = 2.0
    progress.turn(0.05)
    clock[0] = 21.0
    progress.close_oldest(3.0, complete=True)
    clock[0] = 22.0
    progress.turn(0.05)
    assert (progress.oldest_since, progress.open_s) == (22.0, 0.0)
    clock[0] = 40.0  # the process was stopped
    progress.turn(0.05)
    assert progress.open_s == 0.0
    clock[0] = 41.0
    progress.turn(0.05)
    assert progress.open_s == 1.0


def test_time_in_which_the_server_was_stopped_does_not_count_as_time_without_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("parablock_rt.server.progress.time.monotonic", lambda: clock[0])
    progress = Progress(pb.RunConfig(rounds=9, clients=2))
    progress.start()
    for clock[0] in (1.0, 1000.0):
        progress.turn(0.05)
        assert not progress.deserted(anybody=False, may_return=False)
    clock[0] = 1031.0
    assert progress.deserted(anybody=False, may_return=False)
