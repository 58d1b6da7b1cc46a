"""What the codec must do, stated in NumPy: the oracle of the codec tests.

Written from the definition of the format alone and meant to be read next to it. It shares nothing with the native
code or the GPU kernels, imports neither, and must stay that way: its worth is its independence. Speed is no goal.

Arrays are 1-D. `numpy.float32` and `numpy.float16` stand for fp32 and fp16; `numpy.uint16` holds the bits of bf16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUP = {"int8": 128, "int4": 64}
BAD_SCALE = 0x7FC0
ZERO_GROUP = np.float32(2.0**-100)

UNIT = 2.0**-72


def bits(x: Array) -> Array:
    """The bit patterns of fp32 values."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def floats(pattern: Array) -> Array:
    """The fp32 values of bit patterns."""
    return np.ascontiguousarray(pattern, dtype=np.uint32).view(np.float32)


def widen(values: Array) -> Array:
    """fp32, fp16 or bf16 (as uint16) to fp32; exact."""
    if values.dtype == np.uint16:
        return floats(values.astype(np.uint32) << np.uint32(16))
    return values.astype(np.float32)


def to_bf16(x: Array) -> Array:
    """fp32 to bf16 bits, nearest even, on integers. A NaN stays a NaN (quiet), whatever its payload."""
    b = bits(x)
    rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (b >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """fp32 to fp32, fp16 or bf16 (as uint16), nearest even; too large becomes infinite."""
    if dtype == np.uint16:
        return to_bf16(x)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def change(now: Array, ref: Array, residual: Array | None) -> Array:
    """x = (now - ref) + residual, in fp32, in that order."""
    with np.errstate(all="ignore"):
        x = widen(now) - widen(ref)
        return x if residual is None else x + residual


def body_bytes(numel: int, format: str) -> int:
    if format in GROUP:
        return 2 * (numel // GROUP[format]) + (numel if format == "int8" else numel // 2)
    return numel * {"fp32": 4, "bf16": 2}[format]


def encode(now: Array, ref: Array, residual: Array | None, format: str) -> tuple[bytes, Array, int]:
    """Body, new residual (fp32) and the number of bad groups (int8, int4) or bad elements (fp32, bf16)."""
    x = change(now, ref, residual)
    if format in GROUP:
        return _encode_groups(x, format)
    return _encode_elements(x, format)


def _encode_elements(x: Array, format: str) -> tuple[bytes, Array, int]:
    zero = np.float32(0)
    sent = x if format == "fp32" else widen(to_bf16(x))
    bad = ~np.isfinite(sent)  # also catches a finite x that rounds to a bf16 infinity
    decoded = np.where(bad, zero, sent)
    residual = np.where(bad, zero, x) - decoded
    codes = decoded.astype("<f4") if format == "fp32" else (bits(decoded) >> np.uint32(16)).astype("<u2")
    return codes.tobytes(), residual, int(bad.sum())


def _encode_groups(x: Array, format: str) -> tuple[bytes, Array, int]:
    groups = x.reshape(-1, GROUP[format])
    magnitude = bits(groups) & np.uint32(0x7FFFFFFF)
    largest = floats(magnitude.max(axis=1))
    bad = ~np.isfinite(largest)
    zero = ~bad & (largest <= ZERO_GROUP)
    plain = ~bad & ~zero

    # Rows that are not plain get stand-ins here; what they compute is never used.
    y = np.where(plain[:, None], groups, np.float32(1))
    if format == "int8":
        step = np.abs(y).max(axis=1) / np.float32(127)
        low, high = -127, 127
    else:
        top, bottom = y.max(axis=1), (-y).max(axis=1)
        step = np.where(top >= bottom, top, -bottom) / np.float32(-8)
        low, high = -8, 7
    sign = bits(step) & np.uint32(0x80000000)
    up = ((bits(step) & np.uint32(0x7FFFFFFF)) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    scale = floats(sign | up)
    inverse = np.float32(1) / scale
    codes = np.clip(np.rint(y * inverse[:, None]), low, high).astype(np.int8)

    codes = np.where(plain[:, None], codes, np.int8(0))
    scale_bits = np.where(plain, bits(scale) >> np.uint32(16), np.where(bad, np.uint32(BAD_SCALE), np.uint32(0)))
    with np.errstate(all="ignore"):
        left = groups - codes.astype(np.float32) * scale[:, None]
    residual = np.where(plain[:, None], left, np.where(zero[:, None], groups, np.float32(0)))
    body = scale_bits.astype("<u2").tobytes() + _pack_codes(codes, format)
    return body, residual.reshape(-1), int(bad.sum())


def _pack_codes(codes: Array, format: str) -> bytes:
    if format == "int8":
        return codes.tobytes()
    nibbles = codes.reshape(-1).view(np.uint8) & np.uint8(0xF)
    return (nibbles[0::2] | (nibbles[1::2] << np.uint8(4))).tobytes()


def split(body: bytes, numel: int, format: str) -> tuple[Array, Array]:
    """The planes of an int8 or int4 body: scales as bf16 bits (one per group) and codes as int8 (one per element)."""
    assert len(body) == body_bytes(numel, format)
    count = numel // GROUP[format]
    scales = np.frombuffer(body, dtype="<u2", count=count)
    packed = np.frombuffer(body, dtype=np.uint8, offset=2 * count)
    if format == "int8":
        return scales, packed.view(np.int8)
    nibbles = np.stack([packed & np.uint8(0xF), packed >> np.uint8(4)], axis=1).reshape(-1).astype(np.int8)
    return scales, np.where(nibbles >= 8, nibbles - np.int8(16), nibbles).astype(np.int8)


def decode(body: bytes, numel: int, format: str) -> Array:
    """The fp32 values that a body stands for."""
    if format == "fp32":
        return np.frombuffer(body, dtype="<f4").astype(np.float32)
    if format == "bf16":
        return widen(np.frombuffer(body, dtype="<u2").astype(np.uint16))
    scales, codes = split(body, numel, format)
    bad = scales == BAD_SCALE
    scale = np.where(bad, np.float32(0), widen(scales.astype(np.uint16)))
    with np.errstate(over="ignore"):
        values = codes.reshape(-1, GROUP[format]).astype(np.float32) * scale[:, None]
    return np.where(bad[:, None], np.float32(0), values).reshape(-1)


def inspect(body: bytes, numel: int, format: str) -> tuple[float, int, int]:
    """The largest |code * scale| of groups with a finite scale (fp32, bf16: of finite elements), in double; the bad
    groups; and how many scales, codes or elements no encoder makes."""
    if format not in GROUP:
        values = decode(body, numel, format)
        finite = np.isfinite(values)
        return float(np.abs(values[finite]).max(initial=0)), 0, int((~finite).sum())
    scales, codes = split(body, numel, format)
    values = widen(scales.astype(np.uint16))
    finite, bad = np.isfinite(values), scales == BAD_SCALE
    sizes = np.abs(codes.astype(np.int64)).reshape(-1, GROUP[format]).max(axis=1)
    invalid = (~finite & ~bad).sum()
    if format == "int8":
        invalid += (codes == -128).sum() + (finite & (scales >= 0x8000)).sum()
    largest = np.where(finite, np.abs(values), np.float32(0)).astype(np.float64) * sizes
    return float(largest.max(initial=0)), int(bad.sum()), int(invalid)


def apply(target: Array, body: bytes, format: str) -> Array:
    """round(float(target) + decode(body)) in the dtype of `target`."""
    with np.errstate(all="ignore"):
        total = widen(target) + decode(body, target.size, format)
    return narrow(total, target.dtype)


class Accumulator:
    """The sum in units of 2^-72, in Python integers that cannot overflow."""

    def __init__(self, numel: int) -> None:
        self.units = [0] * numel
        self.weights: list[float] = []

    def add(self, body: bytes, weight: float, format: str) -> None:
        """A factor is rounded to units once: of a group, which its codes multiply, or of an element."""
        weight = float(weight)
        numel = len(self.units)
        if format in GROUP:
            scales, codes = split(body, numel, format)
            values = np.where(scales == BAD_SCALE, np.float32(0), widen(scales.astype(np.uint16)))
            factors = [round(weight * float(scale) / UNIT) for scale in values]  # ties to even
            added = [int(code) * factors[i // GROUP[format]] for i, code in enumerate(codes)]
        else:
            added = [round(weight * float(value) / UNIT) for value in decode(body, numel, format)]
        self.units = [before + more for before, more in zip(self.units, added, strict=True)]
        self.weights.append(weight)

    @property
    def hi(self) -> list[int]:
        """The upper 64 bits of each sum in two's complement."""
        return [units >> 64 for units in self.units]

    @property
    def lo(self) -> list[int]:
        """The lower 64 bits, as a number with a sign."""
        return [(units + 2**63) % 2**64 - 2**63 for units in self.units]

    def mean(self) -> Array:
        total = math.fsum(self.weights)
        upper = [(units - lo) >> 64 for units, lo in zip(self.units, self.lo, strict=True)]
        sums = np.array([float(h) * (2**64 * UNIT) + float(lo) * UNIT for h, lo in zip(upper, self.lo, strict=True)])
        return (sums / total).astype(np.float32)


def fingerprint(data: bytes) -> int:
    """sum over i of mix(word_i, i) mod 2^64, over the little-endian 32-bit words of `data`."""
    words = np.frombuffer(data, dtype="<u4").astype(np.uint64)
    index = np.arange(1, words.size + 1, dtype=np.uint64)
    z = (words + index * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return int((z ^ (z >> np.uint64(29))).sum(dtype=np.uint64))
