"""A plot of what `bench.kernels` measured: bandwidth by size of block, against the device's copy and its peak.

`python -m bench.roofline bench/results/kernels.json FILE.svg`. Needs matplotlib (`pip install matplotlib`); without it,
or without figures (no GPU), it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(parameters, GB/s) by name, of the kernels and the copy."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["by"] in ("kernel", "copy") and row.get("gb_per_s") is not None:
            lines.setdefault(row["case"], []).append((row["params"], row["gb_per_s"]))
    return {name: sorted(points) for name, points in lines.items()}


def peak_gb_per_s() -> float | None:
    """The memory's clock times its width, of the first GPU; None where the driver does not say."""
    import pynvml

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        clock = pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_MEM)  # MHz, two transfers each
        width = pynvml.nvmlDeviceGetMemoryBusWidth(device)
    except pynvml.NVMLError:
        return None
    return float(clock * 1e6 * 2 * width / 8 / 1e9)


def draw(lines: dict[str, list[tuple[int, float]]], peak: float | None, device: str, target: Path) -> None:
    """Writes the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name, points in lines.items():
        style = {"color": "black", "linewidth": 2.5} if name.startswith("copy") else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    if peak is not None:
        axes.axhline(peak, linestyle="--", color="grey", label=f"peak {peak:,.0f}")
    axes.set(xscale="log", xlabel="parameters a block", ylabel="GB/s, bytes read and written once", title=device)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    content = json.loads(options.results.read_text())
    lines = series(content["rows"])
    if not lines:
        print(f"{options.results} has no figures: it was made without a GPU; no plot")
    elif find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
    else:
        draw(lines, peak_gb_per_s(), str(content["machine"]["device"]), options.plot)
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
