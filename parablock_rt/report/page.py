"""The HTML file: puts style, scripts and data into the template. Computes no figures."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from parablock_rt.observe.run_folder import to_json
from parablock_rt.report import figures, folder
from parablock_rt.report.folder import Recorded, Span
from parablock_rt.report.verdict import verdict
from parablock_rt.version import __version__

log = logging.getLogger("parablock")

_SCRIPTS = ("format.js", "charts.js", "timeline.js", "page.js")


def render(paths: Sequence[Path]) -> str:
    """The report on the runs in these folders, as the text of an HTML file.

    The report notes what is missing or damaged in a folder. Raises ConfigError for a path without a run.
    """
    runs = [run for path in paths for run in folder.load(path)]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
    content = {"release": __version__, "runs": [describe(run) for run in runs]}
    page = _read("page.html")
    parts = {
        "style": _read("page.css"),
        "script": "\n".join(_read(name) for name in _SCRIPTS),
        "data": embeddable(to_json(content)),
    }
    for name, part in parts.items():  # the data last: it is the only part that is not ours and could hold a placeholder
        page = page.replace(f"<!-- {name} -->", part, 1)
    return page


def write(path: Path) -> None:
    """Writes report.html into a run's folder. A run never fails because of its report: errors are only logged."""
    try:
        temporary = path / ".report.html.part"
        temporary.write_text(render([path]), encoding="utf-8")
        temporary.replace(path / "report.html")
    except Exception:  # the run itself has ended well
        log.warning("could not write the report for %s", path, exc_info=True)


def embeddable(json: str) -> str:
    """JSON escaped for a script element: nothing in it can end the element or start a comment."""
    return json.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def describe(run: Recorded) -> dict[str, Any]:
    """One run as the page's scripts expect it. Times are in seconds if the name ends in `_s`, else in milliseconds."""
    busy, ahead = figures.activity(run), figures.forecast(run)
    return {
        "name": run.name,
        "verdict": verdict(run),
        "notes": run.notes,
        "summary": run.summary,
        "rounds": figures.rounds(run),
        "clients": figures.clients(run),
        "activity": busy and {"bin_s": busy.bin_us / 1e6, "series": busy.series, "idle_link": busy.idle_link},
        "forecast": ahead and {"exchange_s": ahead.exchange_s, "step_s": ahead.step_s, "measured": ahead.measured},
        "telemetry": figures.telemetry(run),
        "timeline": _timeline(run.spans, figures.origin_us(run)),
    }


def _timeline(spans: list[Span], origin: float) -> dict[str, Any]:
    """The spans by column. `rows` are (process, track) and `labels` are (name, stage); the spans have their indices."""
    order = {stage: at for at, stage in enumerate(figures.STAGES)}
    first = {(span.process, span.track): figures.stage_of(span) for span in reversed(spans)}
    tracks = sorted(first, key=lambda row: (_natural(row[0]), order.get(first[row], len(order)), _natural(row[1])))
    rows = {track: at for at, track in enumerate(tracks)}
    labels: dict[tuple[str, str], int] = {}
    columns: dict[str, list[float]] = {"row": [], "label": [], "start": [], "dur": []}
    for span in spans:
        columns["row"].append(rows[span.process, span.track])
        columns["label"].append(labels.setdefault((span.name, figures.stage_of(span)), len(labels)))
        columns["start"].append(round((span.start_us - origin) / 1e3, 3))
        columns["dur"].append(round(span.dur_us / 1e3, 3))
    return {"rows": list(rows), "labels": list(labels), **columns}


def _natural(name: str) -> list[tuple[str, int, str]]:
    """A sort key that puts client 2 before client 10."""
    return [(text, len(number), number) for text, number in re.findall(r"([^0-9]*)0*([0-9]*)", name)]


def _read(name: str) -> str:
    return files("parablock_rt.report").joinpath(name).read_text(encoding="utf-8")
