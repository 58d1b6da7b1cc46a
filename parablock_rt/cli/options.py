"""The options that several commands share, with their help, and what is made of them: settings, TLS, a plan.

What is wrong with them is found here or where they are used first, before a model is loaded. Runs and prints nothing.
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
    """An option that takes no value, shown without the type of one."""
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
BatchSize = Annotated[int | None, typer.Option(help="Sequences a local step.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence; longer examples are left out.")]
LearningRate = Annotated[float | None, typer.Option(help="AdamW's learning rate.")]
Threads = Annotated[int, typer.Option(help="Threads that torch computes with.")]
EvalExamples = Annotated[int | None, typer.Option(help="Held-out examples to evaluate on, before and after; 0: none.")]
Rounds = Annotated[int, typer.Option(help="Rounds; one block is trained in each.")]
Clients = Annotated[int, typer.Option(help="Clients of the run.")]
LocalSteps = Annotated[int, typer.Option(help="Optimiser steps a round.")]
Staleness = Annotated[int, typer.Option(help="Rounds a client may run ahead: 0 no overlap, 1 ParaBlock.")]
Format = Annotated[str, typer.Option(help="On the wire: fp32, bf16, int8 or int4.")]
Schedule = Annotated[str, typer.Option(help="cyclic, reshuffled or reverse.")]
Seed = Annotated[int, typer.Option(help="Of schedule, cohorts and batches.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Cut the model into this many blocks instead of one a layer.")]
Outer = Annotated[str, typer.Option(help="Embeddings, final norm and head: freeze or train.")]
RowLimit = Annotated[
    int | None, typer.Option(help="Cut embeddings and heads above this many elements into blocks of rows.")
]
Rate = Annotated[str, typer.Option(help="Slow every link down to this: 50mbit, 1gbit; none: as it is.")]
Delay = Annotated[str, typer.Option(help="Artificial one-way delay: 40ms.")]
Lanes = Annotated[
    int,
    typer.Option(min=1, max=MAX_LANES, help="Connections that a link may have. More help on long or lossy paths."),
]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File with the shared token; else the variable {handshake.TOKEN_VARIABLE}.")
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file with this side's certificate: switches TLS on.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file with its private key.")]
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
    """A client's TLS settings; None when no option speaks of TLS. Raises ConfigError."""
    if not (cert or key or ca or fingerprint):
        return None
    tls = Tls(cert, key, ca=ca, fingerprint=fingerprint)
    tls.for_client()  # what is wrong with it is found before a model is loaded
    return tls


def server_tls(
    cert: Path | None, key: Path | None, client_ca: Path | None, clients: Literal["required", "optional"]
) -> Tls | None:
    """A server's TLS settings; None when no option speaks of TLS. Raises ConfigError."""
    if not (cert or key or client_ca):
        return None
    tls = Tls(cert, key, ca=client_ca, clients=clients)
    tls.for_server()  # what is wrong with it is found before a model is loaded
    return tls


def seconds_of(step_time: float | None) -> float | None:
    """The seconds that a local step takes, if they are known. Raises ConfigError."""
    if step_time is not None and not 0 < step_time < math.inf:
        raise ConfigError(f"step-time must be a positive number of seconds; found {step_time}")
    return step_time


def plan_of(net: Any, blocks: int | None, outer: str, row_limit: int | None) -> BlockPlan:
    """The plan that the options ask for. Raises ConfigError, PlanError."""
    # Any text may come from the command line; from_model refuses what it does not know.
    return BlockPlan.from_model(net, blocks, outer=outer, outer_limit=row_limit)  # type: ignore[arg-type]
