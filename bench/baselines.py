"""Other ways to train the same model over the same link: the time that each takes for a round of as many local steps.

  ParaBlock             a block per round, hidden behind the next round (staleness 1)
  sequential FedBCD     a block per round, nothing hidden (staleness 0)
  FedAvg                the whole model each round, nothing hidden
  LoRA, rank 8          adapters on every linear layer each round, nothing hidden
  gloo all-reduce       the block's change in fp32, in the training thread, between two ranks without a server

The first four run on this runtime and in one format, so they differ only in what they send and when. Their quality of
learning is not compared here.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from parablock_rt.finetune.loop import Workload
from parablock_rt.report.folder import Recorded, number

from . import gloo, lora, namespaces
from .federation import Link, federation
from .result import columns, shown

WARM_UP_ROUNDS = 2
FEW_ROUNDS = 4  # for methods with long rounds


def run(workload: Workload, link: Link, settings: dict[str, Any]) -> dict[str, Any]:
    """All methods on one link. `settings`: rounds, local_steps and format."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        with federation(workload) as clients:
            for name, staleness in (("ParaBlock", 1), ("sequential FedBCD", 0)):
                rows.append(_row(name, clients.run(Path(scratch, name), link, staleness=staleness, **settings)))
            few = {**settings, "rounds": FEW_ROUNDS}
            rows.append(_row("FedAvg", clients.run(Path(scratch, "FedAvg"), link, 1, staleness=0, **few)))
        with federation(workload, prepare=lora.adapt) as clients:
            name = f"LoRA, rank {lora.RANK}"
            rows.append(_row(name, clients.run(Path(scratch, name), link, 1, staleness=0, **settings)))
    result: dict[str, Any] = {"rate_mbit": link.rate * 8 / 1e6, "delay_s": link.delay, "rows": rows, "left_out": {}}
    name = "gloo all-reduce, fp32"
    if (reason := namespaces.why_not()) is not None:
        result["left_out"][name] = reason
    else:
        measured = gloo.run(workload.model, link, settings["rounds"], settings["local_steps"])
        rows.append({"method": name, "format": "fp32", **measured})
    return result


def _row(name: str, run: Recorded) -> dict[str, Any]:
    steady = run.rounds[WARM_UP_ROUNDS:]
    rounds = number(run.summary.get("rounds")) or 1
    return {
        "method": name,
        "format": run.summary["format"],
        "compute_s": statistics.mean(entry["compute_s"] for entry in steady),
        "exposed_s": statistics.mean(entry["exposed_s"] for entry in steady),
        "round_s": statistics.mean(entry["open_s"] for entry in steady),
        "bytes_up": run.summary["bytes_up"] / run.summary["clients"] / rounds,
    }


def table(result: dict[str, Any]) -> Table:
    """The methods, shortest round first, and the reasons for those left out."""
    title = f"a round on a link of {result['rate_mbit']:.4g} Mbit/s and {result['delay_s'] * 1e3:g} ms"
    table = columns(title, "method", "format", "MB up per client", "compute, s", "exposed, s", "round, s")
    for row in sorted(result["rows"], key=lambda row: row["round_s"]):
        seconds = (shown(row[name]) for name in ("compute_s", "exposed_s", "round_s"))
        table.add_row(row["method"], row["format"], f"{row['bytes_up'] / 1e6:.2f}", *seconds)
    for name, reason in result["left_out"].items():
        table.add_row(f"{name}: not measured, {reason}", *["–"] * 5)
    return table
