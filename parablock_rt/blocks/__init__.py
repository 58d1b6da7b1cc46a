"""The blocks of a model: which parameters form a block, its layout, and its buffers in memory.

Knows nothing of rounds, links or device streams.
"""

from parablock_rt.blocks.plan import BlockPlan

__all__ = ["BlockPlan"]
