"""Flower as its users run it: a SuperLink, a SuperNode, a ServerApp and a ClientApp, each a process, on loopback.

Runs in an environment of its own; stdlib only. The time is that of `grid.send_and_receive`, which asks for replies
every three seconds. Memory of a side is that of its two processes together.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import MIB, arguments, report

HERE = Path(__file__).resolve().parent
PROGRAMS = Path(sys.executable).parent
DEADLINE_S = 400.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(holds: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> None:
    """Returns when it does."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.05)


@contextlib.contextmanager
def running(folder: Path, environment: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Flower process with all that it starts, in a session of its own; its output goes to a file."""
    log = folder / f"{command[0]}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PROGRAMS / command[0], *command[1:]],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)


def end_all(folder: Path) -> None:
    """Ends whatever is left: Flower starts its apps apart from itself. Ours are those whose home is `folder`."""
    mark = f"FLWR_HOME={folder}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def measure(folder: Path, nbytes: int, legs: int) -> None:
    """Starts everything, runs the app once and reports."""
    link, node, result = free_port(), free_port(), folder / "result.json"
    connection = f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (folder / "config.toml").write_text(connection)
    environment = dict(os.environ) | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
    }
    host = ["--insecure", "--host", "127.0.0.1"]
    superlink = ["flower-superlink", *host, "--port", str(link), "--disable-runtime-dependency-installation"]
    supernode = ["flower-supernode", *host, "--port", str(node), "--superlink", f"127.0.0.1:{link}"]
    with running(folder, environment, *superlink) as server:
        wait_for(lambda: is_open(link), "the SuperLink's start", 60.0)
        with running(folder, environment, *supernode) as client:
            wait_for(lambda: is_open(node), "the SuperNode's start", 60.0)
            settings = f"nbytes={nbytes} legs={legs} superlink={server.pid} supernode={client.pid}"
            settings += f" helpers='{HERE}' result='{result}'"
            command = [PROGRAMS / "flwr", "run", HERE / "flower_app", "bench", "-c", settings]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            wait_for(result.exists, "the ServerApp's end")
    found = json.loads(result.read_text())
    report(found["seconds"], found["moved"], found["server_bytes"], found["client_bytes"])


def main() -> None:
    options = arguments().parse_args()
    with tempfile.TemporaryDirectory(prefix="flower-") as folder:
        try:
            measure(Path(folder), options.mib * MIB, options.legs)
        except Exception:
            for log in Path(folder).glob("*.log"):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
            raise
        finally:
            end_all(Path(folder))


if __name__ == "__main__":
    main()
