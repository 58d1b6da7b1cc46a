"""From a block in memory to a body for the network, and from an arriving body to the memory where it is applied.

This is the staging of blocks in host memory: encode jobs, the thread that runs them, the buffers they fill. For blocks
on a GPU, `device_stager` has the same interface, with streams instead of the thread. Nothing here waits for a network.
One thread at a time may use a Stager; the native thread reads the tensors of a job until the job is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parablock_rt import _C, codec, exits
from parablock_rt.errors import CodecError, ParaBlockError
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, body_layout

ENCODE_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a block, of which `now − ref (+ residual)` is encoded. All tensors are 1-D of one length.

    `residual_out` (fp32) receives the error of the encoding; None discards it.
    """

    now: Tensor
    ref: Tensor
    residual: Tensor | None = None
    residual_out: Tensor | None = None


@dataclass(eq=False)
class _Running:
    """A job and the tensors that the native thread reads until it is done."""

    pieces: list[Piece]
    job: _C.EncodeJob | None = None


class Encoding:
    """A body that is being encoded. Its source may be sent at once: the watermark rises as the chunks get ready.

    Nothing may write the pieces' tensors until `wait` has returned; the stager keeps them alive.
    """

    def __init__(self, job: _C.EncodeJob | _C.DeviceToHost, source: _C.Source, buffer: _C.Buffer, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer = buffer
        self._source: _C.Source | None = source
        self._job = job

    @property
    def source(self) -> _C.Source:
        """The source for the transport to send; not available once the encoding is released."""
        assert self._source is not None
        return self._source

    def wait(self) -> None:
        """Waits until the whole body is encoded. Raises ParaBlockError after 600 s."""
        if not self._job.wait(ENCODE_DEADLINE_S):
            raise ParaBlockError(
                f"expected a block to be encoded within {ENCODE_DEADLINE_S:g} s, found it unfinished; check whether "
                "the machine is suspended or overloaded"
            )

    def before_writing(self) -> bool:
        """Call this before writing one of the pieces' tensors. Returns whether it had to wait."""
        waits = not self.done
        self.wait()
        return waits

    def release_source(self) -> None:
        """Drops the source; a transfer that is already under way keeps its own reference."""
        self._source = None

    @property
    def done(self) -> bool:
        """Whether the whole body is encoded."""
        return self._job.wait(0.0)

    @property
    def body(self) -> Tensor:
        """The packed body, uint8 [nbytes]; complete after `wait`."""
        return as_tensor(self.buffer, self.nbytes)

    @property
    def bad_groups(self) -> int:
        """How many groups were not finite and went out as zeros; valid after `wait`."""
        assert isinstance(self._job, _C.EncodeJob)
        return self._job.bad_groups

    @property
    def span_ns(self) -> tuple[int, int]:
        """When encoding started and ended (monotonic clock); valid after `wait`."""
        return self._job.started_ns, self._job.finished_ns

    @property
    def copy_span_ns(self) -> tuple[int, int]:
        """When copying from a device started and ended; zeros, as a block in host memory needs no copy."""
        return 0, 0


class Landing:
    """Room for a packed body to arrive over the network."""

    def __init__(self, buffer: _C.Buffer, layout: _C.Layout) -> None:
        self.buffer = buffer
        self.layout = layout
        self.watermark: _C.Watermark | None = None  # if set, the transport raises it as the body arrives

    def body(self) -> Tensor:
        """The packed body, uint8 [layout.nbytes], on the device of the block. Call it after all of it has arrived."""
        return as_tensor(self.buffer, self.layout.nbytes)


class Stager:
    """The encode thread and the buffers for blocks in host memory."""

    def __init__(self, ring: _C.Ring | None = None) -> None:
        """`ring`: the encode thread writes a record there for each chunk."""
        self.buffers = BufferPool()
        self._encoder = _C.Encoder(ring)
        self._running: list[_Running] = []
        exits.register(self)

    def __del__(self) -> None:
        self.close()

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
    ) -> Encoding:
        """Starts to encode the pieces, which follow each other in the flat block, into one body. Does not wait.

        `kind`, `round` and `block` name the transfer in the timeline. Raises CodecError for tensors that the codec
        cannot read.
        """
        for piece in pieces:
            check_piece(piece, "cpu")
        numel = sum(piece.now.numel() for piece in pieces)
        nbytes = codec.body_bytes(numel, format)
        buffer = self.buffers.take(nbytes)
        source = transport.native.make_source(buffer, body_layout(format, numel, chunk), False)
        native = [_native(piece) for piece in pieces]
        self._running = [entry for entry in self._running if entry.job is None or not entry.job.wait(0.0)]
        entry = _Running(pieces)
        self._running.append(entry)  # before the native thread may read: keeps the tensors alive if `submit` raises
        entry.job = self._encoder.submit(native, codec.FORMATS.index(format), source, kind, round, block)
        return Encoding(entry.job, source, buffer, nbytes)

    def release_inputs(self, encoding: Encoding) -> bool:
        """Waits until the encoding is done and drops its tensors. Returns whether it had to wait."""
        waits = not encoding.done
        encoding.wait()
        self._running = [entry for entry in self._running if entry.job is not encoding._job]
        return waits

    def release(self, encoding: Encoding) -> None:
        """Takes back the buffer of an encoding, after waiting for it; reuses it once the transport has released it."""
        self.release_inputs(encoding)
        self.buffers.give_back(encoding.buffer)
        encoding.release_source()

    def fit(self, nbytes: int) -> None:
        """From now on every buffer is large enough for any body; no body may be larger than `nbytes`."""
        self.buffers.fit(nbytes)

    def residual(self, numel: int) -> Tensor:
        """An uninitialised fp32 tensor [numel] in host memory, for a residual."""
        return torch.empty(numel, dtype=torch.float32, device="cpu")

    def landing(self, numel: int, format: str, chunk: int) -> Landing:
        """Room for the packed body of a block of `numel` elements."""
        layout = body_layout(format, numel, chunk)
        return Landing(self.buffers.take(layout.nbytes), layout)

    def release_landing(self, landing: Landing) -> None:
        """Takes back a landing whose body has been applied."""
        self.buffers.give_back(landing.buffer)

    def close_at_exit(self) -> None:
        """Called when the program ends without closing the stager."""
        self.close()

    def close(self) -> None:
        """Waits until the native thread no longer reads any tensors."""
        if not self._running or exits.is_inherited(self):
            return
        self._running = [e for e in self._running if e.job is not None and not e.job.wait(ENCODE_DEADLINE_S)]


def check_piece(piece: Piece, device: str) -> None:
    """Raises CodecError unless the weights are on `device` ("cpu" or "cuda"), the residuals in host memory, and all
    tensors have the dtype, shape and layout that `Piece` requires."""
    for tensor, where in (
        (piece.now, device),
        (piece.ref, device),
        (piece.residual, "cpu"),
        (piece.residual_out, "cpu"),
    ):
        if tensor is None:
            continue
        if tensor.device.type != where or tensor.dtype not in codec.DTYPE_CODES:
            raise CodecError(f"expected fp32, bf16 or fp16 on {where}, found {tensor.dtype} on {tensor.device}")
        if tensor.dtype != torch.float32 and (tensor is piece.residual or tensor is piece.residual_out):
            raise CodecError(f"expected a residual in fp32, found {tensor.dtype}")
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != piece.now.numel():
            raise CodecError(
                "expected the tensors of a piece to be 1-D, contiguous and of one length, found shape "
                f"{tuple(tensor.shape)}"
            )


def _native(piece: Piece) -> tuple[int, int, int, int, int, int, int]:
    return (
        piece.now.data_ptr(),
        codec.DTYPE_CODES[piece.now.dtype],
        piece.ref.data_ptr(),
        codec.DTYPE_CODES[piece.ref.dtype],
        0 if piece.residual is None else piece.residual.data_ptr(),
        0 if piece.residual_out is None else piece.residual_out.data_ptr(),
        piece.now.numel(),
    )
