"""A run's record: a line per round and telemetry during the run; summary, trace and HTML report after it. `record`
makes one for a program that embeds the runtime; the command line makes its own.

A run never fails because of its record: a file that cannot be written is left out, with one warning that names it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from parablock_rt import report
from parablock_rt.client import Run
from parablock_rt.client.reports import RoundReport
from parablock_rt.errors import ConfigError
from parablock_rt.observe import meters, reporters, run_folder
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import PERIOD_S, Telemetry
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server import Server
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.summary import summarise, summarise_client

log = logging.getLogger("parablock")


@contextlib.contextmanager
def record(
    run: Run | Server,
    folder: str | os.PathLike[str],
    *,
    period: float = PERIOD_S,
    prometheus: int | str | None = None,
    report_to: str | None = None,
) -> Iterator[None]:
    """Leaves the record of a run in `folder`, as the command line does, with `report.html` among its files:

        with pb.join(address, model, optimizer) as run, pb.record(run, "runs/mine"):
            for batch in run.stream(loader):
                run.train_step(batch)

    Begin it before the first round. The `with` statement ends the run, if it has not ended: the record is complete
    after it. The record of an earlier run in the folder is replaced, unless a server resumes that run.

    Args:
        run: a client's run, or a server.
        period: seconds between two samples of the machine and the link; 0 takes none.
        prometheus: a port, or "host:port", at which to serve metrics meanwhile.
        report_to: "tensorboard", "wandb" or both, separated by a comma.

    Raises ConfigError, which leaves the run as it is, when the folder cannot be written or another run is recorded in
    it, or for an invalid argument.
    """
    _check_kinds(run, folder, period, report_to)
    path = Path(folder)
    resumed = isinstance(run, Server) and run.outcome.resumed_from is not None
    with run_folder.held(path):
        recorder = Record(path, period, None if prometheus is None else str(prometheus), report_to)
        try:
            with recorder.telemetry:
                of_the_run = RunFolder(path, resumed=resumed)  # what fails up to here leaves the run as it is
                with _listening(run, recorder), run:
                    recorder.begin(of_the_run, list(run.outcome.rounds) if isinstance(run, Server) else ())
                    name = "server" if isinstance(run, Server) else f"client {run.client}"
                    recorder.telemetry.start(name, meters.of_this_machine(run.link_stats))
                    yield
        finally:
            if isinstance(run, Server):
                summary = summarise(run.config, run.outcome, blocks=len(run.plan.blocks))
            else:
                summary = summarise_client(run)
            recorder.finish(summary, run.timeline)


def _check_kinds(run: object, folder: object, period: object, report_to: object) -> None:
    """Raises ConfigError for arguments of `record` of the wrong kind."""
    if not isinstance(run, (Run, Server)):
        raise ConfigError(
            f"expected a run or a server, found a {type(run).__name__}; pass what pb.join or pb.serve returned"
        )
    if not isinstance(folder, (str, os.PathLike)) or folder == "":
        raise ConfigError(f"expected a folder for the record, found {folder!r}; pass its path, such as 'runs/mine'")
    if not isinstance(period, (int, float)):
        raise ConfigError(f"expected period to be seconds between two samples, found {period!r}; pass a number")
    if report_to is not None and not isinstance(report_to, str):
        raise ConfigError(f"expected report_to to be one text, found {report_to!r}; pass 'tensorboard,wandb', say")


@contextlib.contextmanager
def _listening(run: Run | Server, recorder: Record) -> Iterator[None]:
    """Has the recorder told of each round, before the program's own listeners, which may raise."""
    run.listeners.insert(0, recorder.round)
    try:
        yield
    finally:
        run.listeners.remove(recorder.round)


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
        self._last = -1  # the last round that was written
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
        if done.round <= self._last:  # it was among the past ones
            return
        self._append(done)
        self.telemetry.round(msgspec.to_builtins(done))

    def _append(self, done: ClosedRound | RoundReport) -> None:
        assert self._folder is not None
        self._last = done.round
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
