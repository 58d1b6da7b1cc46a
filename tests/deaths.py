"""Where a server process can be made to kill itself: each place is one where a run might lose or double something.

`prepare` is called in the process that is to die. SIGKILL runs no handler and flushes nothing, as a real death.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from parablock_rt.server import checkpoint, journal
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.closing import Closing
from parablock_rt.server.members import Member
from parablock_rt.server.roster import Roster
from parablock_rt.server.rounds import Delivery, Round
from parablock_rt.wire import protocol
from parablock_rt.wire.transport import Transport


def prepare(where: str, round: int, last_words: Callable[[], None]) -> None:
    """Arranges for a death at `where`, in a round. `last_words` is called just before."""

    def die() -> NoReturn:
        last_words()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it goes on")

    _PLACES[where](round, die)


def _after_the_first_upload(round: int, die: Callable[[], NoReturn]) -> None:
    """An upload counts, and nobody knows but this process."""
    take = Round.take

    def take_and_die(self: Round, delivery: Delivery, format: str) -> str:
        reason = take(self, delivery, format)
        if self.index == round:
            die()
        return reason

    Round.take = take_and_die  # type: ignore[method-assign]


def _in_the_broadcast(round: int, die: Callable[[], NoReturn]) -> None:
    """One client has been told that the round is closed, or may have been; the others have not."""
    say = Roster.say
    told: list[int] = []

    def say_and_die(self: Roster, member: Member, message: protocol.Message) -> None:
        if isinstance(message, protocol.Update) and message.round == round:
            if told:
                self._transport.close(flush=1.0)  # what was said leaves
                die()
            told.append(member.seat)
        say(self, member, message)

    Roster.say = say_and_die  # type: ignore[method-assign]


def _with_half_a_round_file(round: int, die: Callable[[], NoReturn]) -> None:
    """The round's file is there under its temporary name, cut off."""
    save = checkpoint.safetensors.torch.save_file

    def save_half(tensors: Any, file: Any, metadata: Any) -> None:
        save(tensors, file, metadata)
        if file.name == f"round-{round:06d}.part":
            os.truncate(file, file.stat().st_size // 2)
            die()

    checkpoint.safetensors.torch.save_file = save_half


def _before_the_record(round: int, die: Callable[[], NoReturn]) -> None:
    """The round's file is whole and has its name, but the journal does not say that the round is closed."""
    write = Checkpoint.write_round

    def write_and_die(self: Checkpoint, index: int, tensors: Any) -> None:
        write(self, index, tensors)
        if index == round:
            die()

    Checkpoint.write_round = write_and_die  # type: ignore[method-assign]


def _with_half_a_record(round: int, die: Callable[[], NoReturn]) -> None:
    """The journal ends in the middle of the record that the round is closed. The aggregate's bytes have left."""
    append, close = Checkpoint.append, Closing._close
    transports: list[Transport] = []

    def note_transport(self: Closing, *args: Any, **named: Any) -> None:
        transports.append(self._roster._transport)
        close(self, *args, **named)

    def append_half(self: Checkpoint, *records: journal.Record) -> None:
        before = os.fstat(self._journal.fileno()).st_size
        append(self, *records)
        if any(isinstance(record, journal.Closed) and record.closed.round == round for record in records):
            after = os.fstat(self._journal.fileno()).st_size
            os.ftruncate(self._journal.fileno(), (before + after) // 2)
            transports[-1].close(flush=1.0)
            die()

    Closing._close = note_transport  # type: ignore[method-assign]
    Checkpoint.append = append_half  # type: ignore[method-assign]


def _after_the_record(round: int, die: Callable[[], NoReturn]) -> None:
    """The round is closed for good, and nobody has been told."""
    append = Checkpoint.append

    def append_and_die(self: Checkpoint, *records: journal.Record) -> None:
        append(self, *records)
        if any(isinstance(record, journal.Closed) and record.closed.round == round for record in records):
            die()

    Checkpoint.append = append_and_die  # type: ignore[method-assign]


_PLACES = {
    "after the first upload": _after_the_first_upload,
    "with half a round file": _with_half_a_round_file,
    "before the record": _before_the_record,
    "with half a record": _with_half_a_record,
    "after the record": _after_the_record,
    "in the broadcast": _in_the_broadcast,
}
PLACES = list(_PLACES)
