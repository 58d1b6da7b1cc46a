"""A server inside a process: `serve` starts it, and a `Server` object controls the thread that runs it.

Owns the transport and the thread; the coordinator decides what happens in a round.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from parablock_rt import _C, codec, exits
from parablock_rt.blocks.claims import Claim
from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.blocks.plan import BlockPlan, combined
from parablock_rt.config import RunConfig
from parablock_rt.errors import ConfigError, ParaBlockError, StoppedError
from parablock_rt.observe.timeline import Timeline
from parablock_rt.server import journal, recovery
from parablock_rt.server.checkpoint import Checkpoint
from parablock_rt.server.coordinator import Coordinator
from parablock_rt.server.journal import Past
from parablock_rt.server.master import Master, ServerOptimizer
from parablock_rt.server.members import Identity
from parablock_rt.server.outcome import ClosedRound, Outcome
from parablock_rt.version import __version__
from parablock_rt.wire import handshake, protocol
from parablock_rt.wire.tls import Tls
from parablock_rt.wire.transport import MAX_LANES, Shape, Transport, check_free, check_protection

log = logging.getLogger("parablock")

_BUDGET_PART, _ELEMENT_BYTES, _LEAST_AHEAD, _MOST_AHEAD = 32, 9, 2**24, 2**30
_SUM_BYTES = 16.25  # per element: 16 for the sum, 0.25 for the scales of the 16 int8 uploads of the same size
_EXIT_S = 5.0


class Server:
    """A running server, created by `serve`; also a context manager. Any thread may call its methods."""

    def __init__(
        self,
        coordinator: Coordinator,
        transport: Transport,
        address: str,
        model: nn.Module,
        claim: Claim,
        state: Checkpoint | None,
    ) -> None:
        """Only `serve` calls this. Starts the thread, which releases the claim on the model when it ends."""
        self.address = address
        self._state = state
        self._coordinator = coordinator
        self._transport = transport
        self._model = model
        self._claim = claim
        self._failure: BaseException | None = None  # what ended the run early
        self._failure_told = False
        self._ended = threading.Event()  # not Thread.join: before Python 3.13, Ctrl-C in join marks the thread as ended
        self._thread = threading.Thread(target=self._run, name="pb-server", daemon=True)
        self._thread.start()
        exits.register(self)

    @property
    def config(self) -> RunConfig:
        """The run's settings; for a resumed run, those of the saved run."""
        return self._coordinator.config

    @property
    def plan(self) -> BlockPlan:
        """The partition of the model."""
        return self._coordinator.plan

    @property
    def listeners(self) -> list[Callable[[ClosedRound], None]]:
        """Called after each closed round, on the server's thread; `serve`'s `on_round` is one of them."""
        return self._coordinator.listeners

    @property
    def outcome(self) -> Outcome:
        """The run's results so far."""
        return self._coordinator.outcome

    @property
    def timeline(self) -> Timeline:
        """The server's spans. Read it only after the run has ended."""
        return self._coordinator.timeline

    def link_stats(self) -> dict[str, _C.LinkStats]:
        """Current statistics of the link to each client, by the client's name."""
        return self._coordinator.link_stats()

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Waits until every client has applied the last round. `timeout` is in seconds.

        Raises the error that ended the run early, such as RoundError, and TimeoutError when the run has not ended after
        `timeout`.
        """
        if threading.current_thread() is self._thread:
            raise ParaBlockError("the server's own thread cannot wait for itself; call wait() outside of on_round")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the run did not end within {timeout:g} s; it goes on")
        if self._failure is not None:
            self._failure_told = True
            raise self._failure
        return self.outcome

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state: the reference, in the model's own dtype. Raises ParaBlockError while the run goes on."""
        if self.running:
            raise ParaBlockError("the run is still changing the model; call wait() before state_dict()")
        return self._model.state_dict()

    def close(self, reason: str = "closed by its owner") -> None:
        """Ends the run if it has not ended, tells the clients why, and frees the port. Idempotent.

        If the run had failed and `wait`, which raises the reason, was never called, the reason is logged.

        When called from `on_round`, on the server's own thread, it does not wait: the run ends after the callback
        returns.
        """
        if exits.is_inherited(self):
            return
        self._coordinator.stop(reason)
        if threading.current_thread() is not self._thread:
            self._ended.wait()
            self._log_failure()

    def close_at_exit(self) -> None:
        """Called at interpreter exit if the program has not closed the server."""
        self._coordinator.stop("its program ended")
        self._ended.wait(_EXIT_S)
        self._thread.join(_EXIT_S)
        self._log_failure()

    def _log_failure(self) -> None:
        if self._failure is None or self._failure_told:
            return
        self._failure_told = True
        crash = None if isinstance(self._failure, ParaBlockError) else self._failure
        log.error("the run failed in round %d: %s", len(self.outcome.rounds), self._failure, exc_info=crash)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._coordinator.run()
        except StoppedError as error:
            self._failure, self._failure_told = error, True  # whoever stopped it knows
        except BaseException as error:
            self._failure = error
        finally:
            self._transport.close()
            if self._state is not None:
                self._state.close()
            self._claim.release()
            self._ended.set()


def serve(
    model: nn.Module,
    config: RunConfig | None = None,
    *,
    address: str | None = None,
    plan: BlockPlan | None = None,
    token: str | None = None,
    tls: Tls | None = None,
    insecure: bool = False,
    rate: float = 0.0,
    delay: float = 0.0,
    lanes: int = MAX_LANES,
    idle_timeout: float = 60.0,
    durable: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    on_round: Callable[[ClosedRound], None] | None = None,
    upload_budget: int | None = None,
    trace: bool = True,
    **settings: Any,
) -> Server:
    """Starts a server for `model` and returns at once; clients may join from now on.

    The model becomes the reference: its planned parameters are moved into flat buffers and change round by round.

    Args:
        config: the run's settings; alternatively, give its fields as keywords.
        address: "host:port"; port 0 takes a free port, see `Server.address`. None: a free port of 127.0.0.1, or the
            address on which the resumed run listened before.
        plan: the partition; None takes `BlockPlan.from_model(model)`.
        token: at least 16 characters; clients must prove that they know them.
        tls: encrypts every link with TLS; if it has a CA, clients must show certificates (see `Tls.clients`).
        insecure: allows a non-loopback address without TLS, or without a proof of who the clients are.
        rate, delay: slow each link down artificially: bytes per second (0: unlimited) and one-way delay in seconds.
        lanes: the most connections over which a client may spread its link, 1 to 4.
        idle_timeout: seconds of silence after which a connection counts as broken.
        durable: a new folder for the run's state, so that the run can be resumed if this process is killed. Each round
            then writes about seven bytes per parameter of its block.
        resume: the `durable` folder of an earlier run: the run continues with the round that was open, and its clients
            come back by themselves.
        on_round: called on the server's thread after each closed round.
        upload_budget: the most bytes of uploads that are held at once before they are folded; one upload more is always
            allowed. None: nine bytes per parameter of the largest block (eight int8 uploads) or a 32nd of the memory
            that the model takes, whichever is more, from 16 MiB to 1 GiB; plus the uploads of a whole round, if they
            are no larger than the sum that would otherwise be needed (16 int8 uploads). A larger budget lets more
            clients with slow links send at the same time.
        trace: note what happens to every chunk, for the timeline of `record`.
        settings: the fields of `RunConfig`, such as rounds, clients, local_steps, staleness, format, schedule, seed.
            With `resume` they may be omitted; values that differ from the run's are an error.

    Raises:
        ConfigError: a setting is invalid, or the model is in use.
        PlanError: the model has no blocks. TransportError: the address is taken.
        CheckpointError: the state to resume is damaged, in use, or belongs to another run.
    """
    if durable is not None and resume is not None:
        raise ConfigError("give either durable, for a new run, or resume, which goes on to keep the run's state")
    _check_kinds(
        model, config, plan=plan, on_round=on_round, upload_budget=upload_budget, durable=durable, resume=resume
    )
    config = _settings(config, settings, resumes=resume is not None)
    protected = _proves_clients(token, tls)
    context = None if tls is None else tls.for_server()
    plan = plan or BlockPlan.from_model(model)
    with contextlib.ExitStack() as undo:
        claim = Claim(model, "server")
        undo.callback(claim.release)
        blocks = plan.materialise(model)
        _check_on_host(blocks)
        frozen = plan.frozen_digests(model)
        state: Checkpoint | None = None
        past: Past | None = None
        if resume is not None:
            state, past = Checkpoint.open(Path(resume))
            undo.callback(state.close)
            recovery.check_same(past, config, plan.digest, combined(frozen))
            config = past.begin.config
        assert config is not None
        master = Master(blocks, config.format, ServerOptimizer(config.server_optimizer, config.server_lr))
        if past is not None and state is not None:
            recovery.restore_master(past, state, master)
        identity = _identity(plan, config, frozen, token, tls, past)
        transport = Transport(Shape(rate, delay), tls=context, idle_timeout=idle_timeout, lanes=lanes)
        undo.callback(transport.close, flush=0.0)
        at = address or (past.address if past is not None else "127.0.0.1:0")
        taken = transport.listen(at, protected=protected, insecure=insecure)
        if durable is not None:  # not earlier: a run that cannot listen leaves no state
            state = Checkpoint.create(Path(durable), _beginning(identity, master))
            undo.callback(state.close)
        if state is not None:
            state.append(journal.Listening(address=taken))
        budget = default_upload_budget(plan, config) if upload_budget is None else int(upload_budget)
        coordinator = Coordinator(
            transport, identity, plan, master, budget, on_round, state=state, past=past, trace=trace
        )
        server = Server(coordinator, transport, taken, model, claim, state)
        undo.pop_all()
    return server


def _check_kinds(
    model: object, config: object, *, upload_budget: object, on_round: object, plan: object, **folders: object
) -> None:
    """Raises ConfigError for arguments of `serve` of which the wrong kind would show only later, in a client's face."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected model to be a torch.nn.Module, found a {type(model).__name__}")
    if config is not None and not isinstance(config, RunConfig):
        raise ConfigError(
            f"expected config to be a RunConfig, found a {type(config).__name__}; or give its fields as keywords"
        )
    if upload_budget is not None and (not isinstance(upload_budget, numbers.Integral) or upload_budget < 0):
        raise ConfigError(f"expected upload_budget to be a whole number of bytes, found {upload_budget!r}")
    if on_round is not None and not callable(on_round):
        raise ConfigError(f"expected on_round to be a function of the closed round, found {on_round!r}")
    if plan is not None and not isinstance(plan, BlockPlan):
        raise ConfigError(f"expected plan to be a BlockPlan, found {plan!r}")
    for name, folder in folders.items():
        if folder == "":
            raise ConfigError(f"expected {name} to be a folder, found an empty path")


def check_address(address: str, token: str | None, tls: Tls | None, *, insecure: bool) -> None:
    """Checks an address as `serve` would, for callers that want to find errors before they load a model.

    Raises ConfigError for an address that lacks protection, TransportError for an address that is taken.
    """
    protected = _proves_clients(token, tls)
    check_protection(address, protected=protected, encrypted=tls is not None, insecure=insecure)
    check_free(address)


def _settings(config: RunConfig | None, fields: dict[str, Any], *, resumes: bool) -> RunConfig | None:
    """The run's settings, either `config` or `fields`. Returns None to use those of the run that is resumed."""
    if config is not None and fields:
        raise ConfigError(f"give a config, or its fields as keywords; found both, with {', '.join(sorted(fields))}")
    if config is not None or (resumes and not fields):
        return config
    if unknown := sorted(fields.keys() - set(RunConfig.__struct_fields__)):
        known = ", ".join(sorted(RunConfig.__struct_fields__))
        raise ConfigError(f"serve has no setting {', '.join(unknown)}; the settings of a run are {known}")
    required = {field.name for field in msgspec.structs.fields(RunConfig) if field.required}
    if missing := sorted(required - fields.keys()):
        raise ConfigError(f"a run needs to know {' and '.join(missing)}; give {'=..., '.join(missing)}=...")
    return RunConfig(**fields)


def _proves_clients(token: str | None, tls: Tls | None) -> bool:
    """Whether clients must prove who they are. Raises ConfigError for optional certificates without a token or CA."""
    handshake.check_token(token)
    if tls is not None and not isinstance(tls, Tls):
        raise ConfigError(f"expected tls to be parablock_rt.Tls settings, found {tls!r}")
    certificates_asked = tls is not None and tls.asks_for_certificates
    if tls is not None and tls.clients == "optional" and (token is None or not certificates_asked):
        raise ConfigError(
            "optional client certificates take a CA to check them by and a token for clients that have none: give "
            "both, or require certificates"
        )
    return token is not None or certificates_asked


def _identity(
    plan: BlockPlan,
    config: RunConfig,
    frozen: dict[str, str],
    token: str | None,
    tls: Tls | None,
    past: Past | None,
) -> Identity:
    """The identity of a new run, or of the run that is resumed. `frozen`: the digests of what no block trains."""
    return Identity(
        run=past.begin.run if past is not None else int.from_bytes(os.urandom(8), "little") | 1,  # 0: no run yet
        token=token,
        config=config,
        plan=plan.spec(),
        plan_digest=plan.digest,
        frozen=combined(frozen),
        frozen_digests={name: digest[: protocol.FROZEN_CHARS] for name, digest in frozen.items()},
        certificate_suffices=tls is not None and tls.clients == "optional",
        epoch=0 if past is None else past.starts,
    )


def _check_on_host(blocks: list[FlatBlock]) -> None:
    if elsewhere := {str(flat.device) for block in blocks for flat in block.flats if flat.device.type != "cpu"}:
        raise ConfigError(
            f"a server's model must be in host memory; found it on {', '.join(sorted(elsewhere))}; give it a copy of "
            "its own: model.cpu(). Clients may train on GPUs"
        )


def _beginning(identity: Identity, master: Master) -> journal.Begin:
    return journal.Begin(
        format=journal.FORMAT,
        release=__version__,
        run=identity.run,
        config=identity.config,
        plan_digest=identity.plan_digest,
        frozen=identity.frozen,
        fingerprints=list(master.fingerprints),
    )


def default_upload_budget(plan: BlockPlan, config: RunConfig) -> int:
    """The most bytes of uploads that a server holds before they are folded; one upload more is always allowed.

    The budget has two parts. The first is all uploads of a round, if they are no larger than the sum, which is then not
    needed. The second is for uploads that come ahead or wait for a pass over the sum: a small part of the memory that
    the server needs for the model anyway (an fp32 master and the reference), but at least nine bytes per parameter of
    the largest block (eight int8 uploads with their scales, rounded up) and 16 MiB, and at most 1 GiB. So the server's
    memory does not grow with the number of clients.
    """
    model = sum(segment.length * (4 + segment.dtype.itemsize) for block in plan.blocks for segment in block.segments)
    largest = max(block.flat_numel for block in plan.blocks)
    ahead = min(max(model // _BUDGET_PART, _ELEMENT_BYTES * largest, _LEAST_AHEAD), _MOST_AHEAD)
    round = config.cohort_size * codec.body_bytes(largest, config.format)
    return ahead + (round if round <= _SUM_BYTES * largest else 0)
