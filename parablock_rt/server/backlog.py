"""The aggregates of closed rounds that a client may still need: a client that comes back is sent those it missed.

A block's latest aggregate is always kept. Its earlier ones are kept as long as all of them together are no larger than
the block itself; beyond that, sending the whole block is cheaper. So the backlog does not outgrow the model, and it is
almost empty while no client is behind.

Knows neither clients nor sockets. Only one thread may use a backlog at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parablock_rt import _C
from parablock_rt.wire import protocol


@dataclass(frozen=True, eq=False)
class Kept:
    """An aggregate: its announcement and its packed body. `release` returns the body's buffer to its owner."""

    update: protocol.Update
    nbytes: int
    source: _C.Source
    release: Callable[[], None]


class Backlog:
    """The aggregates that are kept, by round."""

    def __init__(self, block_bytes: list[int]) -> None:
        """`block_bytes`: the size of each block's snapshot."""
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
        """Keeps the aggregate of a round later than all others, and drops those that a snapshot is cheaper than."""
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
        """Drops the aggregates up to and including this round, which every client has applied."""
        for kept in [k for k in self._kept.values() if k.update.round <= round]:
            self._drop(kept)

    def missed(self, rounds: range, block_of: Callable[[int], int]) -> tuple[list[int], list[int]]:
        """How to bring a client up to date that has not applied these rounds.

        Returns the rounds whose aggregates to send, and the blocks to send whole instead, ordered by the first round
        that the client missed of each block.
        """
        whole: dict[int, None] = {}
        for round in rounds:
            if len(whole) == len(self._block_bytes):  # a client may claim to have missed millions of rounds
                break
            if round not in self._kept:
                whole[block_of(round)] = None
        aggregates = [round for round in sorted(self._kept) if round in rounds and block_of(round) not in whole]
        return aggregates, list(whole)

    def _drop(self, kept: Kept) -> None:
        del self._kept[kept.update.round]
        kept.release()
