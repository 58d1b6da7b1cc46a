"""A client's copy of the model: the reference, the client's own progress on top of it, and how the two are merged.

For each block: `θ`, the weights the model computes with (`blocks[b].flats`); `x̂`, the reference, a separate copy only
while θ differs from it; the hand-overs whose aggregate is not applied yet; and the error-feedback residual.

Nothing here trains or touches a socket; it waits for encodings, never for the network. Only the training thread may use
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parablock_rt import codec
from parablock_rt.blocks.fingerprint import fingerprint, start_fingerprint
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.errors import DigestError
from parablock_rt.staging.stager import Encoding, Piece


@dataclass(eq=False)
class Handover:
    """A client's change of one block in one round, from the end of its training until the aggregate is applied."""

    round: int
    block: int
    encoding: Encoding
    residual: list[Tensor] | None  # the block's residual if the server accepts; None for fp32 and after the verdict
    progress: list[Tensor] | None = None  # fp32 per segment: θ at the round's end − θ at its start, if needed


@dataclass(frozen=True)
class _Check:
    """A comparison with the server's fingerprint that is still to be made."""

    round: int
    block: int
    found: Callable[[], int]
    expected: int


@dataclass
class _BlockState:
    reference: list[Tensor] | None = None  # x̂ per segment; None: θ is x̂
    pending: list[Handover] = field(default_factory=list)
    residual: list[Tensor] | None = None  # None: zero


class Replica:
    """All blocks of a client's model."""

    def __init__(
        self, blocks: list[FlatBlock], format: str, local_view: str, host_floats: Callable[[int], Tensor]
    ) -> None:
        """`host_floats`: makes an fp32 tensor with the given number of elements in host memory, for the residuals."""
        self.blocks = blocks
        self.format = format
        self.on_gpu = any(flat.device.type != "cpu" for block in blocks for flat in block.flats)
        self._host_floats = host_floats
        self._unchecked: list[_Check] = []
        self._keep_own = local_view == "own"
        self._states = [_BlockState() for _ in blocks]

    def snapshot_start(self, block: int) -> list[Tensor]:
        """A copy of the block's weights at the start of a round (`ref`), per segment; kept as x̂, too, if θ is x̂.

        Then an aggregate that is applied later moves `ref` with x̂. The hand-over reads `ref` last: its progress is
        taken before, and `apply` waits for its encoding.
        """
        state = self._states[block]
        ref = [flat.clone() for flat in self.blocks[block].flats]
        if state.reference is None:
            state.reference = ref
        return ref

    def pieces(self, block: int, now: list[Tensor], ref: list[Tensor]) -> tuple[list[Piece], list[Tensor] | None]:
        """What to encode at a hand-over, and the tensors that will receive the new residual (None for fp32).

        The verdicts on the block's earlier hand-overs must be in.
        """
        residual = self._states[block].residual
        lossless = self.format == "fp32"
        kept = None if lossless else [self._host_floats(part.numel()) for part in now]
        pieces = [
            Piece(
                now=part,
                ref=ref[i],
                residual=None if residual is None else residual[i],
                residual_out=None if kept is None else kept[i],
            )
            for i, part in enumerate(now)
        ]
        return pieces, kept

    def extremes(self, block: int) -> list[Tensor]:
        """The smallest and largest weight of each segment. Both are NaN if any weight is, so they tell whether all
        weights are finite.

        Takes one pass and no temporaries; a sum in fp32 would widen a 16-bit block first.
        """
        return [end for flat in self.blocks[block].flats for end in torch.aminmax(flat)]

    def hand_over(self, handover: Handover, ref: list[Tensor], *, finite: bool, others_pending: bool) -> None:
        """Notes a hand-over. `others_pending`: an earlier aggregate for this block has not been applied yet.

        With local_view "reference" the block returns to x̂ here, once the encoding has read it. The same happens in any
        view if the weights are not `finite`, which would spoil every round until the aggregate comes.
        """
        state = self._states[handover.block]
        flats = self.blocks[handover.block].flats
        if self._keep_own and finite:
            if others_pending:
                handover.progress = [
                    flat.to(torch.float32, copy=True).sub_(start) for flat, start in zip(flats, ref, strict=True)
                ]
        else:
            handover.encoding.before_writing()
            assert state.reference is not None  # `snapshot_start` kept it
            for flat, reference in zip(flats, state.reference, strict=True):
                flat.copy_(reference)
            state.reference = None
        state.pending.append(handover)

    def undecided(self, block: int) -> Handover | None:
        """The earliest hand-over of the block without a verdict, or None."""
        return next((h for h in self._states[block].pending if h.residual is not None), None)

    def verdict(self, round: int, block: int, *, accepted: bool) -> Handover | None:
        """Commits the residual of an accepted hand-over or drops that of a rejected one; returns the hand-over."""
        for handover in self._states[block].pending:
            if handover.round == round:
                if accepted and handover.residual is not None:
                    handover.encoding.wait()
                    self._states[block].residual = handover.residual
                handover.residual = None
                return handover
        return None

    def wait_encoded(self, block: int) -> bool:
        """Call this before writing the block's tensors: waits until no encoding reads them on the host; on a GPU,
        orders the work queued from now on behind the reads. Returns whether it had to wait.
        """
        running = [h.encoding for h in self._states[block].pending if not h.encoding.done]
        waited = [encoding.before_writing() for encoding in running]  # a list: `any` alone would skip some
        return any(waited)

    def apply(self, round: int, block: int, body: Tensor, expected: int) -> None:
        """Moves x̂ by a round's aggregate and puts the client's later progress, if any, back on top.

        `θ ← x̂ + Σ progress of the hand-overs still under way`; without such hand-overs, θ becomes x̂. `expected` is the
        server's fingerprint of the new x̂: see `check`.
        """
        self.wait_encoded(block)
        state = self._states[block]
        flats = self.blocks[block].flats
        reference = flats if state.reference is None else state.reference
        codec.apply_(reference, body, format=self.format)
        self._unchecked.append(_Check(round, block, start_fingerprint(reference), expected))
        state.pending = [h for h in state.pending if h.round > round]
        if state.reference is not None:
            self._rebuild(flats, state)

    def check(self) -> list[tuple[int, int]]:
        """Compares every x̂ applied since the last call with the server's fingerprint; returns (round, fingerprint).

        On a GPU this waits for the work queued so far. Raises DigestError at the first difference.
        """
        checks, self._unchecked = self._unchecked, []
        for check in checks:
            found = check.found()
            if found != check.expected:
                raise DigestError(
                    f"after round {check.round} block {check.block} ({self.blocks[check.block].block.name!r}) has "
                    f"fingerprint {found:016x} here and {check.expected:016x} on the server: the copies have diverged; "
                    "join again to get a snapshot"
                )
        return [(check.round, check.expected) for check in checks]

    def _rebuild(self, flats: list[Tensor], state: _BlockState) -> None:
        assert state.reference is not None
        later = [h.progress for h in state.pending if h.progress is not None]
        for i, flat in enumerate(flats):
            if later:
                progress = later[0][i].clone()
                for further in later[1:]:
                    progress += further[i]
                flat.copy_(progress.add_(state.reference[i]))
            else:
                flat.copy_(state.reference[i])
        if not state.pending:
            state.reference = None

    def overwrite(self, block: int, raw: Tensor, version: int, expected: int) -> None:
        """Replaces a block's x̂: `raw` (uint8) has the bytes of all segments in order, after `version` closed rounds.

        The client's progress in later rounds stays on top. Raises DigestError when the fingerprint is not `expected`.
        """
        self.wait_encoded(block)
        state = self._states[block]
        flats = self.blocks[block].flats
        reference = flats if state.reference is None else state.reference
        start = 0
        for flat in reference:
            nbytes = flat.numel() * flat.element_size()
            flat.copy_(raw[start : start + nbytes].view(flat.dtype))
            start += nbytes
        if (found := fingerprint(reference)) != expected:
            raise DigestError(
                f"expected block {block} ({self.blocks[block].block.name!r}) from the server with fingerprint "
                f"{expected:016x}, found {found:016x}; join again"
            )
        state.pending = [h for h in state.pending if h.round >= version]
        if state.reference is not None:
            self._rebuild(flats, state)

    def holdings(self) -> dict[str, list[Tensor]]:
        """The tensors held now, by the item names of `memory.predict`."""
        states = self._states
        handovers = [handover for state in states for handover in state.pending]
        return {
            "weights": [flat for block in self.blocks for flat in block.flats],
            "references": [part for state in states for part in state.reference or ()],
            "progress": [part for handover in handovers for part in handover.progress or ()],
            "residuals": [
                *(part for state in states for part in state.residual or ()),
                *(part for handover in handovers for part in handover.residual or ()),
            ],
        }

    def fingerprints(self) -> list[int]:
        """The fingerprint of every block's θ, which equals x̂ when no hand-over is under way."""
        return [fingerprint(block) for block in self.blocks]
