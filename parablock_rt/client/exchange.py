"""What a client exchanges with the server, round by round: hand-overs go up, aggregates come down.

Packs a trained block and hands it to the link, applies the aggregates in the order of their rounds, keeps room for
those to come, and counts how long the training thread was blocked. Knows nothing of steps, losses or optimisers. Only
the training thread may call it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parablock_rt.blocks.fingerprint import digest
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client.replica import Handover, Replica
from parablock_rt.client.server_link import ServerLink
from parablock_rt.client.transit import Arrival
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.schedule import Schedule
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.stager import Stager
from parablock_rt.wire import protocol
from parablock_rt.wire.protocol import Kind

log = logging.getLogger("parablock")


@dataclass(frozen=True)
class Wait:
    """A stretch of time in which communication blocked the training thread; nanoseconds of the monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) / 1e9


class Exchange:
    """One client's side of all rounds."""

    def __init__(
        self,
        link: ServerLink,
        replica: Replica,
        plan: BlockPlan,
        config: RunConfig,
        stager: Stager | DeviceStager,
        timeline: Timeline,
    ) -> None:
        """`plan`: the plan of the replica's blocks. The caller keeps ownership of all arguments and closes them."""
        self.schedule = Schedule(config, [block.flat_numel for block in plan.blocks])
        self.exposed_s = 0.0  # seconds for which communication blocked the training thread
        self.bad_groups = 0
        self.aggregates = 0  # rounds whose aggregates were applied, or came within a whole block
        self._link = link
        self._replica = replica
        self._plan = plan
        self._config = config
        self._stager = stager
        self._timeline = timeline
        self._versions = [0] * len(plan.blocks)
        self._in_flight: list[Handover] = []
        self._waits: list[Wait] = []
        self._applied = -1  # the last round whose aggregate is applied, or whose block came whole
        self._posted = -1  # the last round whose aggregate has a landing

    def start(self, updates_from: int) -> None:
        """Makes room for the first aggregates, from round `updates_from` on."""
        self._stager.fit(max(block.wire_bytes(self._config.format) for block in self._plan.blocks))
        self._applied = updates_from - 1
        self._posted = self._applied
        self._post_updates()

    # ---- Up

    def wait_for_verdict(self, block: int, round: int) -> None:
        """Blocks until the server has accepted or rejected every hand-over of the block. `round`: the round whose end
        waits, for the timeline."""
        self._wait(lambda: self._replica.undecided(block) is None, f"the verdict on block {block}", round)

    def pack(self, round: int, block: int, now: list[Tensor], ref: list[Tensor]) -> Handover:
        """Starts to encode the change of a round, `now − ref`, each a tensor per segment.

        The verdicts on the block's earlier hand-overs must be in.
        """
        pieces, residual = self._replica.pieces(block, now, ref)
        encoding = self._stager.encode(
            pieces,
            self._config.format,
            self._config.chunk,
            self._link.transport,
            kind=Kind.UPLOAD,
            round=round,
            block=block,
        )
        return Handover(round, block, encoding, residual)

    def hand_over(self, handover: Handover, upload: protocol.Upload, ref: list[Tensor], *, finite: bool) -> None:
        """Queues the hand-over that `pack` started, with its message. `finite`: whether all weights are finite."""
        self._report_applied()
        self._link.send_upload(upload, handover.encoding)
        others_pending = any(self.schedule.block(q) == handover.block for q in range(self._applied + 1, handover.round))
        self._replica.hand_over(handover, ref, finite=finite, others_pending=others_pending)
        self._in_flight.append(handover)
        self._retire()

    def wait_encoded(self, block: int) -> None:
        """Blocks until no encoding reads the block."""
        start_ns = time.monotonic_ns()
        if self._replica.wait_encoded(block):
            self._note_wait_for_encoding(start_ns)

    def release_handed_over(self) -> None:
        """Frees the masters of earlier rounds before this round's optimiser state is allocated; this bounds the memory.

        Waits for their encoding, which has had the first forward and backward pass of the round to finish.
        """
        start_ns = time.monotonic_ns()
        waited = [self._stager.release_inputs(handover.encoding) for handover in self._in_flight]
        if any(waited):
            self._note_wait_for_encoding(start_ns)

    def _take_verdicts(self) -> None:
        for verdict in self._link.take_verdicts():
            self._check_block(verdict)
            self._replica.verdict(verdict.round, verdict.block, accepted=verdict.accepted)

    def _check_block(self, message: protocol.Verdict | protocol.Update) -> None:
        if message.block != (trains := self.schedule.block(message.round)):
            raise HandshakeError(
                f"expected the {type(message).__name__} of round {message.round} to be about block {trains}, found "
                f"block {message.block}: the server has another schedule; install the same release on both sides"
            )

    def _retire(self) -> None:
        """Releases the buffers and masters of hand-overs that are encoded and decided on."""
        for first_ns, done_ns in self._link.take_sent():
            self._timeline.stages.add("send", first_ns, done_ns)
        remaining = []
        for handover in self._in_flight:
            if handover.encoding.done and not self._link.is_undecided(handover.round):
                self._note_bad_groups(handover)
                self._timeline.stages.add("encode", *handover.encoding.span_ns)
                self._timeline.stages.add("copy", *handover.encoding.copy_span_ns)
                self._stager.release(handover.encoding)
            else:
                remaining.append(handover)
        self._in_flight = remaining

    def _note_bad_groups(self, handover: Handover) -> None:
        bad = handover.encoding.bad_groups
        self.bad_groups += bad
        if bad > 0:
            log.warning(
                "round %d: %d parts of block %d were NaN or infinite after training and went up as zeros; check the "
                "loss, lower the learning rate, clip gradients or skip such batches",
                *(handover.round, bad, handover.block),
            )

    # ---- Down

    def apply_through(self, last: int) -> None:
        """Applies every aggregate up to round `last`, in order; waits for those that have not arrived."""
        while self._applied < last:
            round = self._applied + 1
            self._wait_for_aggregate(round)
            self._take_verdicts()  # `apply` ends this round's hand-over; its verdict came before the aggregate
            arrival = self._link.take_arrival(round)
            block = self.schedule.block(round)
            self.aggregates += 1
            if round >= self._versions[block]:  # else the block came whole and contains this round
                assert isinstance(arrival.message, protocol.Update)  # the aggregate has arrived
                self._check_block(arrival.message)
                self._note_exchange(arrival, arrival.message)
                with self._timeline.span(Stage.APPLY, kind=Kind.UPDATE, round=round, block=block, bytes=arrival.nbytes):
                    self._replica.apply(round, block, arrival.landing.body(), arrival.message.fingerprint)
                if not self._replica.on_gpu:
                    self._report_applied()
            self._link.passed(round)
            self._stager.release_landing(arrival.landing)
            self._applied = round
            self._retire()
            self._post_updates()

    def _note_exchange(self, arrival: Arrival, update: protocol.Update) -> None:
        """Notes the stages of a round's exchange that this client did not measure as they happened."""
        self._timeline.stages.add("receive", arrival.first_byte_ns, arrival.last_byte_ns)
        self._timeline.stages.add_seconds("fold", update.fold_s)
        # The uploads of two rounds may wait at the same time, which must not count twice: so the wait is noted as a
        # stretch of this client's clock. It ends when the aggregate's first byte came, which is when the server closed
        # the round, or a little later.
        waited_ns = int(update.wait_s * 1e9)
        self._timeline.stages.add("wait", arrival.first_byte_ns - waited_ns, arrival.first_byte_ns)

    def take_snapshots(self) -> None:
        """Overwrites the blocks that have come whole from the server's reference."""
        while (arrival := self._link.take_snapshot()) is not None:
            message = arrival.message
            assert isinstance(message, protocol.Snapshot)
            self._replica.overwrite(message.block, arrival.landing.body(), message.version, message.fingerprint)
            self._versions[message.block] = message.version

    def finish(self) -> str:
        """Applies the remaining aggregates and returns the digest of the model, which then is the run's result."""
        self.apply_through(self._config.rounds - 1)
        self._report_applied()
        self._take_verdicts()  # all verdicts are in: each came before its round's aggregate
        return digest(self._plan, self._replica.fingerprints())

    def _wait_for_aggregate(self, round: int) -> None:
        """Returns when the round's aggregate has arrived, or its block has come whole instead."""
        block = self.schedule.block(round)

        def settled() -> bool:
            replaced = self._link.replaced(round, block) and self._versions[block] > round
            return replaced or self._link.arrived(round)

        while not settled():
            self._renew_landings()
            self._wait(
                lambda: settled() or self._link.snapshot_is_here() or bool(self._link.spoiled()),
                f"the aggregate of round {round}",
                round,
            )
            self.take_snapshots()

    def _renew_landings(self) -> None:
        """Opens new landings for aggregates whose old landing has passed bytes of a restarted server to the GPU."""
        for round, block in self._link.spoiled():
            numel = self._plan.blocks[block].flat_numel
            landing = self._stager.landing(numel, self._config.format, self._config.chunk)
            self._stager.release_landing(self._link.renew(round, landing))

    def _report_applied(self) -> None:
        """Compares the applied blocks with the server's fingerprints and reports the result to the server.

        On a GPU this happens one round later, when the result is there without waiting for the device.
        """
        for round, fingerprint in self._replica.check():
            self._link.report_applied(round, fingerprint)

    def _post_updates(self) -> None:
        """Opens a landing for every aggregate that the server may send before this client applies its next one."""
        last = min(self._applied + self._config.staleness + 2, self._config.rounds - 1)
        while self._posted < last:
            self._posted += 1
            numel = self.schedule.numel(self._posted)
            landing = self._stager.landing(numel, self._config.format, self._config.chunk)
            self._link.post_update(self._posted, self.schedule.block(self._posted), landing)

    # ---- Waiting

    def take_waits(self) -> list[Wait]:
        """All waits since the last call, in order."""
        waits, self._waits = self._waits, []
        return waits

    def _wait(self, holds: Callable[[], bool], what: str, round: int) -> None:
        """Blocks the training thread until `holds()`."""

        def now_holds() -> bool:
            self._take_verdicts()
            return holds()

        start_ns = time.monotonic_ns()
        if self._link.wait(now_holds, what) > 0:
            self._note_wait(start_ns, round)

    def _note_wait_for_encoding(self, start_ns: int) -> None:
        """It is the round after the last hand-over that waits."""
        self._note_wait(start_ns, 1 + max((handover.round for handover in self._in_flight), default=-1))

    def _note_wait(self, start_ns: int, round: int) -> None:
        """Counts the time since `start_ns` as exposed."""
        wait = Wait(start_ns, time.monotonic_ns())
        self._timeline.add(Stage.EXPOSED, wait.start_ns, wait.end_ns, round=round)
        self._waits.append(wait)
        self.exposed_s += wait.seconds
