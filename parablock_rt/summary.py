"""The contents of `summary.json`. Pure functions of a run's records."""

from __future__ import annotations

from typing import Any

import msgspec

from parablock_rt.client.run import Run
from parablock_rt.codec import body_bytes
from parablock_rt.config import RunConfig
from parablock_rt.server.outcome import Outcome
from parablock_rt.stages import hidden_share, total, waited_for_others
from parablock_rt.wire.protocol import Goodbye

SUMMARY_VERSION = 2
"""The version of the names and meanings in summary.json; a reader of another version says so.

Version 2: `exposed_comm_s` and `serial_comm_s` no longer contain the wait for other clients, which is now in
`waited_for_others_s`. Means over clients describe a client that took part in the whole run. `wall_s` of a resumed run
includes the earlier rounds. `resumed_from` and `snapshot_bytes` are new.
"""


def summarise(
    config: RunConfig,
    outcome: Outcome,
    *,
    blocks: int,
    serial_comm_s: float | None = None,
    eval_loss_before: float | None = None,
    eval_loss_after: float | None = None,
) -> dict[str, Any]:
    """The contents of `summary.json`. Times are in seconds and bytes exclude framing; clients' times are means over
    clients. `rounds_trained`: in how many of the rounds a client trained, which depends on `RunConfig.fraction`.

    `exposed_comm_s`: how long communication blocked training. `waited_for_others_s`: how long training was blocked
    because other clients had not delivered yet, which a faster link would not change; not part of `exposed_comm_s`.

    `serial_comm_s`: the time of the same transfers without overlap, from a run with staleness 0 on the same link. At
    staleness 0 it is the run's own exposed time. `overlap_efficiency` is None without it, and for a resumed run
    (`resumed_from`: the first round that this server closed): the clients of such a run were also blocked while there
    was no server, and no record separates that time.
    """
    rounds = outcome.rounds
    finished = [goodbye for goodbye in outcome.goodbyes.values() if not goodbye.reason]
    if finished:
        factor = _to_a_whole_run(finished, len(rounds) * config.cohort_size / config.clients)
        stages = total((g.stages for g in finished), factor)
        compute_s = factor * sum(g.compute_s for g in finished)
        blocked_s = factor * sum(g.exposed_s for g in finished)
        others_s = factor * sum(waited_for_others(g.exposed_s, g.stages.wait) for g in finished)
    else:
        stages = total(r.stages for r in rounds)
        compute_s, blocked_s = sum(r.compute_s for r in rounds), sum(r.exposed_s for r in rounds)
        others_s = sum(waited_for_others(r.exposed_s, r.stages.wait) for r in rounds)
    exposed_s = blocked_s - others_s
    serial_s = exposed_s if config.staleness == 0 else serial_comm_s
    if outcome.resumed_from is not None:
        serial_s = None
    bytes_up = rounds[-1].bytes_up if rounds else 0
    bytes_down = rounds[-1].bytes_down if rounds else 0
    snapshot_bytes = rounds[-1].snapshot_bytes if rounds else 0
    packed_bytes = bytes_up + bytes_down - snapshot_bytes
    return {
        "version": SUMMARY_VERSION,
        "complete": len(rounds) == config.rounds and len(finished) > 0 and not outcome.unfinished,
        "staleness": config.staleness,
        "format": config.format,
        "schedule": config.schedule,
        "seed": config.seed,
        "rounds": len(rounds),
        "rounds_trained": len(rounds) * config.cohort_size / config.clients,
        "resumed_from": outcome.resumed_from,
        "clients": config.clients,
        "blocks": blocks,
        "local_steps": config.local_steps,
        "wall_s": outcome.wall_s,
        "compute_s": compute_s,
        "serial_comm_s": serial_s,
        "exposed_comm_s": exposed_s,
        "waited_for_others_s": others_s,
        "skew_s": sum(r.skew_s for r in rounds),
        "overlap_efficiency": hidden_share(exposed_s, serial_s),
        "stages": msgspec.to_builtins(stages),
        "stages_of": {
            "server": msgspec.to_builtins(outcome.server_stages),
            **{f"client {seat}": msgspec.to_builtins(g.stages) for seat, g in sorted(outcome.goodbyes.items())},
        },
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "snapshot_bytes": snapshot_bytes,  # of bytes_down; a whole block has the same size in every format
        "bytes_as_bf16": round(packed_bytes * body_bytes(128, "bf16") / body_bytes(128, config.format))
        + snapshot_bytes,
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


def _to_a_whole_run(finished: list[Goodbye], rounds: float) -> float:
    """The factor that turns sums over these clients into the figures of one client that trained in all `rounds` rounds.

    A client that came late, or took over a seat, has trained fewer rounds, so a plain mean would be too small.
    """
    trained = sum(goodbye.rounds for goodbye in finished)
    return rounds / trained if trained and all(goodbye.rounds for goodbye in finished) else 1 / len(finished)


def summarise_client(run: Run) -> dict[str, Any]:
    """The contents of a client's own `summary.json`, also if it left the run early. Units as in `summarise`.

    `rounds`: how many rounds' aggregates this client has applied. `wall_s`: from its first round to its end. Without
    `serial_comm_s` after a reconnect, because the time without a connection was exposed, too.
    """
    others_s = waited_for_others(run.exposed_s, run.stages.wait)
    exposed_s = run.exposed_s - others_s
    serial_s = exposed_s if run.config.staleness == 0 and not run.reconnects else None
    return {
        "version": SUMMARY_VERSION,
        "client": run.client,
        "complete": run.finished,
        "staleness": run.config.staleness,
        "format": run.config.format,
        "schedule": run.config.schedule,
        "seed": run.config.seed,
        "rounds": run.aggregates,
        "rounds_trained": run.rounds,
        "clients": run.config.clients,
        "blocks": len(run.plan.blocks),
        "local_steps": run.config.local_steps,
        "digest": run.digest,
        "wall_s": run.wall_s,
        "compute_s": run.compute_s,
        "serial_comm_s": serial_s,
        "exposed_comm_s": exposed_s,
        "overlap_efficiency": hidden_share(exposed_s, serial_s),
        "waited_for_others_s": others_s,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "bad_groups": run.bad_groups,
        "stages": msgspec.to_builtins(run.stages),
        "reconnects": run.reconnects,
        "resumed_bytes": run.resumed_bytes,
        "resent_bytes": run.resent_bytes,
    }
