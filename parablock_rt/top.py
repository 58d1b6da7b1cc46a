"""`parablock top`: shows a running server live. Polls its status and renders it; changes nothing.

`Connection.observe` asks for the status; the output is made here.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from parablock_rt.errors import ConnectError, HandshakeError, PeerLostError
from parablock_rt.stages import hidden_share
from parablock_rt.units import printable
from parablock_rt.wire.connection import Connection, pause_before
from parablock_rt.wire.protocol import Status
from parablock_rt.wire.tls import Tls
from parablock_rt.wire.transport import Transport

_SLOW = 0.1  # a client counts as slow if it is behind the first upload by this share of a round
_COME_BACK_S = 3.0  # how long to try to reach the server again after the connection broke


def figures(status: Status) -> dict[str, Any]:
    """The status as plain data, with `hidden`, the hidden share of the last exchanges."""
    found: dict[str, Any] = msgspec.to_builtins(status)
    for name in ("type", "mac"):
        found.pop(name, None)
    return found | {"hidden": hidden(status)}


def hidden(status: Status) -> float | None:
    """The hidden share of the last exchanges, estimated from the durations of their transfers; None if unknown."""
    if status.exposed_s is None:
        return None
    share = hidden_share(status.exposed_s - (status.others_s or 0.0), status.exchange_s)
    return None if share is None else 0.0 if status.staleness == 0 else max(0.0, share)


def render(status: Status, earlier: tuple[Status, float] | None = None) -> Group:
    """The status as text and a table. `earlier`: the previous status and the seconds since then, for the rates."""
    state = "waiting for clients" if status.wall_s is None else f"running for {status.wall_s:.0f} s"
    state = "finished" if status.round == status.rounds else state
    head = Text.assemble(
        (f"round {status.round}/{status.rounds}", "bold"),
        f"  {state}  {status.present} of {status.seats} clients",
        f", {status.left} left early" if status.left else "",
        f"  staleness {status.staleness}, {status.local_steps} local steps, {printable(status.format)}",
    )
    share = hidden(status)
    lines = [
        f"hidden {'–' if share is None else f'{share:.0%}'} of the last exchanges (about {_s(status.exchange_s)} each)",
        f"a round: {_s(status.round_s)}, of which {_s(status.compute_s)} computing and {_s(status.exposed_s)} waiting "
        f"({_s(status.others_s)} for other clients); this one is open for {status.open_s:.1f} s",
        f"loss {'–' if status.loss is None else f'{status.loss:.4f}'}   "
        f"up {_moved(status, earlier, 'bytes_up')}   down {_moved(status, earlier, 'bytes_down')}",
    ]
    table = Table("client", "state", box=None, pad_edge=False)
    for name in ("computing", "waiting", "behind the first", "updates behind"):
        table.add_column(name, justify="right")
    for client in status.clients:
        slow = status.round_s is not None and client.late_s > _SLOW * status.round_s
        late = Text(f"{client.late_s:.2f} s{'  slow' if slow else ''}", "yellow" if slow else "")
        seconds = (f"{client.compute_s:.2f} s", f"{client.exposed_s:.2f} s")
        table.add_row(str(client.client), Text(printable(client.state)), *seconds, late, str(client.behind))
    more = status.present - len(status.clients)
    return Group(head, *lines, "", table, *([f"and {more} faster ones"] if more > 0 else []))


def _s(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def _moved(status: Status, earlier: tuple[Status, float] | None, name: str) -> str:
    total = getattr(status, name)
    text = f"{total / 1e6:.1f} MB"
    if earlier is None or earlier[1] <= 0:
        return text
    return f"{text} ({(total - getattr(earlier[0], name)) * 8 / 1e6 / earlier[1]:.1f} Mbit/s)"


def look_once(address: str, token: str | None, *, tls: Tls | None = None) -> Status:
    """The current status of the server. Raises ConnectError, HandshakeError, PeerLostError, ConfigError."""
    with _transport(tls) as transport:
        return Connection(transport, address).observe(token)


def watch(address: str, token: str | None, interval: float, console: Console, *, tls: Tls | None = None) -> None:
    """Shows the status every `interval` seconds until the server ends; reconnects if only the connection broke.

    Ctrl-C ends it earlier. Raises like `look_once` until a first status has arrived.
    """
    with _transport(tls) as transport:
        link = Connection(transport, address)
        status, at = link.observe(token), time.monotonic()
        with Live(render(status), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    now = link.observe(token)
                except PeerLostError:
                    if status.round == status.rounds:
                        break
                    if (found := _come_back(transport, address, token)) is None:
                        break
                    link, now = found
                elapsed = time.monotonic() - at
                live.update(render(now, (status, elapsed)), refresh=True)
                status, at = now, at + elapsed
    # Polling every second usually misses the close of the last round, so claim only what is known.
    how = "has ended" if status.round == status.rounds else "has ended or cannot be reached any more"
    console.print(f"The server at {address} {how}; last seen after round {status.round} of {status.rounds}")


def _come_back(transport: Transport, address: str, token: str | None) -> tuple[Connection, Status] | None:
    """A new connection and a status, or None if the server cannot be reached in time.

    Tries again after a refused connection and also after one that breaks: neither shows that the server has ended.
    """
    deadline, tries = time.monotonic() + _COME_BACK_S, 0
    while True:
        try:
            link = Connection(transport, address, tries=1)
            return link, link.observe(token)
        except HandshakeError:
            return None
        except (ConnectError, PeerLostError):
            if time.monotonic() >= deadline:
                return None
        time.sleep(pause_before(tries))
        tries += 1


def _transport(tls: Tls | None) -> Transport:
    return Transport(tls=None if tls is None else tls.for_client())
