"""Joining, taking part and leaving, and breaking off and coming back, again and again: nothing of it may stay behind in
either process."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from leftovers import least_growth, settles
from processes import WAIT_S, client, loss_fn, make_batches, make_model, sgd, start_server, starter
from test_resume import BODY, WIDE, Start, through
from tls_cases import both_ends, needs_tls

import parablock_rt as pb

WARM_UP, STRETCHES, CYCLES = 20, 3, 70
MIB = 2**20

IN_TLS = pytest.param(2, True, id="tls-2-lanes", marks=needs_tls)
IN_THE_CLEAR = pytest.param(1, False, id="clear")


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


def _cycle(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """A whole run of one client: connect, handshake, snapshot, upload, update, goodbye, close."""
    with start_server(rounds=1, clients=1, local_steps=1, **theirs) as running:
        # Other weights than the server's, so that there is a snapshot, too.
        with pb.join(running.address, make_model(seed=1), sgd, **ours) as run:
            for batch in run.stream(make_batches(0)):
                run.train_step(batch, loss_fn)
        assert running.wait(WAIT_S).digest == run.digest


@pytest.mark.parametrize(("lanes", "encrypted"), [IN_THE_CLEAR, IN_TLS])
def test_two_hundred_runs_leave_no_thread_no_descriptor_and_no_memory_behind(lanes: int, encrypted: bool) -> None:
    torch.set_num_threads(1)
    process = psutil.Process(os.getpid())
    ends = both_ends(lanes, encrypted)

    def held() -> tuple[int, int, int]:
        return process.num_threads(), threading.active_count(), process.num_fds()

    def cycles(count: int = CYCLES) -> None:
        for _ in range(count):
            _cycle(*ends)
        gc.collect()

    cycles(WARM_UP)
    before = held()
    grown = least_growth(lambda: process.memory_info().rss, cycles, STRETCHES)
    assert settles(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    # A run holds 64 KiB of weights on each side, several times over: a leak of one copy per run would be 4 MiB.
    assert grown < 2.5 * MIB


@pytest.mark.parametrize(("lanes", "encrypted"), [IN_THE_CLEAR, IN_TLS])
def test_two_hundred_breaks_leave_neither_threads_nor_descriptors_nor_memory(
    start: Start, lanes: int, encrypted: bool
) -> None:
    """Up and down, with FIN and RST, anywhere in a transfer; both ends are watched."""
    theirs, ours = both_ends(lanes, encrypted)
    with start_server(rounds=100_000, clients=1, deadline=60.0, trace=False, **WIDE, **theirs) as running:
        bad, address = through(start, running.address)
        victim = start(client, address, data=0, width=256, trace=False, **ours)
        victim.expect("joined")
        watched = [psutil.Process(), psutil.Process(victim.pid)]
        before: list[tuple[int, int]] = []
        memory: list[list[int]] = []
        for cycle in range(WARM_UP + STRETCHES * CYCLES):
            bad.tell(("up" if cycle % 2 else "down", 20_000 + 4_999 * cycle % BODY, "reset" if cycle % 3 else "cut"))
            bad.expect("fired")
            bad.tell(("mend",))
            bad.expect("mended")
            victim.take_reports()
            while running.outcome.reconnects <= cycle:
                victim.pause(0.005)
            if cycle + 1 == WARM_UP:
                before = [(p.num_threads(), p.num_fds()) for p in watched]
            if (cycle + 1 - WARM_UP) % CYCLES == 0:
                memory.append([p.memory_info().rss for p in watched])
        for process, (threads, descriptors) in zip(watched, before, strict=True):
            assert settles(lambda p=process, most=threads: p.num_threads() <= most)
            # A link may be on its way.
            assert settles(lambda p=process, most=descriptors + 2 * lanes: p.num_fds() <= most)
        victim.kill()
    assert len(memory) == STRETCHES + 1
    for resident in zip(*memory, strict=True):
        # A packed block a break would be 4 MiB.
        assert min(after - before for before, after in itertools.pairwise(resident)) < 2.5 * MIB
