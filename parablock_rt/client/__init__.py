"""The client: the train-step runtime that a training loop embeds. Imports nothing from the server."""

from parablock_rt.client.joining import join
from parablock_rt.client.reports import RoundReport, StepReport
from parablock_rt.client.run import Run

__all__ = ["RoundReport", "Run", "StepReport", "join"]
