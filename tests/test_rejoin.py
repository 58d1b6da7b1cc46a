"""Links that break when they have several lanes, are in TLS, or have not brought their client into the run yet.

Real processes and sockets; each test asserts that its fault has fired.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from processes import WAIT_S, client, start_server, starter
from test_resume import MIDDLE, WIDE, Start, arm, through, undisturbed_digest
from tls_cases import both_ends, needs_tls

IN_TLS = pytest.param(True, id="tls", marks=needs_tls)
IN_THE_CLEAR = pytest.param(False, id="clear")


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


def disturbed(
    start: Start,
    harm: tuple[Any, ...],
    *,
    lanes: int = 1,
    encrypted: bool = False,
    width: int = 256,
    idle_timeout: float = 60.0,
    **settings: Any,
) -> tuple[dict[str, Any], Any, dict[str, int]]:
    """A run of two clients, one of which has its link harmed: its end, the outcome, and what has passed the relay.

    Asserts that the harm was done and that the digest is the undisturbed one.
    """
    settings |= WIDE | {"width": width}
    theirs, ours = both_ends(lanes, encrypted)
    with start_server(**settings, **theirs, idle_timeout=idle_timeout) as running:
        bad, address = through(start, running.address)
        arm(bad, *harm)
        victim = start(client, address, data=0, width=width, idle_timeout=idle_timeout, **ours)
        other = start(client, running.address, data=1, width=width, **ours)
        assert bad.expect("fired") == harm[2]
        if harm[2] != "hold":
            bad.tell(("mend",))
        ends = [process.expect("done") for process in (victim, other)]
        outcome = running.wait(WAIT_S)
        bad.tell(("count",))
        passed = bad.expect("passed")
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**settings)
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6
    return ends[0], outcome, passed


# ---- In the middle of a transfer


@pytest.mark.parametrize(("lanes", "encrypted"), [(1, True), (3, False), (2, True), (4, True)])
@pytest.mark.parametrize("harm", ["cut", "reset"])
@pytest.mark.parametrize("way", ["up", "down"])
@needs_tls
def test_a_transfer_goes_on_where_it_was_also_over_several_lanes_and_in_tls(
    start: Start, way: str, harm: str, lanes: int, encrypted: bool
) -> None:
    """Counted from the first connection on, so that the handshakes and all lanes are among what has passed."""
    end, outcome, passed = disturbed(start, (way, 3 * MIDDLE, harm), lanes=lanes, encrypted=encrypted)
    assert end["reconnects"] == outcome.reconnects == 1
    assert end["resumed_bytes"] > 0 or lanes > 1  # what has come is kept as far as it has no gap
    assert outcome.left == []
    assert passed["connections"] == 2 * lanes  # the new link has its lanes, too


@pytest.mark.parametrize("harm", ["cut", "hold"])
def test_a_network_that_is_gone_for_half_of_the_idle_time_loses_nothing(start: Start, harm: str) -> None:
    """Thirty seconds of the usual sixty, scaled down. Where nobody notices, the link goes on as it was."""
    idle: dict[str, Any] = {"idle_timeout": 10.0}
    with start_server(**WIDE, **idle) as running:
        bad, address = through(start, running.address)
        arm(bad, "up", 3 * MIDDLE, harm)
        victim = start(client, address, data=0, width=256, **idle)
        other = start(client, running.address, data=1, width=256, **idle)
        assert bad.expect("fired") == harm
        victim.pause(5.0)
        bad.tell(("mend",))
        ends = [process.expect("done") for process in (victim, other)]
        outcome = running.wait(WAIT_S)
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**WIDE)
    assert ends[0]["reconnects"] == outcome.reconnects == (1 if harm == "cut" else 0)
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6


@needs_tls
def test_a_bit_that_flips_in_tls_costs_the_connection_and_no_more(start: Start) -> None:
    """TLS notices it before the chunk's checksum could, and ends the connection."""
    end, outcome, _ = disturbed(start, ("up", 3 * MIDDLE, "flip"), lanes=2, encrypted=True)
    assert end["reconnects"] == outcome.reconnects == 1


# ---- One lane of several. A block is larger than what two lanes take at once, so that each has a part of it.

LARGE: dict[str, Any] = {"lanes": 3, "width": 768, "format": "fp32"}  # 2.4 MB


@pytest.mark.parametrize("encrypted", [IN_THE_CLEAR, IN_TLS])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("harm", ["cut", "reset"])
def test_one_lane_that_dies_in_the_middle_of_a_frame_loses_nothing(
    start: Start, harm: str, way: str, encrypted: bool
) -> None:
    end, outcome, passed = disturbed(start, (way, 5000, harm, 1), encrypted=encrypted, **LARGE)
    assert end["reconnects"] == outcome.reconnects == 1
    assert outcome.left == []
    assert passed["connections"] == 6


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_lane_that_is_half_open_is_noticed_by_its_silence_and_loses_nothing(start: Start, way: str) -> None:
    """The others go on living meanwhile, with pings and all."""
    end, outcome, passed = disturbed(start, (way, 5000, "hold", 1), idle_timeout=5.0, **LARGE)
    assert end["reconnects"] == outcome.reconnects == 1
    assert outcome.left == []
    assert passed["connections"] == 6


# ---- Before the run has begun


def broken_entry(start: Start, harm: tuple[Any, ...], *, idle_timeout: float = 60.0, **options: Any) -> Any:
    """A run of two clients, one of which has its link harmed before its first round. Returns the outcome.

    That one has other weights than the server's, so that there is a snapshot. Asserts that the harm was done, and that
    nothing is missing in the run's result. The quorum is one: nobody is let in early because a round needs it.
    """
    with start_server(**WIDE, quorum=1, deadline=60.0) as running:
        bad, address = through(start, running.address)
        arm(bad, *harm)
        victim = start(client, address, data=0, width=256, model_seed=5, idle_timeout=idle_timeout, **options)
        assert bad.expect("fired") == harm[2]
        if harm[2] != "hold":
            bad.tell(("mend",))
        other = start(client, running.address, data=1, width=256)
        ends = [process.expect("done") for process in (victim, other)]
        outcome = running.wait(WAIT_S)
        bad.tell(("count",))
        assert bad.expect("passed")["connections"] == 2
    assert [end["digest"] for end in ends] == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**WIDE)
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6
    return outcome


MID_SNAPSHOT = 600_000  # of four blocks of 263 kB
ENTRY = [("up", b"Proof"), ("down", b"Welcome"), ("up", b"Ready"), ("down", b"Snapshot"), ("down", MID_SNAPSHOT)]


@pytest.mark.parametrize("harm", ["cut", "reset"])
@pytest.mark.parametrize(("way", "where"), ENTRY)
def test_a_client_whose_link_breaks_before_it_has_begun_joins_anew_by_itself(
    start: Start, way: str, where: bytes | int, harm: str
) -> None:
    broken_entry(start, (way, where, harm))


def test_a_client_that_does_not_hear_that_the_run_begins_is_in_its_first_round_all_the_same(start: Start) -> None:
    """For the server it takes part already, and its seat is kept for it."""
    with start_server(**WIDE, quorum=1, deadline=60.0) as running:
        bad, address = through(start, running.address)
        arm(bad, "down", b"Begin", "reset")
        victim = start(client, address, data=0, width=256)
        other = start(client, running.address, data=1, width=256)
        assert bad.expect("fired") == "reset"
        bad.tell(("mend",))
        digests = [process.expect("done")["digest"] for process in (victim, other)]
        outcome = running.wait(WAIT_S)
    assert digests == [outcome.digest] * 2
    assert outcome.digest == undisturbed_digest(**WIDE)
    assert [closed.contributions for closed in outcome.rounds] == [2] * 6


def test_a_newcomer_takes_the_place_of_its_own_connection_that_the_server_has_not_found_broken(start: Start) -> None:
    """Else all seats would be taken until the server has noticed."""
    outcome = broken_entry(start, ("down", MID_SNAPSHOT, "hold", 0), idle_timeout=5.0)
    assert len(outcome.left) == 1
    assert "its connection broke before it began, and it joined anew" in outcome.left[0]


def test_one_who_could_not_begin_gives_up_when_its_time_is_over(start: Start) -> None:
    with start_server(**WIDE) as running:
        bad, address = through(start, running.address)
        arm(bad, "down", MID_SNAPSHOT, "cut")
        victim = start(client, address, data=0, width=256, model_seed=5, reconnect=0.5)
        assert bad.expect("fired") == "cut"
        kind, reason = victim.expect("error")
        assert (kind, address in reason) == ("PeerLostError", True)


def test_what_is_no_server_of_ours_is_not_tried_again_and_again(start: Start) -> None:
    with start_server(**WIDE) as running:
        bad, address = through(start, running.address)
        arm(bad, "up", 10, "cut")  # nothing was answered yet
        kind, reason = start(client, address, width=256).expect("error")
        assert bad.expect("fired") == "cut"
        assert (kind, "while waiting for Challenge" in reason) == ("PeerLostError", True)
