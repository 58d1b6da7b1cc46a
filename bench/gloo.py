"""`torch.distributed` with gloo: the block's change is all-reduced in the training thread at the end of each round.

Two ranks, each in its own network namespace; the kernel shapes the link between them, so gloo's own sockets are as slow
as the links of the other systems. Needs root; `namespaces.why_not` says what else is missing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from parablock_rt.errors import ParaBlockError

from . import namespaces
from .federation import Link

PORT = 29511
DEADLINE_S = 1800.0
WARM_UP_ROUNDS = 1


def run(model: str, link: Link, rounds: int, local_steps: int) -> dict[str, Any]:
    """Both ranks, for `rounds` rounds; the mean over the rounds after the first. Raises ParaBlockError."""
    job = {"model": model, "rounds": rounds, "local_steps": local_steps}
    with namespaces.link(namespaces.Shape(link.rate * 8, link.delay)) as names:
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", __spec__.name, json.dumps({**job, "rank": rank})],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": namespaces.DEVICE},
            )
            for rank, name in enumerate(names)
        ]
        try:
            said = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise ParaBlockError(f"gloo's ranks did not end within {DEADLINE_S:g} s") from error
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode != 0 for rank in ranks):
        raise ParaBlockError("a gloo rank failed; see its error above")
    first: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return first


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
    dist.init_process_group("gloo", f"tcp://{namespaces.ADDRESSES[0]}:{PORT}", world_size=2, rank=job["rank"])
    blocks = BlockPlan.from_model(model).materialise(model)
    freeze(model.parameters())
    batches = data.Batches(task.train.shard(job["rank"], 2), workload.batch_size, seed=0)
    batch = iter(batches)
    compute, exposed = [], []
    for index in range(job["rounds"]):
        flat = blocks[index % len(blocks)]
        start = time.monotonic()
        before = torch.cat([part.float() for part in flat.flats])
        active = ActiveBlock(flat, lambda parameters: torch.optim.AdamW(parameters, lr=workload.lr))
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
