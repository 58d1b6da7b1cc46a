"""Which block a round trains and which clients train it: pure functions of the seed, the same on every machine.

Nothing here uses Python's or torch's random generators, whose streams may change between releases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from parablock_rt import codec
from parablock_rt.config import RunConfig


def _draws(seed: int, purpose: str, index: int, count: int) -> list[bytes]:
    return [hashlib.sha256(f"parablock/{purpose}/{seed}/{index}/{item}".encode()).digest() for item in range(count)]


def permutation(seed: int, purpose: str, index: int, count: int) -> list[int]:
    """A permutation of `range(count)`: the items in the order of their hashes. Uniform up to hash collisions."""
    draws = _draws(seed, purpose, index, count)
    return sorted(range(count), key=draws.__getitem__)


@lru_cache(maxsize=1024)  # a server asks again in every iteration of its loop
def block_of(order: str, seed: int, round: int, blocks: int) -> int:
    """The block that round `round` (from 0) trains, out of `blocks`.

    `order`: "cyclic" repeats 0, 1, 2, …; "reverse" goes from the last block to the first; "reshuffled" draws a new
    permutation for every sweep.
    """
    sweep, position = divmod(round, blocks)
    if order == "reverse":
        return blocks - 1 - position
    if order == "reshuffled":
        return permutation(seed, "block", sweep, blocks)[position]
    return position


@lru_cache(maxsize=1024)
def cohort_of(seed: int, round: int, clients: int, size: int) -> frozenset[int]:
    """The `size` clients, out of `clients`, that train in round `round`."""
    if size >= clients:
        return frozenset(range(clients))
    return frozenset(permutation(seed, "cohort", round, clients)[:size])


class Schedule:
    """The rounds of one run: the block, the clients and the size of a body of each round."""

    def __init__(self, config: RunConfig, flat_numels: Sequence[int]) -> None:
        """`flat_numels`: the length of each block's flat index space, `Block.flat_numel`."""
        self._config = config
        self._flat_numels = tuple(flat_numels)

    def block(self, index: int) -> int:
        """The block that a round trains."""
        return block_of(self._config.schedule, self._config.seed, index, len(self._flat_numels))

    def numel(self, index: int) -> int:
        """The number of elements in a round's body, including the gaps of its block."""
        return self._flat_numels[self.block(index)]

    def body_bytes(self, index: int) -> int:
        """Bytes of a round's packed body, the same up and down."""
        return codec.body_bytes(self.numel(index), self._config.format)

    def cohort(self, index: int) -> frozenset[int]:
        """The seats that train in a round."""
        return cohort_of(self._config.seed, index, self._config.clients, self._config.cohort_size)
