"""A server inside a process: `serve` starts it, its own thread runs it, this object watches it.

Owns the transport and the thread; what happens in a round is the coordinator's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from parablock_rt.aggregate import Master, ServerOptimizer
from parablock_rt.blocks import BlockPlan
from parablock_rt.config import RunConfig
from parablock_rt.coordinator import Coordinator
from parablock_rt.errors import ParaBlockError
from parablock_rt.members import Identity
from parablock_rt.outcome import ClosedRound, Outcome
from parablock_rt.timeline import Timeline
from parablock_rt.transport import Shape, Transport


class Server:
    """A running server; made by `serve`, used as a context manager. Its methods may be called from any thread."""

    def __init__(self, coordinator: Coordinator, transport: Transport, address: str, model: nn.Module) -> None:
        """For `serve`. Starts the thread."""
        self.address = address
        self._coordinator = coordinator
        self._transport = transport
        self._model = model
        self._error: ParaBlockError | None = None
        self._crash: BaseException | None = None
        self._ended = threading.Event()  # not Thread.join: before Python 3.13 a Ctrl-C in it makes the thread seem over
        self._thread = threading.Thread(target=self._run, name="pb-server", daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> Outcome:
        """What the run has come to so far."""
        return self._coordinator.outcome

    @property
    def timeline(self) -> Timeline:
        """The server's spans; read it when the run has ended."""
        return self._coordinator.timeline

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Returns when every client has applied the last round. `timeout` in seconds.

        Raises what ended the run early (RoundError, say), and TimeoutError when it goes on after `timeout`.
        """
        if threading.current_thread() is self._thread:
            raise ParaBlockError("the server's own thread cannot wait for itself; call wait() outside of on_round")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the run did not end within {timeout:g} s; it goes on")
        if self._crash is not None:
            raise self._crash
        if self._error is not None:
            raise self._error
        return self.outcome

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state: the reference, in the model's own dtype. Call it when the run has ended."""
        if self.running:
            raise ParaBlockError("the run is still changing the model; call wait() before state_dict()")
        return self._model.state_dict()

    def close(self, reason: str = "closed by its owner") -> None:
        """Ends the run if it has not ended, tells the clients why, and frees the port. Idempotent.

        Called from `on_round`, on the server's own thread, it cannot wait: the run ends when the callback returns.
        """
        self._coordinator.stop(reason)
        if threading.current_thread() is not self._thread:
            self._ended.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._coordinator.run()
        except ParaBlockError as error:
            self._error = error
        except BaseException as error:
            self._crash = error
        finally:
            self._transport.close()
            self._ended.set()


def serve(
    model: nn.Module,
    *,
    address: str = "127.0.0.1:0",
    plan: BlockPlan | None = None,
    token: str | None = None,
    insecure: bool = False,
    rate: float = 0.0,
    delay: float = 0.0,
    on_round: Callable[[ClosedRound], None] | None = None,
    **settings: Any,
) -> Server:
    """Starts a server for `model` and returns at once; clients may join from now on.

    The model becomes the reference: its planned parameters are moved into flat buffers and change round by round.

    Args:
        address: "host:port"; port 0 takes a free one, see `Server.address`.
        plan: the partition; None takes `BlockPlan.from_model(model)`.
        token: clients must prove that they know it. An address that is not loopback needs one, or `insecure`.
        rate, delay: slow each link down artificially: bytes a second (0: unlimited) and seconds, one way.
        on_round: called on the server's thread after each closed round.
        settings: the fields of `RunConfig`, such as rounds, clients, local_steps, staleness, format, schedule, seed.

    Raises:
        ConfigError: a setting that no run can use. PlanError: no blocks. TransportError: the address is taken.
    """
    config = RunConfig(**settings)
    plan = plan or BlockPlan.from_model(model)
    blocks = plan.materialise(model)
    identity = Identity(
        run=int.from_bytes(os.urandom(8), "little") | 1,  # 0 means "no run yet" in a frame
        token=token,
        config=config,
        plan=plan.spec(),
        plan_digest=plan.digest,
        frozen=plan.frozen_fingerprint(model),
    )
    master = Master(blocks, config.format, ServerOptimizer(config.server_optimizer, config.server_lr))
    transport = Transport(Shape(rate, delay))
    try:
        taken = transport.listen(address, protected=token is not None, insecure=insecure)
    except BaseException:
        transport.close(flush=0.0)
        raise
    return Server(Coordinator(transport, identity, plan, master, on_round), transport, taken, model)
