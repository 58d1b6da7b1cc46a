"""A server's durable state: what is torn is cut off, what is damaged or foreign is refused, and why is said."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import WAIT_S, client, make_model, start_server, starter

import parablock_rt as pb
from parablock_rt.errors import CheckpointError, ConfigError
from parablock_rt.server import journal, recovery
from parablock_rt.server.backlog import Backlog, Kept
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.journal import Begin, Listening, Seated, Started, Vacated
from parablock_rt.server.outcome import ClosedRound, Outcome, Part
from parablock_rt.stages import StageSeconds
from parablock_rt.wire import protocol

CONFIG = pb.RunConfig(rounds=3, clients=2)


def begin(**changes: Any) -> Begin:
    fields: dict[str, Any] = {
        "format": journal.FORMAT,
        "release": "0",
        "run": 7,
        "config": CONFIG,
        "plan_digest": "ab" * 32,
        "frozen": "",
        "fingerprints": [1, 2**64 - 1],
    }
    return Begin(**fields | changes)


RECORDS = [
    Listening(address="127.0.0.1:7070"),
    Seated(seat=0, secret=b"s" * 32),
    Started(seat=0, first_round=0),
    Seated(seat=1, secret=b"t" * 32),
    Vacated(seat=1, reason="left"),
]


def make(folder: Path) -> Path:
    state = Checkpoint.create(folder, begin())
    for record in RECORDS:
        state.append(record)
    state.close()
    return folder / "journal"


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(1, 10_000))
def test_a_journal_that_was_torn_anywhere_gives_the_records_that_were_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn") / "state"
    journal = make(folder)
    size = journal.stat().st_size
    left = cut % size
    os.truncate(journal, left)
    payloads = [msgspec.msgpack.encode(record) for record in (begin(), *RECORDS)]
    whole, at = 0, 0
    while whole < len(payloads) and at + 8 + len(payloads[whole]) <= left:
        at += 8 + len(payloads[whole])
        whole += 1
    if whole == 0:
        with pytest.raises(CheckpointError, match="has no beginning"):
            Checkpoint.open(folder)
        return
    state, past = Checkpoint.open(folder)
    assert past.starts == (whole > 1)
    assert past.seats.keys() == ({0} if whole in (3, 4, 6) else {0, 1} if whole == 5 else set())
    assert journal.stat().st_size == at  # what is appended now follows a whole record
    state.append(Listening(address="127.0.0.1:1"))
    state.close()
    state, past = Checkpoint.open(folder)
    assert past.address == "127.0.0.1:1"
    state.close()


def test_a_changed_byte_in_the_middle_of_a_journal_is_damage_and_not_the_end_of_it(tmp_path: Path) -> None:
    journal = make(tmp_path / "state")
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the journal in .* is damaged \d+ bytes into it"):
        Checkpoint.open(tmp_path / "state")


def test_a_state_of_another_format_names_the_release_that_reads_it(tmp_path: Path) -> None:
    Checkpoint.create(tmp_path / "state", begin(format=99, release="9.9")).close()
    with pytest.raises(CheckpointError, match=r"format 99, written by release 9\.9"):
        Checkpoint.open(tmp_path / "state")


def test_two_servers_cannot_use_one_state_nor_begin_it_twice(tmp_path: Path) -> None:
    state = Checkpoint.create(tmp_path / "state", begin())
    with pytest.raises(CheckpointError, match="another server is using the state"):
        Checkpoint.open(tmp_path / "state")
    state.close()
    with pytest.raises(CheckpointError, match="holds the state of a run already"):
        Checkpoint.create(tmp_path / "state", begin())
    with pytest.raises(CheckpointError, match="there is no run to resume in"):
        Checkpoint.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["ftruncate", "fdatasync", "fsync"])
def test_what_the_system_refuses_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(CheckpointError, match=r"the state .* be written.*: Input/output error"):
            Checkpoint.create(tmp_path, begin())
    Checkpoint.create(tmp_path / "next", begin()).close()


def test_the_state_is_readable_for_its_owner_alone(tmp_path: Path) -> None:
    """The seats' secrets are in it."""
    state = Checkpoint.create(tmp_path / "state", begin())
    state.write_round(0, {"x": torch.ones(4)})
    state.close()
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "state", *(tmp_path / "state").iterdir()]
    }
    assert modes == {"state": 0o700, "journal": 0o600, "round-000000.safetensors": 0o600}


def test_what_a_round_changed_comes_back_to_the_bit_and_a_changed_bit_is_noticed(tmp_path: Path) -> None:
    state = Checkpoint.create(tmp_path / "state", begin())
    tensors = {"x": torch.randn(300), "reference.0": torch.randn(300).bfloat16(), "update": torch.arange(99).byte()}
    state.write_round(4, tensors)
    found = state.read_round(4)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    file = tmp_path / "state" / "round-000004.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="failed its checksum"):
        state.read_round(4)
    os.truncate(file, 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        state.read_round(4)
    state.close()


def closed_record(index: int) -> journal.Closed:
    """A round in which clients 0 to 2 were waited for; that of client 1 was refused."""
    parts = tuple(Part(seat, 0.0, 0.0, 0.0) for seat in (0, 2))
    closed = ClosedRound(
        **dict.fromkeys(("loss", "weight", "compute_s", "exposed_s", "open_s", "skew_s"), 0.0),
        **dict.fromkeys(("block", "contributions", "bad_groups", "bytes_up", "bytes_down"), 0),
        round=index,
        fingerprint=index,
        parts=parts,
        stages=StageSeconds(compute=1.0),
    )
    update = protocol.Update(round=index, block=0, fingerprint=index, contributions=2, bad_groups=0)
    verdicts = {0: "", 1: "bad", 2: ""} if index < 30 else {0: ""}
    return journal.Closed(closed=closed, update=update, verdicts=verdicts, given_up=[2] if index > 9 else [])


def test_of_early_rounds_a_server_keeps_no_part_of_any_client_in_memory(tmp_path: Path) -> None:
    """Those who read the journal once get everything."""
    state = Checkpoint.create(tmp_path / "state", begin())
    state.append(*[closed_record(index) for index in range(40)])
    state.close()
    state, past = Checkpoint.open(tmp_path / "state")
    state.close()
    outcome = Outcome()
    outcome.add(closed_record(index).closed for index in range(40))
    for rounds in ([record.closed for record in past.closed], outcome.rounds):
        assert [closed.fingerprint for closed in rounds] == list(range(40))
        assert [len(closed.parts) for closed in rounds] == [0] * 24 + [2] * 16
        assert [closed.stages.compute for closed in rounds] == [0.0] * 24 + [1.0] * 16
    assert [len(record.verdicts) for record in past.closed] == [0] * 24 + [3] * 6 + [1] * 10
    assert [len(closed.parts) for closed in Checkpoint.closed_rounds(tmp_path / "state")] == [2] * 40


def test_the_last_verdicts_on_each_seats_uploads_are_known_however_long_ago_they_were(tmp_path: Path) -> None:
    """But not those on a former holder's."""
    past = journal.Past(begin())
    for seat, first_round in ((0, 0), (1, 0), (2, 28)):
        past.take(Seated(seat=seat, secret=b""))
        past.take(Started(seat=seat, first_round=first_round))
    for index in range(60):
        past.take(closed_record(index))
    members = {member.seat: member for member in recovery.members(past)}
    assert {seat: sorted(member.verdicts) for seat, member in members.items()} == {
        0: [56, 57, 58, 59],
        1: [26, 27, 28, 29],
        2: [28, 29],
    }
    assert {verdict.reason for verdict in members[1].verdicts.values()} == {"bad"}
    assert all(verdict.accepted for verdict in members[2].verdicts.values())


def test_who_was_given_up_is_known_until_a_newcomer_has_the_seat() -> None:
    past = journal.Past(begin())
    found = []
    for index in range(11):
        past.take(closed_record(index))
        found.append(past.given_up)
    assert found == [set()] * 10 + [{2}]
    past.take(Seated(seat=2, secret=b""))
    assert past.given_up == {2}
    past.take(Started(seat=2, first_round=11))
    assert past.given_up == set()


def test_a_file_that_cannot_be_removed_is_an_error_that_says_so_and_frees_the_state(tmp_path: Path) -> None:
    Checkpoint.create(tmp_path / "state", begin()).close()
    folder = tmp_path / "state" / "round-000007.part"  # which cannot be removed as a file is
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"round-000007\.part cannot be removed"):
        Checkpoint.open(tmp_path / "state")
    folder.rmdir()
    state, _ = Checkpoint.open(tmp_path / "state")
    state.close()


# ---- Resuming with something else


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run that has changed two of its four blocks."""
    folder = tmp_path_factory.mktemp("finished") / "state"
    with starter() as start, start_server(rounds=2, clients=1, server_optimizer="adam", durable=folder) as running:
        start(client, running.address).expect("done")
        running.wait(WAIT_S)
    return folder


def test_a_finished_run_resumes_to_its_result(finished: Path) -> None:
    with start_server(resume=finished) as running:
        outcome = running.wait(WAIT_S)
        assert outcome.client_digests == {0: outcome.digest}
        assert [closed.round for closed in outcome.rounds] == [0, 1]


def test_a_run_is_resumed_with_its_own_model_blocks_and_settings_only(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="rounds = 5 instead of 2"):
        start_server(resume=finished, rounds=5, clients=1)
    with pytest.raises(CheckpointError, match="cuts another model, or cuts it differently"):
        start_server(resume=finished, model=make_model(width=32))
    with pytest.raises(CheckpointError, match="block 2 has other weights than the saved run"):
        start_server(resume=finished, model=make_model(seed=3))
    with pytest.raises(ConfigError, match="give either durable"):
        start_server(resume=finished, durable=finished)


def test_a_run_whose_file_is_gone_or_of_another_round_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "state"
    copy.mkdir()
    for file in finished.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    first, second = sorted(copy.glob("round-*"))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"round-000001\.safetensors cannot be read"):
        start_server(resume=copy)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="block 1 has other weights than the saved run"):
        start_server(resume=copy)


@pytest.mark.parametrize("name", ["x", "first", "second", "reference.0", "update"])
@pytest.mark.parametrize("differs", ["type", "shape", "missing"])
def test_a_tensor_that_is_not_what_its_round_left_is_refused(
    finished: Path, tmp_path: Path, name: str, differs: str
) -> None:
    """The checksums cover the bytes of a tensor only."""
    shutil.copytree(finished, tmp_path / "state")
    state, _ = Checkpoint.open(tmp_path / "state")
    tensors = state.read_round(1)
    tensor = tensors.pop(name)
    if differs == "type":
        tensors[name] = tensor.view(torch.int8 if tensor.dtype == torch.uint8 else torch.int32)
    elif differs == "shape":
        tensors[name] = tensor[None]
    state.write_round(1, tensors)
    state.close()
    with pytest.raises(CheckpointError, match=r"found .*: the state is damaged and the run cannot be resumed from it"):
        start_server(resume=tmp_path / "state")


# ---- What is kept for clients that are behind


def test_who_claims_to_have_missed_millions_of_rounds_costs_no_look_at_each() -> None:
    looked_at: list[int] = []

    def block_of(round: int) -> int:
        looked_at.append(round)
        return round % 3

    assert Backlog([1, 1, 1]).missed(range(10**12), block_of) == ([], [0, 1, 2])
    assert looked_at == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=40), st.integers(-1, 40))
def test_what_somebody_missed_comes_once_and_never_weighs_more_than_the_blocks(
    rounds: list[tuple[int, int]], applied: int
) -> None:
    weights = [30, 60, 90, 120]
    backlog = Backlog(weights)
    released: list[int] = []
    for index, (block, nbytes) in enumerate(rounds):
        update = protocol.Update(round=index, block=block, fingerprint=0, contributions=1, bad_groups=0)
        backlog.add(Kept(update, nbytes, None, lambda index=index: released.append(index)))  # type: ignore[arg-type]
    applied = min(applied, len(rounds) - 1)
    blocks = [block for block, _ in rounds]
    again, whole = backlog.missed(range(applied + 1, len(rounds)), blocks.__getitem__)
    assert set(again) | {r for r in range(applied + 1, len(rounds)) if blocks[r] in whole} == set(
        range(applied + 1, len(rounds))
    )
    assert all(blocks[r] not in whole and r in backlog for r in again)
    for block in set(blocks):
        kept = [r for r in backlog.rounds if blocks[r] == block]
        assert len(kept) == 1 or sum(rounds[r][1] for r in kept) <= weights[block]
        assert max(kept) == max(r for r in range(len(rounds)) if blocks[r] == block)
    assert sorted([*released, *backlog.rounds]) == list(range(len(rounds)))
    backlog.drop_through(len(rounds))
    assert backlog.rounds == set()
