"""Faces for training loops that belong to other libraries.

`trainer`, which imports transformers, is not imported here.
"""

from parablock_rt.integrations.optimizer import RunOptimizer

__all__ = ["RunOptimizer"]
