"""`parablock bench`: runs benchmarks, prints their tables, writes and draws their results, compares with older ones.

While a benchmark runs, NAME.partial.json has its results so far, if the benchmark reports them.

Exit codes: 0 done; 1 a metric got worse than the threshold allows or is missing, or the settings differ; 2 wrong usage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape

from parablock_rt.errors import ConfigError
from parablock_rt.observe.run_folder import to_json

from .machine import gpu, machine
from .result import Benchmark, Result, compare, comparison_table, kept_by, notes, read, unlike_settings

WIDTH = 150  # of a table; a narrower terminal wraps the table instead of losing figures
NAMES = ("codec", "transport", "links", "overlap", "scale", "telemetry")
GPU_NAMES = ("kernels", "staging", "gpu-overlap", "large-model")  # without a GPU they run in a reduced form, untimed


def main(arguments: Sequence[str], program: str = "parablock bench") -> int:
    """Runs what the arguments ask for and returns the exit code. Raises ConfigError for settings that no run can use,
    and SystemExit for help and wrong usage."""
    name = next((word for word in arguments if word in (*NAMES, *GPU_NAMES, "all")), None)
    options = _parser(program, name).parse_args(arguments)
    names = NAMES if options.benchmark == "all" else (options.benchmark,)
    older = {each: read(options.compare, each) for each in names} if options.compare else {}
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, WIDTH)
    worse = False
    for each in names:
        benchmark = load(each)
        about = machine()
        own = options if len(names) == 1 else _defaults(benchmark)
        so_far = options.out / f"{each}.partial.json"
        with kept_by(partial(_keep, so_far, {"benchmark": each, "machine": about})):
            measured = benchmark.run(own)
        about |= gpu()
        result = {"benchmark": each, "machine": about, **measured}
        device = f", {about['gpu']}" if "gpu" in about else ""
        console.print(f"[b]{each}[/b]: {about['cpu']}, {about['cores']} cores, {about['instruction_set']}{device}")
        if each in GPU_NAMES and "gpu" not in about:
            console.print("no GPU here: a reduced form ran to its end; figures that need a GPU are left empty")
        for table in benchmark.tables(result):
            if table.row_count:
                console.print(table)
        for note in notes(result):
            console.print(escape(note))
        _write(benchmark, result, options.out, console)
        so_far.unlink(missing_ok=True)
        if each in older:
            comparisons = compare(benchmark.metrics(older[each]), benchmark.metrics(result))
            console.print(comparison_table(comparisons, options.threshold))
            worse = worse or comparisons[0].ratio < options.threshold
            if unlike := unlike_settings(older[each], result):
                console.print(
                    f"[red]These two do not compare[/red]: the older result of {each} has other settings "
                    f"({escape('; '.join(unlike))}); measure with the same ones"
                )
                worse = True
    return 1 if worse else 0


def load(name: str) -> Benchmark:
    """The module of a benchmark; imported on demand, because each needs other packages."""
    return cast(Benchmark, import_module(f".{name.replace('-', '_')}", __package__))


def _parser(program: str, name: str | None) -> argparse.ArgumentParser:
    """All commands, but options only for the command `name`."""
    parser = argparse.ArgumentParser(
        program,
        description="Measure the codec, the transport, the overlap, the server's growth, telemetry and the GPU's data "
        "path on this machine.",
        epilog="Example: parablock bench overlap --model tiny --rates 20mbit 1x --compare older/overlap.json",
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join((*NAMES, *GPU_NAMES, "all")))
    for each in (*NAMES, *GPU_NAMES, "all"):
        if each == name and each != "all":
            benchmark = load(each)
            text = benchmark.__doc__ or ""
            command = commands.add_parser(each, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
            benchmark.add_arguments(command)
        else:
            text = f"{', '.join(NAMES)}, as they are by default" if each == "all" else None
            command = commands.add_parser(each, help=text)
        command.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for JSON and plot")
        command.add_argument("--compare", type=Path, metavar="OLD", help="an older result (file or folder)")
        command.add_argument(
            "--threshold", type=float, default=0.9, help="with --compare: exit with 1 when a ratio is below this"
        )
    return parser


def _defaults(benchmark: Benchmark) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return parser.parse_args([])


def _keep(file: Path, common: Result, measured: Result) -> None:
    """Writes the results so far atomically: a process that is killed leaves the previous file."""
    fresh = file.with_suffix(".new")
    _write_json(fresh, {**common, "machine": common["machine"] | gpu(), **measured})
    fresh.replace(file)


def _write_json(file: Path, result: Result) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(result, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def _write(benchmark: Benchmark, result: Result, folder: Path, console: Console) -> None:
    file = folder / f"{result['benchmark']}.json"
    _write_json(file, result)
    figure = _figure()
    if figure is None:
        console.print(f"Wrote {file}; install matplotlib (`pip install 'parablock-rt\\[bench]'`) to have it drawn")
        return
    benchmark.plot(result, figure)
    figure.savefig(file.with_suffix(".png"), dpi=110)
    console.print(f"Wrote {file} and {file.with_suffix('.png').name}")


def _figure() -> Any | None:
    """An empty figure that needs no display; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(9, 4.8), layout="constrained")
