"""A fingerprint of a block's bits and a digest of a model's: server and clients compare their weights by these.

They find mistakes and damaged bits, but not a lying peer, which can repeat the fingerprint that it was told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch import Tensor

from parablock_rt import codec
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.blocks.plan import BlockPlan


def fingerprint(block: FlatBlock | list[Tensor]) -> int:
    """A 64-bit number for the bits of a whole block (its segments in order). Waits for the GPU if it is on one."""
    return start_fingerprint(block.flats if isinstance(block, FlatBlock) else block)()


def start_fingerprint(flats: list[Tensor]) -> Callable[[], int]:
    """Like `fingerprint`, of the bits as they are now. Only calling the result waits for the GPU."""
    parts = [codec.start_fingerprint(flat) for flat in flats]

    def total() -> int:
        value = 0
        for part in parts:
            value = (3 * value + part()) % 2**64
        return value

    return total


def digest(plan: BlockPlan, fingerprints: list[int]) -> str:
    """A text for the bits of all blocks of a plan: sha256 (hex) over the plan's digest and the fingerprints."""
    sha = hashlib.sha256(bytes.fromhex(plan.digest))
    for value in fingerprints:
        sha.update(value.to_bytes(8, "little"))
    return sha.hexdigest()
