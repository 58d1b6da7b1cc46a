"""Getting into a run: which breaks are tried again. What breaks for real is in test_rejoin.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parablock_rt.client import entry
from parablock_rt.client.entry import Entry
from parablock_rt.errors import ConnectError, ParaBlockError, PeerLostError

ANSWERED, SILENT, REFUSED, WELCOME = "answered", "silent", "refused", "welcome"


class Welcome:
    client, secret = 3, b"secret"


class Transport:
    def close(self, flush: float) -> None:
        pass


def enter(
    monkeypatch: pytest.MonkeyPatch,
    *tries: str,
    reconnect: float = 600.0,
    patience: float = 3600.0,
    begin: Callable[[Any, Any], int] = lambda connection, welcome: welcome.client,
) -> list[str]:
    """Tries to get in where the connections fare like this, one after the other. Returns those that were made."""
    made: list[str] = []

    class Connection:
        def __init__(self, transport: Any, address: str, *, tries: int) -> None:
            made.append(tries_left.pop(0))
            if made[-1] == REFUSED:
                raise ConnectError("refused")
            self.run = 0

        def introduce(self, token: str | None, former: Any) -> Welcome:
            self.run = 0 if made[-1] == SILENT else 7
            if made[-1] == WELCOME:
                return Welcome()
            raise PeerLostError("the connection broke")

    tries_left = list(tries)
    monkeypatch.setattr(entry, "Connection", Connection)
    monkeypatch.setattr(entry.time, "sleep", lambda seconds: None)
    begun = Entry("server:1", None, reconnect, patience).until_begun(Transport, begin)
    assert begun == Welcome.client
    return made


def test_once_a_server_has_answered_connections_that_break_before_it_does_are_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = (ANSWERED, SILENT, REFUSED, SILENT, WELCOME)
    assert enter(monkeypatch, *tries) == list(tries)


def test_what_never_answered_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerLostError):
        enter(monkeypatch, SILENT, WELCOME)


def test_tries_end_when_the_time_to_reconnect_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParaBlockError, match="the connection broke"):
        enter(monkeypatch, ANSWERED, WELCOME, reconnect=0.0)
