"""Encoding into buffers that a link is already sending, and buffers that are used again."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import settles, threads
from torch import Tensor

from parablock_rt import _C, codec
from parablock_rt._C import Buffer, Event
from parablock_rt.errors import CodecError
from parablock_rt.staging.stager import Piece, Stager
from parablock_rt.wire.transport import BufferPool, Transport, as_tensor, body_layout

DEADLINE_S = 90.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_piece(numel: int, now: torch.dtype, ref: torch.dtype, seed: int, residual: bool = True) -> Piece:
    """A piece whose change is small next to its values, as in training."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=generator) * 0.02
    change = torch.randn(numel, generator=generator) * 1e-3
    kept = torch.randn(numel, generator=generator) * 1e-4 if residual else None
    return Piece((base + change).to(now), base.to(ref), kept, torch.full((numel,), 7.0) if residual else None)


def statement(pieces: list[Piece], format: str) -> tuple[Tensor, list[Tensor | None], int]:
    """The body, the new residuals and the bad groups as `codec.encode` says, piece by piece."""
    residuals = [None if piece.residual is None else piece.residual.clone() for piece in pieces]  # updated in place
    parts = [
        codec.encode(piece.now, piece.ref, kept, format=format) for piece, kept in zip(pieces, residuals, strict=True)
    ]
    scales, codes = [], []
    for piece, part in zip(pieces, parts, strict=True):
        split = codec.scale_bytes(piece.now.numel(), format)
        scales.append(part.body[:split])
        codes.append(part.body[split:])
    return torch.cat(scales + codes), residuals, sum(part.bad_groups for part in parts)


@pytest.fixture(scope="module")
def transport() -> object:
    with Transport() as made:
        yield made


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    dtypes=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), min_size=5, max_size=5),
    format=st.sampled_from(codec.FORMATS),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_encoding_pieces_of_mixed_types_equals_the_codec_applied_to_each(
    transport: Transport,
    sizes: list[int],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    format: str,
    chunk: int,
    seed: int,
) -> None:
    pieces = [random_piece(128 * size, *dtypes[i], seed + i, residual=i % 3 != 2) for i, size in enumerate(sizes)]
    body, residuals, bad = statement(pieces, format)
    encoding = Stager().encode(pieces, format, 128 * chunk, transport)
    encoding.wait()
    assert encoding.done
    assert torch.equal(encoding.body, body)
    assert encoding.bad_groups == bad == 0
    for piece, residual in zip(pieces, residuals, strict=True):
        if piece.residual_out is not None:
            assert residual is not None
            assert torch.equal(piece.residual_out.view(torch.int32), residual.view(torch.int32))
    started, finished = encoding.span_ns
    assert 0 < started <= finished


def test_groups_that_are_not_finite_are_counted_over_all_pieces(transport: Transport) -> None:
    pieces = [random_piece(1024, torch.float32, torch.float32, seed) for seed in range(2)]
    pieces[0].now[5] = float("nan")
    pieces[1].now[1023] = float("inf")
    body, _, bad = statement(pieces, "int8")
    encoding = Stager().encode(pieces, "int8", 256, transport)
    encoding.wait()
    assert encoding.bad_groups == bad == 2
    assert torch.equal(encoding.body, body)


def test_tensors_that_the_codec_cannot_read_are_refused(transport: Transport) -> None:
    stager = Stager()
    flat, square = torch.zeros(256), torch.zeros(16, 16)
    for piece in (
        Piece(square, square),
        Piece(torch.zeros(512)[::2], flat),
        Piece(flat, torch.zeros(128)),
        Piece(flat, flat, torch.zeros(128)),
        Piece(flat, flat, None, torch.zeros(512)[::2]),
    ):
        with pytest.raises(CodecError, match="1-D, contiguous and of one length"):
            stager.encode([piece], "int8", 128, transport)
    with pytest.raises(ValueError, match="128"):
        stager.encode([Piece(flat[:100], flat[:100])], "int8", 128, transport)


def test_the_watermark_stands_at_zero_before_and_at_the_end_after_encoding(transport: Transport) -> None:
    stager = Stager()
    # One thread encodes: while it is at the first job, the second cannot have begun.
    big = random_piece(128 * 65536, torch.float32, torch.float32, 0)
    first = stager.encode([big], "int4", 2**15, transport)
    pieces = [random_piece(128 * 64, torch.bfloat16, torch.float32, 1)]
    second = stager.encode(pieces, "int8", 512, transport)
    begun = second.source.ready_chunks > 0
    assert first.done or not begun
    seen = []
    while not first.done:
        seen.append(first.source.ready_chunks)
    assert seen == sorted(seen)
    assert first.source.ready_chunks == 256
    second.wait()
    assert second.source.ready_chunks == 16
    assert first.span_ns[1] <= second.span_ns[0]


@pytest.mark.parametrize("format", codec.FORMATS)
def test_a_link_that_sends_while_the_body_is_encoded_delivers_the_final_bytes(format: str) -> None:
    with Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        pieces = [random_piece(128 * 2048, torch.bfloat16, torch.float32, seed) for seed in range(4)]
        numel, chunk = 4 * 128 * 2048, 4096
        layout = body_layout(format, numel, chunk)
        target = Buffer(layout.nbytes)
        server.native.receive(there.link, 1, 0, 0, target, layout)
        stager = Stager()
        encoding = stager.encode(pieces, format, chunk, client)
        client.native.send(link, 1, 0, 0, encoding.source)  # at once: most is not encoded yet
        received, sent = server.next_event(DEADLINE_S), client.next_event(DEADLINE_S)
        assert received is not None
        assert sent is not None
        assert (received.type, sent.type) == (Event.Type.RECEIVED, Event.Type.SENT)
        encoding.wait()
        body, _, _ = statement(pieces, format)
        assert torch.equal(as_tensor(target, layout.nbytes), body)


def test_a_chunk_is_sent_only_when_it_is_encoded(transport: Transport) -> None:
    # The session is asked for frames all the while; each must already have its final bytes.
    pieces = [random_piece(128 * 8192, torch.float32, torch.float32, 3)]
    body, _, _ = statement(pieces, "int8")
    layout = body_layout("int8", 128 * 8192, 2**14)
    sender, receiver, target = _C.Session(), _C.Session(), Buffer(layout.nbytes)
    receiver.receive(1, 0, 0, target, layout)
    sender.feed(receiver.next_frame() or b"")
    encoding = Stager().encode(pieces, "int8", 2**14, transport)
    sender.send(1, 0, 0, encoding.source)
    frames = 0
    while frames < layout.chunks:
        if (frame := sender.next_frame()) is not None:
            frames += 1
            assert frames <= encoding.source.ready_chunks
            receiver.feed(frame)
            while (answer := receiver.next_frame()) is not None:
                sender.feed(answer)
    assert [event.type for event in receiver.take_events()] == [Event.Type.RECEIVED]
    assert torch.equal(as_tensor(target, layout.nbytes), body)


# ---- Buffers


def test_a_pool_hands_a_buffer_out_again_once_it_is_given_back() -> None:
    pool = BufferPool()
    first = pool.take(1000)
    assert pool.take(1000) is not first
    pool.give_back(first)
    assert pool.take(900) is first
    assert pool.allocated_bytes == 2000


def test_a_pool_never_keeps_more_buffers_than_were_in_use_at_once_whatever_their_sizes() -> None:
    pool = BufferPool()
    used = [pool.take(1000) for _ in range(3)]
    for nbytes in (2000, 500, 3000, 1000, 3000):
        for buffer in used:
            pool.give_back(buffer)
        used = [pool.take(nbytes) for _ in range(3)]
    assert pool.allocated_bytes == 3 * 3000


def test_a_pool_never_hands_out_a_buffer_that_native_code_still_owns() -> None:
    pool = BufferPool()
    layout = _C.Layout(units=1000, scale_bytes=0, code_bytes=1, chunk_units=100)
    as_source, as_sink = pool.take(1000), pool.take(1000)
    session = _C.Session()
    session.send(1, 0, 0, _C.Source(as_source, layout, True))
    session.receive(1, 0, 1, as_sink, layout)
    pool.give_back(as_source)
    pool.give_back(as_sink)
    fresh = pool.take(1000)
    assert fresh is not as_source
    assert fresh is not as_sink
    session.cancel_receive(1, 0, 1)
    assert pool.take(1000) is as_sink
    del session
    assert pool.take(1000) is as_source


def test_a_released_encoding_gives_its_buffer_to_the_next_one(transport: Transport) -> None:
    stager = Stager()
    addresses = set()
    for seed in range(5):
        pieces = [random_piece(128 * 16, torch.float32, torch.float32, seed)]
        encoding = stager.encode(pieces, "int8", 512, transport)
        encoding.wait()
        assert torch.equal(encoding.body, statement(pieces, "int8")[0])
        addresses.add(encoding.body.data_ptr())
        stager.release(encoding)
    assert len(addresses) <= 2  # the encode thread may hold the last job for a moment longer
    assert stager.buffers.allocated_bytes <= 2 * codec.body_bytes(128 * 16, "int8")


def test_a_body_that_is_still_being_sent_is_not_overwritten_by_the_next_encoding() -> None:
    stager = Stager()
    with Transport() as server, Transport() as client:
        link = client.connect(server.listen("127.0.0.1:0", protected=False))
        there = server.next_event(DEADLINE_S)
        assert there is not None
        layout = body_layout("int8", 128 * 64, 512)
        bodies, targets = [], []
        for block in range(4):
            pieces = [random_piece(128 * 64, torch.float32, torch.float32, block)]
            encoding = stager.encode(pieces, "int8", 512, client)
            client.native.send(link, 1, 0, block, encoding.source)
            bodies.append(statement(pieces, "int8")[0])
            stager.release(encoding)  # nothing has left yet: the server has not granted credit
        for block in range(4):
            targets.append(Buffer(layout.nbytes))
            server.native.receive(there.link, 1, 0, block, targets[-1], layout)
        for _ in range(4):
            event = server.next_event(DEADLINE_S)
            assert event is not None
            assert event.type == Event.Type.RECEIVED
        for target, body in zip(targets, bodies, strict=True):
            assert torch.equal(as_tensor(target, layout.nbytes), body)


def test_an_encoder_that_goes_finishes_what_was_submitted(transport: Transport) -> None:
    gc.collect()
    before = threads("pb-encode")  # of runs that other tests have not let go of yet
    stager = Stager()
    ours = threads("pb-encode") - before
    assert ours
    pieces = [[random_piece(128 * 1024, torch.float32, torch.float32, seed)] for seed in range(3)]
    encodings = [stager.encode(each, "int4", 4096, transport) for each in pieces]
    del stager
    for each, encoding in zip(pieces, encodings, strict=True):
        assert encoding.done
        assert torch.equal(encoding.body, statement(each, "int4")[0])
    assert settles(lambda: not ours & threads("pb-encode"))


def test_a_stager_that_outlives_the_modules_at_the_end_of_a_program_ends_without_a_word() -> None:
    program = "import threading; from parablock_rt.staging.stager import Stager; threading.kept = Stager()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
