"""The native threads: each has its name, and signals are none of their business."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from pathlib import Path

import torch
from fake_device import FakeDevice
from leftovers import threads
from test_staging import random_piece

from parablock_rt import codec
from parablock_rt.staging.stager import Stager
from parablock_rt.wire.transport import Transport

SPLIT = 1 << 17  # elements, of which several threads take a part each
BLOCKABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def native_threads() -> list[tuple[str, set[int]]]:
    """The name of every native thread of ours in this process, and the signals that it does not block."""
    found = []
    for thread in threads("pb-") - {str(thread.native_id) for thread in threading.enumerate()}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another test's, which ends meanwhile
            status = Path(f"/proc/self/task/{thread}/status").read_text()
            name, blocked = (re.search(rf"^{key}:\s*(\S+)$", status, re.MULTILINE) for key in ("Name", "SigBlk"))
            assert name is not None
            assert blocked is not None
            mask = int(blocked[1], 16)
            found.append((name[1], {number for number in BLOCKABLE if not mask >> (number - 1) & 1}))
    return found


def test_every_native_thread_has_its_name_and_leaves_all_signals_to_the_program() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    piece = random_piece(SPLIT, torch.float32, torch.float32, 0)
    with Transport() as transport, contextlib.closing(FakeDevice()):
        stager = Stager()
        encoding = stager.encode([piece], "int8", SPLIT, transport)
        codec.encode(piece.now, piece.ref, threads=3)
        found = native_threads()
        stager.release(encoding)
    assert {name for name, _ in found} == {"pb-transport", "pb-encode", "pb-device", "pb-codec"}
    assert [(name, let_in) for name, let_in in found if let_in] == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
