"""What a client makes of a server that lies: an error at once that says what is wrong, and nothing that grows."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hostile_server import HostileServer, Lie
from processes import loss_fn, make_batches, make_model, sgd

import parablock_rt as pb
from parablock_rt.client.transit import Transit
from parablock_rt.errors import ConfigError, HandshakeError, ParaBlockError, PeerLostError, PlanMismatchError


def take_part(address: str, **options: Any) -> str | None:
    """The digest at the end. Whatever goes wrong must not be left to `patience`, which is an hour."""
    with pb.join(address, make_model(), sgd, reconnect=0.0, **options) as run:
        for batch in run.stream(make_batches(0)):
            run.train_step(batch, loss_fn)
    return run.digest


def once(lie: Lie) -> Lie:
    """Told to the first message only; to others there is no answer."""
    untold = [lie]
    return lambda server, link: untold.pop()(server, link) if untold else None


def says(type: str, **fields: Any) -> Lie:
    return lambda server, link: server.say(link, type, **fields)


def challenge(run: int) -> Lie:
    return says("Challenge", run=run, nonce=b"n" * 32, token_required=False)


def welcome(**changes: Any) -> Lie:
    return lambda server, link: server.welcome(link, **changes)


def begin(**changes: Any) -> Lie:
    return lambda server, link: server.begin(link, **changes)


def update(**changes: Any) -> Lie:
    return lambda server, link: (server.accept(link, 0), server.update(link, 0, **changes))[-1]  # type: ignore[func-returns-value]


def verdict(**changes: Any) -> Lie:
    return says("Verdict", **{"round": 0, "block": 0, "accepted": True, "reason": ""} | changes)


def snapshot(**changes: Any) -> Lie:
    return says("Snapshot", **{"block": 0, "version": 0, "fingerprint": 1} | changes)


NOT_UNDERSTOOD = "a control message that this version does not understand"

LIES: dict[str, tuple[str, Lie, type[ParaBlockError], str]] = {
    "a negative run": ("Hello", challenge(-1), HandshakeError, NOT_UNDERSTOOD),
    "no run": ("Hello", challenge(0), HandshakeError, NOT_UNDERSTOOD),
    "a negative seat": ("Proof", welcome(client=-1), HandshakeError, NOT_UNDERSTOOD),
    "a seat beyond the last": ("Proof", welcome(client=1), HandshakeError, "expected a seat below 1"),
    "rounds ahead without end": ("Proof", welcome(config={"staleness": 2**31}), HandshakeError, "at most 64"),
    "updates from before the start": ("Ready", begin(updates_from=-5), HandshakeError, NOT_UNDERSTOOD),
    "updates from after the end": ("Ready", begin(updates_from=5, first_round=5), PlanMismatchError, "a Begin that"),
    "updates from after the first round": ("Ready", begin(updates_from=1), PlanMismatchError, "a Begin that has no"),
    "a whole block with a negative index": ("Ready", snapshot(block=-9), HandshakeError, NOT_UNDERSTOOD),
    "a whole block that is none": ("Ready", snapshot(block=4), PlanMismatchError, "a Snapshot that has no place"),
    "a negative block in a round": ("Upload", snapshot(block=-1), HandshakeError, NOT_UNDERSTOOD),
    "a verdict on another block": (
        "Upload",
        verdict(block=999),
        HandshakeError,
        "Verdict of round 0 to be about block 0",
    ),
    "a verdict on a round after the last": (
        "Upload",
        verdict(round=4),
        PlanMismatchError,
        "a Verdict that has no place",
    ),
    "a verdict with an endless reason": ("Upload", verdict(reason="x" * 501), HandshakeError, NOT_UNDERSTOOD),
    "an aggregate of another block": (
        "Upload",
        update(block=1),
        HandshakeError,
        "Update of round 0 to be about block 0",
    ),
    "an aggregate after the last round": ("Upload", update(round=4), PlanMismatchError, "a Update that has no place"),
    **{
        f"{name} {seconds}": ("Upload", update(**{name: seconds}), HandshakeError, NOT_UNDERSTOOD)
        for name in ("wait_s", "fold_s")
        for seconds in (math.nan, math.inf, -1.0, 1e300)
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_the_server_is_an_error_at_once_that_says_what_is_wrong(lie: str) -> None:
    message, tells, error, words = LIES[lie]
    with HostileServer({message: once(tells)}) as server, pytest.raises(error, match=words):
        take_part(server.address)
    assert message in server.said


def test_the_server_whose_answers_are_made_lies_of_is_believed() -> None:
    with HostileServer() as server:
        assert take_part(server.address) is not None
    assert server.said.count("Upload") == 4


@pytest.mark.parametrize("what", ["verdicts", "aggregates"])
def test_a_server_that_says_more_than_anybody_needs_is_left(what: str) -> None:
    def flood(server: HostileServer, link: int) -> None:
        for number in range(5000):
            if what == "verdicts":
                round = 5000 + number
                server.say(link, "Verdict", round=round, block=round % 4, accepted=False, reason="x" * 500)
            else:
                fields = {"block": 0, "fingerprint": 1, "contributions": 1, "bad_groups": 0}
                server.say(link, "Update", round=5000 + number, **fields)

    lies = {"Proof": welcome(config={"rounds": 10_000}), "Upload": once(flood)}
    with HostileServer(lies) as server, pytest.raises(HandshakeError, match=f"4097 {what} that nobody waits for"):
        take_part(server.address)


def test_a_server_that_sends_a_block_again_and_again_instead_of_beginning_is_left() -> None:
    def twice(server: HostileServer, link: int) -> None:
        for _ in range(2):
            server.say(link, "Snapshot", block=0, version=0, fingerprint=1)

    with (
        HostileServer({"Ready": twice}) as server,
        pytest.raises(PlanMismatchError, match="a Snapshot that has no place"),
    ):
        take_part(server.address)


def test_a_server_that_welcomes_and_hangs_up_for_ever_is_left_when_patience_is_over() -> None:
    with HostileServer({"Ready": HostileServer.hang_up}) as server, pytest.raises(PeerLostError):
        pb.join(server.address, make_model(), sgd, reconnect=600.0, patience=0.5)
    assert server.said.count("Ready") > 1


def test_what_the_link_s_thread_cannot_handle_is_raised_by_the_training_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Transit, round: int) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(Transit, "decided", fail)
    told = pytest.raises(ParaBlockError, match=r"has failed \(ZeroDivisionError: unforeseen\); join again")
    with HostileServer() as server, caplog.at_level(logging.ERROR), told:
        take_part(server.address)
    assert "Traceback" in caplog.text


def test_a_reason_of_the_server_s_reaches_no_terminal_with_control_characters() -> None:
    reason = "\x1b]0;owned\x07\x1b[2J" + "y" * 10_000
    lie = says("Failure", error="HandshakeError", reason=reason)
    with HostileServer({"Ready": lie}) as server, pytest.raises(HandshakeError) as caught:
        take_part(server.address)
    assert str(caught.value).startswith("?]0;owned??[2Jyyy")
    assert len(str(caught.value)) <= 2000


def test_a_client_does_not_join_with_settings_that_no_server_accepts() -> None:
    with pytest.raises(ConfigError, match="at most 64, found 65"):
        pb.RunConfig(rounds=1, clients=1, staleness=65)
