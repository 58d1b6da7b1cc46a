"""Ranges for a profiler that somebody attached, and nothing at all when nobody did.

`torch.profiler` sees them as annotations; NVIDIA's tools see NVTX ranges where torch was built with CUDA, a GPU or not.
Python's threads only: the native threads link no CUDA.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

CLOCK_MARK = "parablock.clock "
"""Followed by the nanoseconds of the monotonic clock at that moment; by it trace_merge.py finds a profile's clock."""

# How a tool that wants NVTX ranges announces itself to the process that it starts.
_NVTX_VARIABLES = ("NVTX_INJECTION64_PATH", "NVTX_INJECTION32_PATH")

_nothing = nullcontext()


def annotation(name: str) -> AbstractContextManager[Any]:
    """A range of that name, around the body of a `with` statement, in whatever profiler is attached."""
    if _torch_attached():
        return torch.profiler.record_function(name)
    if _nvtx_attached():
        return torch.cuda.nvtx.range(name)
    return _nothing


def mark_clock() -> None:
    """Lets a profile of `torch.profiler` be put on the timeline's clock afterwards."""
    if _torch_attached():
        with torch.profiler.record_function(f"{CLOCK_MARK}{time.monotonic_ns()}"):
            pass


def _torch_attached() -> bool:
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # of this thread; costs nanoseconds


def _nvtx_attached() -> bool:
    return torch.version.cuda is not None and any(name in os.environ for name in _NVTX_VARIABLES)
