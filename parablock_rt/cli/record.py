"""A run's record: a line a round and telemetry while it goes on; then summary, trace and page. Starts nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from parablock_rt import report
from parablock_rt.client.run import RoundReport
from parablock_rt.observe import reporters
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import Telemetry
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server.outcome import ClosedRound


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
        report.write(self._folder.path)
