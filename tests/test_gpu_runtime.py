"""The data path on a real GPU: what is sent is what was handed over, however late a stream is, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from federations import ONE, TWO, Case, mlp
from harness import run_federation
from test_staging import DEADLINE_S, DTYPES, random_piece, statement
from torch import Tensor

from parablock_rt import _C, codec
from parablock_rt.observe import meters
from parablock_rt.staging import pinned
from parablock_rt.staging.stager import Piece
from parablock_rt.wire.transport import Transport, as_tensor, body_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

if torch.cuda.is_available():
    from parablock_rt.staging.device import CudaDevice
    from parablock_rt.staging.device_stager import DeviceStager

NUMEL, CHUNK = 128 * 8192, 1 << 15
LATE_S = 0.1  # for which a stream is behind the others and the host, who need a hundredth of it
VERY_LATE_S = 2.0  # longer than the host is held up by anything but the device
MEASURED_CYCLES = 100_000_000

Sleep = Callable[[float], torch.cuda.Event]


@pytest.fixture
def stager() -> Iterator[Any]:
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    made = DeviceStager(device, pinned.PinnedMemory(device.driver, 256 << 20), slice_elements=1 << 18)
    yield made
    made.close()


@pytest.fixture(scope="module")
def transport() -> Iterator[Transport]:
    with Transport() as made:
        yield made


@pytest.fixture(scope="module")
def sleep() -> Sleep:
    """Keeps the current stream busy for so many seconds; the event is behind that."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(2):  # the first is to find the GPU at the clock that it will keep
        marks[0].record()
        torch.cuda._sleep(MEASURED_CYCLES)
        marks[1].record()
        torch.cuda.synchronize()
    cycles_per_s = MEASURED_CYCLES / (marks[0].elapsed_time(marks[1]) / 1e3)

    def queue(seconds: float) -> torch.cuda.Event:
        torch.cuda._sleep(int(seconds * cycles_per_s))
        slept = torch.cuda.Event()
        slept.record()
        return slept

    return queue


def there(piece: Piece, stager: Any) -> Piece:
    """The same piece with its weights on the GPU and its residuals in pinned memory."""
    old = new = None
    if piece.residual is not None:
        old, new = stager.residual(piece.now.numel()), stager.residual(piece.now.numel())
        old.copy_(piece.residual)
        new.fill_(7.0)
    return Piece(piece.now.cuda(), piece.ref.cuda(), old, new)


def test_nvml_shows_the_gpu_and_what_it_does() -> None:
    meter = meters.GpuMeter.find()
    assert meter is not None
    held = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    found = meter.measure(0)
    assert any(value >= held.nbytes for name, value in found.items() if name.endswith(".memory_used_bytes"))
    for name in ("utilization", "memory_utilization"):
        assert 0 <= found[f"gpu.0.{name}"] <= 1
    assert found["gpu.0.sm_clock_hz"] > 1e8
    assert found["gpu.0.power_w"] > 1


@pytest.mark.parametrize("format", codec.FORMATS)
def test_a_block_of_mixed_types_has_the_bytes_residuals_and_count_of_the_host(
    format: str, stager: Any, transport: Transport
) -> None:
    sizes = (NUMEL, 128, 128 * 333)
    pieces = [random_piece(n, DTYPES[i], DTYPES[2 - i], i, residual=format != "fp32") for i, n in enumerate(sizes)]
    pieces[1].now[5] = float("nan")
    body, residuals, bad = statement(pieces, format)
    on_gpu = [there(piece, stager) for piece in pieces]
    encoding = stager.encode(on_gpu, format, CHUNK, transport)
    encoding.wait()
    assert torch.equal(encoding.body, body)
    assert encoding.bad_groups == bad == 1
    for piece, residual in zip(on_gpu, residuals, strict=True):
        if residual is not None:
            assert piece.residual_out is not None
            assert torch.equal(piece.residual_out.view(torch.int32), residual.view(torch.int32))


def test_pinned_memory_is_pinned(stager: Any) -> None:
    assert stager.memory.nbytes == 256 << 20
    assert stager.residual(1024).is_pinned()


@pytest.mark.parametrize("side_stream", [False, True], ids=["default stream", "stream of its own"])
def test_a_block_that_trains_again_at_once_is_sent_as_it_was_handed_over(
    side_stream: bool, stager: Any, transport: Transport, sleep: Sleep
) -> None:
    versions = [random_piece(NUMEL, torch.float32, torch.float32, seed).now for seed in range(5)]
    on_gpu = [version.cuda() for version in versions]
    weights, ref = torch.zeros(NUMEL, device="cuda"), torch.zeros(NUMEL, device="cuda")

    def hand_over(version: Tensor, late_s: float) -> Any:
        slept = sleep(late_s)  # whoever does not wait for the training reads what was before
        weights.copy_(version)
        encoding = stager.encode([Piece(weights, ref)], "int8", CHUNK, transport)
        assert not encoding.done or slept.query()
        assert not encoding.before_writing()
        weights.fill_(float("nan"))  # the training goes on; whoever is not waited for reads this
        return encoding

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side_stream else torch.cuda.current_stream()):
        hand_over(on_gpu[0], 0.0).wait()  # compiles, and loads what torch needs
        torch.cuda.synchronize()
        encodings = [hand_over(version, LATE_S) for version in on_gpu]
        for version, encoding in zip(versions, encodings, strict=True):
            encoding.wait()
            assert torch.equal(encoding.body, codec.encode(version, torch.zeros(NUMEL)).body)
            assert encoding.bad_groups == 0


def test_what_reads_an_aggregate_late_sees_it_whole_although_the_next_one_arrives(stager: Any, sleep: Sleep) -> None:
    with Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        connected = server.next_event(DEADLINE_S)
        assert connected is not None
        layout = body_layout("int8", NUMEL, CHUNK)
        # Allocated before: the device would be waited for. Nothing is to be compiled.
        copies = [torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda") for _ in range(5)]
        bodies, addresses = [], set()
        for round, copy in enumerate(copies):
            landing = stager.landing(NUMEL, "int8", CHUNK)
            client.native.receive(link, 1, round, 0, landing.buffer, layout, listener=landing.watermark)
            outgoing = _C.Buffer(layout.nbytes)
            body = as_tensor(outgoing, layout.nbytes).copy_(torch.arange(layout.nbytes) * (round + 3) % 251)
            server.native.send(connected.link, 1, round, 0, server.native.make_source(outgoing, layout, True))
            arrived = client.next_event(DEADLINE_S)
            assert arrived is not None
            assert arrived.type == _C.Event.Type.RECEIVED
            device_body = landing.body()
            addresses.add(device_body.data_ptr())
            sleep(LATE_S)
            copy.copy_(device_body)
            stager.release_landing(landing)
            bodies.append(body)
        assert len(addresses) == 1
        for copy, body in zip(copies, bodies, strict=True):
            assert torch.equal(copy.cpu(), body)


def test_a_hand_over_and_a_landing_never_wait_for_the_device(stager: Any, transport: Transport, sleep: Sleep) -> None:
    piece = there(random_piece(NUMEL, torch.float32, torch.bfloat16, 0), stager)

    def hand_over() -> Any:
        encoding = stager.encode([piece], "int8", CHUNK, transport)
        encoding.before_writing()
        landing = stager.landing(NUMEL, "int8", CHUNK)
        landing.cancel()
        stager.release_landing(landing)
        return encoding

    for _ in range(2):  # compiles, and allocates what is used again
        hand_over().wait()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slept = sleep(VERY_LATE_S)
        encoding = hand_over()
        done = encoding.done
        assert not slept.query()  # the training is still asleep: all of this came before its end
        assert not done
    finally:
        torch.cuda.set_sync_debug_mode("default")
    encoding.wait()


CASES = {
    "one round behind": Case(settings={"staleness": 1}),
    "in step": Case(settings={"staleness": 0}),
    "one block": Case(blocks=ONE, settings={"staleness": 1}),
    "two blocks, bf16": Case(blocks=TWO, dtype=torch.bfloat16, settings={"staleness": 1}),
    "one block, fp16": Case(blocks=ONE, dtype=torch.float16, settings={"staleness": 2}),
}


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_clients_on_a_gpu_end_on_the_servers_bits_and_every_run_on_the_same(case: Case, format: str) -> None:
    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        inputs, targets = (part.cuda() for part in batch)
        return ((model(inputs) - targets) ** 2).mean()

    def on_gpu() -> torch.nn.Module:
        return mlp(case.dtype).cuda()

    results = []
    for _ in range(2):
        positional, named = case.arguments
        make, batches, _, optimizer = positional
        result = run_federation(
            make, batches, loss, optimizer, **{**named, "format": format, "client_models": [on_gpu] * case.clients}
        )
        for client in result.clients:
            assert client.digest == result.outcome.digest
            for name, parameter in client.model.named_parameters():
                assert parameter.is_cuda
                assert torch.equal(parameter.cpu(), result.model.get_parameter(name))
        results.append(result)
    assert results[0].fingerprints == results[1].fingerprints
    assert all(torch.isfinite(parameter).all() for parameter in results[0].model.parameters())
