"""The train-step runtime: what a training loop calls, and what happens at the end of a round.

With staleness `S`, the end of round `t` (the round boundary) has three steps:

1. Hand over the trained block. Native threads encode it and send it while training goes on.
2. Apply the aggregates of the rounds up to `t − S`, exactly these, and wait for any that has not arrived.
3. Start round `t + 1`.

Only the training thread may call this module, except where a docstring says "any thread".
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parablock_rt import _C
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client import memory
from parablock_rt.client import stream as batches
from parablock_rt.client.active import ActiveBlock, OptimizerFactory, freeze, retire, with_context
from parablock_rt.client.current_round import CurrentRound
from parablock_rt.client.exchange import Exchange
from parablock_rt.client.gradients import GradientWatch
from parablock_rt.client.lease import Lease
from parablock_rt.client.losses import as_number, check_weight, model_loss, read_all, weight_of
from parablock_rt.client.replica import Replica
from parablock_rt.client.reports import RoundReport, StepReport
from parablock_rt.client.server_link import ServerLink
from parablock_rt.errors import ParaBlockError
from parablock_rt.observe import profiling
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.stages import StageSeconds
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.stager import Stager
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind

log = logging.getLogger("parablock")

Batch = TypeVar("Batch")
LossFunction = Callable[[nn.Module, Any], Tensor]


class Run:
    """A client's part in a run. `join` returns it; use it as a context manager:

        with join(address, model, make_optimizer) as run:
            for batch in run.stream(loader):
                run.train_step(batch)

    Each round trains one block, and `train_step` handles the round boundaries. Once `finished` is True, the model holds
    the result of the run. At the end of the `with` statement you get the model back as it was: the same Parameter
    objects with their original `requires_grad`.

    Call everything from one thread, the training thread; `close` and `link_stats` may be called from any thread.

    `listeners`: called after each hand-over with its RoundReport; `join`'s `on_round` is one of them, and its rules
    hold for all.
    """

    def __init__(
        self,
        link: ServerLink,
        model: nn.Module,
        plan: BlockPlan,
        blocks: list[FlatBlock],
        welcome: protocol.Welcome,
        optimizer: OptimizerFactory,
        on_round: Callable[[RoundReport], None] | None,
        stager: Stager | DeviceStager,
        timeline: Timeline,
        lease: Lease,
    ) -> None:
        """Called during `join`, after the handshake and with the plan materialised. The run owns `stager`, which it
        closes, and `lease`: it gives the model back."""
        self.model = model
        self.plan = plan
        self.config = welcome.config
        self.client = welcome.client
        self.timeline = timeline
        self.compute_s = 0.0
        self.rounds = 0  # trained by this client
        self._started_ns = 0  # when the first round began
        self._ended_ns = 0
        self.digest: str | None = None
        self._link = link
        self._lease = lease
        self._blocks = blocks
        self._stager = stager
        self._replica = Replica(blocks, self.config.format, self.config.local_view, stager.residual)
        self._exchange = Exchange(link, self._replica, plan, self.config, stager, timeline)
        link.transport.native.record(timeline.transfer_ring("pb-transport", plan, self.config, links=1))
        self._optimizer = optimizer
        self.listeners = [] if on_round is None else [on_round]
        self._round: CurrentRound | None = None
        self._former_optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None  # a weak reference
        self._interrupted = ""  # why the next round did not start
        self._gradients = GradientWatch(model, plan)
        self._lock = threading.RLock()  # guards the three below; reentrant, for a signal handler that closes the run
        self._stepping = False  # the training thread is in `step`, which gives the model back if the run was closed
        self._closed = False
        self._given_back = False

    # ---- For training loops

    @property
    def finished(self) -> bool:
        """Whether the last round's aggregate has been applied, so that the model is the run's result."""
        return self.digest is not None

    @property
    def round(self) -> int | None:
        """The current round; None between two rounds, as in `on_round`, and when the run is over."""
        return None if self._round is None else self._round.index

    @property
    def block(self) -> int | None:
        """The block that the current round trains, an index of `plan.blocks`; None when `round` is None."""
        return None if self._round is None else self._round.block

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the current round; each round has a new one.

        `Run.step` calls the optimiser's `step`; calling it directly raises ParaBlockError. Raises ParaBlockError when
        `round` is None.
        """
        return self._require_round().active.optimizer

    @property
    def exposed_s(self) -> float:
        """Seconds for which communication has blocked the training thread so far."""
        return self._exchange.exposed_s

    @property
    def wall_s(self) -> float:
        """Seconds from the beginning of the first round until the run finished or was closed, or until now."""
        return ((self._ended_ns or time.monotonic_ns()) - self._started_ns) / 1e9 if self._started_ns else 0.0

    @property
    def bad_groups(self) -> int:
        """How many groups with NaN or infinite values were handed over as zeros so far."""
        return self._exchange.bad_groups

    @property
    def aggregates(self) -> int:
        """How many rounds' aggregates were applied so far, or came within a whole block; also of rounds that only
        others trained."""
        return self._exchange.aggregates

    @property
    def bytes_up(self) -> int:
        """Payload bytes handed over so far."""
        return self._link.bytes_up

    @property
    def bytes_down(self) -> int:
        """Payload bytes received so far."""
        return self._link.bytes_down

    @property
    def stages(self) -> StageSeconds:
        """Seconds per stage so far."""
        return self.timeline.stages.total()

    def link_stats(self) -> dict[str, _C.LinkStats]:
        """The current state of the link, under the key "server"; empty while there is no connection. Any thread."""
        stats = self._link.stats()
        return {} if stats is None else {"server": stats}

    @property
    def reconnects(self) -> int:
        """How many broken connections have been replaced so far."""
        return self._link.reconnects

    @property
    def resumed_bytes(self) -> int:
        """Bytes of the transfers interrupted by a broken connection that were kept and not transferred again."""
        return self._link.resumed_bytes

    @property
    def resent_bytes(self) -> int:
        """Bytes of the same transfers that remained to be transferred after the reconnect."""
        return self._link.resent_bytes

    def stream(self, loader: Iterable[Batch], *, accumulate: int = 1) -> Iterator[Batch]:
        """Yields the loader's batches, epoch after epoch, until the run has finished or is closed.

        Take one step per batch. To accumulate gradients instead, call `loss.backward()` for every batch and
        `run.step()` after every `accumulate`-th one. Skipping a batch now and then is fine.

        Raises:
            ConfigError: `accumulate` is below 1; the loader is empty, or can be iterated only once and is exhausted.
            ParaBlockError: `10 * accumulate` batches in a row without a step; an earlier round boundary failed.
        """
        return batches.stream(loader, is_over=self._is_over, steps_taken=self._steps_taken, accumulate=accumulate)

    def train_step(
        self,
        batch: Any,
        loss_fn: LossFunction | None = None,
        *,
        weight: float | Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> StepReport:
        """Takes one local step: forward, backward and optimiser step. The last step of a round also ends the round.

        Args:
            batch: passed to the model, a mapping as keyword arguments, anything else as one argument.
            loss_fn: called as `loss_fn(model, batch)`, returns the loss. None: the model's output must have a `.loss`.
            weight: how much this step counts in the server's mean. None: the number of labels in the batch that are
                trained on, or 1 if it has no labels.
            scaler: scales the loss before the backward pass; see `step`.

        Raises ConfigError when the model's output has no loss, and what `step` raises.
        """
        round = self._require_round()
        loss = loss_fn(self.model, batch) if loss_fn is not None else model_loss(self.model, batch)
        try:
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        except BaseException:  # a caller that goes on with the next batch must not see half of this one's gradients
            round.active.clear_gradients()
            raise
        return self.step(weight=weight_of(batch, self.model) if weight is None else weight, loss=loss, scaler=scaler)

    def step(
        self,
        *,
        weight: float | Tensor = 1.0,
        loss: Tensor | float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> StepReport:
        """Takes one optimiser step with the gradients of your backward pass. The last step of a round also ends it.

        The gradients are cleared, also when this raises.

        Args:
            weight: how much this step counts in the server's mean: a number or a tensor with one element.
            loss: the loss to report; not used otherwise.
            scaler: the GradScaler that scaled the loss before the backward pass. Its `step` and `update` are called
                here; do not call them yourself.

        `weight` and `loss` may be on a GPU: they are read at the round boundary, so that a step does not wait for the
        GPU.

        Raises:
            ConfigError: the weight of the step, or the sum over the round, is not from 2^-64 to 2^64. The weight of a
                step on a GPU is not checked, only the sum.
            ParaBlockError: no parameter had a gradient in the whole round, and nothing changed; the run has ended or
                was closed; an earlier round boundary failed; the server failed (of the class that the server reports).
            PlanError: the block's parameters have left the buffers in which the run placed them.
            PeerLostError, WaitTimeoutError: at the round boundary, the server is gone or did not deliver in time.
            DigestError: at the round boundary, the weights here differ from the server's.
        """
        with self._held() as round:
            before = self.exposed_s
            try:
                weight = check_weight(as_number(weight))
                value = float("nan") if loss is None else as_number(loss)
                self._gradients.look(round)
                if round.steps == 0:
                    self._exchange.release_handed_over()
                round.active.step(scaler)
            except BaseException:
                round.active.clear_gradients()
                raise
            round.add_step(weight, value)
            if round.steps == self.config.local_steps:
                self._cross_boundary(round)
            exposed_s, ended = self.exposed_s - before, self._round is not round
        return StepReport(value, round.index, round.block, exposed_s, ended, self.finished)

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters of the current block, for example to clip their gradients after a backward pass.

        Raises ParaBlockError when `round` is None.
        """
        return self._require_round().active.flat.params

    def wait_encoded(self) -> None:
        """Waits until no encoding reads the model's weights any more; on a GPU, orders later work behind those reads.

        From then until the next step you may change the weights, for example to evaluate averaged ones, if you restore
        the same bits before that step.
        """
        for block in range(len(self._blocks)):
            self._exchange.wait_encoded(block)

    def holdings(self) -> dict[str, int]:
        """Bytes that this client holds now, by the item names of `memory.predict`; a missing item holds none.

        Activations are not counted, nor is the handed-over master while it is encoded.
        """
        tensors = self._replica.holdings()
        planned = {parameter for block in self._blocks for parameter in block.params}
        frozen = (parameter for parameter in self.model.parameters() if parameter not in planned)
        tensors["weights"] += [*frozen, *self.model.buffers()]
        if self._round is not None:
            for name, parts in self._round.active.holdings().items():
                tensors[name] = parts
            tensors["references"] += self._round.ref
        held = {name: memory.storage_bytes(parts) for name, parts in tensors.items()}
        return held | {"packed bodies": self._stager.buffers.allocated_bytes}

    def close(self, reason: str = "") -> None:
        """Leaves the run and gives the model back: the same Parameters with their original `requires_grad`. Idempotent.

        Before the end of the run, this tells the server that the client leaves, and the `reason`. Any thread may call
        it, and a signal handler. If the training thread is in `step` then, the model is given back when `step` ends,
        which raises ParaBlockError if it needs the network; so does every later step.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ended_ns = self._ended_ns or time.monotonic_ns()
        try:
            self._link.close(None if self.finished else self._goodbye("", reason or "left before the last round"))
        finally:
            with self._lock:
                if not self._stepping:
                    self._give_back()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close("" if kind is None else f"stopped by {kind.__name__}")

    # ---- Rounds

    def start(self) -> None:
        """Takes the blocks that differ from the server's reference and starts the first round. `join` calls it once.

        Waits for the other clients.
        """
        while (begin := self._link.opening()) is None:
            self._exchange.take_snapshots()
        freeze(self.model.parameters())
        self._exchange.start(begin.updates_from)
        self._started_ns = time.monotonic_ns()
        self._begin_round(begin.first_round)

    def _is_over(self) -> bool:
        return self.finished or self._closed

    @contextlib.contextmanager
    def _held(self) -> Iterator[CurrentRound]:
        """The current round, for a step: a `close` from elsewhere gives the model back no earlier than at the end."""
        with self._lock:
            round = self._require_round()
            self._stepping = True
        try:
            yield round
        finally:
            with self._lock:
                self._stepping = False
                if self._closed:
                    self._give_back()

    def _give_back(self) -> None:
        if self._given_back:
            return
        self._given_back = True
        try:
            self._stager.close()  # an encoding reads memory that may be freed with this object
        finally:
            if self._round is not None:
                self._round.active.close()
            self._round = None
            self._lease.give_back()

    def _require_round(self) -> CurrentRound:
        if self.finished:
            raise ParaBlockError("the run has ended; take steps only while run.finished is False, as run.stream does")
        if self._closed:
            raise ParaBlockError("this run was closed before its end; join again")
        if self._round is not None:
            return self._round
        if not self._interrupted:
            raise ParaBlockError("no block trains between two rounds, where on_round is called")
        raise ParaBlockError(f"{self._interrupted}, and the run cannot go on from there; close it and join again")

    def _steps_taken(self) -> int:
        round = self._require_round()
        return round.index * self.config.local_steps + round.steps

    def _cross_boundary(self, round: CurrentRound) -> None:
        try:
            self._end_round(round)
            if not self._closed:  # `on_round` may have closed the run
                self._begin_round(round.index + 1)
        except BaseException as error:
            self._interrupted = f"the boundary after round {round.index} was interrupted by {type(error).__name__}"
            raise

    def _begin_round(self, index: int) -> None:
        """Applies the aggregates due before round `index`, then starts it, or the next round that is still open and in
        whose cohort this client is. Finishes the run if there is none."""
        self.timeline.drain()
        profiling.mark_clock()
        while index < self.config.rounds:
            self._exchange.apply_through(index - 1 - self.config.staleness)
            self._link.check()
            if self.client in self._exchange.schedule.cohort(index) and not self._link.closed(index):
                break
            index += 1
        else:
            self._finish()
            return
        block = self._exchange.schedule.block(index)
        flat = self._blocks[block]
        flat.check_homed(self.model)
        self._exchange.wait_encoded(block)
        ref = self._replica.snapshot_start(block)
        factory = with_context(self._optimizer, round=index, names=flat.block.parameters)
        active = ActiveBlock(flat, factory)
        former = self._former_optimizer()
        if former is not None and former is not active.optimizer:
            retire(former)
        self._round = CurrentRound(index, block, active, ref, time.monotonic_ns())

    def _end_round(self, round: CurrentRound) -> None:
        """Hands the block over. Waits for the network only if the verdict on the block's last hand-over is still out.

        On a GPU, waits once for the round's computation, after queueing everything that does not need its results.
        """
        self._round = None
        round.active.check_homed(self.model)
        if not round.had_gradients:
            round.active.require_change(round.ref)
        self._exchange.wait_for_verdict(round.block, round.index)
        extremes = self._replica.extremes(round.block)
        now = round.active.now()
        if isinstance(round.active.optimizer, torch.optim.Optimizer):
            self._former_optimizer = weakref.ref(round.active.optimizer)
        round.active.close()  # frees gradients and optimiser state before the hand-over takes memory
        handover = self._exchange.pack(round.index, round.block, now, round.ref)
        weight, loss, *values = read_all([round.weight, round.loss_sum / round.steps, *extremes])
        check_weight(weight)
        waits = self._exchange.take_waits()
        exposed_s = sum(wait.seconds for wait in waits)
        compute_s = round.note_compute(self.timeline, waits)
        self.compute_s += compute_s
        self.rounds += 1
        with self.timeline.span(Stage.HAND_OVER, kind=Kind.UPLOAD, round=round.index, block=round.block):
            stages = self.timeline.stages.take()
            upload = protocol.Upload(
                round=round.index,
                block=round.block,
                weight=weight,
                loss=loss,
                compute_s=compute_s,
                exposed_s=exposed_s,
                stages=stages,
            )
            self._exchange.hand_over(handover, upload, round.ref, finite=all(map(math.isfinite, values)))
            counts = (self.bytes_up, self.bytes_down, self.reconnects)
            report = RoundReport(round.index, round.block, loss, compute_s, exposed_s, *counts, stages=stages)
        for listener in list(self.listeners):
            listener(report)

    def _finish(self) -> None:
        for flat in self._blocks:
            flat.check_homed(self.model)
        digest = self._exchange.finish()
        self._link.farewell(self._goodbye(digest, ""))
        self._ended_ns = time.monotonic_ns()
        self.digest = digest
        self._lease.warn_of_drift()

    def _goodbye(self, digest: str, reason: str) -> protocol.Goodbye:
        return protocol.Goodbye(
            digest=digest,
            reason=reason[: protocol.REASON_CHARS],
            compute_s=self.compute_s,
            exposed_s=self.exposed_s,
            rounds=self.rounds,
            reconnects=self.reconnects,
            resumed_bytes=self.resumed_bytes,
            resent_bytes=self.resent_bytes,
            stages=self.stages,
        )
