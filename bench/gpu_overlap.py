"""The cost of handing a block over, for training on a GPU: at the boundary of a round, and while transfers go on.

Boundary: a client trains a model of three equal blocks on the GPU with staleness 1, against a server in another process
on the same machine, over loopback. All times are between CUDA events on the training stream, from the beginning of one
step to the beginning of the next. `boundary_s` is how much longer the last step of a round and the first step of the
next round take than other steps of the same two blocks (the time of a step depends on how far back its gradients go):
all time that the training stream loses at a boundary, to communication and to the change of blocks.
`block_change_s` is the same figure for the same model trained after the run without communication: what remains are the
copy of the block's weights that serves as reference, new fp32 masters, a new optimiser, and the optimiser's state in
the first step. The difference, `exposed_s`, is the time that communication takes from training. `waited_s` is the time
that the training thread was blocked on communication. Medians, without the first two rounds.

Beside transfers: the time of a training step while another thread repeatedly hands over a block with its error
feedback, sends the body over loopback and copies it back to the GPU, against the time without transfers, in alternating
windows. The rate counts the bytes that cross between host and GPU.

Without a GPU both run to the end with a small model on the CPU, and every figure is null.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import threading
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

import parablock_rt as pb
from parablock_rt import _C
from parablock_rt.client.active import ActiveBlock, freeze
from parablock_rt.errors import ConfigError
from parablock_rt.staging.stager import Piece, Stager
from parablock_rt.wire.transport import Transport, body_layout

from .pinned import pinned_figures, pinned_needed
from .process import answer
from .result import Result, columns, keep, shown

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCKS = 3
WARM_UP_ROUNDS = 2
CHUNK = 1 << 18
START_S = 300.0
CHANGE_STEPS = 20  # most steps of a round without communication
BOUNDARY = ("step_s", "round_s", "boundary_s", "block_change_s", "exposed_s", "exposed_share", "waited_s")
Begin = tuple[int, int, Any]  # of a step: its round, its block, and an event on the training stream
BESIDE = ("step_s_without", "step_s_with", "ratio", "transfer_gb_per_s")


def make_model(width: int, device: str) -> nn.Sequential:
    """Three square layers, one block each."""
    layers = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device=device) for _ in range(BLOCKS)]
    with torch.no_grad():
        for seed, layer in enumerate(layers):
            generator = torch.Generator(device).manual_seed(seed)
            layer.weight.normal_(std=width**-0.5, generator=generator)
    return nn.Sequential(*layers)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).float().square().mean()
    return loss


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6)


def _serve(pipe: Any, width: int, settings: dict[str, Any]) -> None:
    """The body of the server's process. The client gets its weights from the server."""
    model = make_model(width, "cpu")
    with pb.serve(model, plan=plan_of(model), **settings) as server:
        pipe.send(server.address)
        server.wait()


def plan_of(model: nn.Module) -> pb.BlockPlan:
    """One block per layer."""
    return pb.BlockPlan.from_model(model, [[str(i)] for i in range(BLOCKS)])


def boundary(width: int, tokens: int, rounds: int, local_steps: int) -> dict[str, Any]:
    """The boundaries of a run and of the same training without communication, timed on the device."""
    settings = {"rounds": rounds, "clients": 1, "local_steps": local_steps, "staleness": 1, "format": "int8"}
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(there, width, settings), daemon=True)
    server.start()
    there.close()
    model, batch = make_model(width, DEVICE), torch.randn(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    begins: list[Begin] = []
    waited: list[float] = []
    needed = pinned_needed(plan_of(model), pb.RunConfig(**settings))
    try:
        address = answer(pipe, START_S)
        with pb.join(
            address, model, optimizer, on_round=lambda report: waited.append(report.exposed_s), pinned_memory=needed
        ) as run:
            pinned = pinned_figures(run._stager, needed)
            while not run.finished:
                begin = event_here()
                report = run.train_step(batch, loss_fn, weight=1.0)
                begins.append((report.round, report.block, begin))
        server.join(60.0)
    finally:
        server.kill()
    changes = block_changes(model, batch, rounds, min(local_steps, CHANGE_STEPS))
    result: dict[str, Any] = {"params_a_block": width * width, "tokens": tokens, "rounds": rounds, **pinned}
    result |= {"local_steps": local_steps, **dict.fromkeys(BOUNDARY)}
    if not GPU:
        return result | {"note": "no GPU: a small model ran to the end on the CPU, nothing is timed"}
    steps, alone = timed(begins), timed(changes)
    result |= compared(steps, alone, local_steps) | {"waited_s": statistics.median(waited[WARM_UP_ROUNDS:])}
    seconds = {"steps_s": steps, "steps_without_communication_s": alone}
    return result | {name: [each.seconds for each in those] for name, those in seconds.items()}


def event_here() -> Any:
    """An event on the training stream; None without a GPU."""
    if not GPU:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def block_changes(model: nn.Module, batch: torch.Tensor, rounds: int, local_steps: int) -> list[Begin]:
    """Trains one block after the other like a run, but without a server. Returns the beginnings of the steps."""
    blocks = plan_of(model).materialise(model)
    freeze(model.parameters())
    begins: list[Begin] = []
    for round in range(rounds):
        flat = blocks[round % BLOCKS]
        reference = [each.clone() for each in flat.flats]
        active = ActiveBlock(flat, optimizer)
        for _ in range(local_steps):
            begins.append((round, round % BLOCKS, event_here()))
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            active.step()
        active.close()
        del reference, active
    return begins


def timed(begins: list[Begin]) -> list[Step]:
    """The steps after the warm-up rounds. Waits for the GPU."""
    torch.cuda.synchronize()
    return [
        Step(round, block, begin.elapsed_time(end) / 1e3)
        for (round, block, begin), (*_, end) in itertools.pairwise(begins)
        if round >= WARM_UP_ROUNDS
    ]


def compared(steps: list[Step], alone: list[Step], local_steps: int) -> dict[str, float]:
    """The cost of a boundary in a run, and the part of it that is due to communication."""
    step, lost = at_the_boundaries(steps)
    _, change = at_the_boundaries(alone)
    round_s, exposed = step * local_steps + lost, lost - change
    figures = {"step_s": step, "round_s": round_s, "boundary_s": lost, "block_change_s": change}
    return figures | {"exposed_s": exposed, "exposed_share": exposed / round_s}


class Step(NamedTuple):
    """From the beginning of one step to the beginning of the next."""

    round: int
    block: int
    seconds: float


def at_the_boundaries(steps: list[Step]) -> tuple[float, float]:
    """Seconds of a step that is not at a boundary, as the mean over the blocks; and the seconds that the two steps at a
    boundary, of the old block and of the new one, take beyond other steps of the same blocks."""
    ends = [i for i, (one, after) in enumerate(itertools.pairwise(steps)) if one.round != after.round]
    edges = {0, *ends, *(i + 1 for i in ends)}
    within: dict[int, list[float]] = {}
    for i, step in enumerate(steps):
        if i not in edges:
            within.setdefault(step.block, []).append(step.seconds)
    usual = {block: statistics.median(seconds) for block, seconds in within.items()}
    lost = [sum(step.seconds - usual[step.block] for step in steps[i : i + 2]) for i in ends]
    return statistics.fmean(usual.values()), statistics.median(lost)


class Traffic:
    """Hands one block over, over loopback and back, again and again while the `with` body runs."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.bytes_per_second = 0.0
        self.pinned: dict[str, int | None] = {}
        self.error: BaseException | None = None

    def __enter__(self) -> Traffic:
        self._thread.start()
        if not self._ready.wait(120.0) or self.error is not None:
            raise RuntimeError("no transfers within 120 s") from self.error
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(120.0)
        if self.error is not None:
            raise RuntimeError("the transfers ended early") from self.error

    def _run(self) -> None:
        try:
            if GPU:
                with torch.cuda.stream(torch.cuda.Stream()):  # apart from the training stream, which must not wait
                    self._exchange(_gpu_stager(self._numel), "cuda")
            else:
                self._exchange(Stager(), "cpu")
        except BaseException as error:
            self.error = error
            self._ready.set()

    def _exchange(self, stager: Any, device: str) -> None:
        self.pinned = pinned_figures(stager, _pinned_for(self._numel))
        ref = torch.zeros(self._numel, dtype=torch.bfloat16, device=device)
        now = torch.randn(self._numel, device=device)
        old, new = stager.residual(self._numel).zero_(), stager.residual(self._numel)
        layout = body_layout("int8", self._numel, CHUNK)
        start, moved = 0, 0
        with Transport() as near, Transport() as far:
            link = near.connect(far.listen("127.0.0.1:0", protected=True))
            connected = far.next_event(60.0)
            assert connected is not None
            while not self._stop.is_set() or moved == 0:
                landing = stager.landing(self._numel, "int8", CHUNK)
                far.native.receive(connected.link, 1, moved, 0, landing.buffer, layout, listener=landing.watermark)
                encoding = stager.encode([Piece(now, ref, old, new)], "int8", CHUNK, near)
                near.native.send(link, 1, moved, 0, encoding.source)
                for transport in (far, near):
                    event = transport.next_event(60.0)
                    if event is None or event.type == _C.Event.Type.CLOSED:
                        raise RuntimeError(f"a transfer did not end: {event and event.text}")
                landing.body()
                stager.release_landing(landing)
                stager.release(encoding)
                moved += 1
                if moved == 1:  # compiled and warm
                    self._ready.set()
                    start = _C.monotonic_ns()
            seconds = (_C.monotonic_ns() - start) / 1e9
            # The body goes to the host and back to the device; the residual goes to the device and back.
            self.bytes_per_second = (2 * layout.nbytes + 8 * self._numel) * (moved - 1) / seconds
        stager.close()


def _pinned_for(numel: int) -> int:
    """Bytes of two residuals and some bodies."""
    return 14 * numel


def _gpu_stager(numel: int) -> Any:
    from parablock_rt.staging.device import CudaDevice
    from parablock_rt.staging.device_stager import DeviceStager
    from parablock_rt.staging.pinned import PinnedMemory

    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    device.warm_up({(torch.float32, torch.bfloat16)}, "int8")
    return DeviceStager(device, PinnedMemory(device.driver, _pinned_for(numel), _pinned_for(numel)))


def beside(width: int, tokens: int, numel: int, windows: int, steps: int) -> dict[str, Any]:
    """The time of a step with and without transfers."""
    model, batch = make_model(width, DEVICE), torch.randn(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    trained = optimizer(list(model.parameters()))

    def window() -> float:
        marks = [torch.cuda.Event(enable_timing=True) if GPU else None for _ in range(2)]
        for mark, count in zip(marks, (steps, 0), strict=True):
            if mark is not None:
                mark.record()
            for _ in range(count):
                loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
                trained.step()
                trained.zero_grad()
        if marks[0] is None or marks[1] is None:
            return 0.0
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3 / steps

    window()
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    rates, pinned = [], {}
    for _ in range(windows):
        seconds["without"].append(window())
        with Traffic(numel) as traffic:
            seconds["with"].append(window())
        rates.append(traffic.bytes_per_second / 1e9)
        pinned = traffic.pinned
    result: dict[str, Any] = {"params": numel, "windows": windows, "steps": steps, **pinned, **dict.fromkeys(BESIDE)}
    if not GPU:
        return result | {"note": "no GPU: transfers of a small block ran on the CPU, nothing is timed"}
    without, with_transfers = statistics.median(seconds["without"]), statistics.median(seconds["with"])
    return result | dict(
        zip(BESIDE, (without, with_transfers, with_transfers / without, statistics.median(rates)), strict=True)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the batch, the number of rounds and windows."""
    # 14,768 squared is 218 M parameters per block.
    parser.add_argument("--width", type=int, default=14_768 if GPU else 32, help="width of a square block")
    parser.add_argument("--tokens", type=int, default=8192 if GPU else 8, help="tokens per batch")
    parser.add_argument("--rounds", type=int, default=12 if GPU else 4)
    parser.add_argument("--local-steps", type=int, default=80 if GPU else 2)
    parser.add_argument("--windows", type=int, default=5 if GPU else 1)
    parser.add_argument("--steps", type=int, default=400 if GPU else 2, help="steps per window")


def run(options: argparse.Namespace) -> Result:
    """The boundary, then the windows beside transfers, on a model of a quarter of the width."""
    fourth = -(-options.width // 4 // 16) * 16  # rows of whole 16 bytes in any dtype, since others multiply more slowly
    numel = options.width**2 // 128 * 128
    if options.local_steps < 3 and GPU:
        raise ConfigError("--local-steps must be 3 or more: each round needs a step that is not at a boundary")
    names = ("width", "tokens", "rounds", "local_steps", "windows", "steps")
    result: Result = {"settings": {name: getattr(options, name) for name in names}, "rows": []}
    at = boundary(options.width, options.tokens, options.rounds, options.local_steps)
    result["rows"].append({"case": "boundary", **at})
    keep(result)
    along = beside(fourth, options.tokens, numel, options.windows, options.steps)
    result["rows"].append({"case": "beside transfers", **along})
    return result


def tables(result: Result) -> list[Table]:
    """The two results."""
    at, along = result["rows"]
    boundary = columns(
        "at a round's boundary, block of 218 M parameters by default",
        "million parameters",
        "step, ms",
        "round, s",
        "lost at a boundary, ms",
        "lost to the change of blocks, ms",
        "lost to communication, ms",
        "share of the round lost to communication",
        "training thread blocked, ms",
    )
    if at["step_s"] is not None:
        boundary.add_row(
            shown(at["params_a_block"] / 1e6, ".0f"),
            shown(at["step_s"] * 1e3, ".2f"),
            shown(at["round_s"]),
            *(shown(at[name] * 1e3, ".2f") for name in ("boundary_s", "block_change_s", "exposed_s")),
            shown(at["exposed_share"], ".2%"),
            shown(at["waited_s"] * 1e3, ".2f"),
        )
    beside = columns(
        "a training step with and without transfers", "without, ms", "with, ms", "with / without", "transfers, GB/s"
    )
    if along["ratio"] is not None:
        times = (shown(along[name] * 1e3, ".3f") for name in BESIDE[:2])
        beside.add_row(*times, shown(along["ratio"]), shown(along["transfer_gb_per_s"], ".2f"))
    return [boundary, beside]


def metrics(result: Result) -> dict[str, float]:
    """Steps per second with transfers over those without, and rounds per second."""
    at, along = result["rows"]
    found = {} if along["ratio"] is None else {"steps beside transfers": 1 / along["ratio"]}
    return found if at["round_s"] is None else found | {"rounds": 1 / at["round_s"]}


def plot(result: Result, figure: Any) -> None:
    """Every step of the run, so that the boundaries can be seen."""
    at = result["rows"][0]
    figure.suptitle(f"steps of a run on {result['machine'].get('gpu', 'no GPU: nothing was timed')}")
    if not at.get("steps_s"):
        return
    axes = figure.subplots()
    axes.plot([seconds * 1e3 for seconds in at["steps_s"]], linewidth=0.8)
    axes.set(xlabel="step after the warm-up rounds", ylabel="ms")
    axes.set_ylim(bottom=0)
