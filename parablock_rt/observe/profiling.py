"""Ranges for an attached profiler; no cost without one.

`torch.profiler` shows them as annotations; NVIDIA's tools show NVTX ranges if torch was built with CUDA, even without a
GPU. Only Python's threads have ranges: the native threads do not link CUDA.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

CLOCK_MARK = "parablock.clock "
"""Prefix of a range's name, followed by the monotonic clock in nanoseconds; trace_merge.py aligns profiles by it."""

# A tool that wants NVTX ranges sets one of these in the process that it starts.
_NVTX_VARIABLES = ("NVTX_INJECTION64_PATH", "NVTX_INJECTION32_PATH")

_nothing = nullcontext()


def annotation(name: str) -> AbstractContextManager[Any]:
    """A context manager that shows its body as a range of this name in the attached profiler, if any."""
    if _torch_attached():
        return torch.profiler.record_function(name)
    if _nvtx_attached():
        return torch.cuda.nvtx.range(name)
    return _nothing


def mark_clock() -> None:
    """Writes a clock mark into the profile of an attached `torch.profiler`, to align it with the timeline later."""
    if _torch_attached():
        with torch.profiler.record_function(f"{CLOCK_MARK}{time.monotonic_ns()}"):
            pass


def _torch_attached() -> bool:
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # on this thread; takes nanoseconds


def _nvtx_attached() -> bool:
    return torch.version.cuda is not None and any(name in os.environ for name in _NVTX_VARIABLES)
