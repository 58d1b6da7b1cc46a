"""How a training loop gets into a run: `join`, which returns when the first round can be trained.

What happens in a round is the run's business; here is what stands before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from torch import nn

from parablock_rt.blocks.claims import Claim
from parablock_rt.blocks.fingerprint import fingerprint
from parablock_rt.blocks.plan import BlockPlan, combined
from parablock_rt.client import memory
from parablock_rt.client.active import OptimizerFactory
from parablock_rt.client.entry import Entry
from parablock_rt.client.run import RoundReport, Run
from parablock_rt.client.server_link import ServerLink
from parablock_rt.errors import ConfigError
from parablock_rt.observe.timeline import Timeline
from parablock_rt.staging.device_stager import stager_for
from parablock_rt.wire import protocol
from parablock_rt.wire.connection import Connection
from parablock_rt.wire.tls import Tls
from parablock_rt.wire.transport import DEFAULT_LANES, Shape, Transport

log = logging.getLogger("parablock")


def join(
    address: str,
    model: nn.Module,
    optimizer: OptimizerFactory,
    *,
    plan: BlockPlan | None = None,
    token: str | None = None,
    tls: Tls | None = None,
    rate: float = 0.0,
    delay: float = 0.0,
    lanes: int = DEFAULT_LANES,
    on_round: Callable[[RoundReport], None] | None = None,
    patience: float = 3600.0,
    reconnect: float = 600.0,
    idle_timeout: float = 60.0,
    pinned_memory: int | None = None,
    trace: bool = True,
) -> Run:
    """Joins the run of the server at `address` ("host:port") and returns when its first round can be trained.

    The parameters that the server's plan names become views of flat buffers; all others are frozen until the run is
    closed. If the model's weights differ from the server's reference, they are replaced by it.

    Args:
        model: the model that the server was started with; same architecture and dtype.
        optimizer: called with the active block's parameters at the start of every round; returns a torch optimiser of
            these parameters, which for a 16-bit model are fp32 copies of the model's. If it has an argument `round`, it
            is given the round's index by that name, for a learning rate that changes; for an argument `names`, what
            the parameters are called in the model, in their order, to group them. On CUDA it is called with parameters
            on the meta device, too, to learn how much memory its state takes.
        plan: a plan of your own, to be checked against the server's; None takes the server's.
        token: the pre-shared token, if the server asks for one.
        tls: speak TLS, with a server that is told from others as this says; None: in the clear.
        rate, delay: slow the upload down artificially: bytes per second (0: unlimited) and seconds, one way.
        lanes: connections to spread the link over, 1 to 4, as far as the server allows. More than one helps where a
            single TCP connection does not fill a long or lossy path.
        on_round: called on the training thread after each hand-over. It may end the run with `run.close()`. Weights may
            be read there; to change them and put them back, call `run.wait_encoded()` before.
        patience: seconds after which a single wait for the server is an error, if no transfer gets on meanwhile.
        reconnect: seconds for which a connection that broke is tried to be replaced, while training goes on as far as
            it can; 0: that is an error at once. One that breaks before the first round is joined anew as long.
        idle_timeout: seconds of silence after which a connection counts as broken.
        pinned_memory: for a model on a GPU, the bytes of host memory that may be pinned; None: what the run uses, at
            most half of the memory that this process may use.
        trace: record what happens to every chunk, for `RunFolder.write_trace`.

    Raises:
        ConfigError: an optimiser instead of a function that makes one, or one of other parameters; a model that
            another run or a server still uses; TLS settings that cannot be used.
        ConnectError, HandshakeError, PlanMismatchError, PeerLostError: see the message.
        DeviceMemoryError: the model's device has less free memory than the run will take.
    """
    if not callable(optimizer):
        raise ConfigError(
            "expected optimizer to be a function, such as lambda params: torch.optim.AdamW(params, lr=1e-5), since "
            f"each round trains other parameters; found a {type(optimizer).__name__}"
        )

    def begin(connection: Connection, welcome: protocol.Welcome) -> Run:
        link = ServerLink(connection, token, welcome, patience=patience, reconnect=reconnect)
        if plan is not None:
            plan.check_same(welcome.plan)
        timeline = Timeline(f"client {welcome.client}", "training", on=trace)
        timeline.run, timeline.seat = connection.run, welcome.client
        return _begin(link, welcome, model, optimizer, on_round, pinned_memory, timeline)

    return Entry(address, token, reconnect).until_begun(
        lambda: Transport(
            Shape(rate, delay),
            tls=None if tls is None else tls.for_client(),
            idle_timeout=idle_timeout,
            lanes=lanes,
        ),
        begin,
    )


def _begin(
    link: ServerLink,
    welcome: protocol.Welcome,
    model: nn.Module,
    optimizer: OptimizerFactory,
    on_round: Callable[[RoundReport], None] | None,
    pinned_memory: int | None,
    timeline: Timeline,
) -> Run:
    """Cuts the model as the server says, takes what memory the run needs, and waits for the first round."""
    config = welcome.config
    plan = BlockPlan.from_spec(model, welcome.plan)
    device = model.get_parameter(plan.blocks[0].parameters[0]).device
    memory.require_room(device, partial(memory.predict, model, plan, config, optimizer, "cuda"))
    claim = Claim(model, "client")
    try:
        blocks = plan.materialise(model)
        ring = partial(timeline.transfer_ring, plan=plan, config=config, links=1)
        stager = stager_for(blocks, config, pinned_memory, ring)
        run = Run(link, model, plan, blocks, welcome, optimizer, on_round, stager, timeline, claim)
    except BaseException:
        claim.release()
        raise
    _warn_of_statistics(model)
    try:
        ready = protocol.Ready(
            plan_digest=plan.digest,
            frozen=combined(run.frozen),
            fingerprints=[fingerprint(block) for block in blocks],
        )
        link.ready(ready, [sum(flat.nbytes for flat in block.flats) for block in blocks])
        log.info("joined as client %d of %d; waiting for the first round", welcome.client, config.clients)
        run._begin()
    except BaseException as error:
        run.close(f"could not begin: {type(error).__name__}")
        raise
    return run


def _warn_of_statistics(model: nn.Module) -> None:
    """Batch statistics are buffers that every forward pass changes, on each client in another way."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training:
            log.warning(
                "module %s keeps running statistics, which are not averaged: the models of clients and server will "
                "differ in them. Freeze them with .eval(), or use a normalisation without, such as GroupNorm",
                name,
            )
            return
