"""A server in this process and long-lived client processes, which run one federation after another without reloading.

Every run starts from the same weights and leaves a run folder like a user's run; the results are read from there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parablock_rt import serve
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.joining import join
from parablock_rt.config import RunConfig
from parablock_rt.errors import ParaBlockError
from parablock_rt.finetune import data
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.report import folder
from parablock_rt.report.folder import Recorded
from parablock_rt.summary import summarise

DEADLINE_S = 1800.0
Prepare = Callable[[nn.Module], None]  # changes a freshly loaded model, on both sides


@dataclass(frozen=True)
class Link:
    """The artificial link of every client: bytes per second (0: unlimited) and seconds one way."""

    rate: float
    delay: float


@dataclass
class _Job:
    address: str
    token: str
    link: Link
    folder: Path


@dataclass
class Federation:
    """One model on a server and `clients` processes; made by `federation`."""

    workload: Workload
    model: nn.Module
    clients: int
    _initial: dict[str, torch.Tensor] = field(default_factory=dict)
    _pipes: list[Connection] = field(default_factory=list)

    def run(self, path: Path, link: Link, blocks: int | None = None, **settings: Any) -> Recorded:
        """One run to its end, with its folder at `path`. `settings`: fields of RunConfig.

        Raises ParaBlockError when a client failed.
        """
        self.model.load_state_dict(self._initial)
        run_folder = RunFolder(path)
        token = secrets.token_hex(16)
        config = RunConfig(clients=self.clients, **settings)
        plan = BlockPlan.from_model(self.model, blocks)
        server = serve(
            self.model,
            plan=plan,
            token=token,
            rate=link.rate,
            delay=link.delay,
            clients=self.clients,
            on_round=lambda closed: run_folder.append_metrics(asdict(closed)),
            **settings,
        )
        with server:
            for index, pipe in enumerate(self._pipes):
                pipe.send(_Job(server.address, token, link, path / f"client-{index}"))
            for index, pipe in enumerate(self._pipes):
                if not pipe.poll(DEADLINE_S):
                    raise ParaBlockError(f"client {index} did not end within {DEADLINE_S:g} s")
                if (failure := pipe.recv()) is not None:
                    raise ParaBlockError(f"client {index} failed:\n{failure}")
            outcome = server.wait(DEADLINE_S)
        summary = summarise(config, outcome, blocks=len(plan.blocks))
        run_folder.write_json("summary.json", summary)
        run_folder.write_trace(server.timeline)
        (recorded,) = folder.load(path)
        return recorded


@contextlib.contextmanager
def federation(workload: Workload, clients: int = 2, prepare: Prepare | None = None) -> Iterator[Federation]:
    """A federation whose processes end with the context. `prepare` must be importable by name."""
    context = multiprocessing.get_context("spawn")
    processes = []
    made = Federation(workload, _load(workload, prepare)[0], clients)
    made._initial = {name: value.clone() for name, value in made.model.state_dict().items()}
    try:
        for _ in range(clients):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_client, args=(theirs, workload, prepare), daemon=True))
            processes[-1].start()
            theirs.close()
            made._pipes.append(ours)
        yield made
        for pipe in made._pipes:
            pipe.send(None)
        for process in processes:
            process.join(10.0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _load(workload: Workload, prepare: Prepare | None) -> tuple[nn.Module, data.Task]:
    model, _, task = finetune.load(workload)
    if prepare is not None:
        prepare(model)
    return model, task


def _client(pipe: Connection, workload: Workload, prepare: Prepare | None) -> None:
    """The body of a client process: takes part in one run after another until the pipe gives None."""
    model, task = _load(workload, prepare)
    initial = {name: value.clone() for name, value in model.state_dict().items()}

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=workload.lr, weight_decay=0.0)

    while (job := pipe.recv()) is not None:
        try:
            model.load_state_dict(initial)
            run_folder = RunFolder(job.folder)
            link = {"rate": job.link.rate, "delay": job.link.delay}
            with join(job.address, model, optimizer, token=job.token, **link) as run:
                shard = task.train.shard(run.client, run.config.clients)
                for batch in run.stream(data.Batches(shard, workload.batch_size, seed=run.config.seed)):
                    run.train_step(batch)
            run_folder.write_trace(run.timeline)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
