"""The train-step runtime: what a training loop calls, and what happens at a round's end.

At the end of round `t` the trained block is handed over and its encoding and sending begin in native threads; then the
aggregates of the rounds up to `t − S` are applied, exactly those, waiting for one that is not there yet; then round
`t + 1` starts. The training thread alone calls everything here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parablock_rt import aggregate, protocol
from parablock_rt.active import ActiveBlock, OptimizerFactory, freeze
from parablock_rt.blocks import BlockPlan, FlatBlock
from parablock_rt.errors import ConfigError, ParaBlockError, PlanMismatchError
from parablock_rt.replica import Handover, Replica
from parablock_rt.schedule import block_of, cohort_of
from parablock_rt.server_link import ServerLink
from parablock_rt.staging import Stager
from parablock_rt.timeline import Timeline
from parablock_rt.transport import Shape, Transport

Batch = TypeVar("Batch")
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepReport:
    """One local step. `exposed_s`: seconds this call was blocked on communication; 0 except at a round boundary."""

    loss: float
    round: int
    block: int
    exposed_s: float
    finished: bool


@dataclass(frozen=True)
class RoundReport:
    """One round on this client. `exposed_s`: what its start waited for. Bytes are payload since the run began."""

    round: int
    block: int
    loss: float
    compute_s: float
    exposed_s: float
    bytes_up: int
    bytes_down: int


@dataclass
class _Round:
    """The round that trains now."""

    index: int
    block: int
    active: ActiveBlock
    ref: list[Tensor]
    began_ns: int
    exposed_s: float
    steps: int = 0
    weight: float = 0.0
    loss_sum: float = 0.0


class Run:
    """A client's part in a run; made by `join`, used as a context manager."""

    def __init__(
        self,
        link: ServerLink,
        model: nn.Module,
        plan: BlockPlan,
        blocks: list[FlatBlock],
        welcome: protocol.Welcome,
        optimizer: OptimizerFactory,
        on_round: Callable[[RoundReport], None] | None,
    ) -> None:
        """For `join`, which has shaken hands and materialised the plan."""
        self.model = model
        self.plan = plan
        self.config = welcome.config
        self.client = welcome.client
        self.timeline = Timeline(f"client {self.client}")
        self.compute_s = 0.0
        self.exposed_s = 0.0
        self.bad_groups = 0
        self.digest: str | None = None
        self._link = link
        self._blocks = blocks
        self._replica = Replica(blocks, self.config.format, self.config.local_view)
        self._stager = Stager()
        self._optimizer = optimizer
        self._on_round = on_round
        self._versions = [0] * len(blocks)
        self._in_flight: list[Handover] = []
        self._handed_over = -1  # the last round
        self._early_verdicts: list[protocol.Verdict] = []
        self._was_trainable = {p: p.requires_grad for p in model.parameters()}
        self._round: _Round | None = None
        self._closed = False

    # ---- What a training loop calls

    @property
    def finished(self) -> bool:
        """Whether the last round's aggregate is applied: the model is the run's result."""
        return self.digest is not None

    @property
    def bytes_up(self) -> int:
        """Payload bytes handed over so far."""
        return self._link.bytes_up

    @property
    def bytes_down(self) -> int:
        """Payload bytes received so far."""
        return self._link.bytes_down

    def stream(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches, epoch after epoch, until the run has finished. Take one step with each.

        Raises ConfigError when the loader has none, ParaBlockError when a batch came back without a step.
        """
        seen = 0
        while self._round is not None:
            before = seen
            for batch in loader:
                seen += 1
                steps_before = self._steps_taken()
                yield batch
                steps_after = self._steps_taken()
                if steps_after is None:
                    return
                if steps_after == steps_before:
                    raise ParaBlockError(
                        "a batch of run.stream was used without run.train_step or run.step; call one for each"
                    )
            if seen == before:
                raise ConfigError(
                    f"the loader gave no batch after {seen}: it is empty, or it can be iterated only once; pass "
                    "something that starts again, such as a DataLoader, or an endless iterator"
                )

    def train_step(
        self, batch: Any, loss_fn: LossFunction | None = None, *, weight: float | Tensor | None = None
    ) -> StepReport:
        """Forward, backward, optimiser step and, after the last local step, the round boundary.

        `batch`: a mapping is passed to the model as keywords, anything else as one argument. `loss_fn(model, batch)`
        returns the loss; without one the model's output has `.loss`. `weight`: how much this step counts in the
        server's mean; by default the number of labels that are trained on, or 1 where there are none.
        """
        self._require_round()
        loss = loss_fn(self.model, batch) if loss_fn is not None else _model_loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return self.step(weight=_weight_of(batch) if weight is None else weight, loss=loss)

    def step(self, *, weight: float | Tensor = 1.0, loss: Tensor | float | None = None) -> StepReport:
        """One optimiser step on gradients that are there already, and the boundary if it was the round's last step.

        `weight`: as in `train_step`, a number or a tensor of one. `loss` is only reported. Raises ConfigError for a
        weight that is not positive and finite.
        """
        round = self._require_round()
        weight = float(weight)
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weight must be positive and finite; found {weight!r}")
        round.active.step()
        value = float("nan") if loss is None else float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        round.steps += 1
        round.weight += weight
        round.loss_sum += value
        exposed = 0.0
        if round.steps == self.config.local_steps:
            before = self.exposed_s
            self._end_round(round)
            self._begin_round(round.index + 1)
            exposed = self.exposed_s - before
        return StepReport(value, round.index, round.block, exposed, self.finished)

    def block_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that train now, with their gradients after a backward pass (to clip them, say)."""
        return self._require_round().active.flat.params

    def close(self, reason: str = "") -> None:
        """Leaves the run and gives the model back as it was found: same parameters, same `requires_grad`. Idempotent.

        Before the end of the run this tells the server that the client is leaving, and `reason`.
        """
        if self._closed:
            return
        self._closed = True
        if self._round is not None:
            self._round.active.close()
            self._round = None
        if not self.finished:
            self._link.send(self._goodbye("", reason or "left before the last round"))
        self._link.transport.close()
        for handover in self._in_flight:
            handover.encoding.wait()  # the native thread reads memory that may go with this object
        for parameter, trainable in self._was_trainable.items():
            parameter.requires_grad_(trainable)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close("" if kind is None else f"stopped by {kind.__name__}")

    # ---- Joining

    def begin(self, begin: protocol.Begin) -> None:
        """For `join`: starts the first round. `begin` is the server's word on where the run stands."""
        freeze(self.model.parameters())
        self._applied = begin.updates_from - 1
        self._posted = self._applied
        self._post_updates()
        self._began_ns = time.monotonic_ns()
        self._begin_round(begin.first_round)

    def take_snapshot(self, message: protocol.Snapshot) -> None:
        """For `join`: receives one block of the reference."""
        flats = self._blocks[message.block].flats
        nbytes = sum(flat.nbytes for flat in flats)
        buffer, raw = self._link.receive_snapshot(message.block, nbytes, self.config.chunk)
        self._replica.overwrite(message.block, raw)
        self._link.give_back(buffer)
        self._versions[message.block] = message.version

    # ---- Rounds

    def _require_round(self) -> _Round:
        if self._round is None:
            raise ParaBlockError("the run has ended; take steps only while run.finished is False, as run.stream does")
        return self._round

    def _steps_taken(self) -> int | None:
        return None if self._round is None else self._round.index * self.config.local_steps + self._round.steps

    def _block_of(self, round: int) -> int:
        return block_of(self.config.schedule, self.config.seed, round, len(self._blocks))

    def _begin_round(self, index: int) -> None:
        """Applies what is due before round `index` and starts it, or the next one that is still open to us."""
        before = self.exposed_s
        while index < self.config.rounds:
            self._apply_through(index - 1 - self.config.staleness)
            cohort = cohort_of(self.config.seed, index, self.config.clients, self.config.cohort_size)
            self._link.poll()
            if self.client in cohort and not self._link.closed(index):
                break
            index += 1
        else:
            self._finish()
            return
        block = self._block_of(index)
        flat = self._blocks[block]
        flat.check_homed()
        self._wait_encoded(block)
        ref = self._replica.begin(block)
        active = ActiveBlock(flat, self._optimizer, self._take_master(flat))
        self._round = _Round(index, block, active, ref, time.monotonic_ns(), self.exposed_s - before)

    def _end_round(self, round: _Round) -> None:
        """Hands the block over. Nothing here waits for the network unless the block's last verdict is still out."""
        self._round = None
        ended_ns = time.monotonic_ns()
        compute_s = (ended_ns - round.began_ns) / 1e9
        self.compute_s += compute_s
        self.timeline.add("compute", f"round {round.index}", round.began_ns, ended_ns, block=round.block)
        self._wait(
            lambda: self._replica.undecided(round.block) is None, f"the verdict on block {round.block}", round.index
        )
        pieces, residual = self._replica.pieces(round.block, round.active.now(), round.ref)
        encoding = self._stager.encode(pieces, self.config.format, self.config.chunk, self._link.transport)
        handover = Handover(round.index, round.block, encoding, residual)
        loss = round.loss_sum / round.steps
        self._link.send_upload(
            protocol.Upload(
                round=round.index,
                block=round.block,
                weight=round.weight,
                loss=loss,
                compute_s=compute_s,
                exposed_s=round.exposed_s,
            ),
            encoding,
        )
        others_pending = any(self._block_of(q) == round.block for q in range(self._applied + 1, round.index))
        self._replica.hand_over(handover, round.ref, others_pending=others_pending)
        self._handed_over = round.index
        self._in_flight.append(handover)
        round.active.close()
        self._retire()
        if self._on_round is not None:
            self._on_round(
                RoundReport(round.index, round.block, loss, compute_s, round.exposed_s, self.bytes_up, self.bytes_down)
            )

    def _apply_through(self, last: int) -> None:
        """Applies every aggregate up to round `last`, in order, waiting for those that are not there yet."""
        while self._applied < last:
            round = self._applied + 1
            self._wait(lambda r=round: self._link.arrived(r), f"the aggregate of round {round}", round)  # type: ignore[misc]
            arrival = self._link.take_arrival(round)
            assert arrival.message is not None  # `arrived` said so
            self.timeline.add(
                "receive", f"round {round}", arrival.first_byte_ns, arrival.last_byte_ns, bytes=arrival.nbytes
            )
            block = self._block_of(round)
            if round >= self._versions[block]:  # a snapshot may be newer than the aggregate
                with self.timeline.span("apply", f"round {round}", block=block):
                    self._replica.apply(round, block, arrival.body, arrival.message.fingerprint)
                self._link.send(protocol.Applied(round=round, fingerprint=arrival.message.fingerprint))
            self._link.give_back(arrival.buffer)
            self._applied = round
            self._retire()
            self._post_updates()

    def _post_updates(self) -> None:
        """Keeps room for every aggregate that the server may have before this client applies its next one."""
        last = min(self._applied + self.config.staleness + 2, self.config.rounds - 1)
        while self._posted < last:
            self._posted += 1
            block = self._block_of(self._posted)
            numel = self._blocks[block].block.flat_numel
            self._link.post_update(self._posted, block, numel, self.config.format, self.config.chunk)

    def _finish(self) -> None:
        self._apply_through(self.config.rounds - 1)
        self._link.poll()  # every round is closed, so every verdict came before the update that was just applied
        self._take_verdicts()
        self.digest = aggregate.digest(self.plan, self._replica.fingerprints())
        self._link.send(self._goodbye(self.digest, ""))

    def _wait(self, holds: Callable[[], bool], what: str, round: int) -> None:
        """Blocks the training thread on communication until `holds()`, and counts the time as exposed."""

        def now_holds() -> bool:
            self._take_verdicts()
            return holds()

        start = time.monotonic_ns()
        seconds = self._link.wait(now_holds, what)
        if seconds > 0:
            self.timeline.add("exposed", what, start, time.monotonic_ns(), round=round)
        self.exposed_s += seconds

    def _wait_encoded(self, block: int) -> None:
        """Blocks until no encoding reads the block; part of what communication costs the training thread."""
        start = time.monotonic_ns()
        if self._replica.wait_encoded(block):
            self.exposed_s += (time.monotonic_ns() - start) / 1e9

    def _take_verdicts(self) -> None:
        # A round that was closed at its deadline is refused before its upload is handed over.
        verdicts = [*self._early_verdicts, *self._link.take_verdicts()]
        self._early_verdicts = [verdict for verdict in verdicts if verdict.round > self._handed_over]
        for verdict in verdicts:
            self._replica.verdict(verdict.round, verdict.block, accepted=verdict.accepted)

    def _retire(self) -> None:
        """Takes back the buffers and masters of hand-overs that have been encoded and sent."""
        for round, first_ns, done_ns in self._link.take_sent():
            self.timeline.add("send", f"round {round}", first_ns, done_ns)
        still = []
        for handover in self._in_flight:
            if handover.encoding.done:
                self.bad_groups += handover.encoding.bad_groups
                self.timeline.add("encode", f"round {handover.round}", *handover.encoding.span_ns, block=handover.block)
                self._stager.release(handover.encoding)
            else:
                still.append(handover)
        self._in_flight = still

    def _take_master(self, flat: FlatBlock) -> Tensor | None:
        return torch.empty(flat.block.flat_numel) if ActiveBlock.needs_master(flat) else None

    def _goodbye(self, digest: str, reason: str) -> protocol.Goodbye:
        return protocol.Goodbye(digest=digest, reason=reason, compute_s=self.compute_s, exposed_s=self.exposed_s)


def join(
    address: str,
    model: nn.Module,
    optimizer: OptimizerFactory,
    *,
    plan: BlockPlan | None = None,
    token: str | None = None,
    rate: float = 0.0,
    delay: float = 0.0,
    on_round: Callable[[RoundReport], None] | None = None,
    patience: float = 3600.0,
) -> Run:
    """Joins the run of the server at `address` ("host:port") and returns when its first round can be trained.

    The parameters that the server's plan names become views of flat buffers; all others are frozen until the run is
    closed. If the model's weights differ from the server's reference, they are replaced by it.

    Args:
        model: the model that the server was started with; same architecture and dtype.
        optimizer: called with the active block's parameters at the start of every round; returns a torch optimiser.
        plan: a plan of your own, to be checked against the server's; None takes the server's.
        token: the pre-shared token, if the server asks for one.
        rate, delay: slow the upload down artificially: bytes a second (0: unlimited) and seconds, one way.
        on_round: called on the training thread after each hand-over.
        patience: seconds after which a single wait for the server is an error.

    Raises:
        ConnectError, HandshakeError, PlanMismatchError, PeerLostError: see the message.
    """
    transport = Transport(Shape(rate, delay))
    run = None
    try:
        link = ServerLink(transport, address, patience=patience)
        welcome = link.introduce(token)
        if plan is not None:
            plan.check_same(welcome.plan)
        plan = BlockPlan.from_spec(model, welcome.plan)
        blocks = plan.materialise(model)
        run = Run(link, model, plan, blocks, welcome, optimizer, on_round)
        link.send(
            protocol.Ready(
                plan_digest=plan.digest,
                frozen=plan.frozen_fingerprint(model),
                fingerprints=[aggregate.fingerprint(block) for block in blocks],
            )
        )
        while not isinstance(message := link.next_message("the other clients to join"), protocol.Begin):
            if not isinstance(message, protocol.Snapshot) or message.block >= len(blocks):
                raise PlanMismatchError(f"expected a snapshot or the start of the run, found {message}")
            run.take_snapshot(message)
        run.begin(message)
    except BaseException as error:
        if run is not None:
            run.close(f"could not begin: {type(error).__name__}")
        transport.close(flush=1.0)
        raise
    return run


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, dict) or hasattr(batch, "keys") else model(batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "the model's output has no loss; put labels into the batch or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def _weight_of(batch: Any) -> float:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        return 1.0
    # A causal model predicts each label from the tokens before it, so the first one of a sequence trains nothing.
    return float(max(1, int((labels[..., 1:] != -100).sum())))
