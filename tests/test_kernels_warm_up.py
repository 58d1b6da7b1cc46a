"""What `warm_up` has had compiled is all that a run needs, so that no round waits for a compiler.

Seen without a GPU: triton's own binder decides what is a compilation of its own, and a hook ends the call where it
would compile. Nothing is launched, so bodies hold arbitrary bytes here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, control
from test_staging import DEADLINE_S
from torch import nn

import parablock_rt as pb
from parablock_rt import codec
from parablock_rt.client.replica import Handover, Replica
from parablock_rt.staging.device import CudaDevice
from parablock_rt.staging.device_stager import DeviceStager, kinds_of
from parablock_rt.staging.pinned import PinnedMemory
from parablock_rt.wire.transport import Transport

triton = pytest.importorskip("triton", minversion="3.3", reason="triton 3.3 or newer is not installed")

# These need it themselves, so they stand behind it.
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from parablock_rt import kernels  # noqa: E402

CHUNK, SLICE, ROUNDS = 512, 1024, 8
NOT_A_DEVICE = 1000  # triton keeps a binder for each number; that of a real GPU stays as it is

Asked = set[tuple[str, str]]  # a kernel and what triton tells its compilations apart by


class Driver:
    """As much of triton's driver as it takes to bind arguments."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return NOT_A_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0


class BindingDevice(FakeDevice):
    """Its kernels are those of a CudaDevice, which go as far as the binder."""

    device = torch.device("cpu")
    _pack = None
    _warm = False
    encode = CudaDevice.encode
    warm_up = CudaDevice.warm_up
    close = CudaDevice.close


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Every compilation that triton asks for, of kernels that take tensors in host memory."""
    if kernels.common.INTERPRETED:
        pytest.skip("this process runs the interpreter, which compiles nothing")
    found: Asked = set()

    def note(*, key: object, fn: Any, **_: object) -> bool:
        found.add((fn.name, str(key)))
        return True  # do not compile

    if hasattr(triton, "knobs"):
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    else:  # triton 3.3
        monkeypatch.setattr(triton.runtime.jit.JITFunction, "cache_hook", staticmethod(note))
    monkeypatch.setattr(kernels.common, "check_memory", lambda tensor, name: None)
    monkeypatch.setattr(codec, "_gpu_codec", lambda tensor: kernels)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    before = dict(vars(driver))  # triton's own way back asks for a GPU
    driver.set_active(Driver())
    yield found
    vars(driver).update(before)


def model_of(dtype: torch.dtype | None) -> nn.Module:
    """Two layers whose blocks end in short slices; None: of more than one dtype each."""
    layers = [nn.Linear(64, 64), nn.Linear(24, 40)]
    for layer in layers:
        layer.to(torch.bfloat16 if dtype is None else dtype)
        if dtype is None:
            layer.bias.data = layer.bias.data.float()
    return nn.Sequential(*layers)


def run_rounds(stager: DeviceStager, replica: Replica, format: str) -> None:
    """Rounds as a client has them: a block is handed over, the server accepts, its aggregate is applied."""
    with Transport() as transport:
        for round in range(ROUNDS):
            block = replica.blocks[round % len(replica.blocks)].block
            ref = replica.snapshot_start(round % len(replica.blocks))
            master = torch.zeros(block.flat_numel)
            now = [master[s.start : s.start + s.length] for s in block.segments] if block.needs_master else ref
            pieces, residual = replica.pieces(round % len(replica.blocks), now, ref)
            encoding = stager.encode(pieces, format, CHUNK, transport)
            handover = Handover(round, round % len(replica.blocks), encoding, residual)
            replica.hand_over(handover, ref, finite=True, others_pending=False)
            replica.verdict(round, handover.block, accepted=True)
            landing = stager.landing(block.flat_numel, format, CHUNK)
            replica.apply(round, handover.block, landing._body, 0)
            landing.cancel()
            stager.release_landing(landing)
            stager.release(encoding)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=["fp32", "bf16", "fp16", "mixed"]
)
@pytest.mark.parametrize("format", codec.FORMATS)
def test_after_the_warm_up_no_round_compiles_anything(format: str, dtype: torch.dtype | None, asked: Asked) -> None:
    control().fake_reset()
    model = model_of(dtype)
    blocks = pb.BlockPlan.from_model(model, ["0", "1"]).materialise(model)
    device = BindingDevice()
    stager = DeviceStager(device, PinnedMemory(device.driver, 1 << 22), slice_elements=SLICE)
    try:
        device.warm_up(kinds_of(blocks), format)
        warm = set(asked)
        assert warm
        run_rounds(stager, Replica(blocks, format, "own", stager.residual), format)
        assert asked - warm == set()
    finally:
        stager.close()


def test_no_hand_over_makes_counters_and_none_are_left_of_a_device_that_is_closed(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    control().fake_reset()
    device = BindingDevice()
    monkeypatch.setattr(device, "_pack", device.native.pack, raising=False)
    streams = [0]  # the current one is the last

    @contextmanager
    def current(stream: int) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(kernels.common, "stream_of", lambda device: streams[-1])
    monkeypatch.setattr(kernels.common, "_pools", {})
    device.warm_up({(torch.float32, torch.float32)}, "int8")
    assert asked
    pool = kernels.common._pools[device.device, device.native.pack]
    before = len(pool)
    weights, body = torch.zeros(1024), kernels.empty_body(1024, format="int8", device="cpu")
    device.encode(weights, weights, None, torch.zeros(1024), body, None, "int8")
    assert len(pool) == before - 1
    device.close()
    assert [stream for _, stream in kernels.common._pools] == [0]  # the training's stays


def test_counters_can_be_dropped_while_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the garbage that is collected meanwhile has a device in it."""
    common, gone = kernels.common, 77
    monkeypatch.setattr(common, "_pools", {(torch.device("cpu"), gone): []})
    zeros = torch.zeros

    def collecting(*arguments: Any, **more: Any) -> torch.Tensor:
        common.drop_counters(gone)
        return zeros(*arguments, **more)

    monkeypatch.setattr(torch, "zeros", collecting)
    thread = threading.Thread(target=common.make_counters, args=(torch.device("cpu"),), daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert [stream for _, stream in common._pools] == [0]


def test_an_argument_of_another_alignment_is_seen_to_ask_for_a_compilation(asked: Asked) -> None:
    now, counts = torch.zeros(1024), torch.zeros(2, dtype=torch.int64)
    kernels.encode(now, now, format="int8", bad=counts[:1])
    before = len(asked)
    kernels.encode(now, now, format="int8", bad=counts[:1])
    assert len(asked) == before
    kernels.encode(now, now, format="int8", bad=counts[1:])
    assert len(asked) == before + 1


def test_every_counter_is_as_aligned_as_the_first() -> None:
    counters = [kernels.common.zero_counter(torch.device("cpu")) for _ in range(600)]
    assert {counter.data_ptr() % 16 for counter in counters} == {0}
    assert len({counter.data_ptr() for counter in counters}) == len(counters)
