"""The shaper: a rate and a delay, on paper and over a real link."""

from __future__ import annotations

import pytest
from leftovers import settles
from transport_cases import HEADER_BYTES, MIB, Make, T, cpu_s_of_transports, expect, filled, flat, join, make_transports

from parablock_rt import _C
from parablock_rt._C import Buffer

make = pytest.fixture(make_transports)


def test_the_shaper_charges_every_byte_and_adds_the_delay() -> None:
    shaper = _C.Shaper(bytes_per_second=1e6, delay_ns=7_000_000)
    assert shaper.active
    assert shaper.transmit(500, now_ns=10, waited=False) == (10 + 7_000_000, 10 + 500_000 + 7_000_000)
    assert shaper.free_at == 10 + 500_000
    # The line is busy until then: a frame that comes earlier queues behind.
    assert shaper.transmit(1000, now_ns=400_000, waited=False) == (10 + 7_500_000, 10 + 1_500_000 + 7_000_000)
    # The timer fired late, the frame had waited: no gap on the line.
    assert shaper.transmit(1000, now_ns=2_000_000, waited=True) == (10 + 8_500_000, 10 + 2_500_000 + 7_000_000)
    # The line was idle: the frame starts now.
    assert shaper.transmit(1000, now_ns=9_000_000, waited=False) == (16_000_000, 9_000_000 + 1_000_000 + 7_000_000)


def test_a_shaper_without_limits_lets_everything_through_at_once() -> None:
    shaper = _C.Shaper(bytes_per_second=0.0, delay_ns=0)
    assert not shaper.active
    assert shaper.transmit(10**9, now_ns=5, waited=False) == (5, 5)
    delayed = _C.Shaper(bytes_per_second=0.0, delay_ns=100)
    assert delayed.active
    assert [delayed.transmit(10**9, now_ns=now, waited=False) for now in (5, 5, 6)] == [
        (at, at) for at in (105, 105, 106)
    ]


@pytest.mark.parametrize("rate", [1e-9, 1e-300])
def test_a_rate_at_which_nothing_ever_leaves_is_a_time_in_the_far_future(rate: float) -> None:
    shaper = _C.Shaper(bytes_per_second=rate, delay_ns=0)
    day_ns = 86_400 * 10**9
    assert shaper.transmit(44, now_ns=10, waited=False)[1] > 365 * day_ns
    first = shaper.free_at
    assert shaper.transmit(44, now_ns=first, waited=True)[1] > first + 365 * day_ns


def test_the_peer_sees_when_a_chunk_begins_to_arrive_not_only_when_it_is_there(make: Make) -> None:
    """A transfer of one chunk takes the receiver as long as the line, as on a real slow link."""
    a, b = make(bytes_per_second=1e6), make()
    link, other = join(a, b)
    buffer, content = filled(100_000)
    target, layout = Buffer(100_000), flat(100_000, 100_000)
    b.receive(other, 1, 0, 0, target, layout)
    a.send(link, 1, 0, 0, a.make_source(buffer, layout, True))
    received = expect(b, T.RECEIVED)[-1]
    assert bytes(memoryview(target)) == content
    assert received.at_ns - received.first_byte_ns >= 90_000_000


@pytest.mark.parametrize(
    "options", [{"bytes_per_second": 50e6}, {"delay": 0.003}, {"bytes_per_second": 50e6, "delay": 0.003}]
)
def test_a_shaped_link_delivers_the_same_bytes_no_faster_than_its_shape(make: Make, options: dict[str, float]) -> None:
    a, b = make(**options), make()
    link, other = join(a, b)
    buffer, content = filled(MIB)
    target = Buffer(MIB)
    layout = flat(MIB, 65536)
    begin = _C.monotonic_ns()
    b.receive(other, 1, 0, 0, target, layout)
    a.send(link, 1, 0, 0, a.make_source(buffer, layout, True))
    expect(b, T.RECEIVED)
    end = _C.monotonic_ns()  # an event's own time is that at which the thread looked, and bytes may come while it reads
    expect(a, T.SENT)
    assert bytes(memoryview(target)) == content
    rate, delay = options.get("bytes_per_second"), options.get("delay", 0.0)
    on_the_line = 0.0 if rate is None else (MIB + 16 * HEADER_BYTES) / rate
    assert end - begin >= int(1e9 * (on_the_line + delay)) - 16  # a rounding a frame


def test_a_shaped_link_that_closes_waits_for_what_is_on_the_line_without_looking_at_the_clock(make: Make) -> None:
    a, b = make(bytes_per_second=1e6, delay=0.5), make()
    link, other = join(a, b)
    buffer, _ = filled(MIB)
    layout = flat(MIB, 65536)
    b.receive(other, 1, 0, 0, Buffer(MIB), layout)
    a.send(link, 1, 0, 0, a.make_source(buffer, layout, True))
    assert settles(lambda: b.stats(other).moved_bytes > 0)
    a.close_link(link, "enough", 5.0)
    before = cpu_s_of_transports()
    expect(a, T.CLOSED)
    assert cpu_s_of_transports() - before < 0.2
