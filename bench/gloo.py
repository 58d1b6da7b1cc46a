"""`torch.distributed` with gloo: the block's change is all-reduced in the training thread at the end of each round.

Two ranks, each in a network namespace of its own, connected by a pair of virtual interfaces whose rate the kernel's
token bucket limits; so gloo's own sockets are slowed down, without a process between them. That takes root, `ip` and
`tc`. The kernel's artificial delay (netem) is used where there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from parablock_rt.errors import ParaBlockError

from .federation import Link

PORT = 29511
ADDRESSES = ("10.213.7.1", "10.213.7.2")
BURST = 64 * 1024  # bytes that a token bucket lets through at once
DEADLINE_S = 1800.0
WARM_UP_ROUNDS = 1


def unavailable() -> str | None:
    """Why gloo cannot be measured over a slow link here; None when it can."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian's iproute2)"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    try:
        with _slow_pair(Link(1e6, 0.0)):
            return None
    except ParaBlockError as error:
        return str(error)


def run(model: str, link: Link, rounds: int, local_steps: int) -> dict[str, Any]:
    """Both ranks, for `rounds` rounds; the mean over the rounds after the first. Raises ParaBlockError."""
    with _slow_pair(link) as (ends, delayed):
        job = {"model": model, "rounds": rounds, "local_steps": local_steps}
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", __spec__.name, json.dumps({**job, "rank": rank})],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": device},
            )
            for rank, (name, device) in enumerate(ends)
        ]
        try:
            said = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise ParaBlockError(f"gloo's ranks did not end within {DEADLINE_S:g} s") from error
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode != 0 for rank in ranks):
        raise ParaBlockError("a gloo rank failed; its error stands above")
    first = json.loads(said[0].splitlines()[-1])
    return {**first, "delayed": delayed}


@contextlib.contextmanager
def _slow_pair(link: Link) -> Iterator[tuple[list[tuple[str, str]], bool]]:
    """Two namespaces, each with its device of a shaped link between them, and whether that delays too. They end with
    the context."""
    names = [f"parablock-{os.getpid()}-{side}" for side in "ab"]
    devices = [f"pb{os.getpid()}{side}"[-15:] for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            _do("ip", "netns", "add", name)
            made.append(name)
        there = ("peer", "name", devices[1], "netns", names[1])
        _do("ip", "link", "add", devices[0], "netns", names[0], "type", "veth", *there)
        delayed = link.delay > 0
        for name, device, address in zip(names, devices, ADDRESSES, strict=True):
            inside = ("ip", "-n", name)
            _do(*inside, "address", "add", f"{address}/24", "dev", device)
            _do(*inside, "link", "set", device, "up")
            _do(*inside, "link", "set", "lo", "up")
            if link.rate:
                rate = ("rate", f"{link.rate * 8:.0f}bit", "burst", str(BURST), "latency", "400ms")
                _do("tc", "-n", name, "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf", *rate)
            if link.delay:
                parent = ("parent", "1:1") if link.rate else ("root",)
                netem = ("netem", "delay", f"{link.delay * 1e3:g}ms")
                delayed &= _does("tc", "-n", name, "qdisc", "add", "dev", device, *parent, *netem)
        yield list(zip(names, devices, strict=True)), delayed
    finally:
        for name in made:
            _does("ip", "netns", "del", name)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ParaBlockError(f"`{' '.join(command[:4])} ...` failed: {done.stderr.strip() or 'it does not say why'}")


def _does(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def rank(job: dict[str, Any]) -> dict[str, Any]:
    """The body of one rank: trains block after block and all-reduces each change, as a plain script would."""
    import torch
    import torch.distributed as dist

    from parablock_rt.blocks.plan import BlockPlan
    from parablock_rt.client.active import ActiveBlock, freeze
    from parablock_rt.finetune import data
    from parablock_rt.finetune import loop as finetune

    workload = finetune.Workload.for_model(job["model"], eval_examples=0)
    model, _, task = finetune.load(workload)
    dist.init_process_group("gloo", f"tcp://{ADDRESSES[0]}:{PORT}", world_size=2, rank=job["rank"])
    blocks = BlockPlan.from_model(model).materialise(model)
    freeze(model.parameters())
    batches = data.Batches(task.train.shard(job["rank"], 2), workload.batch_size, seed=0)
    batch = iter(batches)
    compute, exposed = [], []
    for index in range(job["rounds"]):
        flat = blocks[index % len(blocks)]
        start = time.monotonic()
        before = torch.cat([part.float() for part in flat.flats])
        master = torch.empty(flat.block.flat_numel) if flat.block.needs_master else None
        active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=workload.lr), master)
        for _ in range(job["local_steps"]):
            example = next(batch, None)
            if example is None:
                batch = iter(batches)
                example = next(batch)
            model(**example).loss.backward()
            active.step()
        change = torch.cat([part.float() for part in flat.flats]) - before
        active.close()
        trained = time.monotonic()
        dist.all_reduce(change)
        done = time.monotonic()
        for segment, part in zip(flat.block.segments, flat.flats, strict=True):
            own = slice(segment.start, segment.start + segment.length)
            part.copy_(before[own] + change[own] / 2)
        compute.append(trained - start)
        exposed.append(done - trained)
    dist.destroy_process_group()
    steady = slice(WARM_UP_ROUNDS, None)
    return {
        "compute_s": statistics.mean(compute[steady]),
        "exposed_s": statistics.mean(exposed[steady]),
        "round_s": statistics.mean(compute[steady]) + statistics.mean(exposed[steady]),
        "bytes_up": max(block.block.flat_numel for block in blocks) * 4,
    }


if __name__ == "__main__":
    print(json.dumps(rank(json.loads(sys.argv[1]))))
