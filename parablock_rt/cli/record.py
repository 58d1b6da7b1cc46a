"""A run's record: a line a round and telemetry while it goes on; then summary, trace and page. Starts nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from parablock_rt import report, reporters
from parablock_rt.client import RoundReport
from parablock_rt.outcome import ClosedRound
from parablock_rt.run_folder import RunFolder
from parablock_rt.telemetry import Telemetry
from parablock_rt.timeline import Timeline


class Record:
    """What one process leaves in its run folder, and reports elsewhere if wanted."""

    def __init__(self, folder: RunFolder, period: float, prometheus: str | None, report_to: str | None) -> None:
        """`period`: seconds between samples, 0: none. The others as for `reporters.open_all`. Raises ConfigError."""
        self._folder = folder
        self.telemetry = Telemetry(reporters.open_all(folder, prometheus, report_to, period), period)

    def round(self, done: ClosedRound | RoundReport) -> None:
        """Notes a round."""
        record = msgspec.to_builtins(done)
        self._folder.append_metrics(record)
        self.telemetry.round(record)

    def finish(self, summary: dict[str, Any], timeline: Timeline) -> None:
        """Writes what there is to say once the run is over."""
        self._folder.write_json("summary.json", summary)
        self._folder.write_trace(timeline, self.telemetry.counters())
        report.leave(self._folder.path)
