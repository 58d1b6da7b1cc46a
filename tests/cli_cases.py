"""The command line in this process and in processes of its own, for the tests of its commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import WAIT_S, Process, command, starter

from parablock_rt import cli
from parablock_rt.wire import handshake

Start = Callable[..., Process]
Main = Callable[..., "Result"]


@dataclass
class Result:
    code: int
    out: str
    err: str


def make_main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Main:
    """Calls the program in this process, in an empty folder."""

    def call(*arguments: object) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv(handshake.TOKEN_VARIABLE, raising=False)
        monkeypatch.setattr(sys, "argv", ["parablock", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capfd.readouterr()
        return Result(int(end.value.code or 0), printed.out, printed.err)

    return call


def make_start() -> Iterator[Start]:
    with starter() as start:
        yield start


def read(path: Path) -> Any:
    """A JSON file, by a reader that takes no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} has {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def wait_for(what: Callable[[], Any], process: Callable[[float], None]) -> Any:
    """What `what` returns once that is something. `process` waits a little, and raises when there is no use in it."""
    deadline = time.monotonic() + 2 * WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come in time"
        process(0.05)
    return found


def serve(start: Start, folder: Path, *arguments: object, die: tuple[str, int] | None = None) -> tuple[Process, str]:
    """`parablock serve` on a free port, and its address. `die`: as for a server process."""
    folder.mkdir()
    flags = ["--model", "tiny", "--address", "127.0.0.1:0", "--run-dir", "run"]
    process = start(command, ["serve", *flags, *map(str, arguments)], str(folder), die)

    def address() -> str | None:
        said = (folder / "errors").read_text() if (folder / "errors").exists() else ""
        line = next((line for line in said.splitlines(keepends=True) if line.startswith("Listening on ")), "")
        return line.split()[2] if line.endswith("\n") else None

    return process, wait_for(address, process.pause)


def join(start: Start, folder: Path, address: str, *arguments: object) -> Process:
    folder.mkdir()
    flags = ["--model", "tiny", "--run-dir", "run"]
    return start(command, ["join", address, *flags, *map(str, arguments)], str(folder))
