"""How long a wait may take: by what moves."""

from __future__ import annotations

import pytest
from processes import WAIT_S, loss_fn, make_batches, make_model, sgd, start_server

import parablock_rt as pb
from parablock_rt.errors import WaitTimeoutError
from parablock_rt.wire.patience import Patience


def test_a_wait_in_which_nothing_moves_ends_when_its_time_is_up() -> None:
    patience = Patience(10.0, least=100, now=50.0, moved=7)
    assert patience.left(53.0) == 7.0
    assert not patience.over(59.9, moved=7)
    assert patience.over(60.0, moved=7)


def test_a_slow_transfer_may_take_as_long_as_it_needs() -> None:
    patience = Patience(10.0, least=100, now=0.0, moved=0)
    for tenth in range(1, 1000):
        assert not patience.over(tenth * 10.0, moved=tenth * 100)
        assert patience.left(tenth * 10.0) == 10.0


def test_a_trickle_is_no_progress() -> None:
    patience = Patience(10.0, least=100, now=0.0, moved=0)
    assert not patience.over(10.0, moved=100)
    assert not patience.over(15.0, moved=150)
    assert patience.over(20.0, moved=199)


def test_what_moved_on_a_connection_that_broke_is_no_progress_of_the_next() -> None:
    patience = Patience(10.0, least=100, now=0.0, moved=5000)
    assert not patience.over(10.0, moved=100)
    assert patience.over(20.0, moved=150)


def test_a_client_waits_for_a_transfer_that_takes_longer_than_its_patience() -> None:
    """A block of 38 kB at 8 kB/s."""
    with start_server(rounds=1, clients=1, width=192, chunk=1024) as running:
        with pb.join(running.address, make_model(width=192), sgd, rate=8_000.0, patience=4.0) as run:
            for batch in run.stream(make_batches(0, 192)):
                run.train_step(batch, loss_fn)
        assert run.exposed_s > 4.0
        assert run.digest == running.wait(WAIT_S).digest


def test_a_client_does_not_wait_longer_than_its_patience_for_a_server_from_which_nothing_comes() -> None:
    """Another client is missing: the link is alive, and nothing is transferred."""
    with (
        start_server(clients=2, width=64) as running,
        pytest.raises(WaitTimeoutError, match=r"waited 0\.5 s for the other"),
    ):
        pb.join(running.address, make_model(), sgd, patience=0.5)
