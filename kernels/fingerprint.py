"""Fingerprint: a 64-bit hash of a tensor's bytes, the same for any order of summation, to detect divergence.

    sum over i of z ^ (z >> 29),   z = (word_i + (i + 1) * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9   mod 2^64

Source: the constants and the multiply and xor-shift steps of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable
Pseudorandom Number Generators"), word_i being the i-th little-endian uint32. Does not detect deliberate collisions.
"""

# ruff: noqa: N803 - a compile-time constant of a kernel is written in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common
from .common import kernel

TILE = 8192  # words per program
WARPS = 16

_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)


@kernel("words")
def fingerprint_kernel(words_ptr: tl.tensor, sum_ptr: tl.tensor, words: tl.tensor, TILE: tl.constexpr) -> None:
    """Adds the sum over one tile of words to `sum_ptr`, wrapping around."""
    first = tl.program_id(0).to(tl.int64) * TILE
    at = tl.arange(0, TILE)
    # Only the last tile uses a mask: a mask that may end anywhere would split every access into single words.
    if first + TILE <= words:
        word = tl.load(words_ptr + first + at)
    else:
        word = tl.load(words_ptr + first + at, mask=first + at < words, other=0)
    index = (first + at + 1).to(tl.uint64)
    z = (word.to(tl.uint32, bitcast=True).to(tl.uint64) + index * _STEP) * _FACTOR
    mixed = tl.where(first + at < words, z ^ (z >> 29), 0)
    tl.atomic_add(sum_ptr, tl.sum(mixed, axis=0).to(tl.int64))


def fingerprint_on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The fingerprint of a contiguous `tensor`, as an int64 tensor [1] on its device, without waiting for the device.

    The length must be a multiple of 4 bytes. Raises ValueError.
    """
    common.check_memory(tensor, "tensor")
    size = tensor.numel() * tensor.element_size()
    if size % 4 != 0 or tensor.data_ptr() % 4 != 0:
        raise ValueError(f"tensor: expected a multiple of 4 bytes at an address divisible by 4, found {size} bytes")
    words = tensor.view(-1).view(torch.uint8).view(torch.int32)
    with common.on_device_of(tensor):
        total = common.zero_counter(tensor.device)
        if size > 0:
            fingerprint_kernel[(triton.cdiv(words.numel(), TILE),)](
                words, total, words.numel(), TILE=TILE, num_warps=WARPS, **common.OPTIONS
            )
    return total


def fingerprint(tensor: torch.Tensor) -> int:
    """The 64-bit fingerprint of a contiguous tensor's bytes (a multiple of 4), the same as in `parablock_rt.codec`.


    Waits for the device. Raises ValueError.
    """
    return int(fingerprint_on_device(tensor).item()) % 2**64
