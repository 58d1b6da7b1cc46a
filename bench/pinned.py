"""The pinned memory of a benchmark's client: how much it needs, and how much it got.

By default a client pins at most half of the memory that the machine reports. If that is too little, or the system
refuses, some copies use pageable memory and the training waits for them, so the result does not show what it should.
"""

from __future__ import annotations

import parablock_rt as pb
from parablock_rt.staging import pinned
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.stager import Stager


def pinned_needed(plan: pb.BlockPlan, config: pb.RunConfig) -> int:
    """Bytes that a client of this run pins if allowed."""
    return pinned.bytes_needed(plan.blocks, config.format, config.staleness)


def pinned_figures(stager: Stager | DeviceStager, needed: int) -> dict[str, int | None]:
    """For a row: bytes needed and bytes pinned; None for a model in host memory, which needs no pinned memory."""
    if not isinstance(stager, DeviceStager):
        return {"pinned_bytes_needed": None, "pinned_bytes": None}
    return {"pinned_bytes_needed": needed, "pinned_bytes": stager.memory.nbytes}
