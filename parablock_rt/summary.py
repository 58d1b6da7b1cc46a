"""The figures that a run leaves: `summary.json` and the tables made of it. Pure functions of what was recorded."""

from __future__ import annotations

from statistics import mean
from typing import Any

import msgspec

from parablock_rt.client.run import Run
from parablock_rt.codec import body_bytes
from parablock_rt.config import RunConfig
from parablock_rt.server.outcome import Outcome
from parablock_rt.stages import mean as mean_stages

SUMMARY_VERSION = 1
"""Of the names and meanings in summary.json; a reader of another version says so."""


def overlap_efficiency(exposed_s: float, serial_s: float | None) -> float | None:
    """`1 − exposed / serial`: the share of the communication time that was hidden. None without a serial figure."""
    return None if not serial_s else 1 - exposed_s / serial_s


def summarise(
    config: RunConfig,
    outcome: Outcome,
    *,
    blocks: int,
    serial_comm_s: float | None = None,
    eval_loss_before: float | None = None,
    eval_loss_after: float | None = None,
) -> dict[str, Any]:
    """What `summary.json` holds. Times in seconds, bytes without framing; times of clients are means over them.

    `serial_comm_s`: what the same transfers take when nothing hides them, from a run with staleness 0 on the same link.
    With staleness 0 it is the run's own exposed time; otherwise, without it, there is no overlap efficiency.
    """
    rounds = outcome.rounds
    finished = [goodbye for goodbye in outcome.goodbyes.values() if not goodbye.reason]
    compute_s = mean(g.compute_s for g in finished) if finished else sum(r.compute_s for r in rounds)
    exposed_s = mean(g.exposed_s for g in finished) if finished else sum(r.exposed_s for r in rounds)
    serial_s = exposed_s if config.staleness == 0 else serial_comm_s
    bytes_up = rounds[-1].bytes_up if rounds else 0
    bytes_down = rounds[-1].bytes_down if rounds else 0
    return {
        "version": SUMMARY_VERSION,
        "complete": len(rounds) == config.rounds and len(finished) > 0 and not outcome.unfinished,
        "staleness": config.staleness,
        "format": config.format,
        "schedule": config.schedule,
        "seed": config.seed,
        "rounds": len(rounds),
        "clients": config.clients,
        "blocks": blocks,
        "local_steps": config.local_steps,
        "wall_s": outcome.wall_s,
        "compute_s": compute_s,
        "serial_comm_s": serial_s,
        "exposed_comm_s": exposed_s,
        "skew_s": sum(r.skew_s for r in rounds),
        "overlap_efficiency": overlap_efficiency(exposed_s, serial_s),
        "stages": msgspec.to_builtins(mean_stages(g.stages for g in finished)),
        "stages_of": {
            "server": msgspec.to_builtins(outcome.server_stages),
            **{f"client {seat}": msgspec.to_builtins(g.stages) for seat, g in sorted(outcome.goodbyes.items())},
        },
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "bytes_as_bf16": round((bytes_up + bytes_down) * body_bytes(128, "bf16") / body_bytes(128, config.format)),
        "bad_groups": sum(r.bad_groups for r in rounds),
        "train_loss_last": rounds[-1].loss if rounds else None,
        "eval_loss_before": eval_loss_before,
        "eval_loss_after": eval_loss_after,
        "digest": {
            "server": outcome.digest,
            "clients": [outcome.client_digests[seat] for seat in sorted(outcome.client_digests)],
        },
        "left_early": outcome.left,
        "reconnects": outcome.reconnects,
        "resumed_bytes": sum(goodbye.resumed_bytes for goodbye in finished),
        "resent_bytes": sum(goodbye.resent_bytes for goodbye in finished),
    }


def summarise_client(run: Run) -> dict[str, Any]:
    """What a client's own `summary.json` holds, also of a run that it has left early. Units as in `summarise`."""
    return {
        "version": SUMMARY_VERSION,
        "client": run.client,
        "complete": run.finished,
        "staleness": run.config.staleness,
        "local_steps": run.config.local_steps,
        "digest": run.digest,
        "compute_s": run.compute_s,
        "exposed_comm_s": run.exposed_s,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "bad_groups": run.bad_groups,
        "stages": msgspec.to_builtins(run.stages),
        "reconnects": run.reconnects,
        "resumed_bytes": run.resumed_bytes,
        "resent_bytes": run.resent_bytes,
    }
