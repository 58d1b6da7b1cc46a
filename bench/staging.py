"""The speed of a packed block from the GPU into pinned memory, and the cost of queueing it for the training thread.

For each size of body, on a GPU:

chunked / whole: the time of one large pinned copy over the time of the same bytes in the runtime's copies, each of
which raises a watermark on the host. Both are measured between CUDA events on the copy stream, in turns. On the device
the codes begin at a multiple of 16 bytes. On the host they follow the scales, so their beginning depends on the block's
length: measured at a multiple of 16 bytes, and 4 bytes beyond, as in a block of 14,768 squared elements. One size is
also measured in pieces of other lengths; the runtime's length was chosen by that. pageable / pinned: the cost of the
fallback, measured in the same way. a loss that is read: how long the host waits for 4 bytes from the training stream
while another stream copies the residual of a slice, in the runtime's pieces or in one piece, against the time without
that copy. hand-over: a block encoded and copied by the runtime with residuals in pinned memory, against the encoding
alone and the copies of body and residual alone; `queued_s` is how long the calling thread was busy.

Without a GPU the same steps run once on a small block with the host's stager; every figure is then null.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from rich.table import Table

from parablock_rt import _C, codec
from parablock_rt.staging.device_stager import SLICE, aligned
from parablock_rt.staging.stager import Piece, Stager
from parablock_rt.wire.transport import Transport, body_layout

from .ahead import LATE, Ahead
from .result import Result, columns, keep, shown

GPU = torch.cuda.is_available()
BODIES = (16 << 20, 64 << 20, 256 << 20)  # bytes, about
HOST_CODES = (0, 4)  # the beginning of the codes in host memory, in bytes beyond a multiple of 16
PIECES = tuple(mib << 20 for mib in (1, 2, 4, 8, 16))  # bytes of one copy
BLOCKS = (15_000_064, 218_000_000 // 128 * 128)  # elements
TINY = 128 * 40
CHUNK = 1 << 18
FIGURES = ("whole_gb_per_s", "chunked_gb_per_s", "chunked_over_whole", "pageable_over_pinned")
READ = ("alone_s", "beside_s", "longest_beside_s")
HAND_OVER = ("queued_s", "total_s", "encode_s", "body_copy_s", "residual_copies_s", "total_over_longest")


class Timer:
    """The seconds of work queued on one stream, between two events on that stream.

    `note`: what to know about these seconds, or "".
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.note = ""
        self._ahead = Ahead(stream)
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, work: Callable[[], object]) -> float:
        if not self._ahead.queue(lambda: self._between_marks(work), self._marks[0]):
            self.note = LATE
        return self._elapsed()

    def waited_for(self, work: Callable[[], object]) -> float:
        """The seconds of work that the host waits for, such as a copy to pageable memory."""
        torch.cuda.synchronize()
        self._between_marks(work)
        return self._elapsed()

    def _between_marks(self, work: Callable[[], object]) -> None:
        self._marks[0].record(self._ahead.stream)
        work()
        self._marks[1].record(self._ahead.stream)

    def _elapsed(self) -> float:
        self._marks[1].synchronize()
        return self._marks[0].elapsed_time(self._marks[1]) / 1e3


def in_turns(cases: dict[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """The median seconds of each case. The cases take turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repetitions + 1):
        for name, case in cases.items():
            value = case()
            if turn > 0:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def body_of(nbytes: int, host_codes: int) -> int:
    """Elements of an int8 body of about `nbytes` whose codes begin `host_codes` bytes beyond a multiple of 16."""
    groups = nbytes // 130 // 8 * 8 + host_codes // 2  # a group has 2 bytes of scale, which come first
    return 128 * groups


def copies(
    stager: Any, driver: _C.Driver, piece: int, nbytes: int, host_codes: int, repetitions: int, transport: Transport
) -> dict[str, Any]:
    """Copies the same body in three ways: one large copy, the runtime's copies in pieces of about `piece` bytes, and
    one copy to pageable memory."""
    native, uncut = _C.Device(driver, piece), _C.Device(driver, 2 * nbytes)
    numel = body_of(nbytes, host_codes)
    layout = body_layout("int8", numel, CHUNK)
    split = codec.scale_bytes(numel, "int8")
    there = torch.randint(0, 255, (layout.nbytes + 16,), dtype=torch.uint8, device="cuda")
    body = aligned(there, layout.nbytes, split).data_ptr()
    pinned, pageable = stager.memory.take(layout.nbytes), _C.Buffer(layout.nbytes)
    source = transport.native.make_source(pinned, layout, False)
    timer = Timer(torch.cuda.ExternalStream(native.down))

    def chunked() -> None:
        to_host = native.device_to_host(source)
        native.copy_units(to_host, body, body + split, 0, layout.units)
        native.finish(to_host)

    def whole(target: _C.Buffer) -> None:
        uncut.copy_to_host(target.address, there.data_ptr(), layout.nbytes, native.down)

    seconds = in_turns(
        {
            "whole": lambda: timer(lambda: whole(pinned)),
            "chunked": lambda: timer(chunked),
            "pageable": lambda: timer.waited_for(lambda: whole(pageable)),
        },
        repetitions,
    )
    native.close()
    uncut.close()
    return {
        "case": "device to host",
        "body_bytes": layout.nbytes,
        "host_codes_beyond_16": split % 16,
        "piece_bytes": piece,
        "whole_gb_per_s": layout.nbytes / seconds["whole"] / 1e9,
        "chunked_gb_per_s": layout.nbytes / seconds["chunked"] / 1e9,
        "chunked_over_whole": seconds["whole"] / seconds["chunked"],
        "pageable_over_pinned": seconds["whole"] / seconds["pageable"],
        "note": timer.note,
    }


def small_copy(stager: Any, driver: _C.Driver, piece: int, repetitions: int) -> dict[str, Any]:
    """Reads a number while residuals are copied in pieces of `piece` bytes."""
    native = _C.Device(driver, piece)
    loss, here, kept = torch.zeros(1, device="cuda"), torch.zeros(SLICE, device="cuda"), stager.residual(SLICE)
    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    for turn in range(repetitions + 1):
        for name, taken in seconds.items():
            torch.cuda.synchronize()
            if name == "beside":  # the copy takes some milliseconds
                native.copy_to_host(kept.data_ptr(), here.data_ptr(), here.nbytes, native.down)
            begin = time.perf_counter()
            loss.item()
            if turn > 0:
                taken.append(time.perf_counter() - begin)
    native.close()
    times = statistics.median(seconds["alone"]), statistics.median(seconds["beside"]), max(seconds["beside"])
    return {"case": "a loss that is read", "piece_bytes": piece, **dict(zip(READ, times, strict=True))}


def hand_over(stager: Any, device: Any, numel: int, repetitions: int, transport: Transport) -> dict[str, Any]:
    """The hand-over of a block, and its parts one at a time."""
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
        "note": down.note or training.note,
    }


def on_gpu(sizes: list[int], blocks: list[int], repetitions: int) -> Iterator[dict[str, Any]]:
    from parablock_rt.staging.device import COPY_BYTES, CudaDevice
    from parablock_rt.staging.device_stager import DeviceStager
    from parablock_rt.staging.pinned import PinnedMemory

    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    device.warm_up({(torch.float32, torch.bfloat16)}, "int8")
    needed = max(4 * max(sizes), 12 * max(blocks), 8 * SLICE)
    stager = DeviceStager(device, PinnedMemory(device.driver, needed, needed))
    with Transport() as transport:
        try:
            for nbytes, host_codes in product(sizes, HOST_CODES):
                yield copies(stager, device.driver, COPY_BYTES, nbytes, host_codes, repetitions, transport)
            for piece in PIECES:
                if piece != COPY_BYTES:
                    yield copies(stager, device.driver, piece, max(sizes), HOST_CODES[-1], repetitions, transport)
            for piece in (COPY_BYTES, 4 * SLICE):
                yield small_copy(stager, device.driver, piece, repetitions)
            for numel in blocks:
                yield hand_over(stager, device, numel, repetitions, transport)
        finally:
            stager.close()


def on_cpu() -> Iterator[dict[str, Any]]:
    """The same steps with the host's stager, once, to show that they run."""
    note = "no GPU: run once on a small block in host memory, not timed"
    with Transport() as transport:
        stager = Stager()
        piece = Piece(torch.randn(TINY), torch.zeros(TINY), None, stager.residual(TINY))
        encoding = stager.encode([piece], "int8", 1024, transport)
        encoding.wait()
        stager.release(encoding)
        stager.close()
    yield {"case": "device to host", "body_bytes": encoding.nbytes, **dict.fromkeys(FIGURES), "note": note}
    yield {"case": "hand-over", "params": TINY, **dict.fromkeys(HAND_OVER), "note": note}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bodies, the blocks, the repetitions."""
    parser.add_argument("--bodies", type=int, nargs="+", default=list(BODIES), help="bytes of the bodies to copy")
    parser.add_argument("--params", type=int, nargs="+", default=list(BLOCKS), help="elements of the blocks")
    parser.add_argument("--repetitions", type=int, default=20)


def run(options: argparse.Namespace) -> Result:
    """The copies of every body and the hand-over of every block."""
    settings = {"bodies": options.bodies, "params": options.params, "repetitions": options.repetitions}
    result: Result = {"settings": settings | {"chunk": CHUNK, "format": "int8"}, "rows": []}
    for row in on_gpu(options.bodies, options.params, options.repetitions) if GPU else on_cpu():
        result["rows"].append(row)
        keep(result)
    return result


def tables(result: Result) -> list[Table]:
    """The copies, their effect on a small copy, and the hand-overs."""
    names = (
        "body, MiB",
        "offset of the host's codes from 16 bytes",
        "piece, MiB",
        "one copy, GB/s",
        "in pieces, GB/s",
        "in pieces, ratio to one copy",
        "pageable, ratio to pinned",
    )
    copied = columns("device to host", *names)
    handed = columns("hand-over of a block", "million parameters", *(f"{name[:-2]}, ms" for name in HAND_OVER[:-1]))
    handed.add_column("total, ratio to longest part", justify="right")
    for row in result["rows"]:
        if row.get("chunked_over_whole") is not None:
            speeds = (shown(row[name], ".1f") for name in FIGURES[:2])
            ratios = (shown(row[name], ".3f") for name in FIGURES[2:])
            sizes = f"{row['body_bytes'] / 2**20:.0f}", f"{row['host_codes_beyond_16']}", f"{row['piece_bytes'] >> 20}"
            copied.add_row(*sizes, *speeds, *ratios)
        elif row.get("total_s") is not None:
            times = (shown(row[name] * 1e3, ".2f") for name in HAND_OVER[:-1])
            handed.add_row(f"{row['params'] / 1e6:.1f}", *times, shown(row["total_over_longest"], ".2f"))
    read = columns(
        "reading a loss beside copies in pieces",
        "piece, MiB",
        "without copies, µs",
        "beside copies, µs",
        "longest beside copies, µs",
    )
    for row in result["rows"]:
        if row.get("beside_s") is not None:
            read.add_row(f"{row['piece_bytes'] >> 20}", *(shown(row[name] * 1e6, ".0f") for name in READ))
    return [copied, read, handed]


def metrics(result: Result) -> dict[str, float]:
    """Chunked copies over one copy, by size; hand-overs per second, by size of block."""
    found = {}
    for row in result["rows"]:
        if row.get("chunked_over_whole") is not None:
            found[f"chunked {row['body_bytes']} {row['piece_bytes']}"] = row["chunked_over_whole"]
        elif row.get("total_s") is not None:
            found[f"hand-over {row['params']}"] = 1 / row["total_s"]
    return found


def plot(result: Result, figure: Any) -> None:
    """The parts of a hand-over beside the whole."""
    rows = [row for row in result["rows"] if row.get("total_s") is not None]
    figure.suptitle(f"hand-over of a block on {result['machine'].get('gpu', 'no GPU: nothing was timed')}")
    if not rows:
        return
    axes = figure.subplots()
    names = HAND_OVER[:-1]
    for at, row in enumerate(rows):
        places = [i + at / (len(rows) + 1) for i in range(len(names))]
        heights = [row[name] * 1e3 for name in names]
        axes.bar(places, heights, width=1 / (len(rows) + 1), label=f"{row['params'] / 1e6:.0f} M parameters")
    axes.set_xticks(range(len(names)), [name[:-2].replace("_", " ") for name in names])
    axes.set(ylabel="ms", yscale="log")
    axes.legend()
