"""The demonstration: the same federated fine-tuning twice over an artificially slow link, without and with overlap.

The server runs in this process. Each client runs in its own process, started through the command line as a user would.
Both runs do the same work with the same seed; only the staleness differs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parablock_rt import report
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.errors import ParaBlockError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe import meters, trace_merge
from parablock_rt.observe.reporters import JsonLines
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import PERIOD_S, Telemetry
from parablock_rt.observe.trace_merge import Trace
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.server.server import Server, serve
from parablock_rt.summary import summarise
from parablock_rt.wire import certs, handshake
from parablock_rt.wire.tls import Tls

_CLIENT_EXIT_S = 30.0
_LITTLE = 0.2  # communication below this fraction of the compute time is little to hide
SEQUENTIAL, PARALLEL = "sequential", "parallel"


@dataclass(frozen=True)
class Demo:
    """What to demonstrate. `rate` (bytes per second) and `delay` (seconds) shape every link in both directions."""

    workload: Workload
    rate: float
    delay: float
    folder: RunFolder
    blocks: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # fields of RunConfig except staleness
    encrypted: bool = False


def run(demo: Demo, console: Console) -> dict[str, Any]:
    """Performs both runs. Returns their summaries and the speed-up, which it also writes to the run folder. Prints
    progress and a table.

    On Ctrl-C and errors, writes a partial summary before it raises them again.
    """
    summaries: dict[str, Any] = {}
    traces: list[tuple[str, Trace]] = []
    config = RunConfig(**demo.settings)
    console.print(f"Loading [b]{demo.workload.model}[/b] and evaluating it on held-out examples ...")
    model, _, task = finetune.load(demo.workload)
    plan = BlockPlan.from_model(model, demo.blocks)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    before = finetune.evaluate(model, task, demo.workload)
    console.print(_describe(demo, config, plan, before))
    try:
        for name, staleness in ((SEQUENTIAL, 0), (PARALLEL, 1)):
            model.load_state_dict(initial)
            one = _One(demo, name, RunConfig(**demo.settings | {"staleness": staleness}), plan, console)
            serial = summaries[SEQUENTIAL]["exposed_comm_s"] if staleness else None
            try:
                one.run(model)
                after = finetune.evaluate(model, task, demo.workload)
            except BaseException:
                summaries[name] = one.summary(serial, before, None)
                raise
            summaries[name] = one.summary(serial, before, after)
            traces += [(name, trace) for trace in one.traces()]
        sequential, parallel = summaries[SEQUENTIAL], summaries[PARALLEL]
        summaries["speedup"] = sequential["wall_s"] / parallel["wall_s"]
    finally:
        demo.folder.write_json("summary.json", summaries)
        demo.folder.write_json("trace.json", trace_merge.merge(traces))
        report.write(demo.folder.path)
        if "speedup" not in summaries:
            console.print(f"Stopped before the end. What there is of it is in {escape(str(demo.folder.path))}")
    console.print(_table(summaries))
    if note := little_to_hide(summaries[SEQUENTIAL]):
        console.print(note)
    console.print(f"Everything is in [b]{demo.folder.path}[/b]; look at report.html first")
    return summaries


class _One:
    """One of the two runs."""

    def __init__(self, demo: Demo, name: str, config: RunConfig, plan: BlockPlan, console: Console) -> None:
        self._demo = demo
        self._name = name
        self._config = config
        self._plan = plan
        self._console = console
        self._folder = RunFolder(demo.folder.path / name)
        self._watch = Telemetry([JsonLines(self._folder)], PERIOD_S)
        self._server: Server | None = None
        self._client_tls: list[str] = []  # the clients' TLS flags

    def run(self, model: torch.nn.Module) -> None:
        self._console.rule(f"{self._name}: staleness {self._config.staleness}")
        token = secrets.token_hex(16)
        with (
            self._tls() as tls,
            serve(
                model,
                self._config,
                plan=self._plan,
                token=token,
                tls=tls,
                rate=self._demo.rate,
                delay=self._demo.delay,
                on_round=self._show,
            ) as self._server,
            self._clients(self._server.address, token) as check,
            self._watch,
        ):
            self._watch.start("server", meters.of_this_machine(self._server.link_stats))
            while self._server.running:
                check()
                with contextlib.suppress(TimeoutError):
                    self._server.wait(timeout=0.5)
            self._server.wait()

    @contextlib.contextmanager
    def _tls(self) -> Iterator[Tls | None]:
        """The server's TLS settings, if the run is encrypted. The certificates exist only for the run."""
        if not self._demo.encrypted:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            server = certs.create(Path(folder), ["127.0.0.1"]).server
            self._client_tls = ["--tls-fingerprint", server.fingerprint]
            yield Tls(server.certificate_file, server.key_file)

    @contextlib.contextmanager
    def _clients(self, address: str, token: str) -> Iterator[Callable[[], None]]:
        """Starts the client processes, and ends them with the context. Yields a check that raises ParaBlockError when a
        client has failed."""
        processes: list[subprocess.Popen[bytes]] = []
        logs: list[Path] = []
        try:
            for index in range(self._config.clients):
                log = self._folder.path / f"client-{index}.log"
                logs.append(log)
                with log.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            self._client_command(address, index),
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {handshake.TOKEN_VARIABLE: token},
                        )
                    )

            def check() -> None:
                for index, process in enumerate(processes):
                    if process.poll() not in (None, 0):
                        tail = "\n".join(logs[index].read_text(errors="replace").splitlines()[-8:])
                        raise ParaBlockError(f"client {index} failed with exit code {process.returncode}:\n{tail}")

            yield check
            for index, process in enumerate(processes):
                try:
                    process.wait(_CLIENT_EXIT_S)
                except subprocess.TimeoutExpired as error:
                    raise ParaBlockError(
                        f"client {index} did not end within {_CLIENT_EXIT_S:g} s of the run"
                    ) from error
            check()
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            for process in processes:
                try:
                    process.wait(_CLIENT_EXIT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _client_command(self, address: str, index: int) -> list[str]:
        workload = self._demo.workload
        options = {
            "model": workload.model,
            "task": workload.task,
            "dtype": workload.dtype,
            "batch-size": workload.batch_size,
            "seq-len": workload.seq_len,
            "lr": workload.lr,
            "threads": workload.threads,
            "rate": f"{self._demo.rate * 8:.0f}",
            "delay": f"{self._demo.delay:g}",
            "run-dir": self._folder.path / f"client-{index}",
        }
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "parablock_rt", "join", address, *flags, *self._client_tls]

    def _show(self, closed: ClosedRound) -> None:
        record = {"run": self._name, **msgspec.to_builtins(closed)}
        self._folder.append_metrics(record)
        self._demo.folder.append_metrics(record)
        self._console.print(round_line(closed, self._config.rounds, self._plan.blocks[closed.block].name))

    def summary(self, serial_s: float | None, before: float | None, after: float | None) -> dict[str, Any]:
        if self._server is None:
            return {"complete": False, "staleness": self._config.staleness}
        summary = summarise(
            self._config,
            self._server.outcome,
            blocks=len(self._plan.blocks),
            serial_comm_s=serial_s,
            eval_loss_before=before,
            eval_loss_after=after,
        )
        self._folder.write_json("summary.json", summary)
        return summary

    def traces(self) -> list[Trace]:
        """The trace of the server and of every client of this run."""
        assert self._server is not None
        self._folder.write_trace(self._server.timeline, self._watch.counters())
        paths = [self._folder.path / "trace.json"]
        paths += [self._folder.path / f"client-{i}" / "trace.json" for i in range(self._config.clients)]
        return [trace_merge.read(path) for path in paths if path.exists()]


def round_line(closed: ClosedRound, rounds: int, block: str) -> str:
    """One line of live progress."""
    return (
        f"  round {closed.round + 1:>3}/{rounds}  {block:<18} loss {closed.loss:6.3f}  "
        f"compute {closed.compute_s:5.2f} s  waited {closed.exposed_s:5.2f} s  "
        f"up {closed.bytes_up / 1e6:6.1f} MB  down {closed.bytes_down / 1e6:6.1f} MB"
        + (f"  [red]{closed.bad_groups} bad groups[/red]" if closed.bad_groups else "")
    )


def little_to_hide(sequential: dict[str, Any]) -> str | None:
    """Explains a missing speed-up if the link is so fast that there is little communication to hide; otherwise None."""
    rounds = max(1, sequential["rounds"])
    compute_s, communication_s = sequential["compute_s"] / rounds, sequential["exposed_comm_s"] / rounds
    if communication_s >= _LITTLE * compute_s:
        return None
    return (
        f"Computing took {compute_s:.1f} s per round and communication {communication_s:.1f} s: there was little to "
        "hide. A slower link (--rate) or fewer local steps (--local-steps) show more"
    )


def _describe(demo: Demo, config: RunConfig, plan: BlockPlan, loss: float | None) -> str:
    rate = f"{demo.rate * 8 / 1e6:g} Mbit/s" if demo.rate else "unlimited"
    held_out = "" if loss is None else f" Held-out answer loss: {loss:.4f}."
    return (
        f"{len(plan.blocks)} blocks of up to {max(b.numel for b in plan.blocks) / 1e6:.2f} M parameters, "
        f"{config.clients} clients, {config.rounds} rounds of {config.local_steps} local steps, {config.format} on the "
        f"wire; link {rate} each way, {demo.delay * 1e3:g} ms one-way delay"
        f"{', in TLS' if demo.encrypted else ''}.{held_out}"
    )


def _table(summaries: dict[str, Any]) -> Table:
    table = Table(title=f"speed-up {summaries['speedup']:.2f}×")
    table.add_column("")
    for name in (SEQUENTIAL, PARALLEL):
        table.add_column(f"{name} (S={summaries[name]['staleness']})", justify="right")

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, show(summaries[SEQUENTIAL]), show(summaries[PARALLEL]))

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    row("wall time, s", lambda s: number(s["wall_s"], ".1f"))
    row("compute, s", lambda s: number(s["compute_s"], ".1f"))
    row("communication if nothing hides it, s", lambda s: number(s["serial_comm_s"], ".1f"))
    row("communication exposed, s", lambda s: number(s["exposed_comm_s"], ".1f"))
    row("waited for other clients, s", lambda s: number(s["waited_for_others_s"], ".1f"))
    row("overlap efficiency", lambda s: number(s["overlap_efficiency"], ".1%"))
    row("MB up / down", lambda s: f"{s['bytes_up'] / 1e6:.1f} / {s['bytes_down'] / 1e6:.1f}")
    row("bytes against bf16", lambda s: number((s["bytes_up"] + s["bytes_down"]) / s["bytes_as_bf16"], ".1%"))
    row("held-out loss before", lambda s: number(s["eval_loss_before"], ".4f"))
    row("held-out loss after", lambda s: number(s["eval_loss_after"], ".4f"))
    row(
        "same bits on server and clients",
        lambda s: "yes" if set(s["digest"]["clients"]) == {s["digest"]["server"]} else "NO",
    )
    return table
