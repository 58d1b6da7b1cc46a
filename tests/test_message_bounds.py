"""How long a message may be that a client with a seat sends: as long as an honest one, for any plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from leftovers import settles
from processes import start_server
from test_bad_input import RawClient, announcement

import parablock_rt as pb
from parablock_rt.blocks.layout import BlockSpec, PlanSpec
from parablock_rt.server.members import Member
from parablock_rt.stages import StageSeconds
from parablock_rt.wire import protocol


def test_a_message_that_no_client_needs_to_send_is_refused_before_there_is_memory_for_it() -> None:
    with start_server(clients=1) as running, RawClient(running.address) as raw:
        welcome = raw.take_seat()
        raw.say(raw.ready(welcome))
        raw.hear(protocol.Begin)
        most, _ = protocol.bytes_of_member(welcome.plan, welcome.frozen, welcome.config.staleness)
        raw.say(bytes(most + 1))
        assert raw.hear_closed()
        assert settles(lambda: any(f"where at most {most} are allowed" in str(m.lost_why) for m in members(running)))


@given(st.integers(0, 300), st.integers(0, 5), st.integers(0, 2**31 - 1))
def test_every_message_that_an_honest_client_sends_fits(blocks: int, staleness: int, round: int) -> None:
    plan = PlanSpec(tuple(BlockSpec(f"block {i}", ()) for i in range(blocks)))
    most, _ = protocol.bytes_of_member(plan, {}, staleness)
    times = StageSeconds(**dict.fromkeys(StageSeconds.__struct_fields__, 1 / 3))
    longest: list[protocol.Message] = [
        protocol.Ready(plan_digest="f" * 64, frozen="f" * 64, fingerprints=[2**64 - 1] * blocks),
        protocol.Rejoin(
            applied=round, handed_over=round, held=[round] * (staleness + 3), undecided=[round] * (staleness + 3)
        ),
        announcement(round, stages=times),
        protocol.Goodbye(
            digest="f" * 64, reason="\U0010ffff" * protocol.REASON_CHARS, compute_s=1 / 3, exposed_s=1 / 3, stages=times
        ),
    ]
    assert max(len(protocol.encode(message)) for message in longest) <= most


def members(server: pb.Server) -> list[Member]:
    return server._coordinator._roster.members
