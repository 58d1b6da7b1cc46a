"""Rebuilds a server's state from the durable state of an earlier server.

What the earlier server knew but had not written (uploads in flight, or accepted for a round that was still open) is not
lost: no client was told that such an upload counts, so every client still has it and sends it again.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.config import RunConfig
from parablock_rt.errors import CheckpointError
from parablock_rt.server.backlog import Kept
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.journal import Past
from parablock_rt.server.master import Master
from parablock_rt.server.members import Member, Phase
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, body_layout


def check_same(past: Past, config: RunConfig | None, plan_digest: str, frozen: str) -> None:
    """Raises CheckpointError when the state belongs to another run than the caller wants to resume. `config`: None
    accepts the state's own settings."""
    if config is not None and config != past.begin.config:
        differing = [
            f"{name} = {getattr(config, name)!r} instead of {getattr(past.begin.config, name)!r}"
            for name in RunConfig.__struct_fields__
            if getattr(config, name) != getattr(past.begin.config, name)
        ]
        raise CheckpointError(f"a run is resumed with its own settings; found {', '.join(differing)}")
    if plan_digest != past.begin.plan_digest:
        raise CheckpointError(
            f"the saved run cuts another model, or cuts it differently (plan digest {past.begin.plan_digest[:12]}, "
            f"here {plan_digest[:12]}); resume with the same model and the same blocks"
        )
    if frozen != past.begin.frozen:
        raise CheckpointError(
            "what is not trained differs from the saved run's; resume with the checkpoint it began with"
        )


def restore_master(past: Past, state: Checkpoint, master: Master) -> None:
    """Restores every block to its state after the last closed round. Raises CheckpointError when that fails."""
    for block, began in enumerate(past.begin.fingerprints):
        last = past.last_round_of(block)
        if last is not None:
            master.restore(block, state.read_round(last))
            expected = past.closed[last].closed.fingerprint
        else:
            expected = began
        if fingerprint(master.blocks[block]) != expected:
            raise CheckpointError(
                f"block {block} has other weights than the saved run; resume with the checkpoint that the run began "
                "with"
            )


def members(past: Past) -> list[Member]:
    """The run's members, each disconnected and with nothing in flight. Leaves out clients that never began: they join
    again as newcomers."""
    return [_member(seat, past) for seat, state in past.seats.items() if state.first_round is not None]


def _member(seat: int, past: Past) -> Member:
    state = past.seats[seat]
    assert state.first_round is not None
    member = Member(seat, state.secret, None, "", time.monotonic(), "the server was restarted")
    member.phase = Phase.BEGUN
    member.first_round = member.next_post = state.first_round
    member.goodbye = state.finished
    for round, reason in state.verdicts.items():
        block = past.closed[round].closed.block
        member.verdicts[round] = protocol.Verdict(round=round, block=block, accepted=not reason, reason=reason)
    return member


def aggregates(past: Past, state: Checkpoint, master: Master, transport: Transport, buffers: BufferPool) -> list[Kept]:
    """The aggregates that are still on the disk, oldest first. Raises CheckpointError when one of them is damaged."""
    kept = []
    for record in past.closed:
        if state.has_round(record.closed.round):
            body = state.read_round(record.closed.round).get("update")
            numel = master.blocks[record.closed.block].block.flat_numel
            layout = body_layout(past.begin.config.format, numel, past.begin.config.chunk)
            if body is None or body.dtype != torch.uint8 or body.shape != (layout.nbytes,):
                raise CheckpointError(
                    f"expected an aggregate of {layout.nbytes} bytes in the saved state of round {record.closed.round},"
                    " found another or none: the state is damaged and the run cannot be resumed from it"
                )
            buffer = buffers.take(layout.nbytes)
            as_tensor(buffer, layout.nbytes).copy_(body)
            source = transport.native.make_source(buffer, layout, True)
            kept.append(Kept(record.update, layout.nbytes, source, partial(buffers.give_back, buffer)))
    return kept
