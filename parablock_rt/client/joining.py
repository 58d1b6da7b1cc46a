"""`join`: takes a training loop into a run, up to the start of its first round. run.py has the rounds."""

from __future__ import annotations

import contextlib
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
from parablock_rt.client.lease import Lease
from parablock_rt.client.reports import RoundReport
from parablock_rt.client.run import Run
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

    The parameters that the server's plan names become views of flat buffers; all other parameters are frozen until the
    run is closed. Where the model's weights differ from the server's reference, the reference replaces them.

    Args:
        model: a model with the architecture and dtype of the server's.
        optimizer: a function that makes the optimiser of a round. It is called with the parameters of the round's block
            (fp32 copies, if the model is 16-bit) and returns a torch optimiser of these parameters. If it has an
            argument `round`, it also gets the index of the round, for a learning-rate schedule; if it has an argument
            `names`, it gets the names of the parameters in the model, in the same order, for parameter groups. For a
            model on CUDA it is also called with parameters on the meta device, to measure the optimiser's state.
        plan: your own plan, to check against the server's. None uses the server's plan unchecked.
        token: the pre-shared token, if the server asks for one.
        tls: TLS settings, including how to verify the server. None disables TLS.
        rate, delay: slow the upload down artificially, to `rate` bytes per second (0: unlimited) and by `delay` seconds
            one way.
        lanes: how many TCP connections the link may use, 1 to 4; the server may allow fewer. More than one helps if a
            single connection does not fill a long or lossy path.
        on_round: called on the training thread after each hand-over. It may read the weights, and may leave the run
            with `run.close()`. Before it changes weights (and restores them), it must call `run.wait_encoded()`.
        patience: the longest single wait for the server, in seconds. Progress in any transfer extends the wait. Also
            for how long to join again if connections keep breaking before the first round.
        reconnect: for how many seconds to try to replace a broken connection; training goes on meanwhile as far as it
            can. Before the first round, for how many seconds to try to join again. 0 raises at once.
        idle_timeout: seconds of silence after which a connection counts as broken.
        pinned_memory: for a model on a GPU, the most bytes of host memory to pin. None: what the run needs, but at most
            half of the memory that this process may use.
        trace: note what happens to every chunk, for the timeline of `record`.

    Raises:
        ConfigError: `optimizer` is not a function, or makes an optimiser of other parameters; another run or a server
            uses the model; the model's blocks are not all in host memory or on one CUDA device; `address`, `tls` or
            `lanes` is invalid.
        ConnectError: no connection to `address`, after several tries.
        HandshakeError: the peer is not a compatible ParaBlock server, or refuses this client: protocol version, TLS,
            token, or no free seat.
        PlanMismatchError: the server's plan does not fit the model, or differs from `plan`.
        PlanError: the model's parameters cannot be moved into flat buffers; see `BlockPlan.materialise`.
        PeerLostError: the connection broke and could not be replaced within `reconnect` seconds.
        WaitTimeoutError: the server did not start the run, or did not answer, within `patience` seconds.
        DeviceMemoryError: the model's device has less free memory than the run will take.
        CodecError, _C.DeviceError: the model is on a GPU, and triton or a usable CUDA driver is missing.
    """
    _check_kinds(model, optimizer, plan, on_round)
    Claim(model, "client").release()  # a model that is in use is refused before anything is connected

    def begin(connection: Connection, welcome: protocol.Welcome) -> Run:
        link = ServerLink(connection, token, welcome, patience=patience, reconnect=reconnect)
        if plan is not None:
            plan.check_same(welcome.plan)
        timeline = Timeline(f"client {welcome.client}", "training", on=trace)
        timeline.run, timeline.seat = connection.run, welcome.client
        return _make_run(link, welcome, model, optimizer, on_round, pinned_memory, timeline)

    return Entry(address, token, reconnect, patience).until_begun(
        lambda: Transport(
            Shape(rate, delay),
            tls=None if tls is None else tls.for_client(),
            idle_timeout=idle_timeout,
            lanes=lanes,
        ),
        begin,
    )


def _check_kinds(model: object, optimizer: object, plan: object, on_round: object) -> None:
    """Raises ConfigError for arguments of `join` that are of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected model to be a torch.nn.Module, found a {type(model).__name__}")
    if not callable(optimizer):
        raise ConfigError(
            f"expected optimizer to be a function, found a {type(optimizer).__name__}; each round trains other "
            "parameters, so pass a function such as lambda params: torch.optim.AdamW(params, lr=1e-5)"
        )
    if plan is not None and not isinstance(plan, BlockPlan):
        raise ConfigError(f"expected plan to be a BlockPlan, found a {type(plan).__name__}")
    if on_round is not None and not callable(on_round):
        raise ConfigError(
            f"expected on_round to be a function of the round's report, found a {type(on_round).__name__}"
        )


def _make_run(
    link: ServerLink,
    welcome: protocol.Welcome,
    model: nn.Module,
    optimizer: OptimizerFactory,
    on_round: Callable[[RoundReport], None] | None,
    pinned_memory: int | None,
    timeline: Timeline,
) -> Run:
    """Cuts the model by the server's plan, allocates the memory of the run, and waits for its first round."""
    config = welcome.config
    plan = BlockPlan.from_spec(model, welcome.plan)
    device = model.get_parameter(plan.blocks[0].parameters[0]).device
    memory.require_room(device, partial(memory.predict, model, plan, config, optimizer, "cuda"))
    with contextlib.ExitStack() as undo:
        lease = Lease(model, plan)
        undo.callback(lease.give_back)
        lease.check_frozen(welcome.frozen)
        blocks = plan.materialise(model)
        ring = partial(timeline.transfer_ring, plan=plan, config=config, links=1)
        stager = stager_for(blocks, config, pinned_memory, ring)
        undo.callback(stager.close)
        run = Run(link, model, plan, blocks, welcome, optimizer, on_round, stager, timeline, lease)
        undo.pop_all()
    _warn_of_statistics(model)
    try:
        ready = protocol.Ready(
            plan_digest=plan.digest,
            frozen=combined(lease.frozen),
            fingerprints=[fingerprint(block) for block in blocks],
        )
        link.ready(ready, [sum(flat.nbytes for flat in block.flats) for block in blocks])
        log.info("joined as client %d of %d; waiting for the first round", welcome.client, config.clients)
        run.start()
    except BaseException as error:
        run.close(f"could not start: {type(error).__name__}")
        raise
    return run


def _warn_of_statistics(model: nn.Module) -> None:
    """Warns of running batch statistics: buffers that every forward pass changes, on each client differently."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training:
            log.warning(
                "module %s keeps running statistics, which are not averaged: the models of clients and server will "
                "differ in them. Freeze them with .eval(), or use a normalisation without them, such as GroupNorm",
                name,
            )
            return
