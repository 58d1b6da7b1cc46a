"""What all kernels share: the layout of a packed body, checks of arguments, and the arithmetic of single values.

Kernels read and write memory as integers (bf16 and fp16 as int16, fp32 as int32) and convert them to numbers here: no
kernel computes in bf16, and a NaN keeps or gets the bits that the codec prescribes. Do not use `/`, `tl.max` on
floating-point numbers or conversion to bf16: each of them gives other bits on some path. Must not import the runtime.
"""

# ruff: noqa: N803, N806 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

FORMATS = ("fp32", "bf16", "int8", "int4")
ALIGNMENT = 128  # elements; every flat length is a multiple of it
BAD_SCALE = tl.constexpr(0x7FC0)  # the scale of a group that was not finite

# Triton has no type hints, so a kernel is Any to a type checker.
jit: Callable[[Callable[..., Any]], Any] = triton.jit


def kernel(*unspecialised: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` that does not specialise the named arguments: their values never cause another compilation."""
    jitted: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(unspecialised))
    return jitted


# A fused multiply-add would change bytes.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

# Under the interpreter kernels run on the CPU. Triton reads the variable when it defines a kernel, so one read is safe.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_INFINITY = tl.constexpr(0x7F800000)
_CODE_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHT_DTYPES = tuple(_KINDS)
_POOL_SLOTS = 512
# Re-entrant: allocating a pool can trigger garbage collection, whose finalizers may call drop_counters on this thread.
_pools_lock = threading.RLock()
_pools: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


# ---- layout


def group_of(format: str) -> int:
    """Elements per group: 64 for int4, else 128 (fp32 and bf16 have no scales, but are cut into groups too)."""
    return 64 if format == "int4" else 128


def scale_bytes(numel: int, format: str) -> int:
    """Bytes of the scales of a block of `numel` elements. In a body the scales come first."""
    return numel // group_of(format) * 2 if format in ("int8", "int4") else 0


def body_bytes(numel: int, format: str) -> int:
    """Bytes of a packed block of `numel` elements (a multiple of 128): scales and codes."""
    return scale_bytes(numel, format) + numel * _CODE_BITS[format] // 8


def empty_body(numel: int, *, format: str, device: torch.device | str) -> torch.Tensor:
    """An uninitialised uint8 body [body_bytes] whose codes start at a multiple of 16 bytes.

    The codes follow the scales without a gap, so a body at an aligned address has misaligned codes unless `numel` is a
    multiple of 1024. Here only the scales, a sixty-fourth of the bytes, may be misaligned. Raises ValueError.
    """
    check_format(format)
    check_length(numel)
    size, scales = body_bytes(numel, format), scale_bytes(numel, format)
    memory = torch.empty(size + 16, dtype=torch.uint8, device=device)
    start = -(memory.data_ptr() + scales) % 16
    return memory[start : start + size]


def planes(body: torch.Tensor, name: str, numel: int, format: str) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """A body's scales (int16; None for fp32 and bf16), its codes in words, and the number of elements per word.

    The words of int8 and int4 are int32 if the address allows it, else int16.
    """
    expected = body_bytes(numel, format)
    check_memory(body, name)
    if body.dtype != torch.uint8 or body.dim() != 1 or body.numel() != expected:
        raise ValueError(
            f"{name}: expected a 1-D uint8 tensor of {expected} bytes for {numel} elements as {format}, found "
            f"{body.dtype} of shape {tuple(body.shape)}; check format and length"
        )
    least = 4 if format == "fp32" else 2
    if body.data_ptr() % least or body.storage_offset() % least:
        raise ValueError(f"{name}: expected an address that is a multiple of {least}; allocate it with empty_body()")
    split = scale_bytes(numel, format)
    codes = body[split:]
    if format == "fp32":
        return None, codes.view(torch.int32), 1
    if format == "bf16":
        return None, codes.view(torch.int16), 1
    wide = codes.data_ptr() % 4 == 0 and codes.storage_offset() % 4 == 0
    words = codes.view(torch.int32 if wide else torch.int16)
    return body[:split].view(torch.int16), words, words.element_size() * 8 // _CODE_BITS[format]


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width, outside of autograd."""
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


# ---- checks


def check_format(format: str) -> None:
    """Raise ValueError unless `format` is one of FORMATS."""
    if format not in FORMATS:
        raise ValueError(f"expected a format out of {', '.join(FORMATS)}; found {format!r}")


def check_length(numel: int) -> None:
    """Raise ValueError unless `numel` is a multiple of 128."""
    if numel < 0 or numel % ALIGNMENT != 0:
        raise ValueError(f"expected a length that is a multiple of {ALIGNMENT}, found {numel}; pad the flat block")


def check_memory(tensor: torch.Tensor, name: str) -> None:
    """Raise ValueError unless a kernel can reach the tensor as one run of memory."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{name}: expected a CUDA tensor, found one on {tensor.device}; use parablock_rt.codec there")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, found strides {tensor.stride()}; call .contiguous()")


def check_block(tensor: torch.Tensor, name: str, dtypes: Sequence[torch.dtype], numel: int | None = None) -> int:
    """The length of a flat block. Raises ValueError if it has another dtype, shape or layout than expected."""
    check_memory(tensor, name)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected a dtype out of {', '.join(map(str, dtypes))}; found {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, found shape {tuple(tensor.shape)}; pass the flat block")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements like the other tensors, found {tensor.numel()}")
    check_length(tensor.numel())
    return tensor.numel()


def check_device(first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: expected it on {first.device} like the other tensors, found {tensor.device}")


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, because Triton launches on the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def kind_of(tensor: torch.Tensor) -> str:
    """How `widen` is to read the bits of a tensor: "fp32", "bf16" or "fp16"."""
    return _KINDS[tensor.dtype]


def zero_counter(device: torch.device) -> torch.Tensor:
    """A new int64 [1] that holds 0, usually without a launch of its own.

    Slots come from a pool that is zeroed once, on the stream that will use them, hence a pool per stream. Each slot
    begins at a multiple of 16 bytes: Triton would compile the kernel once more for a pointer that does not.
    Not for capture in a CUDA graph: every replay would go on counting in the captured slot.
    """
    with _pools_lock:
        return _pool(device).pop()


def make_counters(device: torch.device) -> None:
    """Makes the current stream's pool of counters unless the stream has one, so that later calls allocate nothing."""
    with _pools_lock:
        _pool(device)


def drop_counters(stream: int) -> None:
    """Releases the pool of a stream that ends; counters in use stay valid."""
    with _pools_lock:
        for key in list(_pools):
            if key[1] == stream:
                _pools.pop(key, None)


def _pool(device: torch.device) -> list[torch.Tensor]:
    """The current stream's counters, at least one. The caller holds the lock."""
    pool = _pools.setdefault((device, stream_of(device)), [])
    if not pool:
        zeros = torch.zeros(_POOL_SLOTS, 2, dtype=torch.int64, device=device)
        pool.extend(slot[:1] for slot in zeros)
    return pool


def stream_of(device: torch.device) -> int:
    """The stream that this thread launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


# ---- single values, in kernels


@jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """The fp32 value of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@jit
def bits_of(value: tl.tensor) -> tl.tensor:
    """The int32 bits of an fp32 value."""
    return value.to(tl.int32, bitcast=True)


@jit
def widen(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The fp32 value of the bits of an fp32 (int32), bf16 or fp16 (int16). Exact."""
    if KIND == "fp32":
        value = float_of(bits)
    elif KIND == "bf16":
        value = float_of(bits.to(tl.int32) << 16)
    else:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@jit
def rounded_to_bf16(bits: tl.tensor) -> tl.tensor:
    """The bits of an fp32 that is not NaN, rounded to the nearest (even) bf16, as the bits of an fp32."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@jit
def narrow(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The bits of an fp32 value rounded to KIND; any NaN becomes the quiet positive NaN without payload."""
    bits = bits_of(value)
    nan = (bits & 0x7FFFFFFF) > _INFINITY
    if KIND == "fp32":
        result = tl.where(nan, 0x7FC00000, bits)
    elif KIND == "bf16":
        result = (tl.where(nan, 0x7FC00000, rounded_to_bf16(bits)) >> 16).to(tl.int16)
    else:
        half = value.to(tl.float16).to(tl.int16, bitcast=True)
        result = tl.where(nan, 0x7E00, half.to(tl.int32)).to(tl.int16)
    return result


@jit
def load_codes(
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The codes, int32 [rows, GROUP], and the scales, fp32 [rows], of the int8 or int4 groups `first + rows`.

    A scale that is not finite reads as +0, and the codes of its group read as 0.
    """
    BITS: tl.constexpr = 8 if FORMAT == "int8" else 4
    WORDS: tl.constexpr = GROUP // WORD
    scale = tl.load(scales_ptr + first + rows, mask=inside, other=0).to(tl.int32) << 16
    finite = (scale & _INFINITY) != _INFINITY
    scale = tl.where(finite, scale, 0)
    at = rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(codes_ptr + first * WORDS + at, mask=inside[:, None], other=0).to(tl.int32)
    words = tl.where(finite[:, None], words, 0)
    # Shift each code up to the top of the register and down again: the second shift extends the sign.
    up = (32 - BITS) - tl.arange(0, WORD) * BITS
    code = (words[:, :, None] << up[None, None, :]) >> (32 - BITS)
    return tl.reshape(code, (rows.shape[0], GROUP)), float_of(scale)


@jit
def load_change(
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """d = code * scale of the groups `first + rows`, fp32 [rows, GROUP].

    A group whose scale is not finite decodes to +0 whatever its codes are, as does an fp32 or bf16 code that is not
    finite.
    """
    if FORMAT == "int8" or FORMAT == "int4":
        code, scale = load_codes(scales_ptr, codes_ptr, first, rows, inside, FORMAT, WORD, GROUP)
        value = code.to(tl.float32) * scale[:, None]
    else:
        at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        bits = tl.load(codes_ptr + first * GROUP + at, mask=inside[:, None], other=0).to(tl.int32)
        if FORMAT == "bf16":
            bits = bits << 16
        value = float_of(tl.where((bits & _INFINITY) != _INFINITY, bits, 0))
    return value
