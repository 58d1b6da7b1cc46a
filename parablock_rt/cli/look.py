"""The commands around a run, which inspect, measure or prepare. None of them takes part in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from parablock_rt import config, doctor, link_check, planner, report, top, units
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.cli.options import (
    BatchSize,
    Blocks,
    ConfigFile,
    Delay,
    Dtype,
    Format,
    Json,
    Model,
    Outer,
    Rate,
    RowLimit,
    Schedule,
    Seed,
    SeqLen,
    Staleness,
    TlsCa,
    TlsCert,
    TlsFingerprint,
    TlsKey,
    TokenFile,
    client_tls,
    flag,
    plan_of,
    seconds_of,
)
from parablock_rt.cli.output import console, tell_news
from parablock_rt.client import memory, optimizers
from parablock_rt.errors import ConfigError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe import trace_merge
from parablock_rt.observe.run_folder import to_json
from parablock_rt.wire import certs, handshake
from parablock_rt.wire.transport import Shape

commands = typer.Typer()
traces = typer.Typer(help="Work with trace files.", no_args_is_help=True)


@commands.command("plan", epilog="Example: [b]parablock plan --model smollm2 --rate 50mbit --step-time 0.4[/b]")
def show_plan(
    config_file: ConfigFile = None,
    model: Model = "smollm2",
    dtype: Dtype = None,
    blocks: Blocks = None,
    outer: Outer = "freeze",
    row_limit: RowLimit = None,
    format: Format = "int8",
    staleness: Staleness = 1,
    schedule: Schedule = "cyclic",
    seed: Seed = 0,
    optimizer: Annotated[str, typer.Option(help=f"The clients': {', '.join(optimizers.NAMES)}.")] = "adamw",
    device: Annotated[str, typer.Option(help="Where the clients' model is: cpu or cuda.")] = "cpu",
    rate: Rate = "none",
    delay: Delay = "0ms",
    step_time: Annotated[float | None, typer.Option(help="Seconds a local step takes; else it is measured.")] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    as_json: Json = False,
) -> None:
    """Show how a model is cut into blocks, what they weigh and take in memory, and what hides their transfer."""
    workload = Workload.for_model(model, dtype=dtype, batch_size=batch_size, seq_len=seq_len, row_limit=row_limit)
    shape = Shape(units.parse_rate(rate), units.parse_delay(delay))
    seconds = seconds_of(step_time)
    kind = memory.device_kind(device)
    trained = optimizers.by_name(optimizer)
    run_config = config.RunConfig(
        rounds=config.MAX_ROUNDS, clients=1, staleness=staleness, format=format, schedule=schedule, seed=seed
    )
    net = finetune.outline(workload)
    plan = plan_of(net, blocks, outer, row_limit)
    predictor = memory.Predictor(net, plan, run_config, trained, kind)
    if shape.rate and seconds is None:
        seconds = _time_step(workload, plan)
    forecast = planner.forecast(plan, predictor, shape.rate, shape.delay, seconds, staleness)
    if as_json:
        print(to_json(forecast, indent=2))
    else:
        print(planner.render(plan, predictor, forecast))


def _time_step(workload: Workload, plan: BlockPlan) -> float:
    net, batch = finetune.for_timing(workload)
    return planner.measure_step(net, plan, batch)


@commands.command(
    "certs", epilog="Example: [b]parablock certs tls --host server.example.org,203.0.113.7 --clients 2[/b]"
)
def make_certs(
    folder: Annotated[Path, typer.Argument(help="Folder for the files.")],
    host: Annotated[
        str, typer.Option(help="Names and IP addresses by which clients reach the server, comma-separated.")
    ],
    clients: Annotated[int, typer.Option(help="How many client certificates to make.")] = 0,
    days: Annotated[int, typer.Option(help="Days for which the certificates of server and clients are valid.")] = 365,
    force: Annotated[bool, flag("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Make a CA, a certificate for the server and, if wanted, certificates for clients."""
    hosts = [name.strip() for name in host.split(",") if name.strip()]
    deployment = certs.create(folder, hosts, clients=clients, days=days, force=force)
    if as_json:
        print(to_json(certs.as_dict(deployment), indent=2))
    else:
        print(certs.render(deployment))


@commands.command(
    "doctor",
    epilog="Example: [b]parablock doctor --peer server.example.org:7070 --tls-ca ca.pem --token-file token[/b]",
)
def show_doctor(
    config_file: ConfigFile = None,
    peer: Annotated[str | None, typer.Option(help="host:port of a running server, to measure the link to it.")] = None,
    model: Annotated[str | None, typer.Option(help="As for join: is the transfer of its blocks hidden?")] = None,
    dtype: Dtype = None,
    blocks: Blocks = None,
    outer: Outer = "freeze",
    row_limit: RowLimit = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    staleness: Annotated[int | None, typer.Option(help="With --model: replaces the server's.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="With --model: replaces the server's.")] = None,
    format: Annotated[str | None, typer.Option(help="With --model: replaces the server's.")] = None,
    step_time: Annotated[float | None, typer.Option(help="Seconds a local step takes; else it is measured.")] = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_fingerprint: TlsFingerprint = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: Json = False,
) -> None:
    """Show this machine's capabilities and what they enable; with --peer, measure the link to a server."""
    if peer is None:
        if model is not None:
            raise ConfigError("--model needs --peer here; `parablock plan --rate` answers it for a given rate")
        findings = doctor.examine()
        print(to_json(findings, indent=2) if as_json else doctor.render(findings))
        return
    tell_news()
    asked = {"staleness": staleness, "local_steps": local_steps, "format": format}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config.RunConfig(rounds=1, clients=1, **given)  # raises if one is invalid
    seconds = seconds_of(step_time)
    plan = None
    if model is not None:
        workload = Workload.for_model(model, dtype=dtype, batch_size=batch_size, seq_len=seq_len, row_limit=row_limit)
        plan = plan_of(finetune.outline(workload), blocks, outer, row_limit)
    token = handshake.read_token(token_file)
    tls = client_tls(tls_cert, tls_key, tls_ca, tls_fingerprint)
    config.parse_address(peer)
    report = link_check.check_link(peer, token=token, tls=tls)
    result = link_check.as_dict(report)
    lines = [link_check.render(report)]
    if plan is not None:
        run = link_check.settings(top.look_once(peer, token, tls=tls)) | given
        step_s = _time_step(workload, plan) if seconds is None else seconds
        link = planner.Link(report.up, report.down, report.round_trip_s / 2)
        verdict = planner.verdict(plan, **run, link=link, step_s=step_s)
        result["overlap"] = verdict
        lines.append(verdict)
    print(to_json(result, indent=2) if as_json else "\n".join(lines))


@commands.command(
    "top", epilog="Example: [b]parablock top server.example.org:7070 --tls-ca ca.pem --token-file token[/b]"
)
def show_top(
    address: Annotated[str, typer.Argument(help="host:port of the server.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, flag("--once", help="Look once and end.")] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_fingerprint: TlsFingerprint = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: Json = False,
) -> None:
    """Watch a running server: rounds, slow clients, rates, hidden communication. Takes no seat, changes nothing."""
    tell_news()
    token = handshake.read_token(token_file)
    tls = client_tls(tls_cert, tls_key, tls_ca, tls_fingerprint)
    config.parse_address(address)
    if not (once or as_json):
        top.watch(address, token, interval, Console(), tls=tls)
        return
    status = top.look_once(address, token, tls=tls)
    if as_json:
        print(to_json(top.figures(status), indent=2))
    else:
        Console().print(top.render(status))


@commands.command("bench", add_help_option=False, context_settings={"ignore_unknown_options": True})
def run_bench(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Measure the codec, the transport, the overlap and the server's growth; `parablock bench --help` says more."""
    from parablock_rt.bench.cli import main as bench_main

    raise typer.Exit(bench_main(arguments or []))


@commands.command("report", epilog="Example: [b]parablock report runs/demo-20261122-140000 -o report.html[/b]")
def write_report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page on one or several runs: a verdict, the timeline, all figures."""
    text = report.render(runs)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {output}: {error.strerror}") from error
    console.print(f"Wrote [b]{escape(str(output))}[/b]; open it in a browser")


@traces.command(epilog="Example: [b]parablock trace merge runs/a/trace.json profile.json -o both.json[/b]")
def merge(
    files: Annotated[list[Path], typer.Argument(help="trace.json of runs, and traces of torch.profiler.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
) -> None:
    """Put the traces of one machine into one file, on one clock."""
    named = [(f"{path.parent.name}/{path.stem}", trace_merge.read(path)) for path in files]
    merged = trace_merge.merge(named)
    try:
        output.write_text(to_json(merged))
    except OSError as error:
        raise ConfigError(f"cannot write the trace {output}: {error.strerror}") from error
    console.print(f"Wrote {len(merged['traceEvents'])} events to [b]{output}[/b]")
