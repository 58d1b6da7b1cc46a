"""What counts as computing and what as waiting: every second of a round is one of the two, and is told once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_client import one_step, serve, sgd
from test_misuse import join

import parablock_rt as pb
from parablock_rt.client.current_round import CurrentRound
from parablock_rt.client.exchange import Wait
from parablock_rt.observe.timeline import Stage, Timeline

DELAY_S = 0.02


def slow(function: Callable[..., Any], result: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, made to last longer; waiting is what is tested here."""

    def delayed(*args: Any, **named: Any) -> Any:
        time.sleep(DELAY_S)
        return result(function(*args, **named))

    return delayed


# What blocks the training thread, on what attribute of a run, and what it returns when it had to wait.
BLOCKERS = {
    "the verdict": ("_link", "wait", lambda seconds: max(seconds, DELAY_S)),
    "an encoding that reads the masters": ("_stager", "release_inputs", lambda _: True),
    "an encoding that reads the weights": ("_replica", "wait_encoded", lambda _: True),
}


@pytest.mark.parametrize("what", BLOCKERS)
def test_a_wait_of_the_training_thread_is_told_of_once_and_is_not_computing(what: str) -> None:
    owner, name, result = BLOCKERS[what]
    reports: list[pb.RoundReport] = []
    told: list[float] = []

    def note(report: pb.RoundReport) -> None:
        reports.append(report)
        told.append(run.exposed_s)

    with serve(rounds=4) as server, join(server, sgd, on_round=note) as run:
        blocker = getattr(run, owner)
        setattr(blocker, name, slow(getattr(blocker, name), result))
        run._link.is_undecided = lambda round: True  # type: ignore[method-assign]  # else its masters may be free already
        while not run.finished:
            one_step(run)
        for number, exposed_s in enumerate(told):
            assert sum(report.exposed_s for report in reports[: number + 1]) == pytest.approx(exposed_s)
        assert sum(report.exposed_s for report in reports) >= 3 * DELAY_S
        assert run.exposed_s >= told[-1]
        ((_, records), *_) = run.timeline.threads()
    spans = {stage: records[records["stage"] == stage] for stage in (Stage.COMPUTE, Stage.EXPOSED)}
    seconds = {stage: sum(found["end_ns"] - found["start_ns"]) / 1e9 for stage, found in spans.items()}
    assert seconds[Stage.EXPOSED] == pytest.approx(run.exposed_s)
    assert seconds[Stage.COMPUTE] == pytest.approx(run.compute_s)
    for computing in spans[Stage.COMPUTE]:
        for waiting in spans[Stage.EXPOSED]:
            assert min(computing["end_ns"], waiting["end_ns"]) <= max(computing["start_ns"], waiting["start_ns"])


@given(st.lists(st.integers(0, 50), max_size=10).map(sorted), st.integers(0, 50))
def test_computing_and_waiting_make_up_a_round(ends: list[int], began: int) -> None:
    waits = [Wait(start, end) for start, end in zip(ends[::2], ends[1::2], strict=False)]
    timeline = Timeline("client", "training")
    round = CurrentRound(3, 1, None, [], began)  # type: ignore[arg-type]
    computed_s = round.note_compute(timeline, waits)
    ((_, records),) = timeline.threads()
    ended = records["end_ns"].max()
    waited = sum(max(0, wait.end_ns - max(began, wait.start_ns)) for wait in waits)
    assert computed_s == pytest.approx((ended - began - waited) / 1e9)
    assert sum(records["end_ns"] - records["start_ns"]) == ended - began - waited
