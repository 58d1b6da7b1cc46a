"""How fast a packed block gets from the GPU into pinned memory, and what queueing that costs the training thread.

`python -m bench.staging --json FILE` prints a table. On a GPU, for each size of body:

chunked / whole: the time of one large pinned copy over the time of the same bytes in the runtime's copies, each of
which raises a watermark on the host. Both are taken between CUDA events on the copy stream, in turns.
pageable / pinned: what the fallback costs, likewise.
hand-over: a block encoded and copied as the runtime does it, residuals in pinned memory, against its encoding alone and
the copies of its body and residual alone; `queued_s` is how long the calling thread was busy with it.

Without a GPU the same steps run once on a small block with the host's stager; every figure is then null.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parablock_rt import _C, codec
from parablock_rt.staging import Piece, Stager
from parablock_rt.transport import Transport, body_layout

from .machine import machine

GPU = torch.cuda.is_available()
BODIES = (16 << 20, 64 << 20, 256 << 20)  # bytes, about
BLOCKS = (15_000_064, 218_000_000 // 128 * 128)  # elements
TINY = 128 * 40
CHUNK = 1 << 18
FIGURES = ("whole_gb_per_s", "chunked_gb_per_s", "chunked_over_whole", "pageable_over_pinned")
HAND_OVER = ("queued_s", "total_s", "encode_s", "body_copy_s", "residual_copies_s", "total_over_longest")


class Timer:
    """Seconds of what is queued on one stream, between two events on it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, work: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        self._marks[0].record(self._stream)
        work()
        self._marks[1].record(self._stream)
        self._marks[1].synchronize()
        return self._marks[0].elapsed_time(self._marks[1]) / 1e3


def in_turns(cases: dict[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """The median seconds of each case, which take turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repetitions + 1):
        for name, case in cases.items():
            value = case()
            if turn > 0:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def copies(stager: Any, device: Any, nbytes: int, repetitions: int, transport: Transport) -> dict[str, Any]:
    """One large copy, the runtime's copies and one copy to pageable memory, of the same body."""
    numel = nbytes // 130 * 128
    layout = body_layout("int8", numel, CHUNK)
    native = device.native
    there = torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8, device="cuda")
    pinned, pageable = stager.memory.take(layout.nbytes), _C.Buffer(layout.nbytes)
    source = transport.native.make_source(pinned, layout, False)
    start, split = there.data_ptr(), codec.scale_bytes(numel, "int8")
    timer = Timer(torch.cuda.ExternalStream(native.down))

    def chunked() -> None:
        download = native.download(source)
        native.copy_units(download, start, start + split, 0, layout.units)
        native.finish(download)

    seconds = in_turns(
        {
            "whole": lambda: timer(lambda: native.copy_to_host(pinned.address, start, layout.nbytes, native.down)),
            "chunked": lambda: timer(chunked),
            "pageable": lambda: timer(lambda: native.copy_to_host(pageable.address, start, layout.nbytes, native.down)),
        },
        repetitions,
    )
    return {
        "case": "device to host",
        "body_bytes": layout.nbytes,
        "whole_gb_per_s": layout.nbytes / seconds["whole"] / 1e9,
        "chunked_gb_per_s": layout.nbytes / seconds["chunked"] / 1e9,
        "chunked_over_whole": seconds["whole"] / seconds["chunked"],
        "pageable_over_pinned": seconds["whole"] / seconds["pageable"],
    }


def hand_over(stager: Any, device: Any, numel: int, repetitions: int, transport: Transport) -> dict[str, Any]:
    """A block as it is handed over, and its parts one at a time."""
    native = device.native
    ref = torch.randn(numel, device="cuda").mul_(0.02).to(torch.bfloat16)
    now = ref.float() + torch.randn(numel, device="cuda").mul_(1e-4)
    old, new = stager.residual(numel), stager.residual(numel)
    old.zero_()
    piece = Piece(now, ref, old, new)
    body = torch.empty(codec.body_bytes(numel, "int8") + 16, dtype=torch.uint8, device="cuda")
    here = torch.zeros(numel, device="cuda")
    pinned = stager.memory.take(body.numel())
    queued = []

    def whole() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        encoding = stager.encode([piece], "int8", CHUNK, transport)
        queued.append(time.perf_counter() - begin)
        encoding.wait()
        seconds = time.perf_counter() - begin
        stager.release(encoding)
        return seconds

    def residuals() -> None:
        native.copy_to_device(here.data_ptr(), old.data_ptr(), 4 * numel, native.down)
        native.copy_to_host(new.data_ptr(), here.data_ptr(), 4 * numel, native.down)

    down, training = Timer(torch.cuda.ExternalStream(native.down)), Timer(torch.cuda.current_stream())
    seconds = in_turns(
        {
            "total_s": whole,
            "encode_s": lambda: training(lambda: codec.encode(now, ref, here, format="int8")),
            "body_copy_s": lambda: down(
                lambda: native.copy_to_host(pinned.address, body.data_ptr(), body.numel(), native.down)
            ),
            "residual_copies_s": lambda: down(residuals),
        },
        repetitions,
    )
    longest = max(seconds["encode_s"], seconds["body_copy_s"] + seconds["residual_copies_s"] / 2)
    return {
        "case": "hand-over",
        "params": numel,
        "queued_s": statistics.median(queued[1:]),
        **seconds,
        "total_over_longest": seconds["total_s"] / longest,
    }


def on_gpu(sizes: list[int], blocks: list[int], repetitions: int) -> list[dict[str, Any]]:
    from parablock_rt.device import CudaDevice
    from parablock_rt.device_staging import DeviceStager
    from parablock_rt.pinned import PinnedMemory

    rows = []
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    device.warm_up({(torch.float32, torch.bfloat16)}, "int8")
    needed = max(4 * max(sizes), 12 * max(blocks))
    stager = DeviceStager(device, PinnedMemory(device.driver, needed, needed))
    with Transport() as transport:
        try:
            for nbytes in sizes:
                rows.append(copies(stager, device, nbytes, repetitions, transport))
            for numel in blocks:
                rows.append(hand_over(stager, device, numel, repetitions, transport))
        finally:
            stager.close()
    return rows


def on_cpu() -> list[dict[str, Any]]:
    """The same steps with the host's stager, once, to show that they run."""
    note = "no GPU: run once on a small block in host memory, not timed"
    with Transport() as transport:
        stager = Stager()
        piece = Piece(torch.randn(TINY), torch.zeros(TINY), None, stager.residual(TINY))
        encoding = stager.encode([piece], "int8", 1024, transport)
        encoding.wait()
        stager.release(encoding)
        stager.close()
    copied = {"case": "device to host", "body_bytes": encoding.nbytes, **dict.fromkeys(FIGURES), "note": note}
    return [copied, {"case": "hand-over", "params": TINY, **dict.fromkeys(HAND_OVER), "note": note}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, nargs="+", default=list(BODIES), help="bytes of the bodies to copy")
    parser.add_argument("--params", type=int, nargs="+", default=list(BLOCKS), help="elements of the blocks")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write machine, settings and all rows to this file")
    options = parser.parse_args()
    about = machine() | {"device": torch.cuda.get_device_name() if GPU else None}
    print(f"device: {about['device'] or 'none; all figures are absent'}")
    rows = on_gpu(options.bodies, options.params, options.repetitions) if GPU else on_cpu()
    for row in rows:
        shown = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in row.items())
        print("  ".join(f"{name} {value}" for name, value in shown))
    if options.json:
        settings = {"repetitions": options.repetitions, "chunk": CHUNK, "format": "int8"}
        options.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
