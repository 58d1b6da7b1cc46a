"""The blocks of a model: which parameters form one, how it is laid out, how it lies in memory.

Knows nothing of rounds, links or devices' streams.
"""

from parablock_rt.blocks.plan import BlockPlan

__all__ = ["BlockPlan"]
