"""ParaBlock-RT: federated fine-tuning of large models, block by block, with communication hidden behind training."""

from parablock_rt import codec
from parablock_rt.blocks import BlockPlan
from parablock_rt.blocks.rows import split_rows
from parablock_rt.client import RoundReport, Run, StepReport, join
from parablock_rt.config import RunConfig
from parablock_rt.errors import ParaBlockError
from parablock_rt.recording import record
from parablock_rt.server import Server, serve
from parablock_rt.version import __version__
from parablock_rt.wire.tls import Tls

__all__ = [
    "BlockPlan",
    "ParaBlockError",
    "RoundReport",
    "Run",
    "RunConfig",
    "Server",
    "StepReport",
    "Tls",
    "__version__",
    "codec",
    "join",
    "record",
    "serve",
    "split_rows",
]
