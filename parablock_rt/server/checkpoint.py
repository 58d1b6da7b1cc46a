"""A server's durable state: a folder from which a run can be resumed, whenever its server was killed.

`journal` is an append-only list of records, each with its length and checksum. `round-N.safetensors` holds what round N
changed: one block (reference, master, the server optimiser's state) and the aggregate that went to the clients. A block
that no round has changed is in no file: it still equals the initial model, and the journal has its fingerprint.

The write order keeps the state consistent: first the round's file (written under another name, synced, then renamed),
then the record that names the round, synced, and only then are clients told. So the file that a record names always
exists, a file without a record belongs to a round that was never closed, and a torn record was never acted upon.

This module knows nothing of clients or rounds. A lock ensures that only one process uses the folder at a time. The
journal contains the seats' secrets, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from parablock_rt import _C
from parablock_rt.errors import CheckpointError
from parablock_rt.server.journal import FORMAT, Begin, Past, Record
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.version import __version__

_JOURNAL = "journal"
_FRAME = struct.Struct("<II")  # length and CRC-32C of a record
_MAX_RECORD = 64 * 2**20


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Checkpoint:
    """The state folder of the running server. `close` frees the lock, and so does the end of the process, although
    processes that it forked may live on."""

    def __init__(self, folder: Path, journal: _C.Descriptor) -> None:
        """Only `create` and `open` call this."""
        self.folder = folder
        self._journal = journal

    @classmethod
    def create(cls, folder: Path, begin: Begin) -> Checkpoint:
        """Begins the state of a new run. Raises CheckpointError when the folder holds a run or cannot be written."""
        with _told(f"the state cannot be written to {folder}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            journal = _C.Descriptor(os.open(folder / _JOURNAL, flags, 0o600))
        checkpoint = cls(folder, journal)
        try:
            _lock(journal, folder)
            cls.refuse_to_replace(folder)
            with _told(f"the state cannot be written to {folder}"):
                os.ftruncate(journal.fileno(), 0)
                checkpoint.append(begin)
                _sync_folder(folder)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    @staticmethod
    def refuse_to_replace(folder: Path) -> None:
        """Raises CheckpointError when the folder holds the state of a run, which a new run would overwrite."""
        journal = folder / _JOURNAL
        with _told(f"the state in {folder} cannot be read"):
            begun = journal.exists() and not _never_begun(journal.read_bytes())
        if begun:
            raise CheckpointError(
                f"{folder} holds the state of a run already; resume that run, or choose another folder"
            )

    @classmethod
    def open(cls, folder: Path, *, whole: bool = False) -> tuple[Checkpoint, Past]:
        """Opens the state of an earlier server and removes what that server was writing when it died. `whole`: see
        `Past`.

        Raises CheckpointError when there is no state, when another server uses it, or when it is damaged.
        """
        try:
            journal = _C.Descriptor(os.open(folder / _JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
        except OSError as error:
            raise CheckpointError(
                f"there is no run to resume in {folder} ({error.strerror}); expected the folder that an earlier server "
                "was told to keep its state in"
            ) from error
        try:
            _lock(journal, folder)
            with _told(f"the state in {folder} cannot be read"):
                past = _read(journal, folder, whole=whole)
            for file in folder.glob("round-*"):
                if file.suffix == ".part" or _round_of(file) >= len(past.closed):
                    _remove(file)
        except BaseException:
            journal.close()
            raise
        return cls(folder, journal), past

    @classmethod
    def closed_rounds(cls, folder: Path) -> Iterator[ClosedRound]:
        """The closed rounds of a state, with all their details. Raises what `open` raises, before the iteration."""
        checkpoint, past = cls.open(folder, whole=True)
        checkpoint.close()
        return iter([record.closed for record in past.closed])  # an exhausted iterator frees the list

    def append(self, *records: Record) -> None:
        """Appends records; they are on the disk when this returns. Raises CheckpointError when writing fails."""
        data = b""
        for record in records:
            payload = _encoder.encode(record)
            data += _FRAME.pack(len(payload), _C.crc32c(payload)) + payload
        with _told(f"the state in {self.folder} cannot be written"):
            view = memoryview(data)
            while view:
                view = view[os.write(self._journal.fileno(), view) :]
            os.fdatasync(self._journal.fileno())

    def write_round(self, round: int, tensors: dict[str, Tensor]) -> None:
        """Writes what a round changed. The file counts once a Closed record follows. Raises CheckpointError."""
        target = self._file(round)
        temporary = target.with_suffix(".part")
        try:
            with open(temporary, "wb") as file:  # before there is anything to read in it
                os.fchmod(file.fileno(), 0o600)
            safetensors.torch.save_file(tensors, temporary, metadata={"crc": _crc_text(tensors)})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(self.folder)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"round {round} cannot be written to {self.folder}: {error}") from error

    def read_round(self, round: int) -> dict[str, Tensor]:
        """What a round changed. Raises CheckpointError when the file is missing or damaged."""
        file = self._file(round)
        try:
            with safetensors.safe_open(file, "pt") as opened:
                expected = (opened.metadata() or {}).get("crc")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): the state is damaged and the run cannot be resumed from it"
            ) from error
        if _crc_text(tensors) != expected:
            raise CheckpointError(f"{file} failed its checksum: the state is damaged and the run cannot be resumed")
        return tensors

    def keep_rounds(self, rounds: set[int]) -> None:
        """Removes the files of all other rounds. Raises CheckpointError."""
        for file in self.folder.glob("round-*.safetensors"):
            if _round_of(file) not in rounds:
                _remove(file)

    def has_round(self, round: int) -> bool:
        """Whether a round's file exists."""
        return self._file(round).exists()

    def close(self) -> None:
        """Frees the lock."""
        self._journal.close()

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what the system refuses into a CheckpointError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror}") from error


def _remove(file: Path) -> None:
    try:
        file.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be removed ({error.strerror}): expected a folder that this user may change; give it back "
            "its permissions, and resume"
        ) from error


def _round_of(file: Path) -> int:
    number = file.stem.removeprefix("round-")
    return int(number) if number.isdecimal() else -1


def _crc_text(tensors: dict[str, Tensor]) -> str:
    crcs = {name: _C.crc32c(_bytes_of(tensors[name])) for name in sorted(tensors)}
    return " ".join(f"{name}:{crc:08x}" for name, crc in crcs.items())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _lock(journal: _C.Descriptor, folder: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"another server is using the state in {folder}; stop it first") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(journal: _C.Descriptor, folder: Path, *, whole: bool) -> Past:
    """Replays the records and truncates a last record that was torn when the server died."""
    with os.fdopen(os.dup(journal.fileno()), "rb") as file:
        file.seek(0)
        data = file.read()
    past, length = None, 0
    for payload in _payloads(data, folder):
        length += _FRAME.size + len(payload)
        try:
            record = _decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise CheckpointError(
                f"the journal in {folder} has a record that this release does not understand ({error}); resume with "
                "the release that wrote it"
            ) from error
        if past is None:
            past = _begun(record, folder, whole=whole)
        else:
            past.take(record)
    if past is None:
        raise CheckpointError(f"the journal in {folder} has no beginning: there is no run to resume")
    os.ftruncate(journal.fileno(), length)
    return past


def _begun(begin: Record, folder: Path, *, whole: bool) -> Past:
    if not isinstance(begin, Begin):
        raise CheckpointError(f"the journal in {folder} has no beginning: there is no run to resume")
    if begin.format != FORMAT:
        raise CheckpointError(
            f"the state in {folder} has format {begin.format}, written by release {begin.release}; this release, "
            f"{__version__}, reads format {FORMAT}. Resume with the release that wrote it"
        )
    return Past(begin, whole)


def _payloads(data: bytes, folder: Path) -> Iterator[bytes]:
    """The records' bytes, up to a torn last record. Raises CheckpointError for a record that is damaged, not torn."""
    at = 0
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if length == 0 or length > _MAX_RECORD or len(payload) < length or _C.crc32c(payload) != crc:
            break
        yield payload
        at += _FRAME.size + length
    rest = data[at:]
    if _has_record(rest):
        raise CheckpointError(
            f"the journal in {folder} is damaged {at} bytes into it, with whole records after it: the disk or another "
            "program changed it, and the run cannot be resumed from it"
        )


def _never_begun(data: bytes) -> bool:
    """Whether a journal ends before its first record does, or has only the zeros that a power cut may leave: its server
    died before it told anybody of the run."""
    if len(data) < _FRAME.size or not any(data):
        return True
    length: int = _FRAME.unpack_from(data)[0]
    return 0 < length <= _MAX_RECORD and len(data) < _FRAME.size + length


def _has_record(rest: bytes) -> bool:
    """Whether an intact record follows a broken one. If so, the broken one is damaged: only the last can be torn."""
    for at in range(1, len(rest) - _FRAME.size):
        length, crc = _FRAME.unpack_from(rest, at)
        start = at + _FRAME.size
        if 0 < length <= len(rest) - start and _C.crc32c(rest[start : start + length]) == crc:
            return True
    return False
