"""What a command line's run leaves as it is, and what does not end it: refused commands, closed pipes, full disks."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from cli_cases import Main, Start, join, make_main, make_start, read, serve, wait_for
from processes import Process, command, start_server
from test_readme import own_model

from parablock_rt import cli, demo, link_check, top
from parablock_rt.cli import folders, output
from parablock_rt.errors import ConfigError, ConnectError, ParaBlockError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune import models
from parablock_rt.finetune.loop import Workload
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.wire import certs
from parablock_rt.wire.transport import Transport

main = pytest.fixture(make_main)
start = pytest.fixture(make_start)

TOKEN = "sixteen-characters"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be refused before a model is loaded."""

    def load(workload: Workload) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(finetune, "load", load)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the lock, which holds nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- Examples


def example_of(main: Main, name: str) -> list[str]:
    """The words of a command's own example, behind the program's name."""
    shown = " ".join(main(name, "--help").out.split())
    return shown.partition("Example: parablock ")[2].split()


@pytest.mark.parametrize("name", ["demo", "serve", "join", "plan", "top", "doctor"])
def test_the_example_of_a_command_is_taken_as_it_is_printed(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def reached(*_: object, **options: Any) -> None:
        if name in ("join", "top", "doctor"):  # what serve's example asks of them
            assert options["tls"] is not None
            assert (options.get("token") or _[1]) == TOKEN
        raise ConfigError("far enough")

    words = [word.replace("0.0.0.0:7070", "0.0.0.0:0") for word in example_of(main, name)]
    deployment = certs.create(tmp_path / "tls", ["server.example.org"])
    (tmp_path / "ca.pem").write_bytes(deployment.ca.certificate_file.read_bytes())
    (tmp_path / "token").write_text(TOKEN)
    for owner, function in (
        (demo, "run"),
        (finetune, "load"),
        (finetune, "train"),
        (finetune, "outline"),
        (link_check, "check_link"),
        (top, "watch"),
    ):
        monkeypatch.setattr(owner, function, lambda *given, **options: reached(*given, **options))
    result = main(*words)
    assert (result.code, result.err.splitlines()[-1]) == (2, "error: far enough"), result.err


def test_flags_are_shown_without_a_type(main: Main) -> None:
    for name in ("demo", "serve", "join", "top", "certs"):
        lines = [line for line in main(name, "--help").out.splitlines() if "--help" not in line]
        assert not [line for line in lines if "<bool>" in line or "BOOLEAN" in line]


# ---- A command that is refused changes nothing


def started(start: Start, folder: Path, *flags: object) -> tuple[Process, Path]:
    """A durable server that waits for clients, with something in every file, and its run folder."""
    server, _ = serve(start, folder, "--eval-examples", 0, "--telemetry", 0, *flags)
    run = folder / "run"
    for name in ("metrics.jsonl", "telemetry.jsonl", "summary.json"):
        (run / name).write_text("{}\n")
    return server, run


@pytest.mark.parametrize("by", ["--run-dir", "--resume"])
@pytest.mark.usefixtures("no_model")
def test_a_second_server_of_a_run_folder_is_refused_and_the_first_goes_on(
    main: Main,
    start: Start,
    tmp_path: Path,
    by: str,
) -> None:
    server, run = started(start, tmp_path / "server", "--rounds", 2, "--clients", 1)
    before = contents(run)
    result = main("serve", "--model", "tiny", by, run, "--address", "127.0.0.1:0")
    assert result.code == 2
    assert f"another run is using the run folder {run}" in " ".join(result.err.split())
    assert contents(run) == before
    client = join(start, tmp_path / "client", read(run / "settings.json")["address"])
    assert [process.wait() for process in (server, client)] == [0, 0]


@pytest.mark.usefixtures("no_model")
def test_a_new_run_does_not_replace_one_that_can_be_resumed(main: Main, start: Start, tmp_path: Path) -> None:
    server, run = started(start, tmp_path / "server")
    server.kill()
    before = contents(run)
    result = main("serve", "--model", "tiny", "--run-dir", run, "--address", "127.0.0.1:0")
    assert result.code == 2
    assert f"{run} holds the state of a run already: go on with that by --resume, or choose" in result.err
    assert contents(run) == before


def test_a_resume_that_is_refused_changes_nothing_and_the_right_one_goes_on(
    main: Main,
    start: Start,
    tmp_path: Path,
) -> None:
    server, run = started(start, tmp_path / "server", "--rounds", 2, "--clients", 1)
    server.kill()
    before = contents(run)
    for flags, message in (
        (["--format", "int4"], "int4"),
        (["--rounds", "3"], "rounds"),
        (["--model", "absent"], "model 'absent'"),
        (["--blocks", "2"], "plan"),
        (["--run-dir", tmp_path / "elsewhere"], "expected no --run-dir beside --resume"),
    ):
        result = main("serve", "--resume", run, "--telemetry", 0, *flags)
        assert result.code in (1, 2)
        assert message in result.err
        assert contents(run) == before, flags
    again = start(command, ["serve", "--resume", "run"], str(tmp_path / "server"))
    client = join(start, tmp_path / "client", read(run / "settings.json")["address"])
    assert [process.wait() for process in (again, client)] == [0, 0]


@pytest.mark.usefixtures("no_model")
def test_an_address_that_cannot_be_served_is_refused_before_a_model_is_loaded(main: Main, tmp_path: Path) -> None:
    with start_server() as running:
        for address, code, message in (
            (running.address, 1, f"cannot listen on {running.address}: Address already in use; is another server"),
            ("198.51.100.1:0", 1, "cannot listen on 198.51.100.1:0: Cannot assign requested address"),
            ("0.0.0.0:0", 2, "refusing to listen on 0.0.0.0:0 without protection"),
        ):
            insecure = ["--insecure"] if code == 1 else []
            result = main("serve", "--model", "tiny", "--address", address, *insecure)
            assert result.code == code
            assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_no_table_are_refused_by_name(main: Main, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[]")
    result = main("serve", "--resume", tmp_path)
    assert result.code == 2
    assert f"expected the settings of a run in {tmp_path / 'settings.json'}" in result.err
    assert "found a list" in result.err


def test_a_run_is_resumed_from_another_directory(
    main: Main,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_model(tmp_path / "checkpoint")
    flags = ("--model", "../checkpoint", "--task", "additions", "--seq-len", 24)
    server, run = started(start, tmp_path / "server", *flags)
    server.kill()
    loaded: list[str] = []

    def load(workload: Workload) -> None:
        loaded.append(workload.model)
        raise ConfigError("far enough")

    monkeypatch.setattr(finetune, "load", load)
    assert "far enough" in main("serve", "--resume", run).err  # which stands in the folder above
    assert [Path(model).resolve() for model in loaded] == [tmp_path / "checkpoint"]
    assert Path(loaded[0]).is_absolute()


# ---- Waiting


def test_server_and_client_say_who_is_waited_for_and_how_to_go_on(start: Start, tmp_path: Path) -> None:
    server, address = serve(start, tmp_path / "server", "--run-dir", "my run", "--eval-examples", 0)
    client = join(start, tmp_path / "client", address)
    said, heard = tmp_path / "server" / "errors", tmp_path / "client" / "errors"
    wait_for(
        lambda: re.search(r"^client 0 is here, from 127\.0\.0\.1:\d+: 1 of 2$", said.read_text(), re.M), server.pause
    )
    assert "Loading tiny ...\n" in said.read_text()
    wait_for(lambda: "joined as client 0 of 2; waiting for the first round\n" in heard.read_text(), client.pause)
    client.signal(signal.SIGINT)
    assert client.wait() > 0
    assert "Stopped before the first round: nothing was trained" in heard.read_text()
    assert not (tmp_path / "client" / "run").exists()
    server.signal(signal.SIGINT)
    assert server.wait() > 0
    assert "`parablock serve --resume 'my run'` goes on with it" in said.read_text()


def test_a_client_that_is_not_let_in_leaves_no_folder(main: Main, tmp_path: Path) -> None:
    with start_server(token=TOKEN) as running:
        result = main("join", running.address, "--model", "tiny")
    assert result.code == 1
    assert "asks for a token" in result.err
    assert list(tmp_path.iterdir()) == []


def test_commands_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders.time, "strftime", lambda form: "now")
    with folders.held(None, "join") as one, folders.held(None, "join") as other:
        assert [one, other] == [Path("runs/join-now"), Path("runs/join-now-2")]
        (one / "summary.json").touch()
    assert one.exists()
    assert not other.exists()


def test_a_place_where_no_new_folder_can_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file in its place")
    with pytest.raises(ConfigError, match="the run folder runs cannot be written"), folders.held(None, "join"):
        pass


def test_who_waits_for_a_server_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "parablock"), Transport() as transport, pytest.raises(ConnectError):
        transport.connect("127.0.0.1:1", tries=3)
    assert [record.getMessage() for record in caplog.records] == [
        "no server at 127.0.0.1:1 yet (Connection refused); trying again for a while"
    ]


# ---- What is said and noted never ends a run


def unheard(pipe: Connection, arguments: list[str], folder: str) -> None:
    """As `command`, with nobody at the other end of its output."""
    from parablock_rt.cli import main as program

    os.chdir(folder)
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    sys.argv = ["parablock", *arguments]
    program()


def test_closed_pipes_end_neither_server_nor_client(start: Start, tmp_path: Path) -> None:
    flags = "serve --model tiny --address 127.0.0.1:0 --rounds 3 --clients 2 --eval-examples 0 --json"
    server = start(unheard, [*flags.split(), "--run-dir", "server"], str(tmp_path))
    settings = tmp_path / "server" / "settings.json"
    wait_for(settings.exists, server.pause)
    address = read(settings)["address"]
    clients = [
        start(unheard, ["join", address, "--model", "tiny", "--run-dir", f"c{i}", "--json"], str(tmp_path))
        for i in range(2)
    ]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0]
    for name in ("server", "c0", "c1"):
        assert read(tmp_path / name / "summary.json")["complete"] is True
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_can_be_printed_nowhere_is_lost_without_an_error() -> None:
    with open("/dev/full", "w") as full:
        console = output.Progress(file=full)
        console.print("a round")
        console.rule("another")
    with open("/dev/full", "w") as full:
        handler = output.LogHandler(full)
        for _ in range(2):
            handler.handle(logging.LogRecord("parablock", logging.WARNING, "", 0, "a warning", (), None))
        handler.flush()  # as at the exit


def on_a_full_disk(pipe: Connection, arguments: list[str], folder: str, *_: object) -> None:
    """As `command`; of what it leaves in its run folder, only a server's settings find room."""

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json = RunFolder.write_json
    RunFolder.write_json = (  # type: ignore[method-assign]
        lambda self, name, content: write_json(self, name, content) if name == "settings.json" else no_room()
    )
    RunFolder.append_metrics = RunFolder.write_trace = no_room  # type: ignore[method-assign]
    command(pipe, arguments, folder)


def test_a_full_disk_costs_the_record_and_not_the_run(start: Start, tmp_path: Path) -> None:
    def start_on_it(_: object, *rest: Any) -> Process:
        return start(on_a_full_disk, *rest)

    server, address = serve(start_on_it, tmp_path / "server", "--rounds", 3, "--clients", 1, "--eval-examples", 0)
    client = join(start_on_it, tmp_path / "client", address, "--json")
    assert [process.wait() for process in (server, client)] == [0, 0], (tmp_path / "client" / "errors").read_text()
    assert json.loads((tmp_path / "client" / "output").read_text())["complete"] is True
    for name in ("server", "client"):
        said = (tmp_path / name / "errors").read_text()
        for file in ("metrics.jsonl", "summary.json", "trace.json"):
            line = f"WARNING run/{file} cannot be written (No space left on device) and is not complete; the run itself"
            assert said.count(line) == 1, said


def test_a_demonstration_with_little_to_hide_says_so() -> None:
    said = demo.little_to_hide({"rounds": 10, "compute_s": 120.0, "exposed_comm_s": 14.0})
    assert said is not None
    assert said.startswith("Computing took 12.0 s per round and communication 1.4 s: there was little to hide")
    assert demo.little_to_hide({"rounds": 10, "compute_s": 20.0, "exposed_comm_s": 14.0}) is None
    assert demo.little_to_hide({"rounds": 0, "compute_s": 0.0, "exposed_comm_s": 0.0}) is None


def test_saving_a_model_draws_no_bar_and_names_where_there_is_no_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net, tokenizer = models.load("tiny")
    cli.run._save(net, tokenizer, tmp_path)
    assert "Writing" not in capfd.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(ParaBlockError, match=rf"the result cannot be saved to {tmp_path}/file/model: "):
        cli.run._save(net, tokenizer, tmp_path / "file")


# ---- Questions about shapes


def test_a_plan_takes_no_weights_and_measures_a_step_without_a_tokenizer(main: Main, tmp_path: Path) -> None:
    own_model(tmp_path / "checkpoint")
    for file in (tmp_path / "checkpoint").glob("tokenizer*"):
        file.unlink()
    flags = ("plan", "--model", "checkpoint", "--rate", "8mbit", "--seq-len", 16, "--json")
    measured = main(*flags)
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["step_s"] > 0
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    told = main(*flags, "--step-time", "0.5")
    assert told.code == 0, told.err
    assert json.loads(told.out)["memory"] == json.loads(measured.out)["memory"]
    assert "expected a complete Hugging Face causal language model" in main(*flags).err


def test_the_doctor_cuts_and_measures_the_model_as_it_is_told(main: Main) -> None:
    def heaviest(*flags: object) -> str:
        common = ("doctor", "--peer", running.address, "--model", "tiny", "--step-time", "1e-9", "--json")
        result = main(*common, *flags)
        assert result.code == 0, result.err
        (name,) = re.findall(r": (\S+) needs ", json.loads(result.out)["overlap"])
        return str(name)

    with start_server() as running:
        assert heaviest() == "model.layers.0"
        assert heaviest("--blocks", 1) == "block.0"
        assert heaviest("--outer", "train", "--dtype", "bf16", "--seq-len", 8, "--batch-size", 2) == "model.layers.0"
