"""The same payload through ParaBlock's transport and through what else could carry it, all in one run.

`python -m bench.peers.run --json bench/results/peers.json`. Flower and NVFlare are installed apart, each into a virtual
environment of its own in the cache folder; they are no dependencies of the project. Every measurement is a fresh set
of processes that exchange something small first; the repetitions of all systems are interleaved. The receiver's digest
says whether the bytes really moved; a measurement without it does not count. The clock stops when the side that sends
knows that the other one has everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import transport
from bench.result import columns, shown

HERE = Path(__file__).parent
MIB = 2**20
LIMIT_S = 500
# Exact versions: what they are good at changes from release to release.
PINNED = {"flower.py": "flwr==1.41.0", "nvflare_f3.py": "nvflare==2.9.0"}
SCRIPTS = {
    "ParaBlock": "parablock.py",
    "plain Python socket": "plain_socket.py",
    "gloo send/recv": "gloo.py",
    "NVFlare F3": "nvflare_f3.py",
    "Flower": "flower.py",
}
CASES = ((256, 2), (1024, 1))  # MiB, legs


@dataclass
class Measured:
    """All runs of one system in one case."""

    system: str
    mib: int
    legs: int
    seconds: list[float] = field(default_factory=list)
    sender_mib: list[float] = field(default_factory=list)  # peak beyond the base and beyond the payload itself
    receiver_mib: list[float] = field(default_factory=list)

    def take(self, result: dict[str, float]) -> None:
        """Notes one run."""
        self.seconds.append(result["seconds"])
        # The side that sends needs memory for what it sends and for what comes back.
        self.sender_mib.append(result["sender_bytes"] / MIB - self.legs * self.mib)
        self.receiver_mib.append(result["receiver_bytes"] / MIB - self.mib)

    def row(self) -> dict[str, object]:
        """For the file: medians, and every run."""
        row: dict[str, object] = {"system": self.system, "mib": self.mib, "legs": self.legs}
        row["mib_per_s"] = self.mib * self.legs / statistics.median(self.seconds)
        if self.sender_mib:
            row["sender_peak_beyond_payload_mib"] = statistics.median(self.sender_mib)
            row["receiver_peak_beyond_payload_mib"] = statistics.median(self.receiver_mib)
        return row | {"seconds": self.seconds}


def environments() -> Path:
    """Where the peers are installed."""
    cache = os.environ.get("PARABLOCK_CACHE") or Path.home() / ".cache" / "parablock-rt"
    return Path(cache) / "peers"


def install(script: str) -> Path | str:
    """The Python that runs a script: this one, or one of an environment made for it. Says why not, if not."""
    requirement = PINNED.get(script)
    if requirement is None:
        return Path(sys.executable)
    folder = environments() / requirement
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {requirement} into {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        command = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{requirement} cannot be installed: {done.stderr.strip().splitlines()[-1:]}"
        (folder / "installed").touch()
    return python


def run_once(python: Path, script: str, mib: int, legs: int) -> dict[str, float] | str:
    """One measurement, or why there is none."""
    command = [python, HERE / script, "--mib", str(mib), "--legs", str(legs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"it did not end within {LIMIT_S} s"
    if done.returncode != 0:
        return f"it failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result if result["moved"] else "the receiver's digest was another one: the payload did not arrive"


def measure(
    cases: list[tuple[int, int]], systems: list[str], repetitions: int
) -> tuple[list[Measured], dict[str, str]]:
    """All runs, interleaved; and why a system is missing, where one is."""
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for system in systems:
        python = install(SCRIPTS[system])
        if isinstance(python, str):
            missing[system] = python
        else:
            pythons[system] = python
    measured = [Measured(system, *case) for case in cases for system in pythons]
    iperf = [Measured("iperf3", mib, 1) for mib, legs in cases if legs == 1 and shutil.which("iperf3")]
    for _ in range(repetitions):
        for each in measured:
            if each.system in missing:
                continue
            result = run_once(pythons[each.system], SCRIPTS[each.system], each.mib, each.legs)
            if isinstance(result, str):
                missing[each.system] = result
                print(f"{each.system} is left out: {result}", flush=True)
            else:
                each.take(result)
        for each in iperf:
            each.seconds.append(each.mib / transport.iperf(each.mib * MIB)[0])
    return [each for each in [*measured, *iperf] if each.seconds], missing


def tables(result: dict[str, Any]) -> list[Table]:
    """One row a system and payload, with its rate next to ParaBlock's; then what could not be measured, and why."""
    table = columns(
        "the same payload through other systems",
        "system",
        "MiB",
        "ways",
        "MiB/s",
        "ParaBlock is faster by",
        "peak - payload MiB, sender",
        "receiver",
    )
    ours = {(row["mib"], row["legs"]): row["mib_per_s"] for row in result["rows"] if row["system"] == "ParaBlock"}
    for row in result["rows"]:
        reference = ours.get((row["mib"], row["legs"]))
        times = None if reference is None else reference / row["mib_per_s"]
        peaks = (row.get(f"{side}_peak_beyond_payload_mib") for side in ("sender", "receiver"))
        name = " ".join([row["system"], *filter(None, [result["versions"].get(row["system"], "").partition("==")[2]])])
        figures = (shown(row["mib_per_s"], ".0f"), shown(times, ".2f"), *(shown(peak, ".0f") for peak in peaks))
        table.add_row(name, str(row["mib"]), str(row["legs"]), *figures)
    absent = columns("not measured", "system", "why")
    for system, reason in result["missing"].items():
        absent.add_row(system, reason)
    return [table, absent] if absent.row_count else [table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mib", type=int, nargs=2, default=[mib for mib, _ in CASES], metavar=("BACK", "ONE_WAY"))
    parser.add_argument("--systems", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--json", type=Path, help="write machine, versions and all rows to this file")
    options = parser.parse_args()
    cases = [(mib, legs) for mib, (_, legs) in zip(options.mib, CASES, strict=True)]
    measured, missing = measure(cases, options.systems, options.repetitions)
    from bench.machine import machine

    versions = {system: PINNED[script] for system, script in SCRIPTS.items() if script in PINNED}
    rows = [each.row() for each in measured]
    result = {"machine": machine(), "versions": versions, "missing": missing, "rows": rows}
    Console(soft_wrap=True, highlight=False).print(*tables(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
