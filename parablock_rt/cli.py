"""The command line: `parablock demo | serve | join | plan | doctor`.

Parses, calls, prints. Exit codes: 0 done, 1 the run failed, 2 wrong usage.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from parablock_rt import config, demo, doctor, finetune, handshake, planner
from parablock_rt.blocks import BlockPlan
from parablock_rt.client import RoundReport, Run
from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.finetune import Workload
from parablock_rt.outcome import ClosedRound
from parablock_rt.server import serve as start_server
from parablock_rt.summary import summarise
from parablock_rt.timeline import RunFolder, to_json
from parablock_rt.transport import Shape
from parablock_rt.version import __version__

app = typer.Typer(
    help="Federated fine-tuning of large models, one block at a time, with the network behind the computation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, highlight=False, soft_wrap=True)


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
Format = Annotated[str, typer.Option(help="On the wire: fp32, bf16, int8 or int4.")]
Schedule = Annotated[str, typer.Option(help="cyclic, reshuffled or reverse.")]
Seed = Annotated[int, typer.Option(help="Of schedule, cohorts and batches.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Cut the model into this many blocks instead of one a layer.")]
Rate = Annotated[str, typer.Option(help="Slow every link down to this: 50mbit, 1gbit; none: as it is.")]
Delay = Annotated[str, typer.Option(help="Artificial one-way delay: 40ms.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File with the shared token; else the variable {handshake.TOKEN_VARIABLE}.")
]
RunDir = Annotated[Path | None, typer.Option(help="Folder for summary, metrics and trace; default runs/NAME.")]
SummaryFile = Annotated[Path | None, typer.Option("--summary", help="Also write the summary to this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command("demo", epilog="Example: [b]parablock demo --rate 20mbit --rounds 8[/b]")
def run_demo(
    config_file: ConfigFile = None,
    model: Model = "smollm2",
    rounds: Rounds = 20,
    clients: Clients = 2,
    local_steps: LocalSteps = 4,
    format: Format = "int8",
    rate: Rate = "50mbit",
    delay: Delay = "20ms",
    schedule: Schedule = "cyclic",
    seed: Seed = 0,
    blocks: Blocks = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    lr: LearningRate = None,
    eval_examples: EvalExamples = None,
    run_dir: RunDir = None,
    summary: SummaryFile = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model over a slow link twice, without and with overlap, and compare."""
    workload = Workload.for_model(
        model, dtype=dtype, batch_size=batch_size, seq_len=seq_len, lr=lr, eval_examples=eval_examples
    )
    settings: dict[str, Any] = {
        "rounds": rounds,
        "clients": clients,
        "local_steps": local_steps,
        "format": format,
        "schedule": schedule,
        "seed": seed,
    }
    # A wrong setting is found before a model is loaded.
    config.RunConfig(**settings)
    shape = Shape(config.parse_rate(rate), config.parse_delay(delay))
    folder = _run_folder(run_dir, "demo")
    plan = demo.Demo(workload, shape.rate, shape.delay, folder, blocks, settings)
    _deliver(demo.run(plan, console), summary, as_json)


@app.command(epilog="Example: [b]parablock serve --address 0.0.0.0:7070 --token-file token --clients 2[/b]")
def serve(
    config_file: ConfigFile = None,
    address: Annotated[str, typer.Option(help="host:port to listen on; port 0 takes a free one.")] = "127.0.0.1:7070",
    model: Model = "smollm2",
    rounds: Rounds = 20,
    clients: Clients = 2,
    local_steps: LocalSteps = 4,
    staleness: Annotated[int, typer.Option(help="Rounds a client may run ahead: 0 no overlap, 1 ParaBlock.")] = 1,
    format: Format = "int8",
    schedule: Schedule = "cyclic",
    seed: Seed = 0,
    blocks: Blocks = None,
    local_view: Annotated[str, typer.Option(help="Weights between hand-over and aggregate: own, reference.")] = "own",
    fraction: Annotated[float, typer.Option(help="Part of the clients that trains in a round.")] = 1.0,
    quorum: Annotated[int | None, typer.Option(help="Clients that suffice at the deadline; default half.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds a round may stay open; default: adapts.")] = None,
    join_timeout: Annotated[float, typer.Option(help="Seconds to wait for all clients.")] = 600.0,
    server_optimizer: Annotated[str, typer.Option(help="average, momentum, adam or yogi.")] = "average",
    server_lr: Annotated[float, typer.Option(help="Step size of the server's optimiser.")] = 1.0,
    dtype: Dtype = None,
    eval_examples: EvalExamples = None,
    threads: Threads = 1,
    rate: Rate = "none",
    delay: Delay = "0ms",
    token_file: TokenFile = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without a token.")] = False,
    save_model: Annotated[bool, typer.Option(help="Save the result to the run folder.")] = True,
    run_dir: RunDir = None,
    summary: SummaryFile = None,
    as_json: Json = False,
) -> None:
    """Run the server of a federated fine-tuning; clients come with `parablock join`."""
    settings = {
        name: value
        for name, value in locals().items()
        if name in config.RunConfig.__struct_fields__  # the flags that are named like a setting are that setting
    }
    run_config = config.RunConfig(**settings)
    workload = Workload.for_model(model, dtype=dtype, eval_examples=eval_examples, threads=threads)
    token = handshake.read_token(token_file)
    shape = Shape(config.parse_rate(rate), config.parse_delay(delay))
    config.parse_address(address)
    folder = _run_folder(run_dir, "serve")
    net, tokenizer, task = finetune.load(workload)
    plan = BlockPlan.from_model(net, blocks)
    before = finetune.evaluate(net, task, workload)

    def show(closed: ClosedRound) -> None:
        folder.append_metrics({name: getattr(closed, name) for name in closed.__dataclass_fields__})
        console.print(demo.round_line(closed, rounds, plan.blocks[closed.block].name))

    after = None
    server = start_server(
        net,
        address=address,
        plan=plan,
        token=token,
        insecure=insecure,
        rate=shape.rate,
        delay=shape.delay,
        on_round=show,
        **settings,
    )
    try:
        with server:
            console.print(f"Listening on [b]{server.address}[/b] for {clients} clients")
            server.wait()
        after = finetune.evaluate(net, task, workload)
        if save_model:
            _save(net, tokenizer, folder)
    finally:
        result = summarise(
            run_config, server.outcome, blocks=len(plan.blocks), eval_loss_before=before, eval_loss_after=after
        )
        folder.write_json("summary.json", result)
        folder.write_trace([server.timeline])
    _deliver(result, summary, as_json)


@app.command(epilog="Example: [b]parablock join server.example.org:7070 --token-file token[/b]")
def join(
    address: Annotated[str, typer.Argument(help="host:port of the server.")],
    config_file: ConfigFile = None,
    model: Model = "smollm2",
    task: Task = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    lr: LearningRate = None,
    threads: Threads = 1,
    rate: Rate = "none",
    delay: Delay = "0ms",
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Take part in a run as a client, with this machine's shard of the data."""
    workload = Workload.for_model(
        model, task=task, dtype=dtype, batch_size=batch_size, seq_len=seq_len, lr=lr, threads=threads
    )
    token = handshake.read_token(token_file)
    shape = Shape(config.parse_rate(rate), config.parse_delay(delay))
    config.parse_address(address)
    folder = _run_folder(run_dir, "join")
    joined: list[Run] = []

    def show(report: RoundReport) -> None:
        folder.append_metrics({name: getattr(report, name) for name in report.__dataclass_fields__})
        console.print(
            f"  round {report.round + 1:>3}  block {report.block}  loss {report.loss:6.3f}  "
            f"compute {report.compute_s:5.2f} s  waited {report.exposed_s:5.2f} s  "
            f"up {report.bytes_up / 1e6:6.1f} MB  down {report.bytes_down / 1e6:6.1f} MB"
        )

    console.print(f"Joining [b]{address}[/b] with {workload.model} ...")
    try:
        finetune.train(
            address,
            workload,
            token=token,
            rate=shape.rate,
            delay=shape.delay,
            on_round=show,
            on_join=joined.append,
        )
    finally:
        for run in joined:
            result = {
                "client": run.client,
                "complete": run.finished,
                "digest": run.digest,
                "compute_s": run.compute_s,
                "exposed_comm_s": run.exposed_s,
                "bytes_up": run.bytes_up,
                "bytes_down": run.bytes_down,
                "bad_groups": run.bad_groups,
            }
            folder.write_json("summary.json", result)
            folder.write_trace([run.timeline])
    _deliver(result, None, as_json)


@app.command("plan", epilog="Example: [b]parablock plan --model smollm2 --rate 50mbit --step-time 0.4[/b]")
def show_plan(
    config_file: ConfigFile = None,
    model: Model = "smollm2",
    dtype: Dtype = None,
    blocks: Blocks = None,
    rate: Rate = "none",
    delay: Delay = "0ms",
    step_time: Annotated[float | None, typer.Option(help="Seconds a local step takes; else it is measured.")] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    as_json: Json = False,
) -> None:
    """Show how a model is cut into blocks, what they weigh, and what hides their transfer."""
    workload = Workload.for_model(model, dtype=dtype, batch_size=batch_size, seq_len=seq_len)
    shape = Shape(config.parse_rate(rate), config.parse_delay(delay))
    if step_time is not None and not 0 < step_time < math.inf:
        raise ConfigError(f"step-time must be a positive number of seconds; found {step_time}")
    net, _, task = finetune.load(workload)
    plan = BlockPlan.from_model(net, blocks)
    seconds = step_time
    if shape.rate and seconds is None:
        seconds = planner.measure_step(net, plan, task.train.take(range(workload.batch_size)))
    forecast = planner.forecast(plan, shape.rate, shape.delay, seconds)
    if as_json:
        print(to_json(forecast, indent=2))
    else:
        print(planner.render(plan, forecast))


@app.command("doctor", epilog="Example: [b]parablock doctor --json[/b]")
def show_doctor(as_json: Json = False) -> None:
    """Show what this machine has and what that switches on."""
    findings = doctor.examine()
    print(to_json(findings, indent=2) if as_json else doctor.render(findings))


def _run_folder(path: Path | None, kind: str) -> RunFolder:
    return RunFolder(path or Path("runs") / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")


def _save(net: Any, tokenizer: Any, folder: RunFolder) -> None:
    target = folder.path / "model"
    net.save_pretrained(target)
    if hasattr(tokenizer, "save_pretrained"):  # the tiny model's bytes need no file
        tokenizer.save_pretrained(target)
    console.print(f"Saved the result to [b]{target}[/b]")


def _deliver(result: dict[str, Any], file: Path | None, as_json: bool) -> None:
    text = to_json(result, indent=2)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the summary {file}: {error.strerror}") from error
    if as_json:
        print(text)


def main() -> NoReturn:
    """The entry point; never returns."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(prog_name="parablock")  # ends with SystemExit: 0, or 2 after a usage error
    except ConfigError as error:
        _fail(error, 2)
    except (ParaBlockError, OSError) as error:
        _fail(error, 1)
    raise SystemExit(0)


def _fail(error: Exception, code: int) -> NoReturn:
    console.print(f"[red]error:[/red] {escape(str(error))}")
    raise SystemExit(code)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...
