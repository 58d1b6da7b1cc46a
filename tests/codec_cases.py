"""Inputs for the codec tests: bit patterns that a careless codec gets wrong, and the way between NumPy and torch.

Holds no expectation of what the codec answers; those are in `codec_statement` and in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import codec_statement as statement
import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]

FORMATS = statement.FORMATS
DTYPES = ("fp32", "bf16", "fp16")
NUMPY = {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "fp16": np.dtype(np.float16)}

BLOCK = 128  # the shortest length a block can have
FLT_MAX = 0x7F7FFFFF
ZERO_EDGE = 27 << 23  # the bits of 2**-100, the largest magnitude of a zero group


def to_torch(values: Array) -> torch.Tensor:
    """A tensor with the same bits; uint16 becomes bfloat16."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.copy().view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def to_numpy(tensor: torch.Tensor) -> Array:
    """An array with the same bits; bfloat16 becomes uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16).copy()
    return tensor.numpy().copy()


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def to_body(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _signs(rng: np.random.Generator) -> Array:
    return rng.choice(np.array([0, 0x80000000], dtype=np.uint32), BLOCK)


def _gauss(rng: np.random.Generator) -> Array:
    return statement.bits(rng.standard_normal(BLOCK) * 10.0 ** rng.integers(-12, 4))


def _raw(rng: np.random.Generator) -> Array:
    return rng.integers(0, 1 << 32, BLOCK, dtype=np.uint32)


def _wide(rng: np.random.Generator) -> Array:
    """Finite values of every exponent."""
    return rng.integers(0, FLT_MAX + 1, BLOCK, dtype=np.uint32) | _signs(rng)


def _ties(rng: np.random.Generator) -> Array:
    """Halves of a step that is a power of two, for int8 (largest 127 steps) and for int4 (largest 8)."""
    top = float(rng.choice([127, 8]))
    steps = rng.integers(-int(top), int(top), BLOCK) + 0.5
    steps[[3, 70]] = top * rng.choice([-1, 1])
    return statement.bits(steps * 2.0 ** rng.integers(-90, 100))


def _near_ties(rng: np.random.Generator) -> Array:
    """Ties of a step that is no power of two, and their neighbours on both sides."""
    step = statement.floats(np.array([rng.integers(0x3C00, 0x4200) << 16], dtype=np.uint32))[0]
    top = int(rng.choice([127, 8]))
    steps = rng.integers(-top, top, BLOCK) + np.float32(0.5)
    steps[[3, 70]] = -top
    pattern = statement.bits(steps.astype(np.float32) * step)
    pattern += rng.integers(-2, 3, BLOCK).astype(np.uint32)
    pattern[[3, 70]] = statement.bits(np.array([-top * step], dtype=np.float32))
    return pattern


def _subnormal(rng: np.random.Generator) -> Array:
    return rng.integers(0, 1 << 23, BLOCK, dtype=np.uint32) | _signs(rng)


def _huge(rng: np.random.Generator) -> Array:
    pattern = rng.integers(0x7F000000, FLT_MAX + 1, BLOCK, dtype=np.uint32)
    pattern[rng.integers(0, BLOCK, 8)] = FLT_MAX
    return pattern | _signs(rng)


def _bf16_limit(rng: np.random.Generator) -> Array:
    """Both sides of where rounding to bf16 overflows."""
    return rng.integers(0x7F7F7FF0, 0x7F7F8010, BLOCK, dtype=np.uint32) | _signs(rng)


def _negative(rng: np.random.Generator) -> Array:
    return _gauss(rng) | np.uint32(0x80000000)


def _zero(rng: np.random.Generator) -> Array:
    return _signs(rng)


def _sparse(rng: np.random.Generator) -> Array:
    """Zeros of both signs among other values; the sign of a zero residual is part of its bits."""
    return np.where(rng.random(BLOCK) < 0.5, _gauss(rng), _signs(rng))


def _zero_edge(rng: np.random.Generator) -> Array:
    pattern = rng.integers(0, ZERO_EDGE, BLOCK, dtype=np.uint32)
    pattern[[5, 90]] = ZERO_EDGE + rng.integers(-1, 2, 2)
    return pattern | _signs(rng)


def _equal(rng: np.random.Generator) -> Array:
    """One magnitude, both signs: int4 must choose the positive side."""
    return np.full(BLOCK, rng.integers(ZERO_EDGE, FLT_MAX), dtype=np.uint32) | _signs(rng)


def _one_nan(rng: np.random.Generator) -> Array:
    pattern = _gauss(rng)
    pattern[rng.integers(0, BLOCK)] = 0x7F800000 + rng.integers(1, 1 << 23)
    return pattern ^ _signs(rng)


def _one_inf(rng: np.random.Generator) -> Array:
    pattern = _gauss(rng)
    pattern[rng.integers(0, BLOCK)] = 0x7F800000
    return pattern ^ _signs(rng)


KINDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "gauss": _gauss,
    "raw": _raw,
    "wide": _wide,
    "ties": _ties,
    "near_ties": _near_ties,
    "subnormal": _subnormal,
    "huge": _huge,
    "bf16_limit": _bf16_limit,
    "negative": _negative,
    "zero": _zero,
    "sparse": _sparse,
    "zero_edge": _zero_edge,
    "equal": _equal,
    "one_nan": _one_nan,
    "one_inf": _one_inf,
}


def pattern(kinds: list[str], seed: int, dtype: str) -> Array:
    """128 elements a kind. In 16-bit types `raw` is raw bits of that type, the other kinds are rounded to it."""
    rng = np.random.default_rng(seed)
    pieces = []
    for kind in kinds:
        piece = KINDS[kind](rng)
        if kind == "raw" and dtype != "fp32":
            pieces.append(piece.astype(np.uint16).view(NUMPY[dtype]))
        else:
            pieces.append(statement.narrow(statement.floats(piece), NUMPY[dtype]))
    return np.concatenate(pieces)


@st.composite
def blocks(draw: st.DrawFn, dtype: str, kinds: tuple[str, ...] = tuple(KINDS), longest: int = 32) -> Array:
    """A flat block of `dtype`, 128 to 128 * `longest` elements."""
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=longest))
    return pattern(chosen, draw(st.integers(0, 1 << 32)), dtype)


@st.composite
def changes(draw: st.DrawFn, now_dtype: str, ref_dtype: str) -> tuple[Array, Array, Array | None]:
    """(now, ref, residual): now is a pattern, the others zero (so that x is the pattern), near to it, or patterns."""
    now = draw(blocks(now_dtype))
    kinds = ["zero"] * (now.size // BLOCK)
    how = draw(st.sampled_from(["zero", "near", "pattern"]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    if how == "zero":
        ref = np.zeros(now.size, dtype=NUMPY[ref_dtype])
    elif how == "near":
        with np.errstate(all="ignore"):
            near = statement.widen(now) * (1 + 0.01 * rng.standard_normal(now.size)).astype(np.float32)
        ref = statement.narrow(near, NUMPY[ref_dtype])
    else:
        ref = pattern([str(rng.choice(list(KINDS))) for _ in kinds], int(rng.integers(1 << 32)), ref_dtype)
    left = draw(st.sampled_from(["none", "zero", "finite", "pattern"]))
    if left == "none":
        return now, ref, None
    if left == "zero":
        return now, ref, pattern(kinds, 0, "fp32")
    choice = ["gauss", "wide", "subnormal"] if left == "finite" else list(KINDS)
    return now, ref, pattern([str(rng.choice(choice)) for _ in kinds], int(rng.integers(1 << 32)), "fp32")
