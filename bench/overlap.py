"""How much of the communication is hidden: a sweep over link rates, local steps, formats, staleness and blocks.

A server and two client processes fine-tune the model for each cell of the sweep. For each link, format and number of
blocks, a run without overlap (staleness 0) gives `communication`, the time of an unhidden exchange. A cell has


  ideal    max(compute, communication), with this cell's compute, mean over rounds
  round    the measured length of a round, and its ratio to the ideal
  exposed  the time that the training thread waited, and the hidden share 1 - exposed / communication

over the rounds in steady state, without the first two, whose exchanges have nothing to hide behind. Both directions of
a link work at the same time, so a round can be shorter than the ideal where communication takes longer than compute. A
rate such as 2x is a multiple of the break-even rate, at which an exchange takes as long as the compute of a round with
the first number of local steps.

Besides the sweep: the cost of transfers for training (interference), and other ways to train on the same link
(baselines).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError
from parablock_rt.finetune.loop import Workload
from parablock_rt.report import figures
from parablock_rt.report.folder import Recorded
from parablock_rt.stages import hidden_share
from parablock_rt.units import parse_delay, parse_rate

from . import baselines
from .federation import Federation, Link, federation
from .interference import interference
from .result import Result, columns, shown

FAST = 125e6  # bytes per second, for the run that measures the compute time of a round
WARM_UP_ROUNDS = 2
STAGES = (*figures.TRAINING, *figures.EXCHANGE)
LEAST_HIDDEN = 0.95  # the target for the hidden share where compute takes at least as long as communication
LONGEST_ROUND = 1.03  # the target for the ratio of a round to the ideal, everywhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The axes of the sweep; each takes several values."""
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or the folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=10, help="rounds per run, at least 4")
    parser.add_argument(
        "--rates", nargs="+", default=["0.5x", "1x", "2x"], help="50mbit, or 2x: a multiple of break-even"
    )
    parser.add_argument("--local-steps", type=int, nargs="+", default=[4])
    parser.add_argument("--formats", nargs="+", default=["int8"])
    parser.add_argument("--staleness", type=int, nargs="+", default=[1], help="1 or more; 0 is always measured")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0], help="0: one per layer")
    parser.add_argument("--delay", default="20ms", help="one way")
    parser.add_argument("--no-interference", action="store_true", help="leave out the cost of transfers for training")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the other ways to train")


def run(options: argparse.Namespace) -> Result:
    """The sweep, preceded by interference and followed by the baselines on the same link."""
    if options.rounds < WARM_UP_ROUNDS + 2:
        raise ConfigError(f"rounds must be at least {WARM_UP_ROUNDS + 2}; found {options.rounds}")
    delay = parse_delay(options.delay)
    workload = Workload.for_model(options.model, eval_examples=0)
    result: Result = {"settings": {**vars(options), "clients": 2, "delay_s": delay}}
    for key in ("out", "compare", "threshold", "benchmark", "delay"):
        result["settings"].pop(key, None)
    if not options.no_interference:
        result["interference"] = interference(workload, windows=7, steps=10, nbytes=32 * 2**20)
    with federation(workload) as clients, tempfile.TemporaryDirectory() as scratch:
        sweep = _Sweep(clients, options, delay, Path(scratch))
        result["rows"] = sweep.rows()
        link = Link(sweep.rate_of("1x", options.formats[0], options.blocks[0]), delay)
    if not options.no_baselines:
        settings = {"rounds": options.rounds, "local_steps": options.local_steps[0], "format": options.formats[0]}
        result["baselines"] = baselines.run(workload, link, settings)
    return result


@dataclass
class _Sweep:
    """All cells of one sweep."""

    clients: Federation
    options: argparse.Namespace
    delay: float
    scratch: Path
    runs: int = 0
    computed: dict[int, float] = field(default_factory=dict)  # seconds per round, by number of blocks

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        options = self.options
        for format, blocks, rate_text in itertools.product(options.formats, options.blocks, options.rates):
            rate = self.rate_of(rate_text, format, blocks)
            common = {"format": format, "blocks": self.plan(blocks), "rate_mbit": rate * 8 / 1e6}
            where = {"rate": rate, "format": format, "blocks": blocks}
            alone = self.one(local_steps=options.local_steps[0], staleness=0, **where)
            # Round 0 waits for nothing; every later round waits for a whole exchange.
            communication = statistics.median(entry["exposed_s"] for entry in alone.rounds[1:])
            rows.append(_row(alone, communication, **common, local_steps=options.local_steps[0], staleness=0))
            for steps, staleness in itertools.product(options.local_steps, sorted(set(options.staleness) - {0})):
                measured = self.one(local_steps=steps, staleness=staleness, **where)
                rows.append(_row(measured, communication, **common, local_steps=steps, staleness=staleness))
        for row in rows:
            step_s = row["compute_s"] / row["local_steps"]
            room = row["local_steps"] * step_s / 2 - self.delay
            body = self.body(row["format"], row["blocks"])
            row["break_even_mbit"] = body * 8 / 1e6 / room if room > 0 else None
        return rows

    def one(self, *, rate: float, blocks: int, **settings: Any) -> Recorded:
        self.runs += 1
        path = self.scratch / f"run-{self.runs}"
        link = Link(rate, self.delay)
        return self.clients.run(path, link, blocks or None, rounds=self.options.rounds, **settings)

    def rate_of(self, text: str, format: str, blocks: int) -> float:
        """Bytes per second of "50mbit", or of "2x", a multiple of the break-even rate."""
        if not text.endswith("x"):
            return parse_rate(text)
        try:
            factor = float(text[:-1])
        except ValueError:
            raise ConfigError(f"a rate looks like 50mbit or 0.5x; found {text!r}") from None
        room = self.compute_s(blocks) / 2 - self.delay
        if not (factor > 0 and room > 0):
            raise ConfigError(
                f"no rate hides an exchange with a delay of {self.delay:g} s behind {self.compute_s(blocks):.3f} s of "
                f"computing (asked for {text!r}): take more local steps, a shorter --delay, or rates such as 50mbit"
            )
        return factor * self.body(format, self.plan(blocks)) / room

    def compute_s(self, blocks: int) -> float:
        """Compute seconds of a round on a fast link, with the first number of local steps; measured once."""
        if blocks not in self.computed:
            settings = {"format": self.options.formats[0], "local_steps": self.options.local_steps[0], "staleness": 1}
            steady = self.one(rate=FAST, blocks=blocks, **settings).rounds[WARM_UP_ROUNDS:]
            self.computed[blocks] = statistics.mean(entry["compute_s"] for entry in steady)
        return self.computed[blocks]

    def plan(self, blocks: int) -> int:
        return len(BlockPlan.from_model(self.clients.model, blocks or None).blocks)

    def body(self, format: str, blocks: int) -> int:
        """Bytes of the largest block's packed body when the model is cut into `blocks` blocks."""
        layers = BlockPlan.from_model(self.clients.model)
        plan = layers if len(layers.blocks) == blocks else BlockPlan.from_model(self.clients.model, blocks)
        return max(block.wire_bytes(format) for block in plan.blocks)


def _row(run: Recorded, communication: float, **cell: Any) -> dict[str, Any]:
    """One cell's figures, means over the rounds in steady state."""
    steady = run.rounds[WARM_UP_ROUNDS:]
    ideal = sum(max(entry["compute_s"], communication) for entry in steady)
    exposed = statistics.mean(entry["exposed_s"] for entry in steady)
    by_stage = [entry["stages"] for entry in figures.rounds(run)[WARM_UP_ROUNDS:]]
    stages = {name: [entry[name] for entry in by_stage if name in entry] for name in STAGES}
    return {
        **cell,
        "compute_s": statistics.mean(entry["compute_s"] for entry in steady),
        "communication_s": communication,
        "ideal_s": ideal / len(steady),
        "round_s": statistics.mean(entry["open_s"] for entry in steady),
        "round_over_ideal": sum(entry["open_s"] for entry in steady) / ideal,
        "exposed_s": exposed,
        "overlap_efficiency": hidden_share(exposed, communication) if cell["staleness"] > 0 else 0.0,
        "stages": {name: statistics.mean(values) for name, values in stages.items() if values},
    }


def tables(result: Result) -> list[Table]:
    """The sweep, the runtime's targets, the stages, and the interference and baselines, if measured."""
    cells = ("link", "local steps", "format", "staleness", "blocks")
    names = (
        "compute",
        "communication",
        "ideal",
        "round",
        "round / ideal",
        "exposed",
        "hidden share",
        "break-even, Mbit/s",
    )
    sweep = columns("overlap (seconds per round)", *cells, *names)
    stages = columns("stages (seconds per round, mean over clients)", *cells, *STAGES)
    for row in result["rows"]:
        cell = [f"{row['rate_mbit']:.4g} Mbit/s"]
        cell += [str(row[name]) for name in ("local_steps", "format", "staleness", "blocks")]
        seconds = ("compute_s", "communication_s", "ideal_s", "round_s", "round_over_ideal", "exposed_s")
        even = row.get("break_even_mbit")
        hidden = shown(row["overlap_efficiency"], ".1%")
        sweep.add_row(*cell, *(shown(row.get(name)) for name in seconds), hidden, shown(even, ".4g"))
        if "stages" in row:
            stages.add_row(*cell, *(shown(row["stages"].get(name)) for name in STAGES))
    found = [sweep, _statements(result["rows"]), stages]
    if "interference" in result:
        found.append(_interference_table(result["interference"]))
    if "baselines" in result:
        found.append(baselines.table(result["baselines"]))
    return found


def _statements(rows: list[dict[str, Any]]) -> Table:
    """Whether the sweep meets the runtime's targets, and its worst cells."""
    table = columns("over the sweep, staleness 1 or more", "statement", "holds", "worst cell")
    overlapped = [row for row in rows if row["staleness"] > 0]
    hidden = [row["overlap_efficiency"] for row in overlapped if row["compute_s"] >= row["communication_s"]]
    if hidden:
        holds = "yes" if min(hidden) >= LEAST_HIDDEN else "no"
        table.add_row(f"{LEAST_HIDDEN:.0%} hidden where compute ≥ communication", holds, f"{min(hidden):.1%}")
    if overlapped:
        longest = max(row["round_over_ideal"] for row in overlapped)
        holds = "yes" if longest <= LONGEST_ROUND else "no"
        table.add_row(f"round ≤ {LONGEST_ROUND:g} × max(compute, communication)", holds, f"{longest:.3f}")
    return table


def _interference_table(beside: dict[str, Any]) -> Table:
    table = columns("training beside transfers at full rate on the other core", "case", "steps/s", "MiB/s")
    table.add_row("without transfers", f"{beside['steps_per_s_without']:.2f}", "–")
    table.add_row("with transfers", f"{beside['steps_per_s_with']:.2f}", f"{beside['transfer_mib_per_s']:.0f}")
    table.add_row("ratio", f"{beside['ratio']:.3f}", "")
    return table


def metrics(result: Result) -> dict[str, float]:
    """The hidden share and ideal over round, by cell. A cell's name has its settings and the position of its rate in
    the sweep, because a multiple of the break-even rate differs from run to run."""
    found: dict[str, float] = {}
    rates: dict[tuple[Any, ...], list[float]] = {}
    for row in result["rows"]:
        cell = tuple(row[name] for name in ("local_steps", "format", "staleness", "blocks"))
        place = rates.setdefault(cell, [])
        place.append(row["rate_mbit"])
        steps, format, staleness, blocks = cell
        name = f"rate {len(place)}, {steps} steps, {format}, S={staleness}, {blocks} blocks"
        found[f"ideal over round, {name}"] = 1 / row["round_over_ideal"]
        if staleness > 0:
            # A share below 0 means that training waited longer than the exchange takes: not comparable, so take 0.
            found[f"hidden, {name}"] = max(0.0, row["overlap_efficiency"])
    if "interference" in result:
        found["training speed beside transfers"] = result["interference"]["ratio"]
    return found


def plot(result: Result, figure: Any) -> None:
    """A heat map of the hidden share, link rate by local steps, with the break-even line."""
    rows = [row for row in result["rows"] if row["staleness"] > 0]
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["format"], row["staleness"], row["blocks"]), []).append(row)
    axes = figure.subplots(1, max(1, len(cells)), squeeze=False)[0]
    for axis, ((format, staleness, blocks), own) in zip(axes, cells.items(), strict=False):
        rates = sorted({row["rate_mbit"] for row in own})
        steps = sorted({row["local_steps"] for row in own})
        values = {(row["rate_mbit"], row["local_steps"]): row["overlap_efficiency"] for row in own}
        grid = [[values.get((rate, k), float("nan")) for rate in rates] for k in steps]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
        for (rate, k), value in values.items():
            at = (rates.index(rate), steps.index(k))
            color = "black" if value > 0.6 else "white"
            axis.text(*at, f"{100 * value:.0f} %", ha="center", va="center", color=color)
        line = _break_even_line(own, rates, steps)
        if line:
            axis.plot(*zip(*line, strict=True), color="#d55e00", linestyle="--", marker="o", label="break-even")
            axis.legend(loc="upper left")
        axis.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates])
        axis.set_yticks(range(len(steps)), [str(k) for k in steps])
        axis.set_xlabel("link, Mbit/s")
        axis.set_ylabel("local steps")
        axis.set_title(f"{format}, S={staleness}, {blocks} blocks")
    figure.suptitle("share of the communication that is hidden")
    if rows:
        figure.colorbar(image, ax=axes, shrink=0.8)


def _break_even_line(rows: list[dict[str, Any]], rates: list[float], steps: list[int]) -> list[tuple[float, float]]:
    """The position of each number of steps' break-even rate between the columns of the heat map."""

    line = []
    for k in steps:
        known = [row["break_even_mbit"] for row in rows if row["local_steps"] == k and row.get("break_even_mbit")]
        if not known:
            continue
        rate = statistics.mean(known)
        above = [i for i, other in enumerate(rates) if other >= rate]
        if not above or rate < rates[0]:
            continue
        right = above[0]
        left = max(0, right - 1)
        share = (rate - rates[left]) / (rates[right] - rates[left]) if right > left else 0.0
        line.append((left + share, float(steps.index(k))))
    return line


if __name__ == "__main__":
    import sys

    from .cli import main

    sys.exit(main(["overlap", *sys.argv[1:]], "python -m bench"))
