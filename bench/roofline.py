"""A plot of a `bench.kernels` result: bandwidth by size of block, against the device's copy and its peak."""

from __future__ import annotations

from typing import Any


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(parameters, GB/s) of the kernels and the copy, by name."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["by"] in ("kernel", "copy") and row.get("gb_per_s") is not None:
            lines.setdefault(row["case"], []).append((row["params"], row["gb_per_s"]))
    return {name: sorted(points) for name, points in lines.items()}


def peak_gb_per_s() -> float | None:
    """The peak memory bandwidth of the first GPU, clock times width; None without pynvml or if the driver reports
    none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        clock = pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_MEM)  # MHz, two transfers each
        width = pynvml.nvmlDeviceGetMemoryBusWidth(device)
    except pynvml.NVMLError:
        return None
    return float(clock * 1e6 * 2 * width / 8 / 1e9)


def draw(result: dict[str, Any], figure: Any) -> None:
    """Draws a result of `bench.kernels` into an empty matplotlib figure; only a title if the result has no times."""
    lines = series(result["rows"])
    figure.suptitle(f"kernels on {result['machine'].get('gpu', 'no GPU: nothing was timed')}")
    if not lines:
        return
    axes = figure.subplots()
    for name, points in lines.items():
        style = {"color": "black", "linewidth": 2.5} if name.startswith("copy") else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    peak = result["peak_gb_per_s"]
    if peak is not None:
        axes.axhline(peak, linestyle="--", color="grey", label=f"peak {peak:,.0f}")
    axes.set(xscale="log", xlabel="parameters per block", ylabel="GB/s, bytes read and written once")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)
