"""The tables in docs/, made from bench/results: `python -m bench.page` writes them, `--check` only compares.

docs/benchmarks.md is made as a whole; other pages have tables between `<!-- bench:NAME -->` and `<!-- end -->`.

Every number on a page comes from a result file, at most converted to another unit or divided by another such number.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.table import Table

from .cli import NAMES, load
from .result import Result, notes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
APART = {"shaped": "bench.shaped", "peers": "bench.peers.run"}  # separate programs: need root or other systems
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `python -m bench.page` from the files in [bench/results](../bench/results); a test checks that the page matches
them. `make bench` measures again. Figures differ between machines, and on a shared machine from hour to hour: read the
ratios, because both parts of a ratio come from the same run. `parablock bench NAME --compare OLD.json` prints the
ratios to an older result and exits with 1 if a ratio is below `--threshold` (0.9), if the new result lacks a metric, or
if the settings differ.
"""


def page(results: Path) -> str:
    """The page on the results in a folder; also names the benchmarks without a result."""
    sections = [HEAD]
    for name in NAMES:
        benchmark = load(name)
        sections.append(f"## {name}\n\n```text\n{(benchmark.__doc__ or '').strip()}\n```\n")
        sections.append(section(name, results))
        if (results / f"{name}.png").exists():
            sections.append(f"![{name}](../bench/results/{name}.png)\n")
    return "\n".join(sections)


def section(name: str, results: Path) -> str:
    """The tables of one benchmark with its machine, date and command; or how to measure it, if there is no result."""
    file = results / f"{name}.json"
    if not file.exists():
        command = f"python -m {APART[name]}" if name in APART else f"parablock bench {name}"
        return f"Not measured yet: run `{command}`.\n"
    result: Result = json.loads(file.read_text())
    benchmark = import_module(APART[name]) if name in APART else load(name)
    tables = [_markdown(table) for table in benchmark.tables(result) if table.row_count]
    return "\n".join([_about(result["machine"]), *tables, *(f"{note}\n" for note in notes(result))])


def filled(text: str, results: Path) -> str:
    """The text of a page with the tables between its markers replaced by current ones."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- bench:{match[1]} -->\n{section(match[1], results)}<!-- end -->"

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page with tables, and its current text."""
    others = [file for file in sorted(PAGE.parent.glob("*.md")) if file != PAGE and "<!-- bench:" in file.read_text()]
    return {PAGE: page(RESULTS)} | {file: filled(file.read_text(), RESULTS) for file in others}


def _about(machine: dict[str, Any]) -> str:
    versions = [f"{name} {machine[name]}" for name in ("torch", "python") if name in machine]
    device = [machine["gpu"]] if "gpu" in machine else []
    parts = [machine["date"][:10], *device, machine["cpu"], f"{machine['cores']} cores", *versions]
    revision, dirty, _ = machine["revision"].partition("-dirty")
    return f"{', '.join(parts)}; revision `{revision[:12]}{dirty}`; `{machine['command']}`\n"


def _markdown(table: Table) -> str:
    """A table as Markdown; rich keeps its cells by column."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    rows = [[str(column.header) for column in table.columns], *map(list, zip(*columns, strict=True))]
    rows.insert(1, ["---" if i == 0 else "---:" for i in range(len(columns))])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return f"**{table.title}**\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Writes the pages, or with --check reports those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    options = parser.parse_args()
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path.name} is out of date; run `python -m bench.page`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
