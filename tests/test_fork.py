"""A process that is forked in the middle of a run, as data loaders are: it has everything but the threads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import loss_fn, make_batches, make_model, sgd, start_server
from transport_cases import T, expect

import parablock_rt as pb
from parablock_rt import _C

TESTS = Path(__file__).parent

FORKS = """
import os, sys
import parablock_rt as pb
from processes import loss_fn, make_batches, make_model, sgd, start_server

with start_server(rounds=6, clients=1, local_steps=1) as server, pb.join(server.address, make_model(), sgd) as run:
    for batch in run.stream(make_batches(0)):
        if run.train_step(batch, loss_fn).round == 2 and (child := os.fork()) == 0:
            {ends}
    assert os.waitpid(child, 0)[1] == 0
    assert run.digest == server.wait(60).digest
print("done")
"""


@pytest.mark.parametrize("ends", ["sys.exit()", "run.close(); server.close(); sys.exit()"], ids=["exit", "close"])
def test_a_forked_process_ends_by_itself_and_the_run_goes_on(ends: str) -> None:
    program = [sys.executable, "-c", FORKS.format(ends=ends)]
    done = subprocess.run(program, cwd=TESTS, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_a_connection_that_ends_is_over_though_a_forked_process_lives_on(which: str) -> None:
    """The other side sees the end, and nobody waits for events of it any more."""
    here, there = _C.Transport(), _C.Transport()
    link = there.connect("127.0.0.1", here.listen("127.0.0.1", 0), 10.0)
    (accepted,) = expect(here, T.CONNECTED)
    there.send_control(link, b"both loops watch the connection now")
    expect(here, T.CONTROL)
    before = watched()
    with forked():
        if which == "ours":
            here.close_link(accepted.link, "over", 0.0)
        else:
            there.close_link(link, "over", 0.0)
        expect(here, T.CLOSED)
        expect(there, T.CLOSED)
        assert watched() == before - 2
        here.close(0.0)
        there.close(0.0)
        assert watched() == before - 3, "the listener, too"


def test_a_forked_process_holds_nothing_of_a_transport_nor_another_file_in_its_place() -> None:
    before = descriptors("self")
    here, there = _C.Transport(), _C.Transport()
    there.connect("127.0.0.1", here.listen("127.0.0.1", 0), 10.0)
    expect(here, T.CONNECTED)
    ours = descriptors("self").keys() - before.keys()
    with forked() as child:
        theirs = descriptors(child)
        assert len(ours) >= 9, "a listener, both ends, and for each loop an epoll, a timer and an eventfd"
        assert {theirs.get(number) for number in ours} == {os.devnull}
    here.close(0.0)
    there.close(0.0)


def test_a_closed_descriptor_s_number_belongs_to_whoever_opens_the_next_file(tmp_path: Path) -> None:
    first = _C.Descriptor(os.open(tmp_path, os.O_RDONLY))
    number = first.fileno()
    first.close()
    with (tmp_path / "next").open("w") as file, forked() as child:
        assert (file.fileno(), first.fileno()) == (number, -1)
        assert descriptors(child)[number] == file.name


def test_a_killed_server_is_resumed_at_its_port_though_a_process_that_it_forked_lives_on(tmp_path: Path) -> None:
    program = [sys.executable, "-c", DIES, str(tmp_path)]
    with subprocess.Popen(program, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout
        address, child = dying.stdout.readline().split()
        assert dying.wait(60) == -signal.SIGKILL
        assert Path(f"/proc/{child}").exists()
        with start_server(address=address, resume=tmp_path) as server:
            with pb.join(address, make_model(), sgd) as run:
                for batch in run.stream(make_batches(0)):
                    run.train_step(batch, loss_fn)
            assert run.digest == server.wait(60).digest
        assert Path(f"/proc/{child}").exists()


DIES = """
import os, signal, sys
from processes import start_server

server = start_server(rounds=1, clients=1, durable=sys.argv[1])
parent = os.getpid()
if os.fork() == 0:
    print(server.address, os.getpid(), flush=True)
    os.kill(parent, signal.SIGKILL)
    sys.stdin.read()  # as long as the test goes on
    os._exit(0)
signal.pause()
"""


@contextlib.contextmanager
def forked() -> Iterator[int]:
    """The process id of a forked process, which is past the fork and lives until the context ends."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.send(b"!")
        theirs.recv(1)  # until the other end is closed
        os._exit(0)
    theirs.close()
    with ours:
        ours.recv(1)
        yield child
    os.waitpid(child, 0)


def descriptors(process: int | str) -> dict[int, str]:
    """The files behind a process's descriptors, by number."""
    found = {}
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[int(entry.name)] = os.readlink(entry)
    return found


def watched() -> int:
    """Descriptors that epoll watches in this process."""
    epolls = [number for number, file in descriptors("self").items() if file == "anon_inode:[eventpoll]"]
    return sum(Path(f"/proc/self/fdinfo/{number}").read_text().count("tfd:") for number in epolls)
