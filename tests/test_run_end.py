"""What ends a run in the middle: a callback, another thread, a signal, a boundary that fails."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from test_client import one_step, serve
from test_misuse import WAIT_S, join

import parablock_rt as pb
from parablock_rt.errors import ParaBlockError


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_may_be_closed_from_its_own_callback(staleness: int) -> None:
    def end(report: pb.RoundReport) -> None:
        if report.round == 1:
            run.close("good enough")

    with serve(staleness=staleness) as server:
        run = join(server, on_round=end)
        assert one_step(run).round_ended
        report = one_step(run)
        assert (report.round, report.round_ended, report.finished) == (1, True, False)
        assert list(run.stream([torch.ones(1)])) == []
        with pytest.raises(ParaBlockError, match="was closed before its end"):
            one_step(run)
        assert all(parameter.requires_grad for parameter in run.model.parameters())


def wait_in_a_boundary(close: Callable[[pb.Run], None]) -> None:
    """Two clients are expected to deliver; the one here waits for the other's upload, until `close` is called."""
    waiting = threading.Event()
    with serve(clients=2, staleness=0) as server:
        silent: list[pb.Run] = []
        other = threading.Thread(target=lambda: silent.append(join(server)))
        other.start()
        run = join(server)
        other.join(WAIT_S)
        wait = run._link.wait

        def wait_and_tell(holds: Callable[[], bool], what: str, timeout: float | None = None) -> float:
            if "aggregate" in what:
                waiting.set()
            return wait(holds, what, timeout)

        def close_then() -> None:
            assert waiting.wait(WAIT_S)
            close(run)

        run._link.wait = wait_and_tell  # type: ignore[method-assign]
        closer = threading.Thread(target=close_then)
        closer.start()
        with pytest.raises(ParaBlockError, match="closed while it still waited"):
            one_step(run)
        closer.join(WAIT_S)
        run.close()
        silent[0].close()


def test_a_training_thread_that_waits_for_the_network_hears_that_another_has_closed_the_run() -> None:
    wait_in_a_boundary(lambda run: run.close())


def test_a_training_thread_that_waits_for_the_network_hears_that_a_signal_handler_has_closed_the_run() -> None:
    runs: list[pb.Run] = []
    former = signal.signal(signal.SIGUSR1, lambda *_: runs[0].close("stopped by a signal"))

    def close(run: pb.Run) -> None:
        runs.append(run)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    try:
        wait_in_a_boundary(close)
    finally:
        signal.signal(signal.SIGUSR1, former)


def _before_an_encoding(run: pb.Run, close: Callable[[], None]) -> None:
    pack = run._exchange.pack

    def close_then_pack(*args: object) -> object:
        close()
        return pack(*args)  # type: ignore[arg-type]

    run._exchange.pack = close_then_pack  # type: ignore[method-assign,assignment]


def _with_a_round_begun_in_part(run: pb.Run, close: Callable[[], None]) -> None:
    make = run._optimizer

    def close_then_make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        close()
        return make(parameters)

    run._optimizer = close_then_make


def _in_the_optimiser_s_step(run: pb.Run, close: Callable[[], None]) -> None:
    run.optimizer.register_step_pre_hook(lambda *_: close())


def _after_the_optimiser_s_step(run: pb.Run, close: Callable[[], None]) -> None:
    run.optimizer.register_step_post_hook(lambda *_: close())


@pytest.mark.parametrize("who", ["thread", "handler"])
@pytest.mark.parametrize(
    "where",
    [_in_the_optimiser_s_step, _after_the_optimiser_s_step, _before_an_encoding, _with_a_round_begun_in_part],
    ids=lambda where: where.__name__.strip("_"),
)
def test_a_run_that_is_closed_anywhere_in_a_step_gives_the_model_back_when_the_step_ends(
    where: Callable[[pb.Run, Callable[[], None]], None], who: str
) -> None:
    closed_in_step: list[bool] = []

    def close() -> None:
        if who == "thread":
            closer = threading.Thread(target=run.close)
            closer.start()
            closer.join(WAIT_S)
        else:
            run.close()  # as a handler would, between two instructions of the training thread
        closed_in_step.append(not all(parameter.requires_grad for parameter in run.model.parameters()))

    with serve() as server:
        run = join(server)
        where(run, close)
        with contextlib.suppress(ParaBlockError):  # if it needed the network
            one_step(run)
        assert closed_in_step == [True], "nothing was given back within the step"
        assert all(parameter.requires_grad for parameter in run.model.parameters())
        kept = [parameter.detach().clone() for parameter in run.model.parameters()]
        with pytest.raises(ParaBlockError, match="was closed before its end"):
            one_step(run)
        assert list(run.stream([torch.ones(1)])) == []
        assert all(map(torch.equal, kept, run.model.parameters()))
    with serve() as server, join(server, model=run.model) as again:  # nobody has a claim on the model
        assert again.round == 0


def test_a_run_whose_boundary_failed_says_so_when_it_is_used_again() -> None:
    def explode(report: pb.RoundReport) -> None:
        raise KeyboardInterrupt

    with serve() as server, join(server, on_round=explode) as run:
        with pytest.raises(KeyboardInterrupt):
            one_step(run)
        again = "boundary after round 0 was interrupted by KeyboardInterrupt.* join again"
        with pytest.raises(ParaBlockError, match=again):
            run.step()
        with pytest.raises(ParaBlockError, match=again):
            next(iter(run.stream([torch.ones(1)])))


def test_a_close_that_is_interrupted_gives_the_model_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        run = join(server)
        close = run._link.close

        def interrupted(goodbye: object) -> None:
            close(None)
            raise KeyboardInterrupt

        monkeypatch.setattr(run._link, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.close()
        assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_an_interrupt_cannot_leave_the_link_locked() -> None:
    """A condition's `with` is Python code: an interrupt between its two lines would leave the lock taken."""

    class Interrupted(threading.Condition):
        def __enter__(self) -> bool:
            raise KeyboardInterrupt

    with serve() as server, join(server) as run:
        run._link._changed = Interrupted(run._link._lock)
        while not run.finished:
            one_step(run)
    assert run.digest is not None


def test_weights_may_be_changed_and_put_back_between_steps_once_nothing_reads_them() -> None:
    def swap(run: pb.Run) -> None:
        run.wait_encoded()
        kept = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.model.load_state_dict({name: torch.zeros_like(value) for name, value in kept.items()})
        run.model.load_state_dict(kept)

    digests = []
    for disturb in (swap, lambda run: None):
        with serve(rounds=4) as server, join(server) as run:
            while not run.finished:
                one_step(run)
                disturb(run)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None
