"""A benchmark's result: the interface of all benchmarks, the result's file, and the comparison with an older result.

A result is a plain dictionary: `benchmark` (its name), `machine`, `settings` and `rows`, and further keys of the single
benchmark. Metrics are derived from the result, not stored, so that results of older releases can be compared too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from parablock_rt.errors import ConfigError
from parablock_rt.observe.run_folder import to_json

Result = dict[str, Any]


class Benchmark(Protocol):
    """The interface of a benchmark's module."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the benchmark's own options."""

    def run(self, options: argparse.Namespace) -> Result:
        """Measures; returns everything but `benchmark` and `machine`."""

    def tables(self, result: Result) -> list[Table]:
        """The result as tables for a reader."""

    def metrics(self, result: Result) -> dict[str, float]:
        """The figures to compare between two results, by name; larger is better."""

    def plot(self, result: Result, figure: Any) -> None:
        """Draws the result into an empty matplotlib figure."""


_kept_by: ContextVar[Callable[[Result], None] | None] = ContextVar("kept_by", default=None)


def keep(result: Result) -> None:
    """Writes the results so far, which form a result of their own: a run that is killed loses only the rest."""
    if (write := _kept_by.get()) is not None:
        write(result)


@contextmanager
def kept_by(write: Callable[[Result], None]) -> Iterator[None]:
    """Inside this context `keep` calls `write`; outside `keep` does nothing."""
    token = _kept_by.set(write)
    try:
        yield
    finally:
        _kept_by.reset(token)


@dataclass(frozen=True)
class Comparison:
    """One metric in two results; `new` is None if only the older result has it. `ratio`: new over old; below 1 is
    worse."""

    name: str
    old: float
    new: float | None

    @property
    def ratio(self) -> float:
        """New over old. If the old value is 0 or less there is no ratio: gives 1 for the same value, infinity for a
        better one, 0 for a worse one. Also 0 without a new value: a case that fails now must not look as good as
        before."""
        if self.new is None:
            return 0.0
        if self.old > 0:
            return self.new / self.old
        return 1.0 if self.new == self.old else float("inf") if self.new > self.old else 0.0


def read(path: Path, name: str) -> Result:
    """The result of benchmark `name` in a file, or in the file of that name in a folder. Raises ConfigError."""
    file = path / f"{name}.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the older result {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"the older result {file} is not JSON: {error}") from error
    found = result.get("benchmark", name) if isinstance(result, dict) else None
    if found != name or not isinstance(result.get("rows"), list):
        raise ConfigError(f"expected a result of `parablock bench {name}` in {file}, found one of {found!r}")
    return dict(result)


def compare(old: dict[str, float], new: dict[str, float]) -> list[Comparison]:
    """Every metric of the older result, the worst first. Raises ConfigError when the results share no metric."""
    if not old.keys() & new.keys():
        raise ConfigError("the two results have no metric in common: other settings, or another benchmark")
    found = [Comparison(name, value, new.get(name)) for name, value in old.items()]
    return sorted(found, key=lambda each: each.ratio)


def unlike_settings(old: Result, new: Result) -> list[str]:
    """The settings in which two results differ, as "name: old instead of new"; such results are not comparable.

    Repetitions may differ, because they only reduce noise. Settings that only one result has may differ too, because
    the other release did not have them.
    """
    before, now = (json.loads(to_json(result.get("settings", {}))) for result in (old, new))
    names = [name for name in now if name in before and name != "repetitions"]
    return [f"{name}: {before[name]} instead of {now[name]}" for name in names if before[name] != now[name]]


def comparison_table(comparisons: list[Comparison], threshold: float) -> Table:
    """The comparison as a table for a reader, with marks on ratios below the threshold."""
    table = Table("metric", title="new over old; larger is better")
    for name in ("old", "new", "ratio"):
        table.add_column(name, justify="right")
    for each in comparisons:
        mark = "[red]below the threshold[/red] " if each.ratio < threshold else ""
        name = each.name if each.new is not None else f"{each.name} (not in the new result)"
        table.add_row(name, f"{each.old:.4g}", shown(each.new, ".4g"), f"{mark}{each.ratio:.3f}")
    return table


def notes(result: Result) -> list[str]:
    """What rows say of their own figures, such as that a case was left out: a line for each different note."""
    noted: dict[str, list[str]] = {}
    for row in result["rows"]:
        if note := row.get("note"):
            name = ", ".join(str(row[key]) for key in ("case", "by", "params", "body_bytes") if row.get(key))
            noted.setdefault(note, []).append(name or "all")
    return [
        f"{names[0]}{f' and {len(names) - 1} more rows' if len(names) > 1 else ''}: {note}"
        for note, names in noted.items()
    ]


def columns(title: str, *names: str) -> Table:
    """An empty table whose first column is text and the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def shown(value: float | None, form: str = ".3f") -> str:
    """A number for a table; a dash for None."""
    return "–" if value is None else format(value, form)
