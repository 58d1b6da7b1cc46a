"""A run's record: a line per round and telemetry during the run; summary, trace and HTML report after it.

A run never fails because of its record: a file that cannot be written is left out, with one warning that names it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from parablock_rt import report
from parablock_rt.client.reports import RoundReport
from parablock_rt.observe import reporters
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import Telemetry
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server.outcome import ClosedRound

log = logging.getLogger("parablock")


class Record:
    """The files that one process leaves in its run folder, and its reports elsewhere. Writes metrics, summary and trace
    only after `begin`."""

    def __init__(self, path: Path, period: float, prometheus: str | None, report_to: str | None) -> None:
        """`path`: the run folder, whose contents stay unchanged until `begin`. `period`: seconds between samples; 0:
        none. The other arguments are those of `reporters.open_all`. Raises ConfigError."""
        self.telemetry = Telemetry(reporters.open_all(path, prometheus, report_to), period)
        self._samples = period > 0
        self._lock = threading.Lock()
        self._folder: RunFolder | None = None
        self._early: list[ClosedRound | RoundReport] = []
        self._lost: set[str] = set()

    def begin(self, folder: RunFolder, past: Iterable[ClosedRound] = ()) -> None:
        """Starts to write to the folder, which now belongs to this run. `past`: the rounds closed before a resume."""
        with self._lock:
            self._folder = folder
            if self._samples:
                self._try("telemetry.jsonl", lambda: self.telemetry.add(reporters.JsonLines(folder)))
            for closed in past:
                self._append(closed)
            for done in self._early:
                self._note(done)

    def round(self, done: ClosedRound | RoundReport) -> None:
        """Notes a round. Any thread may call it. A round noted before `begin` is written by `begin`."""
        with self._lock:
            if self._folder is None:
                self._early.append(done)
            else:
                self._note(done)

    def finish(self, summary: dict[str, Any], timeline: Timeline) -> None:
        """Writes the summary, the trace and the report after the run."""
        folder = self._folder
        if folder is None:
            return
        self._try("summary.json", lambda: folder.write_json("summary.json", summary))
        self._try("trace.json", lambda: folder.write_trace(timeline, self.telemetry.counters()))
        report.write(folder.path)

    def _note(self, done: ClosedRound | RoundReport) -> None:
        self._append(done)
        self.telemetry.round(msgspec.to_builtins(done))

    def _append(self, done: ClosedRound | RoundReport) -> None:
        assert self._folder is not None
        folder = self._folder
        self._try("metrics.jsonl", lambda: folder.append_metrics(msgspec.to_builtins(done)))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Writes a file of the folder, unless writing it failed before: lines after a partial line are unreadable."""
        assert self._folder is not None
        if name in self._lost:
            return
        try:
            write()
        except OSError as error:
            self._lost.add(name)
            log.warning(
                "%s cannot be written (%s) and is not complete; the run itself goes on",
                self._folder.path / name,
                error.strerror or error,
            )
