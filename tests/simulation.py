"""The algorithm in one process, with no sockets, threads or clocks: the oracle that whole federations are held against.

Written from the rules, to be read next to them, one state after the other. What it shares with the package is only
which block and which clients a round has (`schedule`, pinned by tests of its own). Bytes, sums and fingerprints come
from the NumPy statement of the codec, whose sum is exact integer arithmetic; speed is no goal.

Two choices decide bits and are therefore stated here:
- A merge puts back on top of the new reference what each later hand-over still under way trained: θ at the end of its
  round minus θ at its start, as the model's own numbers widened to fp32, added up in fp32 in the order of the rounds.
  So a jump that another merge made in between is never taken for progress.
- The server optimisers use torch's own `lerp`, `addcmul` and `addcdiv`, so that a fused rounding is the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import codec_statement as statement
import numpy as np
import torch
from harness import Blocks, LossFunction, MakeBatches, MakeModel, Optimizer, Weight
from torch import Tensor, nn

from parablock_rt.schedule import block_of, cohort_of

Array = statement.Array
TakesPart = Callable[[int, int], bool]  # of a round and a seat


def to_numpy(tensor: Tensor) -> Array:
    """A copy, with bf16 as its bits."""
    tensor = tensor.detach().clone()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_torch(array: Array) -> Tensor:
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )


@dataclass(frozen=True)
class Layout:
    """One block: its parameters' names, shapes and places in a flat buffer, each at a multiple of 128."""

    names: list[str]
    shapes: list[torch.Size]
    offsets: list[int]
    length: int

    @staticmethod
    def of(model: nn.Module, prefixes: Sequence[str]) -> Layout:
        names = [n for n, _ in model.named_parameters() if any(n.startswith(f"{prefix}.") for prefix in prefixes)]
        shapes = [model.get_parameter(name).shape for name in names]
        offsets, end = [], 0
        for shape in shapes:
            offsets.append(end)
            end += -(-shape.numel() // 128) * 128
        return Layout(names, shapes, offsets, end)

    def flatten(self, model: nn.Module) -> Tensor:
        parameters = [model.get_parameter(name) for name in self.names]
        flat = torch.zeros(self.length, dtype=parameters[0].dtype)
        for view, parameter in zip(self.views(flat), parameters, strict=True):
            view.copy_(parameter.detach())
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        places = zip(self.offsets, self.shapes, strict=True)
        return [flat[start : start + shape.numel()].view(shape) for start, shape in places]


def apply(flat: Tensor, body: bytes, format: str) -> Tensor:
    """round(flat + decode(body)) in flat's dtype."""
    return to_torch(statement.apply(to_numpy(flat), body, format))


@dataclass
class Upload:
    """What a client's round came to: the bytes, their weight, and its residual if the server accepts."""

    body: bytes
    weight: float
    residual: Array


@dataclass
class Client:
    """One client. Everything is a list with an entry per block; all flat."""

    model: nn.Module
    layouts: list[Layout]
    format: str
    local_view: str
    theta: list[Tensor]
    reference: list[Tensor]
    residual: list[Array | None] = field(default_factory=list)
    under_way: list[list[tuple[int, Tensor]]] = field(default_factory=list)  # a hand-over's round and progress
    steps: int = 0

    def train(
        self,
        round: int,
        block: int,
        local_steps: int,
        batches: Sequence[object],
        loss_fn: LossFunction,
        optimizer: Optimizer,
        weight: Callable[[int], float],
    ) -> Upload:
        """A round on one block, from the weights it starts with to the hand-over."""
        for layout, theta in zip(self.layouts, self.theta, strict=True):
            self._put(layout, theta)
        layout, ref = self.layouts[block], self.theta[block].clone()
        trained = [self.model.get_parameter(name) for name in layout.names]
        master = ref.float().clone()
        masters = [nn.Parameter(view) for view in layout.views(master)]
        steps = optimizer(masters)
        total = 0.0
        for _ in range(local_steps):
            loss = loss_fn(self.model, batches[self.steps % len(batches)])
            for parameter, gradient in zip(masters, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient.float()
            steps.step()
            self._put(layout, master)
            total += weight(self.steps)
            self.steps += 1
        body, residual, _ = statement.encode(to_numpy(master), to_numpy(ref), self.residual[block], self.format)
        progress = master.to(ref.dtype).float() - ref.float()
        self.theta[block] = master.to(ref.dtype)
        if self.local_view == "reference":
            self.theta[block], progress = self.reference[block].clone(), torch.zeros_like(progress)
        self.under_way[block].append((round, progress))
        return Upload(body, total, residual)

    def merge(self, round: int, block: int, body: bytes) -> None:
        """The aggregate of `round` arrives: the reference moves, and later progress goes back on top of it."""
        self.reference[block] = apply(self.reference[block], body, self.format)
        self.under_way[block] = [(r, progress) for r, progress in self.under_way[block] if r > round]
        self.theta[block] = self.reference[block].clone()
        if self.under_way[block] and self.local_view == "own":
            progress = self.under_way[block][0][1].clone()
            for _, further in self.under_way[block][1:]:
                progress = progress + further
            self.theta[block] = (self.reference[block].float() + progress).to(self.reference[block].dtype)

    def _put(self, layout: Layout, flat: Tensor) -> None:
        with torch.no_grad():
            for name, view in zip(layout.names, layout.views(flat), strict=True):
                self.model.get_parameter(name).copy_(view)


class Server:
    """The master x, the reference x̂, and the round's rule."""

    def __init__(self, reference: list[Tensor], format: str, optimizer: str, lr: float) -> None:
        self.reference = reference
        self.x = [flat.float().clone() for flat in reference]
        self.format = format
        self.optimizer = optimizer
        self.lr = lr
        self.first = [torch.zeros_like(x) for x in self.x]
        self.second = [torch.full_like(x, 1e-3**2) for x in self.x]

    def close(self, block: int, uploads: Sequence[Upload]) -> bytes:
        """Folds a round's uploads and returns the bytes that go down."""
        total = statement.Accumulator(len(self.x[block]))
        for upload in uploads:
            total.add(upload.body, upload.weight, self.format)
        self.x[block] = self._step(block, torch.from_numpy(total.mean()))
        body, _, _ = statement.encode(to_numpy(self.x[block]), to_numpy(self.reference[block]), None, self.format)
        self.reference[block] = apply(self.reference[block], body, self.format)
        return body

    def _step(self, block: int, mean: Tensor) -> Tensor:
        x, m, v = self.x[block], self.first[block], self.second[block]
        if self.optimizer == "average":
            return torch.add(x, mean, alpha=self.lr)
        if self.optimizer == "momentum":
            self.first[block] = m = 0.9 * m + mean
            return torch.add(x, m, alpha=self.lr)
        square = mean * mean
        self.first[block] = m = torch.lerp(m, mean, 1 - 0.9)
        if self.optimizer == "adam":
            v = torch.lerp(v, square, 1 - 0.99)
        else:
            v = torch.addcmul(v, square, torch.sign(v - square), value=-(1 - 0.99))
        self.second[block] = v
        return torch.addcdiv(x, m, v.sqrt() + 1e-3, value=self.lr)


@dataclass
class SimulationResult:
    """`fingerprints`: of each round's block once the round was closed. `parameters`: the final ones, by name."""

    fingerprints: list[int]
    parameters: dict[str, Tensor]
    residuals: dict[int, list[Array | None]]  # by seat, an entry per block


def simulate(
    make_model: MakeModel,
    make_batches: MakeBatches,
    loss_fn: LossFunction,
    optimizer: Optimizer,
    *,
    plan_blocks: Blocks,
    clients: int,
    rounds: int,
    weight: Weight = lambda seat, step: 1.0,
    local_steps: int = 4,
    staleness: int = 1,
    format: str = "int8",
    schedule: str = "cyclic",
    seed: int = 0,
    local_view: str = "own",
    fraction: float = 1.0,
    server_optimizer: str = "average",
    server_lr: float = 1.0,
    takes_part: TakesPart | None = None,
    accepted: TakesPart | None = None,
    newcomers: dict[int, int] | None = None,
) -> SimulationResult:
    """The run that `run_federation` makes of the same arguments, bit by bit.

    Args:
        takes_part: whether a seat trains in a round; by default the cohort does.
        accepted: whether a seat's upload is counted; all are by default.
        newcomers: round -> seat whose client is replaced, before that round, by one that has only the reference.
    """
    layouts = [Layout.of(make_model(), prefixes) for prefixes in plan_blocks]

    def new_client(reference: list[Tensor]) -> Client:
        count = len(layouts)
        copies = [flat.clone() for flat in reference], [flat.clone() for flat in reference]
        return Client(make_model(), layouts, format, local_view, *copies, [None] * count, [[] for _ in range(count)])

    start = make_model()
    server = Server([layout.flatten(start) for layout in layouts], format, server_optimizer, server_lr)
    seats = {seat: new_client(server.reference) for seat in range(clients)}
    order = [block_of(schedule, seed, round, len(layouts)) for round in range(rounds)]
    bodies: list[bytes] = []
    fingerprints: list[int] = []
    for t in range(rounds):
        due = t - 1 - staleness
        for client in seats.values():
            if due >= 0:
                client.merge(due, order[due], bodies[due])
        if newcomers and t in newcomers:
            other = next(client for seat, client in seats.items() if seat != newcomers[t])
            seats[newcomers[t]] = new_client(other.reference)
        cohort = cohort_of(seed, t, clients, max(1, round(fraction * clients)))
        counted: list[Upload] = []
        for seat, client in seats.items():
            if takes_part(t, seat) if takes_part is not None else seat in cohort:
                data, weigh = make_batches(seat), functools.partial(weight, seat)
                upload = client.train(t, order[t], local_steps, data, loss_fn, optimizer, weigh)
                if accepted is None or accepted(t, seat):
                    client.residual[order[t]] = upload.residual
                    counted.append(upload)
        bodies.append(server.close(order[t], counted))
        fingerprints.append(statement.fingerprint(to_numpy(server.reference[order[t]]).tobytes()))
    for client in seats.values():
        for late in range(max(0, rounds - 1 - staleness), rounds):
            client.merge(late, order[late], bodies[late])
        for b in range(len(layouts)):
            assert torch.equal(client.theta[b], server.reference[b])
    parameters = {
        name: view
        for layout, flat in zip(layouts, server.reference, strict=True)
        for name, view in zip(layout.names, layout.views(flat), strict=True)
    }
    return SimulationResult(fingerprints, parameters, {seat: client.residual for seat, client in seats.items()})
