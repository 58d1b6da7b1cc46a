"""One GPU as staging sees it: memory, streams besides the training stream, and the encode kernel on one of them.

The only module of the runtime that launches kernels on its own stream. Only the training thread may use it. Tests
replace it by a device whose streams are threads.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from parablock_rt import _C, codec

# The size of one device-to-host copy: long compared with the microsecond between two copies, short compared with the
# network's buffers.
COPY_BYTES = 4 << 20

_compiling = threading.Lock()  # clients in threads of one process, as in tests, would all compile the same kernels


class CudaDevice:
    """A CUDA device with its copy streams."""

    type = "cuda"

    def __init__(self, device: torch.device) -> None:
        """Makes the streams. Raises DeviceError when the driver cannot be used."""
        self.driver = _C.Driver()
        with torch.cuda.device(device):
            # The first use makes the context that owns the streams. A tensor's device always has an index.
            self.device = torch.zeros(1, device=device).device
            self.native = _C.Device(self.driver, COPY_BYTES)
        self._warm = False
        self._pack: torch.cuda.Stream = torch.cuda.ExternalStream(self.native.pack, device=device)  # type: ignore[no-untyped-call]

    def training_stream(self) -> int:
        """The handle of the stream that this thread currently trains on."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, for use by work queued on the training stream from now on."""
        return torch.empty(numel, dtype=dtype, device=self.device)

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
        """Queues one launch of the encode kernel on the pack stream; returns its counter of bad groups: `bad` if given,
        else a new one."""
        kernels = codec.kernels()
        with torch.cuda.stream(self._pack):
            packed = kernels.encode(now, ref, residual, format=format, residual_out=residual_out, out=out, bad=bad)
        counted: Tensor = packed.bad
        return counted

    def warm_up(self, kinds: set[tuple[torch.dtype, torch.dtype]], format: str) -> None:
        """Compiles the kernels of a round for blocks of these dtypes (trained, reference), so that no round waits for
        it, and makes the counters of the pack stream, so that no hand-over allocates them.

        Covers bodies with both alignments of the scales, as in a whole slice and in the last slice of a block, and
        encoding with and without a residual from earlier rounds (fp32 has no residual).
        """
        with _compiling, torch.cuda.device(self.device):
            for now_dtype, ref_dtype in sorted(kinds, key=str):
                for numel in (codec.ALIGNMENT, 8 * codec.ALIGNMENT):
                    now = torch.zeros(numel, dtype=now_dtype, device=self.device)
                    ref = torch.zeros(numel, dtype=ref_dtype, device=self.device)
                    rest = None if format == "fp32" else torch.zeros(numel, dtype=torch.float32, device=self.device)
                    packed = codec.encode(now, ref, None, format=format, residual_out=rest)
                    if rest is not None:
                        codec.encode(now, ref, rest, format=format)
                    codec.apply_(ref, packed.body, format=format)
                    codec.fingerprint(ref)
            with torch.cuda.stream(self._pack):
                codec.kernels().common.make_counters(self.device)
            self._warm = True

    def close(self) -> None:
        """Waits until the streams are idle, then destroys them."""
        if self._warm:  # else the kernels may not even be importable
            self._warm = False  # once only: a stream made later may reuse this stream's handle
            codec.kernels().common.drop_counters(self.native.pack)
        self.native.close()
