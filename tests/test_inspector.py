"""What checks an upload's chunks as they arrive."""

from __future__ import annotations

import struct

import pytest
import torch
from session_cases import ACK, Frame, decode, frames_of

from parablock_rt import _C, codec
from parablock_rt._C import Buffer, Event, Layout, Session, Source
from parablock_rt.codec import FORMATS
from parablock_rt.wire.transport import as_tensor, body_layout, inspector

T = Event.Type


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [[], [0], [1], [2], [4]])
@pytest.mark.parametrize("bad_before", [[], [2]])
def test_a_body_is_inspected_as_it_arrives_in_any_order_and_over_two_links(
    format: str, bad: list[int], bad_before: list[int]
) -> None:
    """The first link breaks after chunks 0, 2 and, damaged, 1: the second one begins at chunk 1, so 2 comes twice, and
    only what comes then counts."""
    numel, kind = 5 * 256, codec.FORMATS.index(format)
    layout = body_layout(format, numel, 256)
    body = encoded(numel, format, bad)
    once, again = data_frames(encoded(numel, format, bad + bad_before), layout), data_frames(body, layout)
    buffer, seen = Buffer(layout.nbytes), inspector(format, layout)
    first, second = Session(), Session()
    first.receive(1, 2, 3, buffer, layout, 0, seen)
    damaged = once[1][:-1] + bytes([once[1][-1] ^ 1])
    for frame in (once[0], once[2], damaged):
        first.feed(frame)
    start = decode(once[1]).offset
    assert first.unfinished() == [(1, 2, 3, start)]
    assert first.corrupt_chunks == 1
    with pytest.raises(RuntimeError, match="expected 5 inspected chunks, found 2"):
        seen.result()
    second.receive(1, 2, 3, buffer, layout, start, seen)
    for chunk in (4, 1, 3, 2):
        second.feed(again[chunk])
    assert [event.type for event in second.take_events()] == [T.RECEIVED]
    assert bytes(memoryview(buffer)) == bytes(memoryview(body))
    scales = buffer.address
    found = seen.result()
    assert found == _C.inspect(scales, scales + codec.scale_bytes(numel, format), numel, kind, 1)
    assert (found[2] > 0) == bool(bad)


def test_an_inspector_refuses_the_layout_of_another_format() -> None:
    with pytest.raises(ValueError, match="not one of a body in this format"):
        inspector("int8", body_layout("int4", 256, 128))


def encoded(numel: int, format: str, bad_chunks: list[int]) -> Buffer:
    """A body with values that no encoder makes at the beginning of some chunks of 256 elements."""
    change = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    body = codec.encode(change, torch.zeros(numel), format=format).body
    scale_bytes = codec.scale_bytes(256, format)
    for chunk in bad_chunks:
        at = chunk * (scale_bytes or body.numel() // (numel // 256))
        body[at : at + 4] = 0xFF
    buffer = Buffer(body.numel())
    as_tensor(buffer, body.numel()).copy_(body)
    return buffer


def data_frames(body: Buffer, layout: Layout) -> list[bytes]:
    """What a sender sends that was granted everything."""
    sender = Session()
    sender.send(1, 2, 3, Source(body, layout, True))
    sender.feed(Frame(ACK, (1, 2, 3), payload=struct.pack("<Q", layout.nbytes)).encode())
    return [frame.encode() for frame in frames_of(sender)]
