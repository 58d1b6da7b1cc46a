"""The cases of `bench.kernels`: the codec's operations over blocks on a GPU, in Triton and in torch, and a copy.

Importing this module imports the kernels, which fixes whether they are compiled or interpreted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from parablock_rt import codec, kernels

from . import eager

FORMATS = ("int8", "int4")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The dtypes of `now` and `ref`: the weights themselves, or the fp32 masters of bf16 weights.
PAIRS = {name: (dtype, dtype) for name, dtype in DTYPES.items()} | {"fp32-bf16": (torch.float32, torch.bfloat16)}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

Tiles = Sequence[tuple[int, int]]  # elements per program, warps per program


def tile_name(elements: int, warps: int) -> str:
    """The name of a tile in results."""
    return f"{elements} x {warps}"


@dataclass(frozen=True)
class Case:
    """An operation to time: `run(i)` is one pass over the i-th set of buffers."""

    name: str
    by: str  # "copy", "kernel", "eager", "compile", or a tile and its warps
    bytes_per_param: float
    sets: int
    run: Callable[[int], object]


def sets_for(bytes_per_set: float) -> int:
    """The number of sets of buffers that together have four times the size of the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0
    return max(1, math.ceil(4 * cache / bytes_per_set))


@dataclass(frozen=True)
class Work:
    """One pass of a codec operation over a block, with each of its implementations."""

    operation: str  # the kernel's module
    name: str
    params: int
    bytes_per_param: float
    sets: int
    kernel: Callable[[int], object]
    eager: Callable[..., object]
    arguments: Callable[[int], tuple[object, ...]]  # of `eager`

    def by(self, name: str, run: Callable[[int], object]) -> Case:
        """The case for one implementation. Each set keeps its last result: what a pass allocates rotates, too."""
        kept: list[object] = [None] * self.sets

        def keeping(i: int) -> None:
            kept[i] = run(i)

        return Case(self.name, name, self.bytes_per_param, self.sets, keeping)

    def cases(self, beside_torch: bool, tiles: Tiles) -> Iterator[Case]:
        """The kernel in its default tile and in `tiles`; with `beside_torch` also torch, eager and (on a GPU) compiled
        once for all sets of buffers."""
        yield self.by("kernel", self.kernel)
        yield from self.in_tiles(tiles)
        if not beside_torch:
            return
        yield self.by("eager", lambda i: self.eager(*self.arguments(i)))
        if GPU:
            torch.compiler.reset()
            compiled = torch.compile(self.eager, dynamic=False)
            yield self.by("compile", lambda i: compiled(*self.arguments(i)))

    def in_tiles(self, tiles: Tiles) -> Iterator[Case]:
        """The kernel in each of these tiles; restores the default tile afterwards."""
        module: Any = import_module(f"parablock_rt.kernels.{self.operation}")
        own = module.TILE, module.WARPS
        try:
            for module.TILE, module.WARPS in tiles:
                yield self.by(tile_name(module.TILE, module.WARPS), self.kernel)
        finally:
            module.TILE, module.WARPS = own


def encode_work(params: int, pair: str, format: str) -> Work:
    now_dtype, ref_dtype = PAIRS[pair]
    size = now_dtype.itemsize + ref_dtype.itemsize + 8 + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    ref = [torch.randn(params, device=DEVICE).mul_(0.02).to(ref_dtype) for _ in range(sets)]
    now = [r.to(now_dtype) + torch.randn(params, device=DEVICE, dtype=now_dtype).mul_(1e-4) for r in ref]
    residual = [torch.zeros(params, device=DEVICE) for _ in range(sets)]
    body = [kernels.empty_body(params, format=format, device=DEVICE) for _ in range(sets)]

    def kernel(i: int) -> object:
        return kernels.encode(now[i], ref[i], residual[i], format=format, out=body[i])

    def arguments(i: int) -> tuple[object, ...]:
        return now[i], ref[i], residual[i], format, body[i]

    return Work("encode", f"encode {pair} {format}", params, size, sets, kernel, eager.encode, arguments)


def bodies(params: int, format: str, sets: int) -> list[torch.Tensor]:
    change = torch.randn(params, device=DEVICE, dtype=torch.bfloat16).mul_(1e-4)
    return [kernels.encode(change, torch.zeros_like(change), format=format).body for _ in range(sets)]


def apply_work(params: int, dtype: str, format: str) -> Work:
    size = 2 * DTYPES[dtype].itemsize + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    target = [torch.randn(params, device=DEVICE).mul_(0.02).to(DTYPES[dtype]) for _ in range(sets)]
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.apply_(target[i], body[i], format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return target[i], body[i], format

    return Work("apply", f"apply {dtype} {format}", params, size, sets, kernel, eager.apply_, arguments)


def decode_work(params: int, format: str) -> Work:
    size = 4 + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.decode(body[i], params, format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return body[i], params, format

    return Work("decode", f"decode {format}", params, size, sets, kernel, eager.decode, arguments)


def accumulate_work(params: int, format: str) -> Work:
    size = 32 + codec.body_bytes(params, format) / params
    sets = sets_for(params * size)
    hi = [torch.zeros(params, dtype=torch.int64, device=DEVICE) for _ in range(sets)]
    lo = [torch.zeros(params, dtype=torch.int64, device=DEVICE) for _ in range(sets)]
    body = bodies(params, format, sets)

    def kernel(i: int) -> object:
        return kernels.accumulate(hi[i], lo[i], body[i], 0.1, format=format)

    def arguments(i: int) -> tuple[object, ...]:
        return hi[i], lo[i], body[i], 0.1, format

    return Work("accumulate", f"accumulate {format}", params, size, sets, kernel, eager.accumulate, arguments)


def other_cases(params: int) -> Iterator[Case]:
    """The copy that serves as reference for all cases, and the fingerprint."""
    sets = sets_for(params * 8)
    source = [torch.randn(params, device=DEVICE) for _ in range(sets)]
    target = [torch.empty(params, device=DEVICE) for _ in range(sets)]
    yield Case("copy fp32", "copy", 8, sets, lambda i: target[i].copy_(source[i]))
    yield Case("fingerprint fp32", "kernel", 4, sets, lambda i: kernels.fingerprint_on_device(source[i]))


def groups(params: int, beside_torch: bool, tiles: Tiles) -> Iterator[Callable[[], Iterator[Case]]]:
    """Groups of cases that share buffers; a group's buffers are freed before the next group's are made. The copy is in
    the first group.

    `tiles`: further tiles to measure each kernel in.
    """
    yield lambda: other_cases(params)
    for format in FORMATS:
        for pair in PAIRS:
            yield lambda p=pair, f=format: encode_work(params, p, f).cases(beside_torch, tiles)
        for dtype in DTYPES:
            yield lambda d=dtype, f=format: apply_work(params, d, f).cases(beside_torch, tiles)
        yield lambda f=format: decode_work(params, f).cases(beside_torch, tiles)
        yield lambda f=format: accumulate_work(params, f).cases(beside_torch, tiles)
