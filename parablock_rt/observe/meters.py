"""Measures the machine during a run: GPUs, links, network interfaces, this process and its threads.

One thread asks each meter for its metrics, again and again. A metric that is not available is absent, never zero. Rates
cover the time since the previous call, so the first answer has none. docs/telemetry.md explains each metric. Nothing
here knows where the numbers go.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from parablock_rt import _C

Metrics = dict[str, float]
LinkStats = Callable[[], Mapping[str, _C.LinkStats]]
"""The state of every link, by the peer's name."""

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter(Protocol):
    """One source of metrics."""

    def measure(self, now_ns: int) -> Metrics:
        """The current metrics. `now_ns`: monotonic clock. May raise anything, and then is not asked again."""
        ...


class Rates:
    """Turns counters that only grow into rates per second."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._before_ns = 0
        self._seconds = 0.0

    def begin(self, now_ns: int) -> None:
        """Starts a new measurement. Call it before `of`."""
        self._seconds = max(1, now_ns - self._before_ns) / 1e9
        self._before_ns = now_ns
        self._before, self._now = self._now, {}

    def of(self, name: str, count: float) -> Metrics:
        """The rate of a counter under its name; nothing if the counter is new or was reset."""
        self._now[name] = count
        before = self._before.get(name)
        return {name: (count - before) / self._seconds} if before is not None and count - before >= 0 else {}


class ProcessMeter:
    """This process: memory, and CPU use in total and by thread name."""

    def __init__(self) -> None:
        self._rates = Rates()

    def measure(self, now_ns: int) -> Metrics:
        self._rates.begin(now_ns)
        pages = int((_PROC / "self" / "statm").read_text().split()[1])
        metrics = {"process.rss_bytes": float(pages * _PAGE)} | self._rates.of("process.cpu", time.process_time())
        seconds: dict[str, float] = {}
        for name, used in self._threads():
            seconds[name] = seconds.get(name, 0.0) + used
        metrics["process.threads"] = float(len(os.listdir(_PROC / "self" / "task")))
        for name, used in seconds.items():
            metrics |= self._rates.of(f"thread.{name}.cpu", used)
        return metrics

    def _threads(self) -> list[tuple[str, float]]:
        """Name and CPU seconds of every thread. Uses Python's thread names where they exist; the system lacks them."""
        known = {thread.native_id: thread.name for thread in threading.enumerate()}
        found = []
        for task in os.listdir(_PROC / "self" / "task"):
            try:
                text = (_PROC / "self" / "task" / task / "stat").read_text()
            except OSError:
                continue  # the thread has just ended
            _, _, rest = text.partition("(")
            command, _, fields = rest.rpartition(")")
            ticks = sum(int(field) for field in fields.split()[11:13])  # utime, stime
            found.append((plain(known.get(int(task), command)), ticks / _TICKS))
        return found


class InterfaceMeter:
    """The network interfaces of this network namespace, with the traffic of all processes."""

    def __init__(self) -> None:
        self._rates = Rates()

    def measure(self, now_ns: int) -> Metrics:
        self._rates.begin(now_ns)
        metrics: Metrics = {}
        for line in (_PROC / "net" / "dev").read_text().splitlines()[2:]:
            name, _, counts = line.partition(":")
            values = [int(value) for value in counts.split()]
            if values[0] == values[8] == 0:
                continue  # the interface has never carried traffic
            prefix = f"interface.{plain(name.strip())}"
            metrics |= self._rates.of(f"{prefix}.bytes_in_rate", values[0])
            metrics |= self._rates.of(f"{prefix}.bytes_out_rate", values[8])
            metrics[f"{prefix}.failed_packets"] = float(sum(values[2:4]) + sum(values[10:12]))
        return metrics


class LinkMeter:
    """Every link of the transport, and the kernel's figures on its connections (TCP_INFO)."""

    def __init__(self, links: LinkStats) -> None:
        self._links = links
        self._rates = Rates()

    def measure(self, now_ns: int) -> Metrics:
        self._rates.begin(now_ns)
        metrics: Metrics = {}
        for peer, stats in self._links().items():
            if not stats.lanes:
                continue  # the link is gone
            prefix = f"link.{plain(peer)}"
            metrics |= self._rates.of(f"{prefix}.bytes_in_rate", stats.bytes_in)
            metrics |= self._rates.of(f"{prefix}.bytes_out_rate", stats.bytes_out)
            if stats.round_trip_ns:
                metrics[f"{prefix}.round_trip_s"] = stats.round_trip_ns / 1e9
            for number, lane in enumerate(stats.lanes):
                metrics |= self._of_lane(f"{prefix}.lane.{number}", lane)
        return metrics

    def _of_lane(self, prefix: str, lane: _C.LaneStats) -> Metrics:
        return {
            **self._rates.of(f"{prefix}.bytes_in_rate", lane.bytes_in),
            **self._rates.of(f"{prefix}.bytes_out_rate", lane.bytes_out),
            f"{prefix}.rtt_s": lane.rtt_us / 1e6,
            f"{prefix}.rttvar_s": lane.rttvar_us / 1e6,
            f"{prefix}.retransmits": float(lane.retransmits),
            f"{prefix}.delivery_rate": float(lane.delivery_rate),
            f"{prefix}.cwnd": float(lane.cwnd),
            f"{prefix}.unsent_bytes": float(lane.unsent_bytes),
        }


class GpuMeter:
    """Every GPU that NVML shows, with the load of all processes. Calls to NVML do not hold the GIL."""

    def __init__(self, nvml: Any) -> None:
        """`nvml`: the module pynvml. Raises its NVMLError if there is no driver or no accessible GPU."""
        self._nvml = nvml
        nvml.nvmlInit()
        self._gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    @staticmethod
    def find() -> GpuMeter | None:
        """The meter for this machine; None without a driver or a GPU."""
        import pynvml

        try:
            meter = GpuMeter(pynvml)
        except pynvml.NVMLError:
            return None
        return meter if meter._gpus else None

    def measure(self, now_ns: int) -> Metrics:
        metrics: Metrics = {}
        for number, gpu in enumerate(self._gpus):
            for read in (self._utilization, self._memory, self._power, self._clocks, self._pcie):
                try:
                    values = read(gpu)
                except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_NoPermission):
                    continue  # this model or partition lacks the value, or hides it from this user
                metrics |= {f"gpu.{number}.{name}": value for name, value in values.items()}
        return metrics

    def _utilization(self, gpu: Any) -> Metrics:
        rates = self._nvml.nvmlDeviceGetUtilizationRates(gpu)
        return {"utilization": rates.gpu / 100, "memory_utilization": rates.memory / 100}

    def _memory(self, gpu: Any) -> Metrics:
        return {"memory_used_bytes": float(self._nvml.nvmlDeviceGetMemoryInfo(gpu).used)}

    def _power(self, gpu: Any) -> Metrics:
        return {"power_w": self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3}

    def _clocks(self, gpu: Any) -> Metrics:
        clock = self._nvml.nvmlDeviceGetClockInfo
        return {
            "sm_clock_hz": clock(gpu, self._nvml.NVML_CLOCK_SM) * 1e6,
            "memory_clock_hz": clock(gpu, self._nvml.NVML_CLOCK_MEM) * 1e6,
        }

    def _pcie(self, gpu: Any) -> Metrics:
        moved = self._nvml.nvmlDeviceGetPcieThroughput  # KiB per second; the call measures for 20 ms
        return {
            "pcie_in_rate": moved(gpu, self._nvml.NVML_PCIE_UTIL_RX_BYTES) * 1024.0,
            "pcie_out_rate": moved(gpu, self._nvml.NVML_PCIE_UTIL_TX_BYTES) * 1024.0,
        }


def of_this_machine(links: LinkStats) -> list[Meter]:
    """Every meter that works on this machine."""
    gpu = GpuMeter.find()
    return [ProcessMeter(), LinkMeter(links), InterfaceMeter(), *([gpu] if gpu is not None else [])]


def plain(name: str) -> str:
    """`name` made fit as one part of a metric's name; dots separate the parts."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
