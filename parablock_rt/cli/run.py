"""The commands that run something: demo, serve, join. Each parses its options, starts the run and records it."""

from __future__ import annotations

import contextlib
import resource
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from parablock_rt import config, demo, units
from parablock_rt.cli import folders
from parablock_rt.cli.options import (
    BatchSize,
    Blocks,
    Clients,
    ConfigFile,
    Delay,
    Device,
    Dtype,
    EvalExamples,
    Format,
    Json,
    Lanes,
    LearningRate,
    LocalSteps,
    Model,
    Outer,
    Period,
    PinnedMemory,
    Prometheus,
    Rate,
    ReportTo,
    Rounds,
    RowLimit,
    RunDir,
    Schedule,
    Seed,
    SeqLen,
    Staleness,
    SummaryFile,
    Task,
    Threads,
    TlsCa,
    TlsCert,
    TlsFingerprint,
    TlsKey,
    TokenFile,
    Trace,
    client_tls,
    flag,
    plan_of,
    server_tls,
)
from parablock_rt.cli.output import console, deliver, say_what_is_left, tell_news
from parablock_rt.client.reports import RoundReport
from parablock_rt.client.run import Run
from parablock_rt.errors import ParaBlockError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune import models
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe import meters
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.telemetry import PERIOD_S
from parablock_rt.recording import Record
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.server.server import check_address
from parablock_rt.server.server import serve as start_server
from parablock_rt.summary import summarise, summarise_client
from parablock_rt.wire import handshake
from parablock_rt.wire.transport import DEFAULT_LANES, MAX_LANES, Shape

commands = typer.Typer()
_OPEN_FILES = 8192  # four connections for each of 1,024 clients, plus unproved connections and the server's files


@commands.command("demo", epilog="Example: [b]parablock demo --rate 20mbit --rounds 8[/b]")
def run_demo(
    context: typer.Context,
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
    tls: Annotated[bool, flag("--tls", help="Encrypt the links, with certificates made for the run.")] = False,
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
    # Finds an invalid setting before a model is loaded.
    config.RunConfig(**settings)
    shape = Shape(units.parse_rate(rate), units.parse_delay(delay))
    folder = RunFolder(context.with_resource(folders.held(run_dir, "demo")))
    plan = demo.Demo(workload, shape.rate, shape.delay, folder, blocks, settings, encrypted=tls)
    deliver(demo.run(plan, console), summary, as_json)


@commands.command(
    epilog="Example: [b]parablock serve --address 0.0.0.0:7070 --tls-cert tls/server.pem --tls-key tls/server.key "
    "--token-file token --clients 2[/b]"
)
def serve(
    context: typer.Context,
    config_file: ConfigFile = None,
    address: Annotated[str, typer.Option(help="host:port to listen on; port 0 takes a free one.")] = "127.0.0.1:7070",
    model: Model = "smollm2",
    rounds: Rounds = 20,
    clients: Clients = 2,
    local_steps: LocalSteps = 4,
    staleness: Staleness = 1,
    format: Format = "int8",
    schedule: Schedule = "cyclic",
    seed: Seed = 0,
    blocks: Blocks = None,
    outer: Outer = "freeze",
    row_limit: RowLimit = None,
    local_view: Annotated[str, typer.Option(help="Weights between hand-over and aggregate: own, reference.")] = "own",
    fraction: Annotated[float, typer.Option(help="Part of the clients that trains in a round.")] = 1.0,
    quorum: Annotated[int | None, typer.Option(help="Clients that suffice at the deadline; default half.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds a round may stay open; default: adapts.")] = None,
    join_timeout: Annotated[float, typer.Option(help="Seconds to wait for all clients.")] = 600.0,
    server_optimizer: Annotated[str, typer.Option(help="average, momentum, adam or yogi.")] = "average",
    server_lr: Annotated[float, typer.Option(help="Step size of the server's optimiser.")] = 1.0,
    task: Task = None,
    dtype: Dtype = None,
    seq_len: SeqLen = None,
    eval_examples: EvalExamples = None,
    threads: Threads = 1,
    upload_budget: Annotated[
        int | None, typer.Option(min=1, help="MiB of unfinished uploads held at once; default: follows the model.")
    ] = None,
    rate: Rate = "none",
    delay: Delay = "0ms",
    lanes: Lanes = MAX_LANES,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of the CA that signs the clients' certificates: they must show one.")
    ] = None,
    tls_clients: Annotated[
        Literal["required", "optional"],
        typer.Option(help="optional: a client without a certificate is let in by the token."),
    ] = "required",
    insecure: Annotated[
        bool, flag("--insecure", help="Listen beyond loopback without TLS, or without a token.")
    ] = False,
    save_model: Annotated[bool, flag(help="Save the result to the run folder.")] = True,
    durable: Annotated[bool, flag(help="Keep the run's state in the run folder, to --resume it.")] = True,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of a server that was killed: go on.", is_eager=True, callback=folders.read_resumed
        ),
    ] = None,
    trace: Trace = True,
    telemetry: Period = PERIOD_S,
    prometheus: Prometheus = None,
    report_to: ReportTo = None,
    run_dir: RunDir = None,
    summary: SummaryFile = None,
    as_json: Json = False,
) -> None:
    """Run the server of a federated fine-tuning; clients come with `parablock join`."""
    tell_news()
    given = context.params
    settings = folders.settings_of(given)
    # Every flag with the name of a setting sets it.
    run_config = config.RunConfig(**{name: given[name] for name in config.RunConfig.__struct_fields__ if name in given})
    workload = Workload.for_model(
        model,
        task=task,
        dtype=dtype,
        seq_len=seq_len,
        eval_examples=eval_examples,
        threads=threads,
        row_limit=row_limit,
    )
    token = handshake.read_token(token_file)
    tls = server_tls(tls_cert, tls_key, tls_client_ca, tls_clients)
    shape = Shape(units.parse_rate(rate), units.parse_delay(delay))
    check_address(address, token, tls, insecure=insecure)
    path = context.with_resource(folders.held(run_dir, "serve"))
    past = folders.earlier_rounds(path, resume, durable=durable)
    record = Record(path, telemetry, prometheus, report_to)
    evaluating = " and evaluating it on held-out examples" if workload.eval_examples else ""
    console.print(f"Loading [b]{escape(workload.model)}[/b]{evaluating} ...")
    net, tokenizer, examples = finetune.load(workload)
    plan = plan_of(net, blocks, outer, row_limit)
    before = finetune.evaluate(net, examples, workload)

    def show(closed: ClosedRound) -> None:
        record.round(closed)
        console.print(demo.round_line(closed, rounds, plan.blocks[closed.block].name))

    after = None
    _allow_open_files()
    server = start_server(
        net,
        run_config,
        address=address,
        plan=plan,
        token=token,
        tls=tls,
        insecure=insecure,
        rate=shape.rate,
        delay=shape.delay,
        lanes=lanes,
        durable=path / folders.STATE if durable and resume is None else None,
        resume=None if resume is None else path / folders.STATE,
        on_round=show,
        trace=trace,
        upload_budget=None if upload_budget is None else upload_budget * 2**20,
    )
    try:
        with record.telemetry, server:
            # Nothing in the folder changes before this point, so that a refused command leaves an earlier run's files.
            folder = RunFolder(path, resumed=resume is not None)
            record.begin(folder, past)
            record.telemetry.start("server", meters.of_this_machine(server.link_stats))
            if durable:
                folders.write_settings(folder, settings | {"address": server.address})  # the port that was taken
            console.print(f"Listening on [b]{server.address}[/b] for {clients} clients")
            server.wait()
        after = finetune.evaluate(net, examples, workload)
        if save_model:
            _save(net, tokenizer, path)
    finally:
        result = summarise(
            run_config, server.outcome, blocks=len(plan.blocks), eval_loss_before=before, eval_loss_after=after
        )
        record.finish(result, server.timeline)
        if not result["complete"]:
            resumed = f"parablock serve --resume {shlex.quote(str(path))}"
            say_what_is_left(path, f"; `{resumed}` goes on with it" if durable else "")
    deliver(result, summary, as_json)


@commands.command(epilog="Example: [b]parablock join server.example.org:7070 --tls-ca ca.pem --token-file token[/b]")
def join(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="host:port of the server.")],
    config_file: ConfigFile = None,
    model: Model = "smollm2",
    task: Task = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    lr: LearningRate = None,
    threads: Threads = 1,
    row_limit: RowLimit = None,
    rate: Rate = "none",
    delay: Delay = "0ms",
    lanes: Lanes = DEFAULT_LANES,
    device: Device = "cpu",
    pinned_memory: PinnedMemory = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_fingerprint: TlsFingerprint = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    reconnect: Annotated[float, typer.Option(help="Seconds to try to replace a connection that broke.")] = 600.0,
    trace: Trace = True,
    telemetry: Period = PERIOD_S,
    prometheus: Prometheus = None,
    report_to: ReportTo = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Take part in a run as a client, with this machine's shard of the data."""
    tell_news()
    pinned = None if pinned_memory is None else units.parse_bytes(pinned_memory)
    workload = Workload.for_model(
        model,
        task=task,
        dtype=dtype,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        threads=threads,
        row_limit=row_limit,
    )
    token = handshake.read_token(token_file)
    tls = client_tls(tls_cert, tls_key, tls_ca, tls_fingerprint)
    shape = Shape(units.parse_rate(rate), units.parse_delay(delay))
    config.parse_address(address)
    path = context.with_resource(folders.held(run_dir, "join"))
    record = Record(path, telemetry, prometheus, report_to)
    joined: list[Run] = []

    def begin(run: Run) -> None:
        joined.append(run)
        record.begin(RunFolder(path))
        record.telemetry.start(f"client {run.client}", meters.of_this_machine(run.link_stats))

    def show(done: RoundReport) -> None:
        record.round(done)
        console.print(
            f"  round {done.round + 1:>3}  block {done.block}  loss {done.loss:6.3f}  "
            f"compute {done.compute_s:5.2f} s  waited {done.exposed_s:5.2f} s  "
            f"up {done.bytes_up / 1e6:6.1f} MB  down {done.bytes_down / 1e6:6.1f} MB"
        )

    console.print(f"Joining [b]{address}[/b] with {workload.model}; training begins when all its clients are there")
    try:
        with record.telemetry:
            finetune.train(
                address,
                workload,
                token=token,
                tls=tls,
                rate=shape.rate,
                delay=shape.delay,
                lanes=lanes,
                reconnect=reconnect,
                on_round=show,
                on_join=begin,
                device=device,
                pinned_memory=pinned,
                trace=trace,
            )
    except KeyboardInterrupt:
        if not joined:
            console.print("Stopped before the first round: nothing was trained")
        raise
    finally:
        for run in joined:
            result = summarise_client(run)
            record.finish(result, run.timeline)
            if not run.finished:
                say_what_is_left(path)
    deliver(result, None, as_json)


def _allow_open_files() -> None:
    """Raises this process's limit of open files, often 1,024, as far as connections need and the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # without a higher limit, fewer clients can connect
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _save(net: Any, tokenizer: Any, path: Path) -> None:
    """Saves the model and its tokenizer to the run folder. Raises ParaBlockError."""
    target = path / "model"
    try:
        with models.no_progress_bars():
            net.save_pretrained(target)
            if hasattr(tokenizer, "save_pretrained"):  # the tiny model's bytes need no file
                tokenizer.save_pretrained(target)
    except Exception as error:  # each library raises its own error for a full disk
        raise ParaBlockError(f"the result cannot be saved to {target}: {error}") from error
    console.print(f"Saved the result to [b]{escape(str(target))}[/b]")
