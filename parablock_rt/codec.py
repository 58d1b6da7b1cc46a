"""The codec: packs the change of a block into bytes and back, sums packed blocks exactly, and takes fingerprints.

All functions take flat blocks: 1-D contiguous tensors whose length is a multiple of 128. `encode`, `decode`, `apply_`
and `fingerprint` work where their tensors are: in host memory by native code, on a GPU by `parablock_rt.kernels`. The
kernels run on the current stream, and only reading a fingerprint or `Packed.bad_groups` waits for the device. The
`Accumulator` is for the server and takes host memory only.

The bytes are the same on both, and depend on neither the number of threads nor the instruction set. All arguments are
checked as far as the native code relies on them, except that buffers must not overlap. Knows nothing of models, rounds
or networks, and has no state but that of an `Accumulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from parablock_rt import _C
from parablock_rt.errors import CodecError, ConfigError

FORMATS = ("fp32", "bf16", "int8", "int4")
ALIGNMENT = 128  # elements; every flat length is a multiple
# Each contribution adds at most 2^103 units (below) to a 128-bit sum: 4095 * 2^103 < 2^127. For fp32 and bf16, one pass
# adds up halves of at most 2^51 in 64 bits: 4095 * 2^51 < 2^63. See csrc/codec_sum.h.
MAX_CONTRIBUTIONS = 4095
LARGEST_CONTRIBUTION = 2.0**31  # exclusive bound of weight * |decoded value|
# Every count of tokens or examples is in this range. Outside of it, the sum's resolution divided by the weight, or the
# sum of the weights, could overflow a float, and one client could make the mean infinite for all.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 2.0**-64, 2.0**64

_GROUP = {"int8": 128, "int4": 64}
_CODE_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LARGEST_FP32 = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Packed:
    """One packed block: `body`, a uint8 tensor of `body_bytes` elements, and `bad`, the count behind `bad_groups`.

    `bad` stays on the GPU (int64 [1]) when the block was packed there.
    """

    body: torch.Tensor
    bad: int | torch.Tensor

    @cached_property
    def bad_groups(self) -> int:
        """How many groups (int8, int4) or elements (fp32, bf16) were not finite and are packed as zeros.

        The first access waits for the GPU if the block was packed there.
        """
        return int(self.bad)


def check_format(name: str) -> str:
    """Returns `name` if it is one of `FORMATS`, else raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"expected a format out of {', '.join(FORMATS)}, found {name!r}")
    return name


def group_size(format: str) -> int | None:
    """Elements that share one scale; None for formats without scales."""
    return _GROUP.get(check_format(format))


def scale_bytes(numel: int, format: str) -> int:
    """Bytes of the scales of a block of `numel` elements; they come first in a body. 0 for fp32 and bf16."""
    group = group_size(format)
    _check_length(numel)
    return 0 if group is None else numel // group * 2


def body_bytes(numel: int, format: str) -> int:
    """Bytes of a packed block of `numel` elements (a multiple of 128): scales and codes."""
    return scale_bytes(numel, format) + numel * _CODE_BITS[format] // 8


def encode(
    now: torch.Tensor,
    ref: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    format: str = "int8",
    threads: int | None = None,
    residual_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> Packed:
    """Packs `(now - ref) + residual`; the new residual is the error of the packing.

    Args:
        now: new weights, [numel], fp32, bf16 or fp16.
        ref: reference weights, [numel], fp32, bf16 or fp16 (not necessarily the dtype of `now`).
        residual: the error that earlier packings left, [numel], fp32; None stands for zeros. Updated in place unless
            `residual_out` is given.
        format: one of `FORMATS`.
        threads: number of threads including the caller; `torch.get_num_threads()` if None. Ignored on a GPU.
        residual_out: fp32 [numel] that receives the new residual; `residual` is then only read.
        out: uint8 [body_bytes] to write into; allocated if None.

    Raises:
        CodecError: a tensor has an unexpected dtype, shape, layout or device; or it is on a GPU and triton is missing.
        ConfigError: the format is unknown.
    """
    check_format(format)
    if (gpu := _gpu_codec(now)) is not None:
        with _as_codec_error():
            packed = gpu.encode(now, ref, residual, format=format, residual_out=residual_out, out=out)
            return Packed(body=packed.body, bad=packed.bad)
    count = _threads(threads)
    numel = _check_block(now, "now", DTYPE_CODES)
    _check_block(ref, "ref", DTYPE_CODES, numel)
    if residual is not None:
        _check_block(residual, "residual", (torch.float32,), numel)
    if residual_out is not None:
        _check_block(residual_out, "residual_out", (torch.float32,), numel)
    kept = residual if residual_out is None else residual_out
    body = torch.empty(body_bytes(numel, format), dtype=torch.uint8, device="cpu") if out is None else out
    scales, codes = _planes(body, "out", numel, format)
    bad = _C.encode(
        now.data_ptr(),
        DTYPE_CODES[now.dtype],
        ref.data_ptr(),
        DTYPE_CODES[ref.dtype],
        0 if residual is None else residual.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        numel,
        FORMATS.index(format),
        scales,
        codes,
        count,
    )
    return Packed(body=body, bad=bad)


def decode(body: torch.Tensor, numel: int, *, format: str = "int8", threads: int | None = None) -> torch.Tensor:
    """Returns the change that `body` (uint8, [body_bytes]) holds, as a new fp32 tensor [numel] on the same device.

    Raises CodecError if the body does not fit, ConfigError for an unknown format.
    """
    check_format(format)
    if (gpu := _gpu_codec(body)) is not None:
        with _as_codec_error():
            decoded: torch.Tensor = gpu.decode(body, numel, format=format)
            return decoded
    count = _threads(threads)
    scales, codes = _planes(body, "body", numel, format)
    out = torch.empty(numel, dtype=torch.float32, device="cpu")
    _C.decode(scales, codes, numel, FORMATS.index(format), out.data_ptr(), count)
    return out


def apply_(
    target: torch.Tensor | Sequence[torch.Tensor],
    body: torch.Tensor,
    *,
    format: str = "int8",
    threads: int | None = None,
) -> torch.Tensor | Sequence[torch.Tensor]:
    """Adds the change in `body` to `target` in place. Adds in fp32 and rounds to nearest even in the target's dtype.

    `target` is [numel] in fp32, bf16 or fp16, or several such tensors that follow one another in the block. A sum that
    is NaN is stored as the dtype's positive quiet NaN without payload. Returns `target`. Raises CodecError if an
    argument does not fit, ConfigError for an unknown format.
    """
    check_format(format)
    if (gpu := _gpu_codec(body)) is not None:
        with _as_codec_error():
            gpu.apply_(target, body, format=format)
            return target
    count = _threads(threads)
    parts = [target] if isinstance(target, torch.Tensor) else target
    sizes = [_check_block(part, "target", DTYPE_CODES) for part in parts]
    scales, codes = _planes(body, "body", sum(sizes), format)
    for part, numel in zip(parts, sizes, strict=True):
        _C.apply(part.data_ptr(), DTYPE_CODES[part.dtype], scales, codes, numel, FORMATS.index(format), count)
        scales += scale_bytes(numel, format)
        codes += numel * _CODE_BITS[format] // 8
    return target


@dataclass(frozen=True)
class Contribution:
    """A packed block that `Accumulator.check` accepted. Nobody may write the body until it has been added.

    `bad_groups`: how many groups the encoder marked as not finite.
    """

    body: torch.Tensor = field(repr=False)
    weight: float
    format: str
    bad_groups: int


class Accumulator:
    """The weighted sum of packed blocks in host memory, bit-identical for any order of the contributions.

    The sum of an element is a 128-bit integer in units of 2^-72. Its halves are in two int64 tensors of `numel`
    elements, 16 bytes per element. `fold` reads and writes them once for all contributions held; if all contributions
    are held until `mean`, they are not even allocated. Contributions may have different formats. One thread at a time
    may use it.
    """

    def __init__(self, numel: int, *, threads: int | None = None) -> None:
        """An empty sum over blocks of `numel` elements (a multiple of 128); `threads` as in `encode`."""
        _check_length(numel)
        self.numel = numel
        self._threads = threads
        self._halves: tuple[torch.Tensor, ...] = ()  # upper and lower half; arbitrary while `_settled` is 0
        self._settled = 0
        self._held: list[Contribution] = []
        self._weight = Fraction(0)  # exact, so that the total does not depend on the order
        self.bad_groups = 0  # groups that encoders marked as not finite, over all contributions

    @property
    def contributions(self) -> int:
        """How many contributions are in the sum, held ones included."""
        return self._settled + len(self._held)

    @property
    def total_weight(self) -> float:
        """The sum of the weights, rounded once."""
        return float(self._weight)

    def add(self, body: torch.Tensor, weight: float, format: str = "int8") -> None:
        """Adds `weight` times the change in `body` (uint8, [body_bytes]). An add that raises changes nothing.

        Raises what `check` and `hold` raise.
        """
        self.hold(self.check(body, weight, format))
        self.fold()

    def check(
        self, body: torch.Tensor, weight: float, format: str = "int8", *, inspector: _C.Inspector | None = None
    ) -> Contribution:
        """Checks all of a body (uint8, [body_bytes]), which may come from an untrusted peer.

        `inspector`: has looked at the whole body while it arrived, so that it need not be read again.

        Raises:
            CodecError: the weight is not from 2^-64 to 2^64; the body does not fit or holds values that no encoder
                makes; or a weighted value reaches 2^31.
            ConfigError: the format is unknown.
        """
        scales, codes = _planes(body, "body", self.numel, format)
        weight = float(weight)
        if not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:  # a NaN fails, too
            raise CodecError(f"expected a weight from 2^-64 to 2^64, such as a count of tokens, found {weight}")
        if inspector is not None:
            largest, bad_groups, invalid = inspector.result()
        else:
            kind, count = FORMATS.index(format), _threads(self._threads)
            largest, bad_groups, invalid = _C.inspect(scales, codes, self.numel, kind, count)
        if invalid > 0 or largest > _LARGEST_FP32:
            raise CodecError(
                f"expected a body that an encoder made, found {invalid} impossible values and a largest magnitude of "
                f"{largest:g}; reject this upload"
            )
        if weight * largest >= LARGEST_CONTRIBUTION:
            raise CodecError(
                f"expected weight * |value| below 2^31, found {weight:g} * {largest:g}; use smaller weights or reject "
                "this upload"
            )
        return Contribution(body, weight, format, bad_groups)

    def hold(self, contribution: Contribution) -> None:
        """Counts a checked contribution. Nobody may write its body until `fold` or `reset`.

        Raises CodecError if there would be more than `MAX_CONTRIBUTIONS`.
        """
        if self.contributions == MAX_CONTRIBUTIONS:
            raise CodecError(
                f"expected at most {MAX_CONTRIBUTIONS} contributions to one sum; call reset() or use a second sum"
            )
        self._held.append(contribution)
        self._weight += Fraction(contribution.weight)
        self.bad_groups += contribution.bad_groups

    def fold(self) -> None:
        """Adds all held contributions to the sum, in one pass over it."""
        if not self._held:
            return
        if not self._halves:
            self._halves = tuple(torch.empty(self.numel, dtype=torch.int64, device="cpu") for _ in range(2))
        empty = self._settled == 0
        _C.accumulate(*self._where(), self._natively_held(), self.numel, empty, _threads(self._threads))
        self._settled += len(self._held)
        self._held.clear()

    def mean(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted mean, fp32 [numel], in `out` if given. Held contributions stay held.

        Raises CodecError if there are no contributions or `out` does not fit.
        """
        if self.contributions == 0:
            raise CodecError("expected at least one contribution before mean(), found none; call add() first")
        if out is None:
            out = torch.empty(self.numel, dtype=torch.float32, device="cpu")
        _check_block(out, "out", (torch.float32,), self.numel)
        _C.accumulated_mean(
            *self._where(),
            self._settled == 0,
            self._natively_held(),
            self.total_weight,
            self.numel,
            out.data_ptr(),
            _threads(self._threads),
        )
        return out

    def reset(self) -> None:
        """Empties the sum and keeps its memory."""
        self._weight = Fraction(0)
        self._settled = 0
        self._held.clear()
        self.bad_groups = 0

    def _where(self) -> tuple[int, int]:
        return (self._halves[0].data_ptr(), self._halves[1].data_ptr()) if self._halves else (0, 0)

    def _natively_held(self) -> list[tuple[int, int, int, float]]:
        return [
            (*_planes(one.body, "body", self.numel, one.format), FORMATS.index(one.format), one.weight)
            for one in self._held
        ]


def fingerprint(tensor: torch.Tensor) -> int:
    """A 64-bit fingerprint of a contiguous tensor's bytes (a multiple of 4), for finding divergence.

    It covers neither dtype nor shape, and does not withstand a deliberate collision. Waits for the GPU if the tensor is
    on one. Raises CodecError for a tensor that is not contiguous or of another length.
    """
    return start_fingerprint(tensor)()


def start_fingerprint(tensor: torch.Tensor) -> Callable[[], int]:
    """Like `fingerprint`, of the bytes as they are now. Only calling the result waits for the GPU."""
    if (gpu := _gpu_codec(tensor)) is not None:
        with _as_codec_error():
            total = gpu.fingerprint_on_device(tensor)
        return lambda: int(total.item()) % 2**64
    value = _host_fingerprint(tensor)
    return lambda: value


def _host_fingerprint(tensor: torch.Tensor) -> int:
    _check_memory(tensor, "tensor")
    size = tensor.numel() * tensor.element_size()
    if size % 4 != 0:
        raise CodecError(f"tensor: expected a multiple of 4 bytes, found {size}")
    return _C.fingerprint(tensor.data_ptr(), size, _threads(None))


def kernels() -> Any:
    """`parablock_rt.kernels`, imported at first use, as importing triton takes a second."""
    return import_module("parablock_rt.kernels")


def _gpu_codec(tensor: torch.Tensor) -> Any:
    """The kernels if `tensor` is on a GPU, else None. Raises CodecError for what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise CodecError(f"expected a tensor, found {type(tensor).__name__}")
    return kernels() if tensor.device.type == "cuda" else None


@contextmanager
def _as_codec_error() -> Iterator[None]:
    """Turns the errors of the kernels, which do not import the runtime, and a missing triton into CodecError."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise CodecError(str(error)) from error


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise CodecError(f"expected at least 1 thread, found {threads}")
    return threads


def _check_length(numel: int) -> None:
    if numel < 0 or numel % ALIGNMENT != 0:
        raise CodecError(f"expected a length that is a multiple of {ALIGNMENT}, found {numel}; pad the flat block")


def _check_memory(tensor: torch.Tensor, name: str) -> None:
    if tensor.device.type != "cpu":
        raise CodecError(
            f"{name}: expected host memory, found it on {tensor.device}; put all tensors of a call on one device, or "
            "call .cpu() if only host memory is supported"
        )
    if not tensor.is_contiguous():
        raise CodecError(f"{name}: expected contiguous memory, found strides {tensor.stride()}; call .contiguous()")


def _check_block(
    tensor: torch.Tensor, name: str, dtypes: dict[torch.dtype, int] | tuple[torch.dtype, ...], numel: int | None = None
) -> int:
    _check_memory(tensor, name)
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise CodecError(f"{name}: expected dtype {expected}, found {found}; convert it with .to(...)")
    if tensor.dim() != 1:
        raise CodecError(f"{name}: expected one dimension, found shape {tuple(tensor.shape)}; pass the flat block")
    if numel is not None and tensor.numel() != numel:
        raise CodecError(f"{name}: expected {numel} elements like the other tensors, found {tensor.numel()}")
    _check_length(tensor.numel())
    return tensor.numel()


def _planes(body: torch.Tensor, name: str, numel: int, format: str) -> tuple[int, int]:
    """The addresses of a body's scales and codes, after checking that it has room for both."""
    expected = body_bytes(numel, format)
    _check_memory(body, name)
    if body.dtype != torch.uint8 or body.dim() != 1:
        raise CodecError(
            f"{name}: expected a 1-D uint8 tensor, found {str(body.dtype).removeprefix('torch.')} of shape "
            f"{tuple(body.shape)}"
        )
    if body.numel() != expected:
        raise CodecError(
            f"{name}: expected {expected} bytes for {numel} elements as {format}, found {body.numel()}; check format "
            "and length"
        )
    start = body.data_ptr()
    return start, start + scale_bytes(numel, format)
