"""The client: the train-step runtime that a training loop embeds. Imports nothing from the server."""

from parablock_rt.client.joining import join
from parablock_rt.client.run import RoundReport, Run, StepReport

__all__ = ["RoundReport", "Run", "StepReport", "join"]
