"""The GPU's driver where it is missing or too old, and memory that is pinned for its copies."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_device
import pytest
import torch
from fake_device import FakeDevice, control
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_staging import CHUNK, MEMORY, NUMEL, SLICE, Staged
from test_staging import statement

from parablock_rt import _C, codec
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError
from parablock_rt.staging import pinned
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.pinned import PinnedMemory
from parablock_rt.wire.transport import Transport, as_tensor


@pytest.fixture(scope="module")
def transport() -> Iterator[Transport]:
    with Transport() as made:
        yield made


# ---- The driver


def test_a_machine_without_a_driver_says_so() -> None:
    with pytest.raises(_C.DeviceError, match=r"expected the CUDA driver, found none .*no-such-driver.*on the CPU"):
        _C.Driver("no-such-driver.so")


def test_a_driver_that_is_too_old_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    source = tmp_path / "old.cc"
    names = ["DriverGetVersion", "GetErrorName", "GetErrorString", "CtxGetCurrent", "CtxSetCurrent"]
    source.write_text("".join(f'extern "C" int cu{name}() {{ return 0; }}\n' for name in names))
    library = tmp_path / "libold.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(
        _C.DeviceError, match=r"11\.0 or newer, found that .*libold\.so has no cuCtxGetStreamPriorityRange; update"
    ):
        _C.Driver(str(library))


def test_a_device_without_a_context_is_refused() -> None:
    control().fake_reset()
    control().cuCtxSetCurrent(None)
    with pytest.raises(_C.DeviceError, match="expected a CUDA context, found none"):
        _C.Device(_C.Driver(fake_device.driver_file()), 1)


# ---- Pinned memory


def _driver() -> _C.Driver:
    control().fake_reset()
    control().cuCtxSetCurrent(1)
    return _C.Driver(fake_device.driver_file())


def test_refused_pinning_falls_back_to_ordinary_memory_with_one_warning(
    caplog: pytest.LogCaptureFixture, transport: Transport
) -> None:
    control().fake_reset()
    fake_device.fail("cuMemHostRegister_v2", 2)
    with caplog.at_level(logging.WARNING, logger="parablock"):
        here = Staged.__new__(Staged)
        here.device = FakeDevice(700)
        here.memory = PinnedMemory(here.device.driver, MEMORY)
        here.stager = DeviceStager(here.device, here.memory, slice_elements=SLICE)
        with here:
            piece = here.piece(NUMEL, 0)
            body, _, _ = statement([piece], "int8")
            encoding = here.stager.encode([piece], "int8", CHUNK, transport)
            encoding.wait()
            assert torch.equal(encoding.body, body)
    assert here.memory.nbytes == 0
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "expected to pin 4.0 MiB" in text
    assert "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in text
    fake_device.fail("", 0)


def test_the_cap_holds_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    before = control().fake_pinned_bytes()
    with caplog.at_level(logging.WARNING, logger="parablock"):
        memory = PinnedMemory(_driver(), 1 << 20, cap=1 << 16)
        assert (memory.nbytes, control().fake_pinned_bytes() - before) == (1 << 16, 1 << 16)
        buffers = [memory.take(1 << 15) for _ in range(4)]
        assert memory.used == 1 << 16
        assert all(as_tensor(buffer, 1 << 15).fill_(1).sum() == 1 << 15 for buffer in buffers)
    assert [record.getMessage()[:39] for record in caplog.records] == ["pinning 0.1 MiB of host memory instead "]
    assert PinnedMemory(_driver(), 1 << 20, cap=0).nbytes == 0
    with pytest.raises(ConfigError, match="0 bytes or more, found -1"):
        PinnedMemory(_driver(), 1, cap=-1)


def test_a_slab_that_is_full_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="parablock"):
        memory = PinnedMemory(_driver(), 1 << 13)
        kept = [memory.take(1 << 12) for _ in range(4)]
    assert len(kept) == 4
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "the 0.0 MiB of pinned memory have no room for 0.0 MiB more"
    ]


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 30_000)), st.tuples(st.just("give back"), st.integers(0, 30))
        ),
        max_size=60,
    )
)
def test_a_slab_cuts_pieces_that_never_overlap_and_is_whole_again_in_the_end(steps: list[tuple[str, int]]) -> None:
    before = control().fake_pinned_bytes()
    slab = _C.Slab(_driver(), 1 << 17)
    held: list[_C.Buffer] = []
    for step, value in steps:
        if step == "take":
            buffer = slab.take(value)
            if buffer is not None:
                assert buffer.address % 4096 == 0
                assert all(
                    buffer.address + buffer.nbytes <= other.address or other.address + other.nbytes <= buffer.address
                    for other in held
                )
                held.append(buffer)
        elif held:
            held.pop(value % len(held))
        buffer = None
        assert slab.used == sum(-(-piece.nbytes // 4096) * 4096 for piece in held)
    held.clear()
    assert slab.used == 0
    whole = slab.take(1 << 17)
    assert whole is not None
    assert slab.take(1) is None
    del whole, slab
    assert control().fake_pinned_bytes() == before


def test_buffers_outlive_the_slab_they_were_cut_from() -> None:
    before = control().fake_pinned_bytes()
    slab = _C.Slab(_driver(), 1 << 14)
    buffer = slab.take(100)
    assert buffer is not None
    del slab
    assert as_tensor(buffer, 100).fill_(3).sum() == 300
    assert control().fake_pinned_bytes() == before + (1 << 14)
    del buffer
    gc.collect()
    assert control().fake_pinned_bytes() == before


FORK = """
import os, sys
from parablock_rt import _C
from fake_device import control, driver_file

control().cuCtxSetCurrent(1)
slab = _C.Slab(_C.Driver(driver_file()), 1 << 22)
buffer = slab.take(1 << 20)
memoryview(buffer)[:4] = b"here"

def is_mapped(address):
    ranges = [line.split()[0].split("-") for line in open("/proc/self/smaps") if "-" in line.split()[0]]
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)

assert is_mapped(buffer.address)
child = os.fork()
if child == 0:
    os._exit(2 if is_mapped(buffer.address) else 0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bytes(memoryview(buffer)[:4]))
"""


def test_a_child_that_is_forked_does_not_have_pinned_memory() -> None:
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "b'here'"]


def test_what_a_run_pins_is_what_it_is_said_to_need(transport: Transport) -> None:
    """All residuals, two more under way, and the bodies of four uploads and four landings at staleness 1."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    blocks = BlockPlan.from_model(model, [["0"], ["1"], ["2"]]).blocks
    needed = pinned.bytes_needed(blocks, "int8", 1)
    numel = blocks[0].flat_numel
    with Staged() as here:
        memory = PinnedMemory(here.device.driver, needed)
        stager = DeviceStager(here.device, memory)
        stager.fit(codec.body_bytes(numel, "int8"))
        kept = [stager.residual(numel) for _ in range(len(blocks) + 2)]
        landings = [stager.landing(128, "int8", CHUNK) for _ in range(4)]
        bodies = [stager.buffers.take(pinned.buffer_bytes(codec.body_bytes(numel, "int8"))) for _ in range(4)]
        assert memory.used == memory.nbytes == needed
        del kept, landings, bodies
    assert pinned.bytes_needed(blocks, "fp32", 0) < needed
