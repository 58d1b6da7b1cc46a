"""Staging of blocks on a GPU: from weights to a body in pinned memory, and from an arriving body to the device.

A block is encoded in slices, each into one of two slots on the device, and each slice goes to the host in chunks while
the next is encoded; the network sends what is there. All of it is queued by the training thread in one go and then runs
without it, in the order that streams and marks give:

    pack:  [after the training] fetch residual, encode slice i      (waits until the slot's last copies are done)
    down:  [after encode i] copy the body's slice, chunk by chunk, each raising the watermark; copy the new residual
    up:    chunks of an arriving body, queued by a native thread as they come

Nobody waits for a network here. One thread at a time uses a DeviceStager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parablock_rt import _C, codec, exits
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.staging.device import CudaDevice
from parablock_rt.staging.pinned import PinnedMemory, buffer_bytes, bytes_needed
from parablock_rt.staging.stager import ENCODE_DEADLINE_S, Encoding, Landing, Piece, Stager, check_piece
from parablock_rt.wire.transport import BufferPool, Transport, body_layout

# Elements of a slot, at most. The training's first optimiser step waits until the last slice is encoded, and each
# encode may have to wait for a matrix product that has all of the GPU, some milliseconds in a large model. So there are
# as few slices as let copies and encoding overlap: a quarter of a layer of 218 M parameters fits. It bounds the memory
# that larger blocks take.
SLICE = 1 << 26
LEAST_SLICE = 1 << 20
SLOTS = 2
_ALIGNMENT = 16  # bytes, of the codes on the device
_CHECK_S = 0.5


class Device(Protocol):
    """What staging needs of a GPU: see `parablock_rt.staging.device.CudaDevice`."""

    type: str
    native: _C.Device

    def training_stream(self) -> int: ...
    def empty(self, numel: int, dtype: torch.dtype) -> Tensor: ...
    def encode(
        self,
        now: Tensor,
        ref: Tensor,
        residual: Tensor | None,
        residual_out: Tensor | None,
        out: Tensor,
        bad: Tensor | None,
        format: str,
    ) -> Tensor: ...
    def close(self) -> None: ...


class DeviceEncoding(Encoding):
    """A body in the making, on the device and on its way to the host.

    The pieces' tensors must stay as they are until `read` is passed: `before_writing` sees to it on the device.
    """

    def __init__(
        self,
        device: Device,
        pieces: list[Piece],
        to_host: _C.DeviceToHost,
        source: _C.Source,
        buffer: _C.Buffer,
        nbytes: int,
    ) -> None:
        super().__init__(to_host, source, buffer, nbytes)
        self._device = device
        self._to_host = to_host
        self.weights = [tensor for piece in pieces for tensor in (piece.now, piece.ref)]  # kept until they are read
        self.residuals = [(piece.residual, piece.residual_out) for piece in pieces]  # until all is on the host
        self.bad: Tensor | None = None
        self.read: _C.Mark | None = None  # behind the last kernel that reads the pieces

    def wait(self) -> None:
        """Returns when the whole body and the residuals are on the host. Raises DeviceError if the GPU failed."""
        deadline = time.monotonic() + ENCODE_DEADLINE_S
        while not self._to_host.wait(_CHECK_S):
            self._device.native.check()
            if time.monotonic() > deadline:
                raise ParaBlockError(f"packing a block on the GPU took longer than {ENCODE_DEADLINE_S:g} s")

    def before_writing(self) -> bool:
        """What is queued on the training stream from now on comes after the last read. Never waits."""
        if self.read is not None:
            self._device.native.wait(self._device.training_stream(), self.read)
        return False

    @property
    def count_address(self) -> int:
        """Where in host memory the count of bad groups goes."""
        return self.buffer.address + _round_up(self.nbytes, 8)

    @property
    def bad_groups(self) -> int:
        """Groups that were not finite and went out as zeros; valid after `wait`."""
        start = self.count_address - self.buffer.address
        return int.from_bytes(memoryview(self.buffer)[start : start + 8], "little")

    @property
    def span_ns(self) -> tuple[int, int]:
        """From packing being queued until the first chunk was on the host; valid after `wait`.

        What the device does in between is not measured: timing it would put more work on its streams.
        """
        return self._to_host.started_ns, self._to_host.first_copied_ns

    @property
    def copy_span_ns(self) -> tuple[int, int]:
        """From the first chunk being on the host until all was, beside the packing of later ones; after `wait`."""
        return self._to_host.first_copied_ns, self._to_host.finished_ns


class DeviceLanding(Landing):
    """Room for a body on the host and on the device, to which it goes on while it arrives."""

    def __init__(
        self, device: Device, buffer: _C.Buffer, layout: _C.Layout, memory: Tensor, free: _C.Mark, scales: int
    ) -> None:
        super().__init__(buffer, layout)
        self._device = device
        self.memory = memory
        self._body = aligned(memory, layout.nbytes, scales)
        address = self._body.data_ptr()
        self._to_device: _C.HostToDevice | None = device.native.host_to_device(
            buffer, layout, address, address + scales, free
        )
        self.watermark = self._to_device.watermark

    def body(self) -> Tensor:
        """The packed body on the device, behind its last copy on the training stream.

        Waits for the host's part alone, which is done by the time the last chunk has been noted here. Raises
        DeviceError if a copy failed.
        """
        deadline = time.monotonic() + ENCODE_DEADLINE_S
        assert self._to_device is not None
        while (copied := self._to_device.wait(_CHECK_S)) is None:
            if time.monotonic() > deadline:
                raise ParaBlockError("an aggregate that has arrived was not copied to the GPU; was the run closed?")
        self._device.native.wait(self._device.training_stream(), copied)
        return self._body

    def cancel(self) -> None:
        """Nothing that still arrives is copied."""
        if self._to_device is not None:
            self._to_device.cancel()

    def release(self) -> None:
        """The buffer is somebody else's once the last copy from it has been made."""
        self.cancel()
        self._to_device = None


@dataclass
class _Slot:
    """Memory of one slice on the device, and the mark from which on it may be written."""

    body: Tensor
    residual: Tensor | None
    free: _C.Mark | None = None


@dataclass(frozen=True)
class _Slice:
    """Elements `at` to `at + numel` of a piece; `start` counts from the beginning of the block."""

    piece: Piece
    at: int
    numel: int
    start: int


class DeviceStager:
    """The slots, buffers and streams of one client whose blocks are on a GPU."""

    def __init__(
        self, device: Device, memory: PinnedMemory, *, slice_elements: int = SLICE, ring: _C.Ring | None = None
    ) -> None:
        """`memory`: where bodies and residuals are kept on the host. `slice_elements`: of a slot, at most. `ring`:
        where the driver's callbacks, one after the other, note each chunk that is on the host."""
        self.memory = memory
        self.buffers = BufferPool(memory.take)
        self._device = device
        self._slice = slice_elements
        self._ring = ring
        self._slots: list[_Slot] = []
        self._slot_elements = 0
        self._next = 0
        self._running: list[DeviceEncoding] = []
        self._targets: list[tuple[Tensor, _C.Mark]] = []  # device memory of landings, and from when on it is free
        self._landings: list[DeviceLanding] = []
        self._closed = False
        exits.register(self)

    def encode(
        self,
        pieces: list[Piece],
        format: str,
        chunk: int,
        transport: Transport,
        *,
        kind: int = 0,
        round: int = 0,
        block: int = 0,
    ) -> DeviceEncoding:
        """Queues all that it takes to pack the pieces, which follow each other in the flat block. Does not wait.

        `kind`, `round` and `block` name the transfer in the timeline. What the training stream has been given so far
        comes first. Raises CodecError for tensors that the codec cannot read, DeviceError when the GPU refuses.
        """
        for piece in pieces:
            check_piece(piece, self._device.type)
        native = self._device.native
        numel = sum(piece.now.numel() for piece in pieces)
        nbytes = codec.body_bytes(numel, format)
        self._running = [encoding for encoding in self._running if not encoding.done]
        self.reserve(numel, format, chunk)
        buffer = self.buffers.take(buffer_bytes(nbytes))
        layout = body_layout(format, numel, chunk)
        source = transport.native.make_source(buffer, layout, False)
        to_host = native.device_to_host(source, self._ring, kind, round, block)
        encoding = DeviceEncoding(self._device, pieces, to_host, source, buffer, nbytes)
        self._running.append(encoding)  # before the GPU may read: whatever is raised from here on, the tensors live
        native.wait(native.pack, native.mark(self._device.training_stream()))
        for part in _cut(pieces, self._slot_elements, chunk):
            self._pack(encoding, part, format, numel // layout.units)
        encoding.read = native.mark(native.pack)
        assert encoding.bad is not None
        native.copy_to_host(encoding.count_address, encoding.bad.data_ptr(), 8, native.down)
        native.finish(encoding._to_host)
        return encoding

    def _pack(self, encoding: DeviceEncoding, part: _Slice, format: str, unit: int) -> None:
        """Queues one slice: fetch its residual, encode it, copy it and its new residual to the host."""
        native = self._device.native
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        piece, at, numel = part.piece, part.at, part.numel
        if slot.free is not None:
            native.wait(native.pack, slot.free)
        here = None if slot.residual is None else slot.residual[:numel]
        if piece.residual is not None:
            assert here is not None
            native.copy_to_device(here.data_ptr(), _address(piece.residual, at), 4 * numel, native.pack)
        scales = codec.scale_bytes(numel, format)
        body = aligned(slot.body, codec.body_bytes(numel, format), scales)
        encoding.bad = self._device.encode(
            piece.now[at : at + numel],
            piece.ref[at : at + numel],
            here if piece.residual is not None else None,
            here if piece.residual_out is not None else None,
            body,
            encoding.bad,
            format,
        )
        native.wait(native.down, native.mark(native.pack))
        start = body.data_ptr()
        native.copy_units(encoding._to_host, start, start + scales, part.start // unit, numel // unit)
        if piece.residual_out is not None:
            assert here is not None
            native.copy_to_host(_address(piece.residual_out, at), here.data_ptr(), 4 * numel, native.down)
        slot.free = native.mark(native.down)

    def reserve(self, numel: int, format: str, chunk: int) -> None:
        """Sees to it that the slots are there and large enough for a block of `numel` elements.

        Waits for the streams when there are smaller ones, so reserve for the largest block first.
        """
        wanted = slot_elements(numel, chunk, self._slice)
        if wanted <= self._slot_elements:
            return
        if self._slots:
            self._device.native.synchronise()
        body, residual = slot_bytes(wanted, format)
        self._slots = [
            _Slot(
                self._device.empty(body, torch.uint8),
                self._device.empty(residual // 4, torch.float32) if residual > 0 else None,
            )
            for _ in range(SLOTS)
        ]
        self._slot_elements = wanted

    def fit(self, nbytes: int) -> None:
        """From now on no body is larger than `nbytes`, and every buffer is for any of them."""
        self.buffers.fit(buffer_bytes(nbytes))

    def release_inputs(self, encoding: Encoding) -> bool:
        """Gives the memory of the encoding's weights back, for what the training stream does from now on."""
        assert isinstance(encoding, DeviceEncoding)
        encoding.before_writing()
        # torch gives memory that is freed to what comes later on the stream it was made on: the training's.
        encoding.weights.clear()
        return False

    def release(self, encoding: Encoding) -> None:
        """Takes a finished encoding's buffer back; it is used again once the transport has let go of it, too."""
        assert isinstance(encoding, DeviceEncoding)
        encoding.wait()
        encoding.weights.clear()
        encoding.residuals.clear()
        self.buffers.give_back(encoding.buffer)
        encoding.release_source()

    def residual(self, numel: int) -> Tensor:
        """An uninitialised fp32 [numel] in pinned memory, to keep an error feedback in."""
        return torch.frombuffer(self.memory.take(4 * numel), dtype=torch.float32, count=numel)

    def landing(self, numel: int, format: str, chunk: int) -> DeviceLanding:
        """Room for the packed body of a block of `numel` elements, on the host and on the device."""
        layout = body_layout(format, numel, chunk)
        buffer = self.buffers.take(buffer_bytes(layout.nbytes))
        fitting = [target for target in self._targets if target[0].numel() >= layout.nbytes + _ALIGNMENT]
        if fitting:
            target = min(fitting, key=lambda target: target[0].numel())
            self._targets = [other for other in self._targets if other is not target]
            memory, free = target
        else:
            memory = self._device.empty(layout.nbytes + _ALIGNMENT, torch.uint8)
            free = self._device.native.mark(self._device.training_stream())
        landing = DeviceLanding(self._device, buffer, layout, memory, free, codec.scale_bytes(numel, format))
        self._landings.append(landing)
        return landing

    def release_landing(self, landing: Landing) -> None:
        """Takes a landing back. What reads its body has been queued on the training stream."""
        assert isinstance(landing, DeviceLanding)
        self._landings.remove(landing)
        landing.release()
        self._targets.append((landing.memory, self._device.native.mark(self._device.training_stream())))
        self.buffers.give_back(landing.buffer)

    def close(self) -> None:
        """Returns when nothing on the device reads or writes what was handed over. Idempotent."""
        if self._closed or exits.is_inherited(self):
            return
        self._closed = True
        for landing in self._landings:
            landing.cancel()
        self._device.close()
        self._landings.clear()
        self._running.clear()

    def close_at_exit(self) -> None:
        """For a program that ends without closing it."""
        self.close()

    def __del__(self) -> None:
        self.close()


def stager_for(
    blocks: list[FlatBlock],
    config: RunConfig,
    pinned_memory: int | None,
    ring: Callable[[str], _C.Ring | None] = lambda thread: None,
) -> Stager | DeviceStager:
    """What stages a client's blocks where they are: in host memory or on one GPU.

    `pinned_memory`: the most bytes of host memory to pin; None: see `PinnedMemory`. `ring`: makes the ring in which a
    thread of that name notes what it does. Raises ConfigError when the blocks
    are on several devices or where nothing can stage them, CodecError when triton is missing, DeviceError when the
    driver is.
    """
    devices = {flat.device for block in blocks for flat in block.flats}
    if devices == {torch.device("cpu")}:
        return Stager(ring("pb-encode"))
    device = devices.pop()
    if devices or device.type != "cuda":
        found = ", ".join(sorted(map(str, {device, *devices})))
        raise ConfigError(f"expected all blocks in host memory or on one CUDA device; found {found}; move the model")
    cuda = CudaDevice(device)
    try:
        cuda.warm_up(kinds_of(blocks), config.format)
        with torch.cuda.device(device):
            plan = [block.block for block in blocks]
            memory = PinnedMemory(cuda.driver, bytes_needed(plan, config.format, config.staleness), pinned_memory)
            stager = DeviceStager(cuda, memory, ring=ring("cuda-copies"))
            stager.reserve(max(block.flat_numel for block in plan), config.format, config.chunk)
            return stager
    except BaseException:
        cuda.close()
        raise


def slot_elements(numel: int, chunk: int, most: int = SLICE) -> int:
    """Elements of a slot for blocks of up to `numel` elements: whole chunks, about `most` or fewer."""
    quarter = _round_up(-(-numel // 4), chunk)  # a small block is cut, too, so that copies and encoding overlap
    return _round_up(min(max(quarter, LEAST_SLICE), most, numel), chunk)


def slot_bytes(elements: int, format: str) -> tuple[int, int]:
    """Bytes of a slot on the device: of the body, and of the residual."""
    return codec.body_bytes(elements, format) + _ALIGNMENT, 0 if format == "fp32" else 4 * elements


def kinds_of(blocks: list[FlatBlock]) -> set[tuple[torch.dtype, torch.dtype]]:
    """What is trained and what it is encoded against, of all segments: see `CudaDevice.warm_up`."""
    return {
        (torch.float32 if block.block.needs_master else flat.dtype, flat.dtype)
        for block in blocks
        for flat in block.flats
    }


def _cut(pieces: Sequence[Piece], elements: int, chunk: int) -> list[_Slice]:
    """The pieces in slices of at most `elements`, a multiple of `chunk`, that end where a chunk of the block ends."""
    slices = []
    start = 0
    for piece in pieces:
        at = 0
        while at < piece.now.numel():
            until = (start // chunk * chunk) + elements  # the first slice of a piece may begin within a chunk
            numel = min(until - start, piece.now.numel() - at)
            slices.append(_Slice(piece, at, numel, start))
            at += numel
            start += numel
    return slices


def aligned(memory: Tensor, nbytes: int, scales: int) -> Tensor:
    """A body of `nbytes` bytes within `memory` (uint8, at least 16 more), whose codes start at a multiple of 16."""
    start = -(memory.data_ptr() + scales) % _ALIGNMENT
    return memory[start : start + nbytes]


def _address(tensor: Tensor, element: int) -> int:
    return tensor.data_ptr() + element * tensor.element_size()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
