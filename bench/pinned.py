"""The pinned memory of a benchmark's client: as much as it needs, and how much of that it got.

By default a client pins at most half of the memory that the machine shows. Where that is too little, or the system
refuses, some copies are from pageable memory and the training waits for them: then a result is not what it says.
"""

from __future__ import annotations

import parablock_rt as pb
from parablock_rt.staging import pinned
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.stager import Stager


def pinned_needed(plan: pb.BlockPlan, config: pb.RunConfig) -> int:
    """Bytes that a client of this run pins if it may."""
    return pinned.bytes_needed(plan.blocks, config.format, config.staleness)


def pinned_figures(stager: Stager | DeviceStager, needed: int) -> dict[str, int | None]:
    """For a row: bytes that are needed and that are pinned; None of a model in host memory, which needs none."""
    if not isinstance(stager, DeviceStager):
        return {"pinned_bytes_needed": None, "pinned_bytes": None}
    return {"pinned_bytes_needed": needed, "pinned_bytes": stager.memory.nbytes}
