"""A GPU for machines without one: `fake_cuda.cc`, built once, and a device whose kernels run on its streams' threads.

Staging sees what it sees on a real device: every operation happens later than it was queued, in the order of its
stream, and it is the marks alone that keep two streams apart. Device memory is host memory, so a test can look at it.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from parablock_rt import _C, codec

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GARBAGE = 0xA5


@functools.cache
def driver_file() -> str:
    """The path of the built library."""
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    path = folder / "libfakecuda.so"
    source = Path(__file__).with_name("fake_cuda.cc")
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o", path, source], check=True)
    return str(path)


@functools.cache
def control() -> ctypes.CDLL:
    """The library's own functions: `fake_delay`, `fake_fail` and the like."""
    fake = ctypes.CDLL(driver_file())
    numbers = ("calls", "violations", "unpinned_copies", "largest_copy", "pinned_bytes", "allocations")
    for name in numbers:
        getattr(fake, f"fake_{name}").restype = ctypes.c_int64
    fake.fake_delay.argtypes = [ctypes.c_int64, ctypes.c_uint]
    fake.fake_kernel.argtypes = [ctypes.c_void_p, _KERNEL, ctypes.c_void_p]
    for name in ("cuCtxSetCurrent", "cuStreamSynchronize", "cuStreamDestroy_v2", "fake_priority"):
        getattr(fake, name).argtypes = [ctypes.c_void_p]
    return fake


def calls(function: str) -> int:
    """How often the driver's `function` was called since the last reset."""
    return int(control().fake_calls(function.encode()))


def fail(function: str, code: int, after: int = 0) -> None:
    """Every call of the driver's `function` fails with `code`, after `after` that do not."""
    control().fake_fail(function.encode(), after, code)


class Stream:
    """A stream of the test's own, to train on."""

    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        assert control().cuStreamCreateWithPriority(ctypes.byref(handle), 1, 0) == 0
        assert handle.value is not None
        self.handle = handle.value

    def close(self) -> None:
        control().cuStreamDestroy_v2(self.handle)

    def synchronise(self) -> None:
        control().cuStreamSynchronize(self.handle)


class FakeDevice:
    """In the place of `parablock_rt.staging.device.CudaDevice`. Trains on the host (stream 0) unless told otherwise."""

    type = "cpu"

    def __init__(self, copy_bytes: int = 1 << 12) -> None:
        control().cuCtxSetCurrent(1)
        self.driver = _C.Driver(driver_file())
        self.native = _C.Device(self.driver, copy_bytes)
        self.training = 0
        self.launches = 0
        self._kernels: list[object] = []  # what ctypes calls must not go before it has run

    def training_stream(self) -> int:
        return self.training

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        memory = torch.empty(numel, dtype=dtype)
        memory.view(torch.uint8).fill_(GARBAGE)
        return memory

    def launch(self, stream: int, work: Callable[[], object]) -> None:
        """Queues Python code as a kernel."""

        def run(_: object) -> None:
            work()

        kernel = _KERNEL(run)
        self._kernels.append(kernel)
        control().fake_kernel(stream, kernel, None)

    def encode(
        self,
        now: Tensor,
        ref: Tensor,
        residual: Tensor | None,
        residual_out: Tensor | None,
        out: Tensor,
        bad: Tensor | None,
        format: str,
    ) -> Tensor:
        count = torch.zeros(1, dtype=torch.int64) if bad is None else bad

        def work() -> None:
            packed = codec.encode(now, ref, residual, format=format, residual_out=residual_out, out=out, threads=1)
            count.add_(packed.bad_groups)

        self.launches += 1
        self.launch(self.native.pack, work)
        return count

    def close(self) -> None:
        self.native.close()
