"""Telemetry of real runs, real links and real files; only the GPU is a fake, which answers as pynvml does."""

from __future__ import annotations

import json
import logging
import queue
import re
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from processes import WAIT_S, loss_fn, make_batches, make_model, sgd, start_server

import parablock_rt as pb
from parablock_rt.errors import ConfigError
from parablock_rt.observe import meters, reporters
from parablock_rt.observe.meters import GpuMeter, InterfaceMeter, LinkMeter, Metrics, ProcessMeter
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import Sample, Telemetry

DOCUMENT = Path(__file__).parent.parent / "docs" / "telemetry.md"
FAST_S = 0.01


class FakeNvml(types.ModuleType):
    """One GPU. Every call raises `error` while it is set; those named in `unsupported` raise `refusal`."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 1, 2, 0, 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 - pynvml's name
        pass

    class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818 - likewise
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.error: Exception | None = None
        self.unsupported: set[str] = set()
        self.refusal: type[Exception] = self.NVMLError_NotSupported
        self.calls = 0

    def _answer(self, name: str, value: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        if name in self.unsupported:
            raise self.refusal
        return value

    @staticmethod
    def answers() -> dict[str, Callable[..., Any]]:
        return {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
            "nvmlDeviceGetUtilizationRates": lambda gpu: types.SimpleNamespace(gpu=50, memory=25),
            "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(used=2**30, total=2**34),
            "nvmlDeviceGetPowerUsage": lambda gpu: 250_000,
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetPcieThroughput": lambda gpu, counter: {0: 10, 1: 20}[counter],
        }

    def __getattr__(self, name: str) -> Any:
        answers = self.answers()
        if name not in answers:
            raise AttributeError(name)
        return lambda *args: self._answer(name, answers[name](*args))


class Collector:
    """A reporter that a test can wait for."""

    def __init__(self) -> None:
        self.samples: queue.Queue[Sample] = queue.Queue()
        self.rounds: queue.Queue[dict[str, float]] = queue.Queue()
        self.closed = threading.Event()

    def sample(self, process: str, sample: Sample) -> None:
        self.samples.put(sample)

    def round(self, process: str, metrics: Mapping[str, float]) -> None:
        self.rounds.put(dict(metrics))

    def close(self) -> None:
        self.closed.set()

    def next(self) -> Sample:
        return self.samples.get(timeout=WAIT_S)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def no_links() -> dict[str, Any]:
    return {}


class Constant:
    """A meter that always says the same."""

    def measure(self, now_ns: int) -> Metrics:
        return {"process.cpu": 1.0}


# ---- The contract


def documented() -> dict[str, re.Pattern[str]]:
    """The names in docs/telemetry.md, by how they are written there, as patterns, but for the trace's counters."""
    text, _, _ = DOCUMENT.read_text().partition("## Counters of the trace")
    names = re.findall(r"^\|((?: `[^`]+`,?)+) \|", text, re.MULTILINE)
    keys = [key for cell in names for key in re.findall(r"`([^`]+)`", cell)]
    assert len(keys) == len(set(keys)) > 30
    return {key: re.compile(re.sub(r"<\w+>", "[A-Za-z0-9_-]+", re.escape(key))) for key in keys}


def watched_run(folder: RunFolder, collectors: tuple[Collector, Collector]) -> None:
    """A run of one client in this process, both sides watched until two samples are there."""
    with start_server(
        rounds=3, clients=1, on_round=lambda closed: at_server.round(msgspec.to_builtins(closed))
    ) as server:
        at_server = Telemetry([collectors[0], reporters.JsonLines(folder)], FAST_S)
        at_client = Telemetry([collectors[1]], FAST_S)
        with at_server, at_client:
            at_server.start("server", meters.of_this_machine(server.link_stats))
            report = lambda r: at_client.round(msgspec.to_builtins(r))  # noqa: E731
            with pb.join(server.address, make_model(), sgd, on_round=report) as run:
                at_client.start("client 0", meters.of_this_machine(run.link_stats))
                for batch in run.stream(make_batches(0)):
                    for collector in collectors:
                        collector.next()
                    run.train_step(batch, loss_fn)
            server.wait(WAIT_S)


def test_what_is_emitted_is_what_is_documented(tmp_path: Path, nvml: FakeNvml) -> None:
    folder = RunFolder(tmp_path)
    collectors = Collector(), Collector()
    watched_run(folder, collectors)
    lines = [json.loads(line) for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    assert len(lines) > 2
    emitted = {key for line in lines for key in line}
    for collector in collectors:
        while not collector.samples.empty():
            emitted |= collector.next().metrics.keys()
        assert collector.rounds.qsize() == 3
        while not collector.rounds.empty():
            emitted |= collector.rounds.get().keys()
    contract = documented()
    # Pings go every five seconds, which this run does not last: the metric has a test of its own below.
    emitted.add("link.server.round_trip_s")
    assert [key for key in emitted if not any(pattern.fullmatch(key) for pattern in contract.values())] == []
    assert [name for name, pattern in contract.items() if not any(map(pattern.fullmatch, emitted))] == []
    assert [line["process"] for line in lines] == ["server"] * len(lines)
    times = [line["t_s"] for line in lines]
    assert times == sorted(set(times))
    assert {key: line[key] for line in lines for key in line if key.startswith("gpu.")} == {
        "gpu.0.utilization": 0.5,
        "gpu.0.memory_utilization": 0.25,
        "gpu.0.memory_used_bytes": 2.0**30,
        "gpu.0.power_w": 250.0,
        "gpu.0.sm_clock_hz": 1.98e9,
        "gpu.0.memory_clock_hz": 2.619e9,
        "gpu.0.pcie_in_rate": 20_480.0,
        "gpu.0.pcie_out_rate": 10_240.0,
    }


def test_the_lines_of_a_run_have_the_same_keys_once_it_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    watch = Telemetry([reporters.JsonLines(folder), collector := Collector()], FAST_S)
    with watch:
        watch.start("server", [ProcessMeter(), InterfaceMeter()])
        for _ in range(5):
            collector.next()
    lines = [json.loads(line) for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    keys = [line.keys() for line in lines if "process.cpu" in line]
    common = set.intersection(*map(set, keys))
    assert {"process.cpu", "process.rss_bytes", "thread.MainThread.cpu", "thread.pb-telemetry.cpu"} <= common
    assert all("process.rss_bytes" in line for line in lines)
    assert "process.cpu" not in lines[0]  # a rate needs two samples


# ---- Probes


def test_the_stand_in_for_nvml_has_the_names_and_numbers_of_the_library() -> None:
    library = pytest.importorskip("pynvml")
    for name in FakeNvml.answers():
        assert callable(getattr(library, name)), name
    for name in [name for name in vars(FakeNvml) if name.startswith("NVML_")]:
        assert getattr(library, name) == getattr(FakeNvml, name), name
    for error in (library.NVMLError_NotSupported, library.NVMLError_NoPermission):
        assert issubclass(error, library.NVMLError)
    assert {"gpu", "memory"} <= {field[0] for field in library.c_nvmlUtilization_t._fields_}
    assert {"used", "total"} <= {field[0] for field in library.c_nvmlMemory_t._fields_}


def test_without_a_gpu_there_are_no_gpu_rows(nvml: FakeNvml) -> None:
    nvml.error = nvml.NVMLError("Driver Not Loaded")
    assert nvml.calls == 0
    assert GpuMeter.find() is None
    assert nvml.calls == 1
    assert [type(meter) for meter in meters.of_this_machine(no_links)] == [ProcessMeter, LinkMeter, InterfaceMeter]


def test_the_real_library_says_whether_there_is_a_gpu() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        count = 0
    meter = GpuMeter.find()
    assert (meter is None) == (count == 0)
    if meter is not None:
        assert meter.measure(0)["gpu.0.memory_used_bytes"] >= 0


@pytest.mark.parametrize("refusal", [FakeNvml.NVMLError_NotSupported, FakeNvml.NVMLError_NoPermission])
def test_what_a_gpu_does_not_say_is_absent_and_the_rest_is_there(nvml: FakeNvml, refusal: type[Exception]) -> None:
    nvml.refusal = refusal
    nvml.unsupported = {"nvmlDeviceGetPcieThroughput", "nvmlDeviceGetPowerUsage"}
    meter = GpuMeter.find()
    assert meter is not None
    names = meter.measure(0).keys()
    assert not {"gpu.0.pcie_in_rate", "gpu.0.power_w"} & names
    assert {"gpu.0.utilization", "gpu.0.sm_clock_hz"} <= names


def test_when_nvml_fails_in_mid_run_its_rows_end_with_one_warning_and_the_rest_goes_on(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    with Telemetry([collector := Collector()], FAST_S) as watch:
        watch.start("server", meters.of_this_machine(no_links))
        assert "gpu.0.utilization" in collector.next().metrics
        nvml.error = nvml.NVMLError("GPU is lost")
        while "gpu.0.utilization" in (sample := collector.next()).metrics:
            pass
        calls = nvml.calls
        for _ in range(3):
            sample = collector.next()
            assert not any(name.startswith("gpu.") for name in sample.metrics)
            assert sample.metrics["process.rss_bytes"] > 0
    assert nvml.calls == calls
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["GpuMeter failed and is dropped; its metrics end here: NVMLError: GPU is lost"]


def test_a_busy_thread_is_seen_under_its_name() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    meter = ProcessMeter()
    thread = threading.Thread(target=spin, name="a busy one")
    thread.start()
    try:
        meter.measure(time.monotonic_ns())
        deadline = time.monotonic() + WAIT_S
        while not (used := meter.measure(time.monotonic_ns()).get("thread.a_busy_one.cpu", 0.0)):
            assert time.monotonic() < deadline
    finally:
        stop.set()
        thread.join()
    assert used > 0


def test_a_counter_that_begins_anew_gives_no_rate() -> None:
    rates = meters.Rates()
    found = []
    for second, count in enumerate([100, 300, 50, 60], start=1):
        rates.begin(second * 10**9)
        found.append(rates.of("x", count))
    assert found == [{}, {"x": 200.0}, {}, {"x": 10.0}]


def test_the_kernel_tells_of_every_lane_of_a_link() -> None:
    with start_server(rounds=9, clients=1) as server, pb.join(server.address, make_model(), sgd) as run:
        for batch in run.stream(make_batches(0)):
            if run.train_step(batch, loss_fn).round == 4:
                break
        stats = run.link_stats()["server"]
        (lane,) = stats.lanes
        assert lane.rtt_us > 0
        assert lane.cwnd > 0
        assert (lane.bytes_in, lane.bytes_out) == (stats.bytes_in, stats.bytes_out)
        assert stats.bytes_out > 64 * 64
        assert set(server.link_stats()) == {"client-0"}
    assert run.link_stats()["server"].lanes == []  # it is closed
    assert LinkMeter(run.link_stats).measure(0) == {}


def test_a_ping_becomes_the_links_round_trip() -> None:
    stats = types.SimpleNamespace(bytes_in=1, bytes_out=2, round_trip_ns=1_500_000, lanes=[lane_stats()])
    assert LinkMeter(lambda: {"server": stats}).measure(0)["link.server.round_trip_s"] == 0.0015


def lane_stats() -> types.SimpleNamespace:
    names = ("rtt_us", "rttvar_us", "retransmits", "delivery_rate", "cwnd", "bytes_in", "bytes_out", "unsent_bytes")
    return types.SimpleNamespace(**dict.fromkeys(names, 1))


# ---- The thread


def test_a_wall_clock_that_jumps_moves_nothing_but_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    walls = iter([2e9, 1e9, 3e9, *[0.0] * 10_000])
    clocks = types.SimpleNamespace(time=lambda: next(walls), monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr("parablock_rt.observe.telemetry.time", clocks)
    with Telemetry([collector := Collector()], FAST_S) as watch:
        watch.start("server", [ProcessMeter()])
        samples = [collector.next() for _ in range(3)]
    assert [sample.wall for sample in samples] == [2e9, 1e9, 3e9]
    assert 0 <= samples[0].t_s < samples[1].t_s < samples[2].t_s < WAIT_S
    assert samples[2].at_ns - samples[0].at_ns == pytest.approx((samples[2].t_s - samples[0].t_s) * 1e9)
    assert all(0 <= sample.metrics["process.cpu"] < 1000 for sample in samples[1:])


class Broken(Collector):
    """A reporter whose disk is full."""

    def sample(self, process: str, sample: Sample) -> None:
        self.samples.put(sample)
        raise OSError("no space left")


def test_a_reporter_that_fails_gets_nothing_more_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, good = Broken(), Collector()
    with Telemetry([broken, good], FAST_S) as watch:
        watch.start("server", [Constant()])
        for _ in range(3):
            good.next()
        watch.round({"round": 4})
        assert good.rounds.get(timeout=WAIT_S) == {"round.round": 4.0}
    assert broken.samples.qsize() == 1
    assert broken.rounds.empty()
    assert [record.getMessage() for record in caplog.records] == [
        "Broken failed and is dropped: OSError: no space left"
    ]
    assert good.closed.is_set()


def test_with_a_period_of_zero_nothing_is_sampled_and_rounds_are_reported() -> None:
    class Never:
        def measure(self, now_ns: int) -> Metrics:
            raise AssertionError("nobody asked for samples")

    with Telemetry([collector := Collector()], 0.0) as watch:
        watch.start("server", [Never()])
        watch.round({"round": 1, "loss": float("nan"), "stages": {"send": 2}, "name": "x"})
        numbers = collector.rounds.get(timeout=WAIT_S)
    assert list(numbers) == ["round.round", "round.loss", "round.stages.send"]
    assert collector.samples.empty()
    assert collector.closed.is_set()


def test_every_round_that_was_reported_before_the_close_arrives() -> None:
    with Telemetry([collector := Collector()], 100.0) as watch:
        watch.start("server", [Constant()])
        for number in range(200):
            watch.round({"round": number})
    assert [collector.rounds.get_nowait()["round.round"] for _ in range(200)] == list(range(200))
    assert collector.samples.qsize() == 2  # at the start and at the end


def test_a_telemetry_that_was_never_started_closes_its_reporters() -> None:
    with Telemetry([collector := Collector()], FAST_S):
        pass
    assert collector.closed.is_set()


@pytest.mark.parametrize("period", [-1.0, float("nan"), float("inf")])
def test_a_period_that_cannot_be_is_refused(period: float) -> None:
    with pytest.raises(ConfigError, match="seconds between two samples"):
        Telemetry([], period)


def test_the_newest_samples_become_counters_of_the_trace() -> None:
    class Both:
        def measure(self, now_ns: int) -> Metrics:
            return {"gpu.0.utilization": 0.5, "interface.lo.failed_packets": 0.0, "link.a.lane.0.rtt_s": 1.0}

    with Telemetry([], 100.0) as watch:
        watch.start("server", [Both()])
    first, last = watch.counters()
    assert first.values == last.values == {"gpu.0.utilization": 0.5}
    assert first.at_ns < last.at_ns


# ---- Prometheus


@pytest.fixture
def page() -> Iterator[reporters.Prometheus]:
    pytest.importorskip("prometheus_client")
    reporter = reporters.Prometheus("0")
    yield reporter
    reporter.close()


def fetch(reporter: reporters.Prometheus) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{reporter.port}/metrics", timeout=WAIT_S) as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def test_prometheus_fetches_the_newest_values_with_labels(page: reporters.Prometheus) -> None:
    assert fetch(page) == []
    page.sample("client 0", Sample(0.0, 0, 0.0, {"process.cpu": 9.0, "gone": 1.0}))
    metrics = {"process.cpu": 0.5, "gpu.0.utilization": 0.25, "gpu.1.utilization": 0.75, "link.a.lane.0.rtt_s": 0.01}
    page.sample("client 0", Sample(1.0, 0, 0.0, metrics))
    page.round("client 0", {"round.loss": float("nan"), "round.stages.send": 2.0})
    assert sorted(fetch(page)) == [
        'parablock_gpu_utilization{gpu="0",process="client 0"} 0.25',
        'parablock_gpu_utilization{gpu="1",process="client 0"} 0.75',
        'parablock_link_lane_rtt_s{lane="0",link="a",process="client 0"} 0.01',
        'parablock_process_cpu{process="client 0"} 0.5',
        'parablock_round_loss{process="client 0"} NaN',
        'parablock_round_stages_send{process="client 0"} 2.0',
    ]


def test_prometheus_is_served_to_this_machine_alone_unless_told_otherwise(page: reporters.Prometheus) -> None:
    assert page._server.server_address[0] == "127.0.0.1"
    everywhere = reporters.Prometheus("0.0.0.0:0")
    assert everywhere._server.server_address[0] == "0.0.0.0"
    everywhere.close()


def test_a_port_that_is_taken_is_refused_with_a_way_out(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"cannot serve Prometheus on 127.0.0.1:{port} \(.+\); give prometheus \(--prometh"
        ):
            reporters.open_all(tmp_path, str(port), None)


def test_a_closed_page_frees_its_port() -> None:
    pytest.importorskip("prometheus_client")
    reporter = reporters.Prometheus("0")
    port = reporter.port
    reporter.close()
    with pytest.raises(urllib.error.URLError):
        fetch(reporter)
    again = reporters.Prometheus(str(port))
    again.close()


# ---- TensorBoard and W&B


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (reporter,) = reporters.open_all(tmp_path, None, "tensorboard")
    reporter.sample("server", Sample(1.25, 0, 0.0, {"process.cpu": 0.5}))
    reporter.round("server", {"round.round": 7.0, "round.loss": 2.5})
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("process/cpu")] == [(1250, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("round/loss")] == [(7, 2.5)]


def test_wandb_gets_samples_and_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    steps: dict[str, str] = {}
    settings: dict[str, Any] = {}
    ended: list[bool] = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: steps.update({name: step_metric}),
        log=logged.append,
        finish=lambda: ended.append(True),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: settings.update(given) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (reporter,) = reporters.open_all(tmp_path, None, " wandb ,wandb")
    reporter.sample("server", Sample(1.5, 0, 0.0, {"process.cpu": 0.5}))
    reporter.round("server", {"round.round": 7.0})
    reporter.close()
    assert logged == [{"t_s": 1.5, "process.cpu": 0.5}, {"round.round": 7.0}]
    assert steps == {"round.*": "round.round", "*": "t_s"}
    assert (settings["dir"], settings["name"], ended) == (str(tmp_path), tmp_path.name, [True])


@pytest.mark.parametrize(
    ("module", "package", "options"),
    [
        ("tensorboard", "tensorboard", (None, "tensorboard")),
        ("wandb", "wandb", (None, "wandb")),
        ("prometheus_client", "prometheus-client", ("0", None)),
    ],
)
def test_what_is_not_installed_is_named_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str, options: tuple[str | None, str | None]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is not installed .*; install it with: pip install {package}$"):
        reporters.open_all(tmp_path, *options)


def test_a_reporter_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected report_to \(--report-to\) to name tensorboard or wandb, found 'mlflow'"
    ):
        reporters.open_all(tmp_path, None, "tensorboard,mlflow")
