"""Measures the link to a running server from the client's end: round trip, bandwidth, TLS, clock offset.

Takes no seat and transfers at most 64 MiB in each direction, whatever the server allows. The server's end is
server/probe.py.
"""

from __future__ import annotations

import datetime
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

from parablock_rt import _C
from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError, HandshakeError, PeerLostError
from parablock_rt.units import printable
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection
from parablock_rt.wire.protocol import PROBE_CHUNK, Kind
from parablock_rt.wire.tls import Tls
from parablock_rt.wire.transport import Transport, raw_layout

_ROUND_TRIPS = 200
_ROUND_TRIPS_S = 5.0  # limits the number of round trips on a slow link
_FIRST_BYTES = 4 * PROBE_CHUNK
_MOST_BYTES = 64 * 2**20  # in one direction
_LONG_ENOUGH_S = 0.5
_PATIENCE_S = 30.0
_SET_S = 365 * 86400.0  # clocks that differ by more are not both set


@dataclass(frozen=True)
class LinkReport:
    """Times in seconds, rates (`up`, `down`) in bytes per second. `clock_offset_s`: how far the server's clock is ahead
    of this machine's, None if that is more than a year either way; `clock_error_s`: its error bound;
    `congestion_control`: the algorithm that paces `up`."""

    address: str
    round_trip_s: float
    round_trip_p99_s: float
    up: float
    down: float
    clock_offset_s: float | None
    clock_error_s: float
    congestion_control: str
    tls: dict[str, str] | None


def check_link(address: str, *, token: str | None = None, tls: Tls | None = None) -> LinkReport:
    """Measures the link to the server at `address`. Raises ConnectError, HandshakeError, PeerLostError, ConfigError."""
    with Transport(tls=None if tls is None else tls.for_client()) as transport:
        link = Connection(transport, address)
        check = _Check(link, link.introduce_probe(token))
        trips, offset = check.round_trips()
        trips.sort()
        median = statistics.median(trips)
        lanes = transport.native.stats(link.link).lanes
        return LinkReport(
            address=address,
            round_trip_s=median,
            round_trip_p99_s=trips[min(len(trips) - 1, int(0.99 * len(trips)))],
            up=check.rate("up", median),
            down=check.rate("down", median),
            clock_offset_s=offset if abs(offset) <= _SET_S else None,
            clock_error_s=trips[0] / 2,
            congestion_control=lanes[0].congestion_control if lanes else "unknown",  # the link ends just now
            tls=None if link.tls is None else _describe(link.tls),
        )


class _Check:
    """One measurement on an open link."""

    def __init__(self, link: Connection, welcome: protocol.ProbeWelcome) -> None:
        """Raises HandshakeError when the server allows too little to measure anything."""
        if (allowed := min(welcome.max_bytes, welcome.max_total)) < _FIRST_BYTES:
            raise HandshakeError(
                f"expected the server at {link.address} to allow a measurement of {_FIRST_BYTES} bytes, found "
                f"{allowed}; install the same release of parablock-rt on both sides"
            )
        self._link = link
        self._native = link.transport.native
        self._welcome = welcome
        self._index = 0

    def round_trips(self) -> tuple[list[float], float]:
        """The seconds of each round trip, and the clock offset from the fastest round trip, as in NTP."""
        trips: list[float] = []
        offset, until = 0.0, time.monotonic() + _ROUND_TRIPS_S
        while len(trips) < _ROUND_TRIPS and (len(trips) < 3 or time.monotonic() < until):
            before_ns, start = time.time_ns(), time.monotonic_ns()
            clock_ns = self._ask(0, "up").clock_ns
            seconds = (time.monotonic_ns() - start) / 1e9
            if not trips or seconds < min(trips):
                offset = (clock_ns - before_ns) / 1e9 - seconds / 2
            trips.append(seconds)
        return trips, offset

    def rate(self, direction: Literal["up", "down"], round_trip_s: float) -> float:
        """Bytes per second. Doubles the size of the transfer until one takes at least 0.5 s, and uses the last."""
        nbytes, left = _FIRST_BYTES, min(self._welcome.max_total, _MOST_BYTES)
        move = self._up if direction == "up" else self._down
        rate = 0.0
        while nbytes <= min(left, self._welcome.max_bytes):
            seconds = move(nbytes)
            rate = nbytes / max(seconds - (round_trip_s if direction == "up" else 0.0), 1e-9)
            if seconds >= _LONG_ENOUGH_S:
                break
            left -= nbytes
            nbytes *= 2
        return rate

    def _up(self, nbytes: int) -> float:
        """Seconds from the first byte sent to the acknowledgement of the last."""
        layout = raw_layout(nbytes, PROBE_CHUNK)
        source = self._native.make_source(_C.Buffer(nbytes), layout, True)
        self._ask(nbytes, "up")
        self._native.send(self._link.link, Kind.PROBE, self._index, 0, source)
        event = self._wait(_C.Event.Type.SENT)
        return (event.at_ns - event.first_byte_ns) / 1e9

    def _down(self, nbytes: int) -> float:
        """Seconds from the first chunk to the last, scaled up to include the first chunk."""
        buffer = _C.Buffer(nbytes)
        self._native.receive(self._link.link, Kind.PROBE, self._index + 1, 0, buffer, raw_layout(nbytes, PROBE_CHUNK))
        self._ask(nbytes, "down")
        event = self._wait(_C.Event.Type.RECEIVED)
        return (event.at_ns - event.first_byte_ns) / 1e9 * nbytes / (nbytes - PROBE_CHUNK)

    def _ask(self, nbytes: int, direction: Literal["up", "down"]) -> protocol.Measured:
        self._index += 1
        self._link.send(protocol.Measure(index=self._index, nbytes=nbytes, direction=direction))
        answer = protocol.decode(self._wait(_C.Event.Type.CONTROL).message)
        if isinstance(answer, protocol.Failure):
            raise HandshakeError(printable(answer.reason))
        if not isinstance(answer, protocol.Measured) or answer.index != self._index:
            raise HandshakeError(f"expected Measured {self._index} from the server, found {printable(repr(answer))}")
        return answer

    def _wait(self, kind: _C.Event.Type) -> _C.Event:
        event = self._link.transport.next_event(_PATIENCE_S)
        if event is None:
            raise PeerLostError(f"the server at {self._link.address} did not answer for {_PATIENCE_S:g} s")
        if event.type == _C.Event.Type.CLOSED:
            raise PeerLostError(f"lost the server at {self._link.address} while measuring: {event.text}")
        if event.type != kind:
            raise HandshakeError(f"expected {kind.name} while measuring, found {event.type.name} {event.text[:200]}")
        return event


def settings(status: protocol.Status) -> dict[str, Any]:
    """The settings of the server's run that decide what is hidden. Raises HandshakeError when no run can have them."""
    found = {name: getattr(status, name) for name in ("staleness", "local_steps", "format")}
    try:
        RunConfig(rounds=1, clients=1, **found)
    except ConfigError as error:
        raise HandshakeError(f"the server reports a setting that no run has: {printable(str(error))}") from error
    return found


def _describe(info: _C.TlsInfo) -> dict[str, str]:
    until = datetime.datetime.fromtimestamp(info.not_after, datetime.timezone.utc)
    return {
        "version": info.version,
        "cipher": info.cipher,
        "certificate": info.subject,
        "issuer": info.issuer,
        "expires": until.isoformat(),
        "fingerprint": info.fingerprint,
    }


def render(report: LinkReport) -> str:
    """The report as text."""
    clock = "one of the two is not set: they differ by more than a year"
    if report.clock_offset_s is not None:
        clock = (
            f"the server's is {abs(report.clock_offset_s) * 1e3:.1f} ms "
            f"{'ahead' if report.clock_offset_s > 0 else 'behind'} (± {report.clock_error_s * 1e3:.1f} ms)"
        )
    lines = [
        f"server          {report.address}",
        f"round trip      {report.round_trip_s * 1e3:.2f} ms median, {report.round_trip_p99_s * 1e3:.2f} ms p99",
        f"up              {report.up * 8 / 1e6:.1f} Mbit/s, congestion control {report.congestion_control}",
        f"down            {report.down * 8 / 1e6:.1f} Mbit/s",
        f"clock           {clock}",
    ]
    if report.tls is None:
        lines.append("TLS             none: anyone on the network path can read and change everything")
    for name, value in (report.tls or {}).items():
        lines.append(f"TLS {name:<12}{value}")
    return "\n".join(lines)


def as_dict(report: LinkReport) -> dict[str, Any]:
    """The report as plain data; rates in bytes per second."""
    return {name: getattr(report, name) for name in report.__dataclass_fields__}
