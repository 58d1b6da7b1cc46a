"""From a block in memory to a body on its way: encode jobs, the thread that runs them, and the buffers they fill.

On the CPU a native worker thread stands where a GPU has its pack and copy streams. Nobody here waits for a network.
One thread at a time uses a Stager; the native thread reads the tensors of a job until it is done.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parablock_rt import _C, codec
from parablock_rt.errors import CodecError, ParaBlockError
from parablock_rt.transport import BufferPool, Transport, as_tensor, body_layout

_ENCODE_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a block: `now − ref (+ residual)` is encoded. All 1-D and of one length.

    `residual_out` (fp32) receives what the encoding left out; None: nobody wants to know.
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
    """A body in the making. Its source may be sent at once: the watermark rises as the chunks get ready.

    The pieces' tensors must stay unchanged until `wait` has returned; the stager keeps them alive.
    """

    def __init__(self, job: _C.EncodeJob, source: _C.Source, buffer: _C.Buffer, nbytes: int) -> None:
        self.nbytes = nbytes
        self._source: _C.Source | None = source
        self._buffer = buffer
        self._job = job

    @property
    def source(self) -> _C.Source:
        """What the transport sends. Gone once the encoding is released."""
        assert self._source is not None
        return self._source

    def wait(self) -> None:
        """Returns when the whole body is encoded."""
        if not self._job.wait(_ENCODE_DEADLINE_S):
            raise ParaBlockError(
                f"encoding a block took longer than {_ENCODE_DEADLINE_S:g} s; is the machine suspended?"
            )

    @property
    def done(self) -> bool:
        """Whether the whole body is encoded."""
        return self._job.wait(0.0)

    @property
    def body(self) -> Tensor:
        """The packed body, uint8 [nbytes]; complete after `wait`."""
        return as_tensor(self._buffer, self.nbytes)

    @property
    def bad_groups(self) -> int:
        """Groups that were not finite and went out as zeros; valid after `wait`."""
        return self._job.bad_groups

    @property
    def span_ns(self) -> tuple[int, int]:
        """When encoding began and ended (monotonic clock); valid after `wait`."""
        return self._job.started_ns, self._job.finished_ns


class Stager:
    """The encode thread and the buffers of a process."""

    def __init__(self) -> None:
        self.buffers = BufferPool()
        self._encoder = _C.Encoder()
        self._running: list[_Running] = []

    def __del__(self) -> None:
        for entry in self._running:
            if entry.job is not None:
                entry.job.wait(_ENCODE_DEADLINE_S)

    def encode(self, pieces: list[Piece], format: str, chunk: int, transport: Transport) -> Encoding:
        """Begins to encode the pieces, which follow each other in the flat block, into one body. Does not wait.

        Raises CodecError for tensors that the codec cannot read.
        """
        numel = sum(piece.now.numel() for piece in pieces)
        nbytes = codec.body_bytes(numel, format)
        buffer = self.buffers.take(nbytes)
        source = transport.native.make_source(buffer, body_layout(format, numel, chunk), False)
        native = [_native(piece) for piece in pieces]
        self._running = [entry for entry in self._running if entry.job is None or not entry.job.wait(0.0)]
        entry = _Running(pieces)
        self._running.append(entry)  # before the native thread may read: whatever is raised from here on, they live
        entry.job = self._encoder.submit(native, codec.FORMATS.index(format), source)
        return Encoding(entry.job, source, buffer, nbytes)

    def release(self, encoding: Encoding) -> None:
        """Takes a finished encoding's buffer back; it is used again once the transport has let go of it, too."""
        encoding.wait()
        self.buffers.give_back(encoding._buffer)
        encoding._source = None


def _native(piece: Piece) -> tuple[int, int, int, int, int, int, int]:
    for tensor in (piece.now, piece.ref, piece.residual, piece.residual_out):
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype not in codec.DTYPE_CODES:
            raise CodecError(f"expected fp32, bf16 or fp16 in host memory; found {tensor.dtype} on {tensor.device}")
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != piece.now.numel():
            raise CodecError(
                f"the tensors of a piece must be 1-D, contiguous and of one length; found shape {tuple(tensor.shape)}"
            )
    return (
        piece.now.data_ptr(),
        codec.DTYPE_CODES[piece.now.dtype],
        piece.ref.data_ptr(),
        codec.DTYPE_CODES[piece.ref.dtype],
        0 if piece.residual is None else piece.residual.data_ptr(),
        0 if piece.residual_out is None else piece.residual_out.data_ptr(),
        piece.now.numel(),
    )
