"""One number for the bits of a block, one text for those of a model: by them server and clients compare what they hold.

Finds mistakes and damaged bits. A peer that lies can repeat what it was told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch import Tensor

from parablock_rt import codec
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.blocks.plan import BlockPlan


def fingerprint(block: FlatBlock | list[Tensor]) -> int:
    """One number for the bits of a whole block (its segments in order)."""
    return start_fingerprint(block.flats if isinstance(block, FlatBlock) else block)()


def start_fingerprint(flats: list[Tensor]) -> Callable[[], int]:
    """As `fingerprint`, of the bits as they are now; only calling what this returns waits for a GPU."""
    parts = [codec.start_fingerprint(flat) for flat in flats]

    def total() -> int:
        value = 0
        for part in parts:
            value = (3 * value + part()) % 2**64
        return value

    return total


def digest(plan: BlockPlan, fingerprints: list[int]) -> str:
    """One text for the bits of all blocks of a plan: sha256 over the plan's digest and the fingerprints."""
    sha = hashlib.sha256(bytes.fromhex(plan.digest))
    for value in fingerprints:
        sha.update(value.to_bytes(8, "little"))
    return sha.hexdigest()
