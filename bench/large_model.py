"""A large model whose parameters are all trained, block by block: the memory that it needs and the time of a step.

Runs a server in a process of its own and a client here, over loopback, with random weights of a Llama shape in bf16,
activation checkpointing and a full sweep over all blocks, embeddings and head included. On a CUDA device the shape is
that of Llama 3 8B and torch is limited to `--limit-gib` of device memory; on a machine without such a device, a small
model of the same proportions takes its place, and figures that need a device are null.

The client never holds the weights in fp32. It starts with empty memory and gets the weights from the server's snapshot.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import parablock_rt as pb
from parablock_rt.client import memory

from .pinned import pinned_figures, pinned_needed
from .process import answer
from .result import Result, columns, keep, shown

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 896,
        "vocab_size": 8016,
    },
}
GIB = 2**30
WAIT_S = 600.0
KEPT_EVERY = 4  # rounds
FIGURES = (
    "model_and_training_bytes_a_parameter",
    "peak_device_bytes",
    "peak_device_reserved_bytes",
    "device_in_use_at_the_end_bytes",
    "beyond_the_prediction_bytes",
    "client_peak_resident_bytes",
    "pinned_bytes_needed",
    "pinned_bytes",
    "rounds_done",
    "join_s",
    "wall_s",
    "step_s_median",
    "exposed_s_total",
    "exposed_s_a_round_median",
    "bytes_up",
    "bytes_down",
    "loss_first",
    "loss_last",
)
"""The figures of a row; None until they are known."""


def on_meta(shape: str) -> Any:
    """The model without memory, in bf16, its vocabulary split by rows so that no parameter is larger than a layer."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, use_cache=False, max_position_embeddings=8192)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    pb.split_rows(model, largest_layer(model))
    return model


def largest_layer(model: Any) -> int:
    """Elements of the largest decoder layer."""
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)


def plan_of(model: Any) -> pb.BlockPlan:
    """A plan that covers every parameter, with no block larger than a decoder layer."""
    return pb.BlockPlan.from_model(model, outer="train", outer_limit=largest_layer(model))


def with_memory(model: Any, device: str) -> Any:
    """The model on a device, with zero weights."""
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)  # its buffers are computed, not loaded
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Fills in weights like a fresh model's: N(0, 0.02) in matrices, from a table of 2^20 values; ones in norms."""
    table = torch.randn(2**20, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), len(table)):
            part = flat[start : start + len(table)]
            part.copy_(table[: len(part)])


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused, because the multi-tensor form needs another four bytes per parameter inside each step."""
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def serve(shape: str, settings: dict[str, Any], threads: int, pipe: Connection) -> None:
    """The body of the server's process: sends its address, and after the run its digest and peak resident memory."""
    torch.set_num_threads(threads)
    model = with_memory(on_meta(shape), "cpu")
    fill(model)
    with pb.serve(model, plan=plan_of(model), **settings) as server:
        pipe.send(server.address)
        server.wait(WAIT_S)
    pipe.send({"digest": server.outcome.digest, "peak_resident_bytes": peak_resident_bytes()})


def peak_resident_bytes() -> int:
    """The peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Watch:
    """The memory that a client holds at its optimiser steps and hand-overs: the most of each item."""

    run: pb.Run | None = None
    items: dict[str, int] = field(default_factory=dict)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = adamw(parameters)
        made.register_step_post_hook(lambda *_: self.note())
        return made

    def note(self) -> None:
        if self.run is not None:
            for name, nbytes in self.run.holdings().items():
                self.items[name] = max(self.items.get(name, 0), nbytes)


Note = Callable[[dict[str, Any]], None]


def train(address: str, model: Any, tokens: int, pinned_memory: int, note: Note) -> str:
    """Runs the client to the end, on sequences of random tokens, and returns its digest. Passes the figures so far to
    `note` every few rounds and at the end."""
    device = next(model.parameters()).device
    model.train()
    checkpoint = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    checkpoint({"use_reentrant": False})
    watch, rounds = Watch(), list[pb.RoundReport]()
    generator = torch.Generator().manual_seed(1)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
            yield {"input_ids": ids, "labels": ids}

    joined = time.perf_counter()
    with pb.join(
        address, model, watch.optimizer, on_round=rounds.append, patience=WAIT_S, pinned_memory=pinned_memory
    ) as run:
        watch.run = run
        began = time.perf_counter()
        started = {"join_s": began - joined, **pinned_figures(run._stager, pinned_memory)}
        for batch in run.stream(batches()):
            report = run.train_step(batch)
            if report.finished or (report.round_ended and len(rounds) % KEPT_EVERY == 0):
                note({**started, "wall_s": time.perf_counter() - began, **figures_of(run, rounds), "held": watch.items})
    assert run.digest is not None
    return run.digest


def figures_of(run: pb.Run, rounds: list[pb.RoundReport]) -> dict[str, Any]:
    """A run's own figures after these rounds."""
    return {
        "rounds_done": len(rounds),
        "step_s_median": statistics.median(r.compute_s for r in rounds) / run.config.local_steps,
        "exposed_s_total": run.exposed_s,
        "exposed_s_a_round_median": statistics.median(r.exposed_s for r in rounds),
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "loss_first": rounds[0].loss,
        "loss_last": rounds[-1].loss,
    }


def taken(held: dict[str, int], parameters: int, predicted: memory.Prediction) -> dict[str, int | float]:
    """The memory in use so far, and how far its peak exceeds the prediction."""
    resident = sum(held[name] for name in ("weights", "references", "master", "gradients", "optimiser state"))
    found: dict[str, int | float] = {"model_and_training_bytes_a_parameter": resident / parameters}
    found["client_peak_resident_bytes"] = peak_resident_bytes()
    if predicted.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        found["peak_device_bytes"] = peak
        found["peak_device_reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["device_in_use_at_the_end_bytes"] = in_use()
        found["beyond_the_prediction_bytes"] = peak - predicted.peak("device")
    return found


def measure(options: argparse.Namespace, keep_row: Note = lambda row: None) -> dict[str, Any]:
    """One run and its figures. Passes the row so far to `keep_row`, first with only the prediction."""
    cuda = options.device == "cuda"
    model = on_meta(options.shape)
    plan = plan_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    rounds = options.rounds or len(plan.blocks) + 1  # every block, and the first again
    settings = {"rounds": rounds, "clients": 1, "local_steps": options.local_steps, "staleness": 1}
    settings |= {"format": options.format}
    config = pb.RunConfig(**settings)
    predicted = memory.predict(model, plan, config, adamw, options.device)
    row: dict[str, Any] = {
        "shape": {"name": options.shape, **SHAPES[options.shape]},
        "parameters": parameters,
        "trained_parameters": sum(block.numel for block in plan.blocks),
        "blocks": len(plan.blocks),
        "settings": {**settings, "tokens": options.tokens, "optimizer": "AdamW, fused", "dtype": "bf16"},
        "device": torch.cuda.get_device_name() if cuda else None,
        "limit_gib": options.limit_gib if cuda else None,
        "predicted": predicted.to_dict(),
        "held": {},
        **dict.fromkeys(FIGURES),
    }
    keep_row(row)

    def note(figures: dict[str, Any]) -> None:
        row.update(figures, **taken(figures["held"], parameters, predicted))
        keep_row(row)

    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_gib * GIB / total))
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(options.shape, settings, options.server_threads, there), daemon=True
    )
    process.start()
    there.close()
    try:
        with_memory(model, options.device)
        digest = train(answer(here, WAIT_S), model, options.tokens, pinned_needed(plan, config), note)
        server = answer(here, WAIT_S)
    finally:
        process.join(30.0)
        process.kill()
    if server["digest"] != digest:
        raise RuntimeError(f"the server ended on {server['digest']}, the client on {digest}")
    return row | {"digest": digest, "server_peak_resident_bytes": server["peak_resident_bytes"]}


def in_use() -> int:
    """Bytes of the device in use by this process and others, including CUDA's own."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape, the run, the limit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3-8b on a CUDA device, else small")
    parser.add_argument("--rounds", type=int, help="default: a sweep over all blocks and one round more")
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, help="per sequence, one sequence per step; default: 512 on a CUDA device, else 32"
    )
    parser.add_argument("--format", default="int8")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="what torch may take of the device's memory")
    parser.add_argument("--server-threads", type=int, default=max(1, (torch.get_num_threads() or 2) // 2))


def run(options: argparse.Namespace) -> Result:
    """One run."""
    # Blocks of different sizes come and go: without this, freed ranges too small for reuse count against the limit.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if options.device == "cpu":
        torch.set_num_threads(1)
    options.tokens = options.tokens or (512 if options.device == "cuda" else 32)
    options.shape = options.shape or ("llama-3-8b" if options.device == "cuda" else "small")
    names = ("device", "shape", "rounds", "local_steps", "tokens", "format", "limit_gib", "server_threads")
    settings = {name: getattr(options, name) for name in names}
    row = measure(options, lambda row: keep({"settings": settings, "rows": [row]}))
    return {"settings": settings, "rows": [row]}


def tables(result: Result) -> list[Table]:
    """The memory held beside the prediction, and the figures of the run."""
    row = result["rows"][0]
    most = {item["name"]: max(item["bytes"]) / 1e9 for item in row["predicted"]["items"]}
    title = f"{row['shape']['name']}: {row['parameters']:,} parameters, all trained, in {row['blocks']} blocks"
    held = columns(title, "item", "held at most, GB", "predicted, GB")
    for name, nbytes in row["held"].items():
        held.add_row(name, shown(nbytes / 1e9), shown(most.get(name, 0.0)))
    run = columns("the run", "figure", "value")
    peak, limit = row["peak_device_bytes"], row["limit_gib"]
    if peak is not None:
        run.add_row(f"peak device memory, with activations; the limit is {limit:g} GiB", f"{peak / GIB:.2f} GiB")
    if (pinned := row["pinned_bytes"]) is not None:
        needed = row["pinned_bytes_needed"] / GIB
        run.add_row(f"pinned host memory; {needed:.2f} GiB are needed", f"{pinned / GIB:.2f} GiB")
    run.add_row("model and training state, bytes per parameter", shown(row["model_and_training_bytes_a_parameter"]))
    run.add_row("step", f"{row['step_s_median'] * 1e3:.1f} ms")
    run.add_row("exposed communication per round", f"{row['exposed_s_a_round_median'] * 1e3:.1f} ms")
    return [held, run]


def metrics(result: Result) -> dict[str, float]:
    """Steps per second, and parameters per byte of device memory."""
    row = result["rows"][0]
    step, peak = row["step_s_median"], row["peak_device_bytes"]
    found = {} if step is None else {"steps per second": 1 / step}
    return found if peak is None else found | {"parameters per byte": row["parameters"] / peak}


def plot(result: Result, figure: Any) -> None:
    """The memory held, by item."""
    row = result["rows"][0]
    axes = figure.subplots()
    axes.barh(list(row["held"]), [nbytes / 1e9 for nbytes in row["held"].values()])
    axes.invert_yaxis()
    axes.set_xlabel("GB held at most")
    figure.suptitle(f"{row['shape']['name']} on {row['device'] or 'the CPU'}")
