"""The rings that threads write, the timeline that reads them, and the seconds of each stage."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parablock_rt import _C
from parablock_rt.config import RunConfig
from parablock_rt.observe import timeline
from parablock_rt.observe.timeline import RECORD, Stage, Timeline
from parablock_rt.stages import (
    STAGES,
    StageClock,
    StageSeconds,
    hidden_share,
    mean,
    steps_to_hide,
    total,
    waited_for_others,
)
from parablock_rt.staging.stager import Piece, Stager
from parablock_rt.wire.transport import Transport

WAIT_S = 90.0


def write(ring: _C.Ring, number: int) -> None:
    ring.write(Stage.FOLD, number, number + 1, 1, number, number, number, number, number)


def drained(ring: _C.Ring) -> np.ndarray:
    return np.frombuffer(ring.drain(), RECORD)


# ---- Rings


@given(st.integers(2, 40), st.lists(st.integers(0, 100), max_size=12))
def test_a_ring_gives_every_record_once_or_counts_it_as_lost(size: int, batches: list[int]) -> None:
    ring = _C.Ring(size)
    written = 0
    for batch in batches:
        for _ in range(batch):
            write(ring, written)
            written += 1
        found = drained(ring)
        kept = min(batch, ring.capacity)
        assert found["round"].tolist() == list(range(written - kept, written))
        for field in ("start_ns", "block", "chunk", "peer", "bytes"):
            assert (found[field] == found["round"]).all()
    assert ring.lost == sum(max(0, batch - ring.capacity) for batch in batches)
    assert ring.capacity >= size


def test_a_record_has_the_fields_that_were_written() -> None:
    ring = _C.Ring(8)
    ring.write(12, -(2**62), 2**62, 3, 1, 2, 3, 4, 2**63)
    (record,) = drained(ring)
    assert record.tolist() == (-(2**62), 2**62, 2**63, 1, 2, 3, 4, 12, 3, 0, 0)


def test_a_reader_beside_a_fast_writer_sees_whole_records_in_order() -> None:
    """The encode thread writes two records a chunk, faster than Python looks at them: it is always a ring ahead, and
    overwrites the oldest slots while they are being read."""
    chunks, numel, seen, rounds = 2**15, 128, [], 0
    ring = _C.Ring(2**12)
    now, ref = torch.ones(numel * chunks), torch.zeros(numel * chunks)
    with Transport() as transport:
        stager = Stager(ring)
        while ring.lost == 0 or rounds < 8:  # until it was overtaken
            encoding = stager.encode([Piece(now, ref)], "int8", numel, transport, kind=1, round=rounds, block=7)
            while not encoding.done:
                seen += drained(ring).tolist()
            stager.release(encoding)
            rounds += 1
        seen += drained(ring).tolist()
    order = [(record[3], record[5], record[7]) for record in seen]
    assert order == sorted(set(order))
    assert len(seen) + ring.lost == 2 * chunks * rounds
    for start, end, nbytes, _, block, chunk, _, stage, kind, *_ in seen:
        assert 0 < start <= end
        assert (nbytes, block, kind) == (130, 7, 1)
        assert stage in (Stage.ENCODE, Stage.CHECKSUM)
        assert chunk < chunks


# ---- Timelines


def test_a_span_is_noted_even_when_its_work_fails() -> None:
    made = Timeline("p", "main")
    before = time.monotonic_ns()
    with pytest.raises(ZeroDivisionError), made.span(Stage.APPLY, round=3, block=2, peer=5, bytes=9):
        raise ZeroDivisionError
    ((name, (record,)),) = made.threads()
    assert name == "main"
    assert (record["stage"], record["round"], record["block"], record["peer"]) == (Stage.APPLY, 3, 2, 5)
    assert (record["bytes"], record["chunk"]) == (9, _C.WHOLE_TRANSFER)
    assert before <= record["start_ns"] <= record["end_ns"] <= time.monotonic_ns()


def test_a_timeline_that_is_off_makes_no_ring_but_still_adds_up_seconds(tmp_path: Path) -> None:
    made = Timeline("p", "main", on=False)
    assert made.ring("pb-encode", 100) is None
    made.add(Stage.COMPUTE, 0, 2_000_000_000, round=1)
    with made.span(Stage.FOLD):
        pass
    assert made.threads() == []
    assert made.lost == 0
    assert made.stages.total().compute == 2.0


def test_a_timeline_keeps_the_newest_records_and_says_how_many_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "KEPT_RECORDS", 10)
    made = Timeline("p", "main")
    for number in range(25):
        made.add(Stage.FOLD, number, number, round=number)
        if number % 5 == 4:
            made.drain()
    ((_, records),) = made.threads()
    assert records["round"].tolist() == list(range(15, 25))
    assert made.lost == 15


def test_rings_have_room_for_a_round_of_every_link() -> None:
    from processes import make_model

    from parablock_rt import BlockPlan

    plan = BlockPlan.from_model(make_model(width=512), blocks=1)
    config = RunConfig(rounds=1, clients=1, chunk=128, staleness=1)
    chunks = -(-plan.blocks[0].flat_numel // 128)
    ring = Timeline("p", "main").transfer_ring("pb-transport", plan, config, links=2)
    assert ring is not None
    # Two links, three rounds that may be under way, and of each chunk, both ways: checksum, send and acknowledgement on
    # one side, receive and check on the other.
    assert ring.capacity >= 2 * 3 * chunks * (3 + 2)


# ---- Seconds a stage


stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])), max_size=15)


@given(stretches)
def test_stretches_that_overlap_count_once(found: list[tuple[int, int]]) -> None:
    clock = StageClock()
    for start, end in found:
        clock.add("send", start * 10**9, end * 10**9)
    covered = {second for start, end in found for second in range(start, end)}
    assert clock.total().send == pytest.approx(len(covered))
    assert clock.take().send == pytest.approx(len(covered))
    assert clock.total().send == pytest.approx(len(covered))
    assert clock.take() == StageSeconds()


def test_a_window_holds_what_ended_in_it_and_the_total_is_the_sum_of_the_windows() -> None:
    clock = StageClock()
    clock.add("encode", 0, 2 * 10**9)
    clock.add_seconds("fold", 0.5)
    assert clock.take() == StageSeconds(encode=2.0, fold=0.5)
    clock.add("encode", 10**9, 4 * 10**9)  # its first second was counted in the window before
    assert clock.take() == StageSeconds(encode=2.0)
    clock.add("apply", 0, 10**9)
    assert clock.total() == StageSeconds(encode=4.0, fold=0.5, apply=1.0)


def test_the_mean_of_stages_is_taken_one_by_one() -> None:
    assert mean([StageSeconds(compute=1.0, send=3.0), StageSeconds(compute=2.0)]) == StageSeconds(compute=1.5, send=1.5)
    assert mean([]) == StageSeconds()
    assert total([StageSeconds(compute=1.0), StageSeconds(compute=2.0)], 2.0) == StageSeconds(compute=6.0)
    assert STAGES == ("compute", "encode", "copy", "send", "fold", "wait", "receive", "apply")


# ---- What follows from seconds


def test_the_hidden_share_needs_something_to_hide() -> None:
    assert hidden_share(1.0, 4.0) == 0.75
    assert hidden_share(5.0, 4.0) == -0.25  # longer than the exchanges take, and it says so
    assert hidden_share(1.0, None) is None
    assert hidden_share(0.0, 0.0) is None


def test_no_more_was_waited_for_others_than_training_was_blocked() -> None:
    assert waited_for_others(3.0, 1.0) == 1.0
    assert waited_for_others(0.5, 1.0) == 0.5
    assert waited_for_others(-1e-9, 1.0) == 0.0


@pytest.mark.parametrize(
    ("send_s", "receive_s", "staleness", "steps"),
    [(3.0, 1.0, 1, 8), (3.0, 1.0, 2, 6), (1.0, 3.0, 4, 6), (2.0, 2.0, 2, 4), (0.0, 0.0, 1, 8)],
)
def test_each_direction_carries_a_body_per_round_whatever_the_staleness(
    send_s: float, receive_s: float, staleness: int, steps: int
) -> None:
    """An exchange of 4 s and steps of 0.5 s."""
    assert steps_to_hide(4.0, send_s, receive_s, 0.5, staleness) == steps


def test_there_is_at_least_one_local_step() -> None:
    assert steps_to_hide(0.1, 0.05, 0.05, 10.0, 1) == 1
