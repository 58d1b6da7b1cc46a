"""What was said before is worth nothing when it is said again: recorded handshakes, proofs of seats, uploads."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from processes import WAIT_S, client, start_server, starter
from test_bad_input import RawClient, announcement, good_body

from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.config import RunConfig
from parablock_rt.errors import HandshakeError
from parablock_rt.server.members import Candidate, Identity
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.handshake import Conversation


class Returning(RawClient):
    """A client that claims a seat which it, or somebody else, held on another connection."""

    def claim(self, seat: int, secret: bytes) -> list[protocol.Message]:
        """Says Hello and a right proof, and returns both for whoever wants to say them again."""
        nonce = handshake.nonce()
        hello = protocol.Hello(version=protocol.VERSION, release="0", nonce=nonce, purpose="rejoin")
        self.say(hello)
        challenge = self.hear(protocol.Challenge)
        self._transport.native.trust(self._link, challenge.run, protocol.CONTROL_BYTES)
        conversation = Conversation(challenge.run, nonce, challenge.nonce)
        mac = handshake.seat_proof(secret, seat, "client", conversation)
        proof = protocol.Proof(mac=b"", seat=seat, seat_mac=mac)
        self.say(proof)
        return [hello, proof]


def test_a_recorded_return_to_a_seat_is_refused_when_it_is_replayed() -> None:
    with start_server(clients=1) as running, RawClient(running.address) as holder:
        welcome = holder.begin()
        with Returning(running.address) as returning, Returning(running.address) as thief:
            recorded = returning.claim(welcome.client, welcome.secret)
            back = returning.hear(protocol.WelcomeBack)
            assert back.epoch == 0
            assert "came back" in holder.hear_closed() or "closed" in holder.hear_closed()
            for message in recorded:
                thief.say(message)
            failure = thief.hear(protocol.Failure)
            assert failure.error == "HandshakeError"
            assert "seat 0 is not this client's" in failure.reason
            returning.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[0]))
            resume = returning.hear(protocol.RejoinAnswer)
            assert (resume.updates_from, resume.snapshots, resume.uploads) == (0, [], {0: 0})
            returning.say(protocol.Rejoin(applied=-1, handed_over=-1, held=[], undecided=[0]))
            assert "Rejoin has no place here" in returning.hear(protocol.Failure).reason


@pytest.mark.parametrize(
    ("seat", "secret"), [(0, bytes(32)), (1, bytes(32)), (7, b""), (-1, b"")], ids=["guess", "vacant", "none", "minus"]
)
def test_a_seat_is_given_back_to_nobody_without_its_secret(seat: int, secret: bytes) -> None:
    with start_server(clients=2, quorum=1) as running, RawClient(running.address) as holder:
        holder.take_seat()
        with Returning(running.address) as thief:
            thief.claim(seat, secret)
            failure = thief.hear(protocol.Failure)
            assert failure.error == "HandshakeError"
            assert re.search(f"seat {seat} is not this client's", failure.reason)


def test_a_proof_for_one_seat_or_one_role_proves_no_other() -> None:
    here = Conversation(5, b"c" * 32, b"s" * 32)
    proof = handshake.seat_proof(b"k" * 32, 1, "client", here)
    assert handshake.is_seat_proof(proof, b"k" * 32, 1, "client", here)
    assert not handshake.is_seat_proof(proof, b"k" * 32, 2, "client", here)
    assert not handshake.is_seat_proof(proof, b"k" * 32, 1, "server", here)
    assert not handshake.is_seat_proof(proof, b"k" * 32, 1, "client", replace(here, run=6))
    assert not handshake.is_seat_proof(proof, b"k" * 32, 1, "client", replace(here, binding=b"b" * 32))
    assert proof != handshake.proof("k" * 32, "rejoin", here)


def test_a_client_that_says_it_is_where_it_cannot_be_is_dismissed() -> None:
    for applied, handed_over in [(0, 0), (-2, -1), (-1, 5)]:
        with start_server(clients=1) as running, RawClient(running.address) as holder:
            welcome = holder.begin()
            with Returning(running.address) as returning:
                returning.claim(welcome.client, welcome.secret)
                returning.hear(protocol.WelcomeBack)
                returning.say(protocol.Rejoin(applied=applied, handed_over=handed_over, held=[], undecided=[]))
                assert "where it cannot be" in returning.hear(protocol.Failure).reason


def test_an_upload_that_is_announced_again_after_it_was_accepted_ends_the_link_and_counts_once() -> None:
    with starter() as start, start_server(quorum=1, deadline=3.0) as running, RawClient(running.address) as greedy:
        other = start(client, running.address, stop_before=[0])
        greedy.begin()
        other.expect("stopped")
        assert greedy.upload(0, good_body(), announcement(0)).accepted
        greedy.say(announcement(0))
        failure = greedy.hear(protocol.Failure)
        assert "round 0 has an upload of client" in failure.reason
        other.let_go()
        digest = other.expect("done")["digest"]
        outcome = running.wait(WAIT_S)
    assert digest == outcome.digest
    assert outcome.rounds[0].contributions == 2
    assert outcome.rounds[0].weight == 3.0  # 1 of the first, and 2 steps of the other


def test_an_upload_that_is_announced_again_after_it_was_refused_is_not_waited_for() -> None:
    running = start_server(clients=2, quorum=1, deadline=300.0)
    with running, RawClient(running.address) as greedy, RawClient(running.address) as other:
        for each in (greedy, other):
            each.say(each.ready(each.take_seat()))
        for each in (greedy, other):
            each.hear(protocol.Begin)
        assert not greedy.upload(0, b"\xff" * len(good_body()), announcement(0)).accepted
        greedy.say(announcement(0))
        assert greedy.upload(1, good_body(), announcement(1)).accepted  # so the one before has been read
        (member,) = [m for m in running._coordinator._roster.members if m.verdicts]
        assert 0 not in member.announced
        assert other.upload(0, good_body(), announcement(0)).accepted
        assert other.hear(protocol.Update).contributions == 1


def test_a_candidate_cannot_prove_itself_twice() -> None:
    identity = Identity(1, None, RunConfig(rounds=1, clients=1), PlanSpec(blocks=()), "", "")
    candidate = Candidate(1, "", 0.0)
    candidate.challenge(protocol.Hello(version=protocol.VERSION, release="", nonce=bytes(32)), identity, None)
    candidate.prove(protocol.Proof(mac=b""))
    with pytest.raises(HandshakeError, match="expected Proof after the challenge"):
        candidate.prove(protocol.Proof(mac=b""))
