"""The options that several commands share, with their help texts, and their conversion to settings, TLS and a plan.

Invalid options are found here or where they are first used, before a model is loaded. Runs and prints nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from parablock_rt import config
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError
from parablock_rt.wire import handshake
from parablock_rt.wire.tls import SYSTEM, Tls
from parablock_rt.wire.transport import MAX_LANES


def flag(*names: str, help: str) -> Any:
    """An option that takes no value; the help shows no type for it."""
    return typer.Option(*names, help=help, metavar="")


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        settings = config.read_toml(path)
        flags = {
            flag.lstrip("-").replace("-", "_"): str(parameter.name)
            for parameter in context.command.params
            for flag in parameter.opts
            if parameter.name != "config_file"
        }
        if unknown := sorted(settings.keys() - flags.keys()):
            raise ConfigError(
                f"{path} has settings that `parablock {context.command.name}` does not know: {', '.join(unknown)}; "
                f"it knows {', '.join(sorted(flags))}"
            )
        context.default_map = {flags[key]: value for key, value in settings.items()}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with the same keys; flags win.", is_eager=True, callback=_read_config),
]
Model = Annotated[str, typer.Option(help="smollm2, tiny, or the folder of a Hugging Face checkpoint.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default what suits the model.")]
Task = Annotated[str | None, typer.Option(help="gsm8k or additions; by default what suits the model.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per local step.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per sequence; longer examples are left out.")]
LearningRate = Annotated[float | None, typer.Option(help="AdamW's learning rate.")]
Threads = Annotated[int, typer.Option(help="Threads that torch computes with.")]
EvalExamples = Annotated[int | None, typer.Option(help="Held-out examples to evaluate on, before and after; 0: none.")]
Rounds = Annotated[int, typer.Option(help="Rounds; one block is trained in each.")]
Clients = Annotated[int, typer.Option(help="Clients of the run.")]
LocalSteps = Annotated[int, typer.Option(help="Optimiser steps per round.")]
Staleness = Annotated[int, typer.Option(help="Rounds a client may run ahead: 0 no overlap, 1 ParaBlock.")]
Format = Annotated[str, typer.Option(help="Format on the wire: fp32, bf16, int8 or int4.")]
Schedule = Annotated[str, typer.Option(help="cyclic, reshuffled or reverse.")]
Seed = Annotated[int, typer.Option(help="Seed of schedule, cohorts and batches.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Cut the model into this many blocks; default: one per layer.")]
Outer = Annotated[str, typer.Option(help="Embeddings, final norm and head: freeze or train.")]
RowLimit = Annotated[
    int | None, typer.Option(help="Cut embeddings and heads above this many elements into blocks of rows.")
]
Rate = Annotated[str, typer.Option(help="Slow every link down to this: 50mbit, 1gbit; none: no limit.")]
Delay = Annotated[str, typer.Option(help="Artificial one-way delay: 40ms.")]
Lanes = Annotated[
    int,
    typer.Option(min=1, max=MAX_LANES, help="Connections that a link may have. More help on long or lossy paths."),
]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File with the shared token; else the variable {handshake.TOKEN_VARIABLE}.")
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file with this side's certificate: switches TLS on.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file with the certificate's private key.")]
TlsCa = Annotated[
    str | None, typer.Option(help=f"PEM file of the CA that signed the server's certificate, or {SYSTEM}: TLS on.")
]
TlsFingerprint = Annotated[str | None, typer.Option(help="SHA-256 of the server's certificate: switches TLS on.")]
Device = Annotated[str, typer.Option(help="Where this client trains: cpu, cuda or cuda:1.")]
PinnedMemory = Annotated[
    str | None,
    typer.Option(help="On a GPU: pin at most this much of the host's memory (8gib); default: up to half."),
]
RunDir = Annotated[Path | None, typer.Option(help="Folder for summary, metrics and trace; default runs/NAME.")]
SummaryFile = Annotated[Path | None, typer.Option("--summary", help="Also write the summary to this file.")]
Trace = Annotated[bool, flag("--trace/--no-trace", help="Record what happens to every chunk.")]
Period = Annotated[
    float, typer.Option("--telemetry", help="Seconds between samples of GPU, links and threads; 0: none.")
]
Prometheus = Annotated[
    str | None, typer.Option(help="Serve metrics to Prometheus: a port (of this machine alone), or host:port.")
]
ReportTo = Annotated[str | None, typer.Option(help="Also write telemetry and rounds to tensorboard, wandb or both.")]
Json = Annotated[bool, flag("--json", help="Print the result as JSON on standard output.")]


def client_tls(cert: Path | None, key: Path | None, ca: str | None, fingerprint: str | None) -> Tls | None:
    """A client's TLS settings; None when no TLS option is given. Raises ConfigError."""
    if not (cert or key or ca or fingerprint):
        return None
    tls = Tls(cert, key, ca=ca, fingerprint=fingerprint)
    tls.for_client()  # finds errors before a model is loaded
    return tls


def server_tls(
    cert: Path | None, key: Path | None, client_ca: Path | None, clients: Literal["required", "optional"]
) -> Tls | None:
    """A server's TLS settings; None when no TLS option is given. Raises ConfigError."""
    if not (cert or key or client_ca):
        return None
    tls = Tls(cert, key, ca=client_ca, clients=clients)
    tls.for_server()  # finds errors before a model is loaded
    return tls


def seconds_of(step_time: float | None) -> float | None:
    """Checks the given seconds per local step; None if not given. Raises ConfigError."""
    if step_time is not None and not 0 < step_time < math.inf:
        raise ConfigError(f"step-time must be a positive number of seconds; found {step_time}")
    return step_time


def plan_of(net: Any, blocks: int | None, outer: str, row_limit: int | None) -> BlockPlan:
    """The plan that the options ask for. Raises ConfigError, PlanError."""
    # `outer` may be any text from the command line; from_model rejects unknown values.
    return BlockPlan.from_model(net, blocks, outer=outer, outer_limit=row_limit)  # type: ignore[arg-type]
