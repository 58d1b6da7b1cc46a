"""What a client makes of a server that lies: an error at once that says what is wrong, and nothing that grows."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hostile_server import HostileServer, Lie
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import loss_fn, make_batches, make_model, sgd

import parablock_rt as pb
from parablock_rt.client.transit import Transit
from parablock_rt.errors import ConfigError, HandshakeError, ParaBlockError, PeerLostError, PlanMismatchError


def take_part(address: str, **options: Any) -> str | None:
    """The digest at the end. Whatever goes wrong must not be left to `patience`, which is an hour."""
    with pb.join(address, make_model(), sgd, **{"reconnect": 0.0, **options}) as run:
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
    def lie(server: HostileServer, link: int) -> None:
        server.accept(link, 0)
        server.update(link, 0, **changes)

    return lie


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


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, -1, 2**31, 2**31 + 1, 2**62, 2**63, 2**64 - 1])
SECONDS = st.sampled_from([0.0, 0.5, -1.0, 1e300, math.nan, math.inf])
TEXTS = st.sampled_from(["", "no", "x" * 501, "\x1b[2J"])
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "Challenge": {"run": NUMBERS, "nonce": st.just(b"n"), "token_required": st.booleans()},
    "WelcomeBack": {"mac": st.just(b""), "seat_mac": st.just(b""), "epoch": NUMBERS},
    "RejoinAnswer": {
        "updates_from": NUMBERS,
        "snapshots": st.lists(NUMBERS, max_size=3),
        "uploads": st.dictionaries(NUMBERS, NUMBERS, max_size=2),
    },
    "Lanes": {"most": NUMBERS, "key": st.sampled_from([b"", b"k" * 16, b"k" * 32])},
    "Snapshot": {"block": NUMBERS, "version": NUMBERS, "fingerprint": NUMBERS},
    "Begin": {"first_round": NUMBERS, "updates_from": NUMBERS},
    "Verdict": {"round": NUMBERS, "block": NUMBERS, "accepted": st.booleans(), "reason": TEXTS},
    "Update": {
        "round": NUMBERS,
        "block": NUMBERS,
        "fingerprint": NUMBERS,
        "contributions": NUMBERS,
        "bad_groups": NUMBERS,
        "fold_s": SECONDS,
        "wait_s": SECONDS,
    },
    "Failure": {"error": st.sampled_from(["HandshakeError", "os", ""]), "reason": TEXTS, "resumable": st.booleans()},
    "Farewell": {},
}
MESSAGES = st.one_of([st.fixed_dictionaries({"type": st.just(name), **fields}) for name, fields in FIELDS.items()])
ANSWERS = st.tuples(st.lists(MESSAGES, max_size=4), st.booleans(), st.booleans())
MOMENTS = st.sampled_from(["Hello", "Proof", "Ready", "Upload", "Applied", "Rejoin", "Goodbye"])
PROGRAMS = st.dictionaries(MOMENTS, ANSWERS)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(PROGRAMS)
def test_whatever_a_server_says_a_client_ends_with_the_result_or_with_an_error_of_ours(
    program: dict[str, tuple[list[dict[str, Any]], bool, bool]],
) -> None:
    def lie(messages: list[dict[str, Any]], hangs_up: bool, honest: bool) -> Lie:
        def answer(server: HostileServer, link: int) -> bool:
            for message in messages:
                server.say(link, **message)
            in_handshake = server.said[-1] in (
                "Hello",
                "Proof",
            )  # where silence is waited for longer than a test should
            if hangs_up or (in_handshake and not honest):
                server.hang_up(link)
            return honest

        return answer

    with HostileServer({moment: lie(*answer) for moment, answer in program.items()}) as server:
        ended = ""
        try:
            take_part(server.address, patience=0.3, reconnect=0.3)
        except ParaBlockError as error:
            ended = str(error)
        assert "has failed" not in ended, "the error is of ours, but not foreseen"


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
