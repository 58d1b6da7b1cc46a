"""Schedules and cohorts: pure, fair, and the same in every release, since server and clients never tell each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock_rt.config import RunConfig
from parablock_rt.schedule import block_of, cohort_of, permutation

ORDERS = ("cyclic", "reshuffled", "reverse")

# What the seeds have drawn since the first release.
RESHUFFLED_0 = [3, 0, 4, 1, 2, 2, 4, 1, 0, 3, 4, 0, 3, 1, 2]
RESHUFFLED_7 = [2, 0, 1, 2, 0, 1, 0, 2, 1, 2, 0, 1]
RESHUFFLED_BIG = [2, 6, 7, 3, 5, 4, 0, 1]
COHORTS_0 = [[4, 5], [1, 4], [0, 3], [0, 5], [1, 5], [2, 3], [2, 4], [0, 2]]
COHORTS_123 = [[0, 1, 2], [0, 2, 3], [0, 2, 3], [0, 1, 3], [1, 2, 3], [0, 1, 2]]

seeds = st.integers(min_value=-(2**63), max_value=2**64)


@pytest.mark.parametrize("order", ORDERS)
@given(seed=seeds, blocks=st.integers(1, 40), sweep=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_each_sweep_trains_every_block_once(order: str, seed: int, blocks: int, sweep: int) -> None:
    rounds = range(sweep * blocks, (sweep + 1) * blocks)
    assert sorted(block_of(order, seed, round, blocks) for round in rounds) == list(range(blocks))


@given(seed=seeds, sweep=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_cyclic_goes_up_and_reverse_goes_down_whatever_the_seed(seed: int, sweep: int) -> None:
    rounds = range(7 * sweep, 7 * (sweep + 1))
    assert [block_of("cyclic", seed, round, 7) for round in rounds] == [0, 1, 2, 3, 4, 5, 6]
    assert [block_of("reverse", seed, round, 7) for round in rounds] == [6, 5, 4, 3, 2, 1, 0]


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_reshuffled_draws_anew_for_every_sweep_and_seed(seed: int) -> None:
    """Of 20 blocks there are 2e18 orders: two equal ones are no accident."""

    def sweep(seed: int, index: int) -> tuple[int, ...]:
        return tuple(block_of("reshuffled", seed, 20 * index + i, 20) for i in range(20))

    assert len({sweep(seed, 0), sweep(seed, 1), sweep(seed, 2), sweep(seed + 1, 0), sweep(seed + 1, 1)}) == 5


@given(seed=seeds, round=st.integers(0, 10**6), clients=st.integers(1, 60), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_cohort_has_the_size_asked_for_and_only_clients_that_exist(
    seed: int, round: int, clients: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, clients))
    cohort = cohort_of(seed, round, clients, size)
    assert len(cohort) == size
    assert cohort <= set(range(clients))
    assert cohort_of(seed, round, clients, clients) == frozenset(range(clients))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_cohorts_change_from_round_to_round_and_leave_nobody_out(seed: int) -> None:
    """The chance that one of 6 clients is in none of 200 cohorts of half of them is 6 / 2^200."""
    cohorts = [cohort_of(seed, round, 6, 3) for round in range(200)]
    assert frozenset().union(*cohorts) == frozenset(range(6))
    assert len(set(cohorts)) > 5


def test_blocks_and_cohorts_are_drawn_independently() -> None:
    assert permutation(0, "block", 0, 20) != permutation(0, "cohort", 0, 20)


def test_reshuffled_is_what_it_was_in_every_release() -> None:
    """A client of another release must train what the server expects: a change here is a new protocol version."""
    assert [block_of("reshuffled", 0, round, 5) for round in range(15)] == RESHUFFLED_0
    assert [block_of("reshuffled", 7, round, 3) for round in range(12)] == RESHUFFLED_7
    assert [block_of("reshuffled", 2**63, round, 8) for round in range(8)] == RESHUFFLED_BIG


def test_cohorts_are_what_they_were_in_every_release() -> None:
    assert [sorted(cohort_of(0, round, 6, 2)) for round in range(8)] == COHORTS_0
    assert [sorted(cohort_of(123, round, 4, 3)) for round in range(6)] == COHORTS_123


def test_nothing_that_a_process_may_differ_in_changes_the_answers() -> None:
    """Neither the generators' state here nor the hash seed of another process."""
    here = [[block_of("reshuffled", 3, round, 9) for round in range(18)], sorted(cohort_of(3, 4, 30, 10))]
    torch.manual_seed(99)
    torch.rand(5)
    again = [[block_of("reshuffled", 3, round, 9) for round in range(18)], sorted(cohort_of(3, 4, 30, 10))]
    program = (
        "from parablock_rt.schedule import block_of, cohort_of\n"
        "print([[block_of('reshuffled', 3, round, 9) for round in range(18)], sorted(cohort_of(3, 4, 30, 10))])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    other = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert here == again
    assert other.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("fraction", "clients", "size"), [(1.0, 5, 5), (0.5, 4, 2), (0.01, 4, 1), (0.75, 4, 3), (0.34, 3, 1)]
)
def test_the_fraction_of_the_clients_that_train_is_rounded_and_never_none(
    fraction: float, clients: int, size: int
) -> None:
    assert RunConfig(rounds=1, clients=clients, fraction=fraction).cohort_size == size
