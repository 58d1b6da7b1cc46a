"""Runs `kernel_cases_interpreted` in a process of its own, in which triton interprets kernels on the CPU.

The compile tests of the same pytest run need a triton that compiles, hence the second process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "kernel_cases_interpreted.py"


def test_every_kernel_gives_the_codecs_bytes_in_the_interpreter() -> None:
    # The interpreter of 3.2 stores 8 bytes where the type that it names has 4.
    pytest.importorskip("triton", minversion="3.3", reason="triton 3.3 or newer is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
