"""What a report says of runs whose records are uneven: two transfers in one line, or no summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import write_run
from test_report import NBSP, rewrite_lines

from parablock_rt.report import figures, folder
from parablock_rt.report.verdict import verdict


@pytest.mark.parametrize("summary", ["there", "gone"])
def test_times_that_come_two_in_one_line_and_none_in_the_next_are_not_taken_for_longer_ones(
    summary: str, tmp_path: Path
) -> None:
    """An acknowledgement that comes a little late belongs to the next line."""
    write_run(tmp_path / "r", rounds=8, serial_comm_s=None, overlap_efficiency=None)
    rewrite_lines(
        tmp_path / "r", lambda line: {"stages": {"send": 0.3 * (line["round"] % 2), "receive": 0.15, "fold": 0.0}}
    )
    for path in (tmp_path / "r").rglob("trace.json"):
        path.unlink()
    file = tmp_path / "r" / "summary.json"
    totals = {"send": 8 * 0.15, "receive": 8 * 0.15} if summary == "there" else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stages": totals}))
    (loaded,) = folder.load(tmp_path / "r")
    ahead = figures.forecast(loaded)
    assert ahead is not None
    assert ahead.send_s == pytest.approx(0.15, rel=0.15 if summary == "gone" else 1e-6)
    assert ahead.receive_s == pytest.approx(0.15)


def test_what_is_hidden_by_more_than_the_steps_needs_no_advice(tmp_path: Path) -> None:
    """An evaluation between rounds hides communication, too; the steps alone would not."""
    write_run(tmp_path / "r", serial_comm_s=6 * 0.85, overlap_efficiency=0.97)
    (loaded,) = folder.load(tmp_path / "r")
    assert f"97{NBSP}% of the communication was hidden" in verdict(loaded)
    assert "would hide the rest" not in verdict(loaded)


def test_of_a_run_that_was_cut_short_the_lines_say_how_long_it_waited(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    (tmp_path / "r" / "summary.json").unlink()
    rewrite_lines(tmp_path / "r", lambda _: {"compute_s": 0.5, "exposed_s": 0.25})
    (loaded,) = folder.load(tmp_path / "r")
    waited = "In the 6 recorded rounds the training thread waited 1.5 s in addition to 3.0 s of computing."
    assert waited in verdict(loaded)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.3, "0.30 s"), (0.012, "0.01 s"), (0.0034, "3.4 ms"), (2e-5, "0.02 ms")]
)
def test_a_short_exchange_does_not_read_as_none(seconds: float, text: str, tmp_path: Path) -> None:
    write_run(tmp_path / "r", serial_comm_s=6 * seconds)
    (loaded,) = folder.load(tmp_path / "r")
    assert f"exchange takes {text}" in verdict(loaded).replace("An", "an")
