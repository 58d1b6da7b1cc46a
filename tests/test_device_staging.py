"""Staging of blocks on a GPU, on a fake driver whose streams run late: what is sent, what arrives, what is refused."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_device
import numpy as np
import pytest
import torch
from fake_device import FakeDevice, Stream, control
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import settles, threads
from test_staging import DEADLINE_S, DTYPES, random_piece, statement

from parablock_rt import _C, codec
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.client import memory
from parablock_rt.config import RunConfig
from parablock_rt.errors import CodecError, ParaBlockError
from parablock_rt.observe.timeline import RECORD, Stage
from parablock_rt.staging import device_stager
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.pinned import PinnedMemory
from parablock_rt.staging.stager import Piece
from parablock_rt.wire.transport import Transport, as_tensor, body_layout

NUMEL, CHUNK, SLICE = 128 * 40, 512, 1024
MEMORY = 1 << 22


class Staged:
    """A fake device with its stager, and a check at the end that nothing forbidden was done."""

    def __init__(
        self,
        *,
        delay_us: int = 0,
        seed: int = 0,
        copy_bytes: int = 700,
        slice_elements: int = SLICE,
        ring: _C.Ring | None = None,
    ) -> None:
        control().fake_reset()
        control().fake_delay(delay_us, seed)
        self.device = FakeDevice(copy_bytes)
        self.memory = PinnedMemory(self.device.driver, MEMORY)
        self.stager = DeviceStager(self.device, self.memory, slice_elements=slice_elements, ring=ring)

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stager.close()
        assert control().fake_violations() == 0
        assert control().fake_unpinned_copies() == 0 or self.memory.nbytes == 0

    def piece(self, numel: int, seed: int, now: torch.dtype = torch.float32, ref: torch.dtype = torch.float32) -> Piece:
        """A piece whose residuals are in pinned memory."""
        made = random_piece(numel, now, ref, seed)
        old, new = self.stager.residual(numel), self.stager.residual(numel)
        assert made.residual is not None
        old.copy_(made.residual)
        new.fill_(7.0)
        return Piece(made.now, made.ref, old, new)


@contextlib.contextmanager
def nothing_packed(device: FakeDevice) -> Iterator[None]:
    """Whatever is handed to the stream that packs waits for the end of the context."""
    gate = threading.Event()
    device.launch(device.native.pack, lambda: gate.wait(DEADLINE_S))
    try:
        yield
    finally:
        gate.set()


@pytest.fixture
def staged() -> Iterator[Staged]:
    with Staged(delay_us=300) as made:
        yield made


@pytest.fixture(scope="module")
def transport() -> Iterator[Transport]:
    with Transport() as made:
        yield made


# ---- What is packed


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    dtypes=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), min_size=4, max_size=4),
    format=st.sampled_from(codec.FORMATS),
    chunk=st.integers(1, 6),
    slices=st.integers(1, 8),
    copy_bytes=st.integers(1, 3000),
    seed=st.integers(0, 1000),
)
def test_a_block_packed_in_slices_has_the_bytes_residuals_and_count_of_the_codec(
    transport: Transport,
    sizes: list[int],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    format: str,
    chunk: int,
    slices: int,
    copy_bytes: int,
    seed: int,
) -> None:
    with Staged(delay_us=50, seed=seed, copy_bytes=copy_bytes, slice_elements=128 * slices) as here:
        pieces = [
            here.piece(128 * size, seed + i, *dtypes[i])
            if i % 3 != 2 and format != "fp32"
            else random_piece(128 * size, *dtypes[i], seed + i, residual=False)
            for i, size in enumerate(sizes)
        ]
        pieces[0].now[5] = float("nan")
        body, residuals, bad = statement(pieces, format)
        encoding = here.stager.encode(pieces, format, 128 * chunk, transport)
        encoding.wait()
        assert torch.equal(encoding.body, body)
        assert encoding.bad_groups == bad == 1
        assert encoding.source.ready_chunks == body_layout(format, 128 * sum(sizes), 128 * chunk).chunks
        for piece, residual in zip(pieces, residuals, strict=True):
            if piece.residual_out is not None:
                assert residual is not None
                assert torch.equal(piece.residual_out.view(torch.int32), residual.view(torch.int32))
        started, finished = encoding.span_ns
        assert 0 < started <= finished


def test_a_chunk_is_sent_only_when_it_is_on_the_host(staged: Staged, transport: Transport) -> None:
    # The session is asked for frames all the while; each must already have its final bytes.
    piece = staged.piece(NUMEL, 3)
    body, _, _ = statement([piece], "int8")
    layout = body_layout("int8", NUMEL, CHUNK)
    sender, receiver, target = _C.Session(), _C.Session(), _C.Buffer(layout.nbytes)
    receiver.receive(1, 0, 0, target, layout)
    sender.feed(receiver.next_frame() or b"")
    with nothing_packed(staged.device):
        encoding = staged.stager.encode([piece], "int8", CHUNK, transport)
        sender.send(1, 0, 0, encoding.source)
        assert encoding.source.ready_chunks == 0  # nothing has waited for the device
        assert sender.next_frame() is None
    frames = 0
    while frames < layout.chunks:
        if (frame := sender.next_frame()) is not None:
            frames += 1
            receiver.feed(frame)
            while (answer := receiver.next_frame()) is not None:
                sender.feed(answer)
    assert [event.type for event in receiver.take_events()] == [_C.Event.Type.RECEIVED]
    assert torch.equal(as_tensor(target, layout.nbytes), body)


def test_every_chunk_is_noted_once_when_it_is_on_the_host(transport: Transport) -> None:
    ring = _C.Ring(1024)
    with Staged(delay_us=300, ring=ring) as here:
        piece = here.piece(NUMEL, 1)
        for round in range(2):
            encoding = here.stager.encode([piece], "int8", CHUNK, transport, kind=1, round=round, block=7)
            encoding.wait()
            records = np.frombuffer(ring.drain(), RECORD)
            assert set(records["round"]) == {round}
            assert set(records["block"]) == {7}
            for stage in (Stage.COPY, Stage.CHECKSUM):
                assert records["chunk"][records["stage"] == stage].tolist() == list(range(NUMEL // CHUNK))
            copied = records[records["stage"] == Stage.COPY]
            assert copied["bytes"].sum() == encoding.nbytes
            queued, first = encoding.span_ns
            assert (first, copied["start_ns"][0]) == (copied["end_ns"][0], queued)
            assert first <= copied["end_ns"][-1] <= encoding.copy_span_ns[1]
            assert encoding.copy_span_ns[0] == first
            here.stager.release(encoding)
    assert ring.lost == 0


def test_a_block_is_cut_into_several_launches_of_bounded_number(transport: Transport) -> None:
    with Staged(slice_elements=1 << 12) as here:
        here.stager.encode([random_piece(1 << 14, *DTYPES[:2], 0, residual=False)], "int8", CHUNK, transport).wait()
        assert here.device.launches == 4
    with Staged() as here:  # one that is smaller than a slice
        here.stager.encode([random_piece(SLICE, *DTYPES[:2], 0, residual=False)], "int8", CHUNK, transport).wait()
        assert here.device.launches == 1


@pytest.mark.parametrize(("numel", "slices"), [(218_112_000, 4), (524_288_000, 8), (3 << 20, 3), (128, 1)])
def test_a_block_has_four_slices_unless_they_would_be_too_large_or_too_small(numel: int, slices: int) -> None:
    chunk = RunConfig(rounds=1, clients=1).chunk
    meta = torch.empty(numel, device="meta")
    elements = device_stager.slot_elements(numel, chunk)
    cut = device_stager._cut([Piece(meta, meta, None, None)], elements, chunk)
    assert len(cut) == slices
    assert sum(part.numel for part in cut) == numel
    assert elements <= device_stager.SLICE


def test_no_copy_of_a_hand_over_is_longer_than_a_piece(transport: Transport) -> None:
    piece_bytes = 700  # of a residual's slice of 4096
    with Staged(copy_bytes=piece_bytes) as here:
        piece = here.piece(NUMEL, 0)
        _, residuals, _ = statement([piece], "int8")
        here.stager.encode([piece], "int8", CHUNK, transport).wait()
        assert control().fake_largest_copy() == piece_bytes
        assert piece.residual_out is not None
        assert residuals[0] is not None
        assert torch.equal(piece.residual_out, residuals[0])


@pytest.mark.parametrize("width", [40, 700, 2200, 9000])
@pytest.mark.parametrize("format", codec.FORMATS)
def test_slots_take_what_is_predicted(format: str, width: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2048, width, device="meta"))
    plan = BlockPlan.from_model(model, ["0"])
    config = RunConfig(rounds=4, clients=1, format=format)
    predicted = memory.predict(model, plan, config, lambda parameters: torch.optim.SGD(parameters, lr=0.1), "cuda")
    with Staged(slice_elements=device_stager.SLICE) as here:
        here.stager.reserve(plan.blocks[0].flat_numel, format, config.chunk)
        held = [tensor for slot in here.stager._slots for tensor in (slot.body, slot.residual) if tensor is not None]
    assert sum(tensor.nbytes for tensor in held) == predicted.item("pack slots")


# ---- Who waits for whom


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", codec.FORMATS)
def test_a_block_that_trains_again_at_once_is_sent_as_it_was_handed_over(
    format: str, seed: int, transport: Transport
) -> None:
    """The training stream, as late as the others, writes the block before each hand-over and again right behind it."""
    with Staged(delay_us=400, seed=seed) as here:
        training = Stream()
        here.device.training = training.handle
        weights, ref = torch.zeros(NUMEL), torch.zeros(NUMEL)
        versions = [random_piece(NUMEL, torch.float32, torch.float32, 10 * seed + round).now for round in range(6)]
        encodings = []
        residual = None
        for version in versions:
            # Training is slower than any of the others: whoever does not wait for it comes first.
            here.device.launch(training.handle, lambda v=version: (time.sleep(0.01), weights.copy_(v)))
            kept = None if format == "fp32" else here.stager.residual(NUMEL)
            encoding = here.stager.encode([Piece(weights, ref, residual, kept)], format, CHUNK, transport)
            assert not encoding.before_writing()  # never waits on the host
            here.device.launch(training.handle, lambda: weights.fill_(float("nan")))
            encodings.append(encoding)
            residual = kept
            if residual is not None:
                encoding.wait()  # a residual is committed only when the server has accepted, so it is on the host
        expected = None
        for version, encoding in zip(versions, encodings, strict=True):
            encoding.wait()
            before = None if expected is None else expected.clone()
            expected = None if format == "fp32" else torch.empty(NUMEL)
            packed = codec.encode(version, ref, before, format=format, residual_out=expected)
            assert torch.equal(encoding.body, packed.body)
            assert encoding.bad_groups == 0
        training.synchronise()
        training.close()


def test_what_reads_an_aggregate_late_sees_it_whole_although_the_next_one_arrives() -> None:
    """Bodies land in the same device memory one after another; the stream that applies them runs behind."""
    with Staged(delay_us=2000) as here, Transport() as server, Transport() as client:
        training = Stream()
        here.device.training = training.handle
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        layout = body_layout("int8", NUMEL, CHUNK)
        expected, applied, addresses = [], [], set()
        for round in range(6):
            landing = here.stager.landing(NUMEL, "int8", CHUNK)
            client.native.receive(link, 1, round, 0, landing.buffer, landing.layout, listener=landing.watermark)
            outgoing = _C.Buffer(layout.nbytes)
            as_tensor(outgoing, layout.nbytes).copy_(torch.arange(layout.nbytes) * (round + 3) % 251)
            server.native.send(there.link, 1, round, 0, server.native.make_source(outgoing, layout, True))
            arrived = client.next_event(DEADLINE_S)
            assert arrived is not None
            assert arrived.type == _C.Event.Type.RECEIVED
            body, copy = landing.body(), torch.empty(layout.nbytes, dtype=torch.uint8)
            addresses.add(body.data_ptr())
            here.device.launch(training.handle, lambda b=body, c=copy: c.copy_(b))
            here.stager.release_landing(landing)
            expected.append(as_tensor(outgoing, layout.nbytes))
            applied.append(copy)
        training.synchronise()
        assert len(addresses) == 1
        assert addresses.pop() % 16 == -codec.scale_bytes(NUMEL, "int8") % 16  # the codes are aligned
        for copy, body in zip(applied, expected, strict=True):
            assert torch.equal(copy, body)
        training.close()


def test_a_round_trip_allocates_nothing_and_never_waits_for_a_stream_once_it_is_warm(transport: Transport) -> None:
    with Staged(delay_us=100) as here:
        pieces = [[here.piece(NUMEL, seed)] for seed in range(2)]

        def rounds(count: int) -> tuple[int, int, int]:
            for round in range(count):
                encoding = here.stager.encode(pieces[round % 2], "int8", CHUNK, transport)
                landing = here.stager.landing(NUMEL, "int8", CHUNK)
                landing.cancel()
                here.stager.release_landing(landing)
                encoding.wait()
                here.stager.release(encoding)
            return fake_device.calls("cuEventCreate"), here.memory.used, here.stager.buffers.allocated_bytes

        # When a thread gives something back late, one more of it is taken; more than a few are never under way.
        warm, later, tries = None, rounds(6), 1
        while later != warm:
            assert tries <= 10
            warm, later, tries = later, rounds(12), tries + 1
        assert fake_device.calls("cuStreamSynchronize") == 0


ROUND_TRIPS = """
import sys
import fake_device
fake_device.driver_file = lambda: sys.argv[1]  # the one that is preloaded
from test_device_staging import CHUNK, NUMEL, Staged, Transport, control

with Transport() as transport, Staged(delay_us=20) as here:
    pieces = [here.piece(NUMEL, seed) for seed in range(2)]
    for round in range(30):
        encoding = here.stager.encode([pieces[round % 2]], "int8", CHUNK, transport)
        encoding.wait()
        here.stager.release(encoding)
        if round == 0:  # the first checksum of a process makes its tables
            before = control().fake_allocations()
    print(control().fake_calls(b"cuLaunchHostFunc"), control().fake_allocations() - before)
"""


def test_a_callback_of_the_driver_allocates_nothing() -> None:
    driver = fake_device.driver_file()
    command = [sys.executable, "-c", ROUND_TRIPS, driver]
    first = os.environ.get("LD_PRELOAD", "")  # a sanitizer's
    environment = {**os.environ, "LD_PRELOAD": f"{first} {driver}".strip()}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    callbacks, allocations = map(int, done.stdout.split())
    assert callbacks > 300
    assert allocations == 0


def test_the_pack_stream_yields_to_the_training_and_the_copies_do_not(staged: Staged) -> None:
    native = staged.device.native
    assert [control().fake_priority(stream) for stream in (native.pack, native.down, native.up)] == [0, -5, -5]


# ---- Without the interpreter


def _hold_the_interpreter(until: object, seconds: float) -> bool:
    """Runs Python code that never lets go of the GIL until `until()`; whether that came."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():  # type: ignore[operator]
                return True
        return False
    finally:
        sys.setswitchinterval(before)


def test_a_body_goes_from_device_to_device_while_python_holds_its_lock() -> None:
    """Both ways at once: device, host, socket, host, device. No thread of this needs the GIL."""
    with Staged(delay_us=200) as here, Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        layout = body_layout("int8", NUMEL, CHUNK)
        native = here.device.native
        landing = here.stager.landing(NUMEL, "int8", CHUNK)
        target = landing._body
        server.native.receive(there.link, 1, 0, 0, landing.buffer, layout, listener=landing.watermark)
        outgoing = here.stager.buffers.take(layout.nbytes)
        body = (torch.arange(layout.nbytes) % 249 + 1).to(torch.uint8)
        body[-1] = 77
        source = client.native.make_source(outgoing, layout, False)
        client.native.send(link, 1, 0, 0, source)
        view = (ctypes.c_uint8 * layout.nbytes).from_address(target.data_ptr())
        to_host = native.device_to_host(source)

        def whole() -> bool:
            return view[layout.nbytes - 1] == 77

        assert not whole()
        split = codec.scale_bytes(NUMEL, "int8")
        sys.setswitchinterval(1000.0)
        native.copy_units(to_host, body.data_ptr(), body.data_ptr() + split, 0, layout.units)
        native.finish(to_host)
        assert _hold_the_interpreter(whole, DEADLINE_S)
        sys.setswitchinterval(0.005)
        assert torch.equal(landing.body(), body)


# ---- Ends


def test_closing_in_the_middle_gives_everything_back(transport: Transport) -> None:
    gc.collect()
    before = threads("pb-device")  # of those that other tests have not let go of yet
    pinned_before = control().fake_pinned_bytes()
    here = Staged(delay_us=3000)
    with here:
        ours = threads("pb-device") - before
        assert len(ours) == 1
        encoding = here.stager.encode([here.piece(NUMEL, 0)], "int8", CHUNK, transport)
        for _ in range(2):
            here.stager.landing(NUMEL, "int8", CHUNK)
        assert control().fake_pinned_bytes() > pinned_before
    assert encoding.done  # closing lets what was queued end
    assert settles(lambda: not ours & threads("pb-device"))
    del here, encoding
    gc.collect()
    assert control().fake_pinned_bytes() == pinned_before


def test_a_link_that_goes_in_the_middle_of_a_body_leaves_a_landing_that_can_be_closed() -> None:
    with Staged(delay_us=200) as here, Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        layout = body_layout("int8", NUMEL, CHUNK)
        landing = here.stager.landing(NUMEL, "int8", CHUNK)
        client.native.receive(link, 1, 0, 0, landing.buffer, layout, listener=landing.watermark)
        source = server.native.make_source(_C.Buffer(layout.nbytes), layout, False)
        server.native.send(there.link, 1, 0, 0, source)
        source.raise_watermark(3)
        while landing.watermark is not None and landing.watermark.received == 0:
            client.next_event(0.01)
        server.close()
        closed = client.next_event(DEADLINE_S)
        assert closed is not None
        assert closed.type == _C.Event.Type.CLOSED
        assert landing._to_device.wait(0.0) is None


# ---- Failures


@pytest.mark.parametrize(
    "function",
    ["cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuLaunchHostFunc", "cuEventRecord", "cuStreamWaitEvent"],
)
def test_a_driver_that_refuses_a_call_is_an_error_with_its_words(function: str, transport: Transport) -> None:
    with Staged(delay_us=50) as here:
        piece = here.piece(NUMEL, 0)
        fake_device.fail(function, 2, after=3)
        with pytest.raises(_C.DeviceError, match=r"failed: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)"):
            here.stager.encode([piece], "int8", CHUNK, transport)
        fake_device.fail("", 0)
        assert issubclass(_C.DeviceError, ParaBlockError)


def test_a_copy_to_the_device_that_fails_is_told_when_the_body_is_asked_for() -> None:
    with Staged() as here, Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        landing = here.stager.landing(NUMEL, "int8", CHUNK)
        fake_device.fail("cuMemcpyHtoDAsync_v2", 2)
        client.native.receive(link, 1, 0, 0, landing.buffer, landing.layout, listener=landing.watermark)
        outgoing = server.native.make_source(_C.Buffer(landing.layout.nbytes), landing.layout, True)
        server.native.send(there.link, 1, 0, 0, outgoing)
        with pytest.raises(_C.DeviceError, match="copying to the GPU failed: CUDA_ERROR_OUT_OF_MEMORY"):
            landing.body()
        fake_device.fail("", 0)


def test_a_device_that_has_failed_ends_the_wait_for_a_body(transport: Transport) -> None:
    here = Staged(delay_us=1000)
    with nothing_packed(here.device):
        encoding = here.stager.encode([here.piece(NUMEL, 0)], "int8", CHUNK, transport)
        control().fake_break()
    with pytest.raises(_C.DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
        encoding.wait()
    here.stager.close()
    control().fake_reset()


def test_tensors_that_do_not_fit_are_refused_before_anything_is_queued(staged: Staged, transport: Transport) -> None:
    flat = torch.zeros(256)
    for piece in (
        Piece(torch.zeros(16, 16), torch.zeros(16, 16)),
        Piece(torch.zeros(512)[::2], flat),
        Piece(flat, torch.zeros(128)),
        Piece(flat.double(), flat),
        Piece(flat, flat, torch.zeros(256, device="meta")),
    ):
        with pytest.raises(CodecError):
            staged.stager.encode([piece], "int8", 128, transport)
    assert staged.device.launches == 0
