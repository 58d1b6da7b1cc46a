"""Where telemetry goes: a file of the run folder, Prometheus, TensorBoard, Weights & Biases.

The last three need optional packages, which are imported only when a user asks for them.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from parablock_rt.config import parse_address
from parablock_rt.errors import ConfigError
from parablock_rt.observe.meters import Metrics
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import Reporter, Sample

LOOPBACK = "127.0.0.1"


class JsonLines:
    """`telemetry.jsonl`: one line per sample."""

    FILE = "telemetry.jsonl"

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        (folder.path / self.FILE).touch()  # a resumed run appends; for a new run, `RunFolder` has removed the file

    def sample(self, process: str, sample: Sample) -> None:
        head = {"t_s": sample.t_s, "at_ns": sample.at_ns, "wall": sample.wall, "process": process}
        self._folder.append(self.FILE, head | sample.metrics)

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        """Does nothing: rounds go to metrics.jsonl."""

    def close(self) -> None:
        """Does nothing: every line is in the file already."""


class Prometheus:
    """Serves a page with the newest values for Prometheus to scrape."""

    def __init__(self, address: str) -> None:
        """`address`: a port on loopback, or "host:port". Raises ConfigError when it cannot listen there."""
        prometheus = _import("prometheus_client", "prometheus-client")
        host, port = parse_address(address if ":" in address else f"{LOOPBACK}:{address}")
        self._families = prometheus.metrics_core.GaugeMetricFamily
        self._lock = threading.Lock()  # the library calls `collect` on its own threads
        self._process = ""
        self._sampled: Metrics = {}
        self._round: Metrics = {}
        registry = prometheus.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = prometheus.start_http_server(port, host or "0.0.0.0", registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve Prometheus on {host}:{port} ({error.strerror}); give prometheus (--prometheus) a "
                "free port"
            ) from error
        self.port = int(self._server.server_port)

    def sample(self, process: str, sample: Sample) -> None:
        with self._lock:
            self._process, self._sampled = process, dict(sample.metrics)

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._process, self._round = process, dict(metrics)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Any]:
        """Called by the library: the newest values, grouped into families."""
        with self._lock:
            process, values = self._process, self._sampled | self._round
        families: dict[str, Any] = {}
        for name, value in values.items():
            family, labels = labelled(name)
            if family not in families:
                families[family] = self._families(family, "see docs/telemetry.md", labels=["process", *labels])
            families[family].add_metric([process, *labels.values()], value)
        yield from families.values()


_LABELLED = re.compile(r"(gpu|link|interface|thread)\.([^.]+)\.(?:(lane)\.([^.]+)\.)?(.+)")


def labelled(name: str) -> tuple[str, dict[str, str]]:
    """The Prometheus name and labels of a metric: link.a.lane.0.rtt_s → parablock_link_lane_rtt_s
    {link="a", lane="0"}."""
    labels: dict[str, str] = {}
    if found := _LABELLED.fullmatch(name):
        kind, which, lane, number, name = found.groups()
        labels = {kind: which} | ({lane: number} if lane else {})
        name = ".".join([kind, *([lane] if lane else []), name])
    return "parablock_" + re.sub(r"\W", "_", name), labels


class TensorBoard:
    """Event files in the run folder. The x axis is milliseconds for samples and the round index for rounds."""

    def __init__(self, folder: Path) -> None:
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def sample(self, process: str, sample: Sample) -> None:
        for name, value in sample.metrics.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, round(sample.t_s * 1e3))

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, round(metrics["round.round"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A wandb run, configured by wandb's environment variables (WANDB_MODE, WANDB_PROJECT, ...)."""

    def __init__(self, folder: Path) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(dir=str(folder), name=folder.name, reinit="create_new")
        self._run.define_metric("round.*", step_metric="round.round")
        self._run.define_metric("*", step_metric="t_s")

    def sample(self, process: str, sample: Sample) -> None:
        self._run.log({"t_s": sample.t_s, **sample.metrics})

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def close(self) -> None:
        self._run.finish()


_BY_NAME: dict[str, Callable[[Path], Reporter]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_all(folder: Path, prometheus: str | None, report_to: str | None) -> list[Reporter]:
    """The requested reporters. What they write in the run folder stands beside the folder's own files.

    `prometheus`: a port or "host:port". `report_to`: comma-separated names.

    Raises ConfigError for an unknown name, a package that is not installed, or a port that is not free.
    """
    names = [name.strip() for name in (report_to or "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in _BY_NAME]:
        raise ConfigError(f"expected report_to (--report-to) to name {' or '.join(_BY_NAME)}, found {unknown[0]!r}")
    reporters: list[Reporter] = []
    if prometheus is not None:
        reporters.append(Prometheus(prometheus))
    return reporters + [_BY_NAME[name](folder) for name in dict.fromkeys(names)]


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed ({error}); install it with: pip install {package}") from error
