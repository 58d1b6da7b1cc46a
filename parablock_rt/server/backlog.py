"""The aggregates of closed rounds that somebody may still need: a client that comes back is sent those it missed.

A block's aggregates are kept as long as they weigh no more together than the block itself, and the last one always;
beyond that the whole block is the cheaper thing to send. So the backlog does not outgrow the model, and it is almost
empty while nobody is behind.

Knows neither clients nor sockets. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parablock_rt import _C
from parablock_rt.wire import protocol


@dataclass(frozen=True, eq=False)
class Kept:
    """An aggregate: its announcement and its packed body. `release` gives the body's memory back."""

    update: protocol.Update
    nbytes: int
    source: _C.Source
    release: Callable[[], None]


class Backlog:
    """The aggregates that are kept, by round."""

    def __init__(self, block_bytes: list[int]) -> None:
        """`block_bytes`: what a snapshot of each block weighs."""
        self._block_bytes = block_bytes
        self._kept: dict[int, Kept] = {}

    def __contains__(self, round: int) -> bool:
        return round in self._kept

    def __getitem__(self, round: int) -> Kept:
        return self._kept[round]

    @property
    def rounds(self) -> set[int]:
        """The rounds whose aggregates are kept."""
        return set(self._kept)

    def add(self, kept: Kept) -> None:
        """Keeps one more, of a later round than all others, and lets go of those that a snapshot is cheaper than."""
        block = kept.update.block
        self._kept[kept.update.round] = kept
        same = [k for k in self._kept.values() if k.update.block == block]
        total = sum(k.nbytes for k in same)
        for old in same[:-1]:
            if total <= self._block_bytes[block]:
                break
            self._drop(old)
            total -= old.nbytes

    def drop_through(self, round: int) -> None:
        """Everybody has applied this round and those before it."""
        for kept in [k for k in self._kept.values() if k.update.round <= round]:
            self._drop(kept)

    def missed(self, rounds: range, block_of: Callable[[int], int]) -> tuple[list[int], list[int]]:
        """How to bring somebody up to date who lacks these rounds.

        Returns the rounds whose aggregates to send and the blocks to send whole instead, in the order of their first
        missed round.
        """
        whole = dict.fromkeys(block_of(round) for round in rounds if round not in self._kept)
        return [round for round in rounds if block_of(round) not in whole], list(whole)

    def _drop(self, kept: Kept) -> None:
        del self._kept[kept.update.round]
        kept.release()
