"""A process that is forked in the middle of a run, as data loaders are: it has everything but the threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transport_cases import T, expect

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
def test_a_connection_that_ends_is_over_though_a_forked_process_has_it_still(which: str) -> None:
    """The other side sees the end, and nobody waits for events of it any more."""
    here, there = _C.Transport(), _C.Transport()
    link = there.connect("127.0.0.1", here.listen("127.0.0.1", 0), 10.0)
    (accepted,) = expect(here, T.CONNECTED)
    there.send_control(link, b"both loops watch the connection now")
    expect(here, T.CONTROL)
    before = watched()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the other end is closed
        os._exit(0)
    try:
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
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


def watched() -> int:
    """Descriptors that epoll watches in this process."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.readlink(entry) == "anon_inode:[eventpoll]":
            count += Path(f"/proc/self/fdinfo/{entry.name}").read_text().count("tfd:")
    return count
