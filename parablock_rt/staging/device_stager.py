"""Staging of blocks on a GPU: from weights to a body in pinned memory, and from an arriving body to the device.

A block is encoded in slices, each into one of two slots on the device. Each slice goes to the host in chunks while the
next slice is encoded, and the network sends the chunks that are there. The training thread queues everything in one go;
it then runs on its own, in the order that streams and marks define:

    pack:  [after the training] fetch residual, encode slice i      (waits until the slot's last copies are done)
    down:  [after encode i] copy the body's slice, chunk by chunk, each raising the watermark; copy the new residual
    up:    chunks of an arriving body, queued by a native thread as they come

Nothing here waits for a network. One thread at a time may use a DeviceStager.
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

# The most elements of a slot. The training's first optimiser step waits until the last slice is encoded, and each
# encode may wait for a matrix product that fills the GPU, some milliseconds in a large model. So there are only as many
# slices as needed to overlap copies and encoding: a slot holds a quarter of a layer of 218 M parameters. For larger
# blocks, this limit bounds the memory of the slots.
SLICE = 1 << 26
LEAST_SLICE = 1 << 20
SLOTS = 2
_ALIGNMENT = 16  # bytes; of the codes on the device
_CHECK_S = 0.5  # how often a wait for the GPU checks it for errors


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
    """A body that is being encoded on the device and copied to the host.

    Nothing may write the pieces' tensors before the device has passed the mark `read`; call `before_writing` first.
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
        self.weights = [tensor for piece in pieces for tensor in (piece.now, piece.ref)]  # kept alive until read
        self.residuals = [(piece.residual, piece.residual_out) for piece in pieces]  # kept alive until all is copied
        self.bad: Tensor | None = None
        self.read: _C.Mark | None = None  # after the last kernel that reads the pieces

    def wait(self) -> None:
        """Waits until the whole body and the residuals are on the host. Raises DeviceError if the GPU failed."""
        deadline = time.monotonic() + ENCODE_DEADLINE_S
        while not self._to_host.wait(_CHECK_S):
            self._device.native.check()
            if time.monotonic() > deadline:
                raise ParaBlockError(
                    f"expected the GPU to pack a block within {ENCODE_DEADLINE_S:g} s, found it still packing; check "
                    "whether another process keeps the GPU busy"
                )

    def before_writing(self) -> bool:
        """Orders the work queued on the training stream from now on behind the last read. The host never waits."""
        if self.read is not None:
            self._device.native.wait(self._device.training_stream(), self.read)
        return False

    @property
    def count_address(self) -> int:
        """The address in host memory of the count of bad groups."""
        return self.buffer.address + _round_up(self.nbytes, 8)

    @property
    def bad_groups(self) -> int:
        """Groups that were not finite and went out as zeros; valid after `wait`."""
        start = self.count_address - self.buffer.address
        return int.from_bytes(memoryview(self.buffer)[start : start + 8], "little")

    @property
    def span_ns(self) -> tuple[int, int]:
        """When packing was queued and when the first chunk was on the host (monotonic clock); valid after `wait`.

        The steps in between are not measured, as timing them would put more work on the streams.
        """
        return self._to_host.started_ns, self._to_host.first_copied_ns

    @property
    def copy_span_ns(self) -> tuple[int, int]:
        """When the first and when the last chunk was on the host; later chunks were packed meanwhile. Valid after
        `wait`."""
        return self._to_host.first_copied_ns, self._to_host.finished_ns


class DeviceLanding(Landing):
    """Room for a body on the host and on the device; arriving chunks go on to the device at once."""

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
        """The packed body on the device; orders the training stream behind its last copy.

        Waits only until the host has queued the last copy, which soon follows the arrival of the last chunk. Raises
        DeviceError if a copy failed.
        """
        deadline = time.monotonic() + ENCODE_DEADLINE_S
        assert self._to_device is not None
        while (copied := self._to_device.wait(_CHECK_S)) is None:
            if time.monotonic() > deadline:
                raise ParaBlockError(
                    "expected an aggregate that has arrived to be copied to the GPU, found copies missing; check "
                    "whether the run was closed"
                )
        self._device.native.wait(self._device.training_stream(), copied)
        return self._body

    def cancel(self) -> None:
        """Stops copying: chunks that arrive later stay on the host."""
        if self._to_device is not None:
            self._to_device.cancel()

    def release(self) -> None:
        """Stops copying and gives up the buffer, which is free for reuse once the last copy from it is done."""
        self.cancel()
        self._to_device = None


@dataclass
class _Slot:
    """Memory for one slice on the device; it may be written after the mark `free`."""

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
        """`memory`: for bodies and residuals on the host. `slice_elements`: the most elements of a slot. `ring`: the
        driver's callbacks, which run one at a time, write a record there for each chunk that is on the host."""
        self.memory = memory
        self.buffers = BufferPool(memory.take)
        self._device = device
        self._slice = slice_elements
        self._ring = ring
        self._slots: list[_Slot] = []
        self._slot_elements = 0
        self._next = 0
        self._running: list[DeviceEncoding] = []
        self._targets: list[tuple[Tensor, _C.Mark]] = []  # spare device memory for landings, each free after its mark
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
        """Queues the packing of the pieces, which follow each other in the flat block. Does not wait.

        Packing runs after the work queued on the training stream so far. `kind`, `round` and `block` name the transfer
        in the timeline. Raises CodecError for tensors that the codec cannot read, DeviceError when the driver fails.
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
        self._running.append(encoding)  # before the GPU may read: keeps the tensors alive if anything below raises
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
        """Allocates slots that are large enough for a block of `numel` elements, unless they exist already.

        Waits for the streams if it replaces smaller slots, so reserve for the largest block first.
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
        """From now on every buffer is large enough for any body; no body may be larger than `nbytes`."""
        self.buffers.fit(buffer_bytes(nbytes))

    def release_inputs(self, encoding: Encoding) -> bool:
        """Frees the encoding's weights for the work queued on the training stream from now on. Returns False: it never
        waits."""
        assert isinstance(encoding, DeviceEncoding)
        encoding.before_writing()
        # torch reuses freed memory for later work on the stream that it was allocated on, the training stream.
        encoding.weights.clear()
        return False

    def release(self, encoding: Encoding) -> None:
        """Takes back the buffer of an encoding, after waiting for it; reuses it once the transport has released it."""
        assert isinstance(encoding, DeviceEncoding)
        encoding.wait()
        encoding.weights.clear()
        encoding.residuals.clear()
        self.buffers.give_back(encoding.buffer)
        encoding.release_source()

    def residual(self, numel: int) -> Tensor:
        """An uninitialised fp32 tensor [numel] for a residual, in pinned memory if there is room."""
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
        """Takes a landing back. All reads of its body must have been queued on the training stream."""
        assert isinstance(landing, DeviceLanding)
        self._landings.remove(landing)
        landing.release()
        self._targets.append((landing.memory, self._device.native.mark(self._device.training_stream())))
        self.buffers.give_back(landing.buffer)

    def close(self) -> None:
        """Waits until the device no longer reads or writes any memory given to it. Idempotent."""
        if self._closed or exits.is_inherited(self):
            return
        self._closed = True
        for landing in self._landings:
            landing.cancel()
        self._device.close()
        self._landings.clear()
        self._running.clear()

    def close_at_exit(self) -> None:
        """Called when the program ends without closing the stager."""
        self.close()

    def __del__(self) -> None:
        self.close()


def stager_for(
    blocks: list[FlatBlock],
    config: RunConfig,
    pinned_memory: int | None,
    ring: Callable[[str], _C.Ring | None] = lambda thread: None,
) -> Stager | DeviceStager:
    """The stager for a client's blocks, which are in host memory or on one GPU.

    `pinned_memory`: the most bytes of host memory to pin; None: see `PinnedMemory`. `ring`: makes the ring for a thread
    of the given name. Raises ConfigError when the blocks are on several devices, or on one that is neither the CPU nor
    a CUDA device; CodecError when triton is missing; DeviceError when the driver is missing.
    """
    devices = {flat.device for block in blocks for flat in block.flats}
    if devices == {torch.device("cpu")}:
        return Stager(ring("pb-encode"))
    device = devices.pop()
    if devices or device.type != "cuda":
        found = ", ".join(sorted(map(str, {device, *devices})))
        raise ConfigError(f"expected all blocks in host memory or on one CUDA device, found {found}; move the model")
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
    """Elements of a slot for blocks of up to `numel` elements: whole chunks, at most about `most` elements."""
    quarter = _round_up(-(-numel // 4), chunk)  # cuts smaller blocks, too, so that copies and encoding overlap
    return _round_up(min(max(quarter, LEAST_SLICE), most, numel), chunk)


def slot_bytes(elements: int, format: str) -> tuple[int, int]:
    """Bytes of a slot on the device: for the body, and for the residual."""
    return codec.body_bytes(elements, format) + _ALIGNMENT, 0 if format == "fp32" else 4 * elements


def kinds_of(blocks: list[FlatBlock]) -> set[tuple[torch.dtype, torch.dtype]]:
    """The pairs (trained dtype, reference dtype) of all segments: see `CudaDevice.warm_up`."""
    return {
        (torch.float32 if block.block.needs_master else flat.dtype, flat.dtype)
        for block in blocks
        for flat in block.flats
    }


def _cut(pieces: Sequence[Piece], elements: int, chunk: int) -> list[_Slice]:
    """The pieces, cut into slices of at most `elements` (a multiple of `chunk`).

    A slice ends at the end of a chunk of the block, or of its piece.
    """
    slices = []
    start = 0
    for piece in pieces:
        at = 0
        while at < piece.now.numel():
            until = (start // chunk * chunk) + elements  # a piece may begin within a chunk
            numel = min(until - start, piece.now.numel() - at)
            slices.append(_Slice(piece, at, numel, start))
            at += numel
            start += numel
    return slices


def aligned(memory: Tensor, nbytes: int, scales: int) -> Tensor:
    """A view of `nbytes` bytes in `memory` (uint8, at least 16 bytes larger) for a body with `scales` bytes of scales.

    Its codes start at an address that is a multiple of 16.
    """
    start = -(memory.data_ptr() + scales) % _ALIGNMENT
    return memory[start : start + nbytes]


def _address(tensor: Tensor, element: int) -> int:
    return tensor.data_ptr() + element * tensor.element_size()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
