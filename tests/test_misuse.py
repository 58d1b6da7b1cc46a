"""What would train nothing, or other weights than are handed over, and what ends a run in the middle: it is told."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_client import WIDTH, Net, one_step, serve, sgd, to_the_end
from torch import Tensor, nn

import parablock_rt as pb
from parablock_rt.client.losses import weight_of
from parablock_rt.client.transit import Transit
from parablock_rt.errors import CodecError, ConfigError, ParaBlockError, PlanError
from parablock_rt.staging.stager import Piece, check_piece

WAIT_S = 60.0
DTYPES = [torch.float32, torch.bfloat16]


def layers_of(model: nn.Module) -> nn.ModuleList:
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def join(server: pb.Server, optimizer: Any = sgd, model: nn.Module | None = None, **options: Any) -> pb.Run:
    return pb.join(server.address, model or Net(), optimizer, **options)


# ---- The optimiser


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimiser_of_parameters_that_do_not_train_is_refused(dtype: torch.dtype) -> None:
    foreign = [nn.Parameter(torch.zeros(3))]
    with serve(Net(dtype)) as server, pytest.raises(ConfigError, match="other parameters than those it was given"):
        join(server, lambda parameters: torch.optim.SGD(foreign, lr=0.1), Net(dtype))


def test_an_optimiser_of_the_models_own_parameters_is_refused_where_copies_of_them_train() -> None:
    model = Net(torch.bfloat16)
    with serve(Net(torch.bfloat16)) as server, pytest.raises(ConfigError, match="fp32 copies"):
        join(server, lambda parameters: torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_an_optimiser_of_the_whole_model_trains_the_block_where_it_trains_in_place() -> None:
    model, digests = Net(), []
    for optimizer in (lambda parameters: torch.optim.SGD(model.parameters(), lr=0.1), sgd):
        with serve(rounds=4) as server, join(server, optimizer, model if not digests else None) as run:
            to_the_end(run)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


def test_a_function_that_returns_no_optimiser_is_refused() -> None:
    with serve() as server, pytest.raises(ConfigError, match=r"an optimiser like torch.*found a NoneType"):
        join(server, lambda parameters: None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_function_that_asks_for_names_can_group_parameters_by_them(dtype: torch.dtype) -> None:
    seen: list[list[str]] = []

    def grouped(parameters: list[nn.Parameter], names: list[str], round: int) -> torch.optim.Optimizer:
        seen.append(names)
        decayed = [p for p, name in zip(parameters, names, strict=True) if name.endswith("weight")]
        assert [p.shape for p in decayed] == [torch.Size([WIDTH, WIDTH])]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}], lr=0.01)

    with serve(Net(dtype), rounds=2) as server, join(server, grouped, Net(dtype)) as run:
        to_the_end(run)
    assert seen == [[f"layers.{i}.weight", f"layers.{i}.bias"] for i in range(2)]


def test_the_optimiser_of_the_round_can_be_reached() -> None:
    with serve(rounds=1) as server, join(server) as run:
        run.optimizer.param_groups[0]["lr"] = 0.0
        to_the_end(run)
        with pytest.raises(ParaBlockError, match="the run has ended"):
            _ = run.optimizer
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), Net().parameters(), strict=True))


# ---- Weights that are elsewhere


class Replacing(torch.optim.SGD):
    """Gives each parameter another tensor."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - 0.1 * parameter.grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimiser_that_replaces_a_parameters_memory_is_noticed_before_anything_is_handed_over(
    dtype: torch.dtype,
) -> None:
    with serve(Net(dtype), rounds=1) as server, join(server, lambda p: Replacing(p, lr=0.1), Net(dtype)) as run:
        with pytest.raises(PlanError, match=r"left its (block's flat )?buffer.* in place"):
            one_step(run)
        assert not run.finished


@pytest.mark.parametrize("when", ["of the block that trains", "of another block, in the last round"])
def test_a_parameter_that_was_replaced_is_noticed_before_the_run_ends(when: str) -> None:
    with serve(rounds=2) as server, join(server) as run:
        one_step(run)  # now the last block trains, in the last round
        layer = run.model.layers[1 if when == "of the block that trains" else 0]
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        with pytest.raises(PlanError, match="was replaced during the run"):
            one_step(run)
        assert not run.finished


def test_a_model_that_somebody_uses_is_refused_until_they_are_done() -> None:
    model = Net()
    with serve(model, rounds=1) as server:
        with pytest.raises(ConfigError, match="in use by a server that was not closed"):
            join(server, model=model)
        with pytest.raises(ConfigError, match="in use by a server"):
            serve(model)
        with join(server, model=(ours := Net())) as run:
            with pytest.raises(ConfigError, match="in use by a client"):
                serve(ours)
            to_the_end(run)
        server.wait(WAIT_S)
    for _ in range(2):
        with serve(model, rounds=1) as server, join(server, model=ours) as run:
            to_the_end(run)


def test_a_join_that_fails_lets_go_of_the_model() -> None:
    model = Net()
    with serve(rounds=1) as server, pytest.raises(ConfigError):
        join(server, lambda parameters: None, model)
    with serve(rounds=1) as server, join(server, model=model) as run:
        to_the_end(run)


# ---- Gradients


def test_a_round_without_any_gradient_is_an_error() -> None:
    with serve(local_steps=2) as server, join(server) as run:
        run.step()
        with pytest.raises(ParaBlockError, match=r"no parameter of block.*loss\.backward"):
            run.step()


def test_a_round_may_have_steps_that_leave_its_block_out() -> None:
    """As a model does that drops layers at random."""
    with serve(local_steps=3, rounds=2) as server, join(server) as run:
        while not run.finished:
            run.step()
            one_step(run)
            run.step()


def test_an_optimiser_that_steps_in_the_backward_pass_trains() -> None:
    """It leaves no gradient behind."""

    def eager(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        def step_at_once(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(step_at_once)
        return sgd(parameters)

    digests = []
    for optimizer in (eager, sgd):
        with serve(rounds=1) as server, join(server, optimizer) as run:
            to_the_end(run)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def test_a_module_may_be_wrapped_during_the_run() -> None:
    with serve(rounds=4) as server, join(server) as run:
        one_step(run)
        layers = layers_of(run.model)
        layers[0] = Wrapper(layers[0])
        to_the_end(run)
        assert run.digest == server.wait(WAIT_S).digest


def test_a_run_does_not_go_on_after_a_boundary_that_was_refused() -> None:
    with serve() as server, join(server) as run:
        layer = layers_of(run.model)[0]
        kept = layer.weight
        layer.weight = nn.Parameter(kept.detach().clone())
        layer(torch.ones(1, WIDTH)).sum().backward()
        with pytest.raises(PlanError, match="was replaced"):
            run.step()
        layer.weight = kept
        with pytest.raises(ParaBlockError, match="boundary after round 0 was interrupted by PlanError"):
            one_step(run)


def test_parameters_without_a_gradient_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with serve(rounds=3) as server, join(server) as run, caplog.at_level(logging.WARNING, "parablock"):
        while not run.finished:
            assert run.block is not None
            run.model.layers[run.block].weight.sum().backward()
            run.step()
    said = [record.getMessage() for record in caplog.records if "got no gradient" in record.getMessage()]
    assert len(said) == 1
    assert "without 1 of its parameters, such as layers.0.bias" in said[0]


def test_gradients_that_somebody_left_behind_do_not_enter_a_later_round() -> None:
    def digest(disturb: Callable[[pb.Run], None]) -> str | None:
        with serve(rounds=4) as server, join(server) as run:
            disturb(run)
            to_the_end(run)
            return run.digest

    def look_at_all(run: pb.Run) -> None:
        flags = {parameter: parameter.requires_grad for parameter in run.model.parameters()}
        for parameter in flags:
            parameter.requires_grad_(True)
        run.model(torch.ones(2, WIDTH)).sum().backward()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter in run.block_parameters():
            parameter.grad = None

    assert digest(look_at_all) == digest(lambda run: None) is not None


class FailsOnce(torch.autograd.Function):
    """Lets gradients through, but the first time raises instead."""

    failed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise RuntimeError("out of memory")
        return gradient


def test_a_backward_pass_that_fails_leaves_none_of_its_gradients() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        early, late = layers_of(model)
        return late(torch.relu(FailsOnce.apply(early(batch)) + early(batch))).square().sum()

    digests = []
    for failed in (False, True):
        FailsOnce.failed = failed
        with serve(rounds=1) as server, join(server) as run:
            if not failed:
                with pytest.raises(RuntimeError, match="out of memory"):
                    run.train_step(torch.ones(2, WIDTH), loss_fn)
                assert FailsOnce.failed
            run.train_step(torch.full((2, WIDTH), 0.5), loss_fn)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


def test_a_loss_that_is_no_number_is_refused_before_the_step() -> None:
    with serve() as server, join(server) as run:
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.model(torch.ones(2, WIDTH)).sum().backward()
        with pytest.raises((RuntimeError, ValueError)):
            run.step(loss=torch.ones(3))
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# ---- Ending


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


# ---- Settings of torch's own, and models with more than parameters


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_default_dtype_changes_nothing(default: torch.dtype, dtype: torch.dtype) -> None:
    digests = []
    for set_to in (torch.float32, default):
        server_model, model = Net(dtype), Net(dtype)
        torch.set_default_dtype(set_to)
        try:
            with serve(server_model, rounds=4) as server, join(server, model=model) as run:
                to_the_end(run)
                digests.append(run.digest)
        finally:
            torch.set_default_dtype(torch.float32)
    assert digests[0] == digests[1] is not None


def test_an_error_feedback_that_is_not_fp32_is_refused() -> None:
    now = torch.zeros(128)
    with pytest.raises(CodecError, match="expected an error feedback in fp32"):
        check_piece(Piece(now, now, residual_out=torch.zeros(128, dtype=torch.bfloat16)), "cpu")


def test_a_model_with_batch_statistics_joins_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

    plan = pb.BlockPlan.from_model(model(), blocks=1)
    with serve(model(), rounds=1, plan=plan) as server, caplog.at_level(logging.WARNING, "parablock"):
        join(server, model=model()).close()
        assert "module 1 keeps running statistics" in caplog.text
        caplog.clear()
        frozen = model()
        frozen[1].eval()
        join(server, model=frozen).close()
        assert "running statistics" not in caplog.text


def weigh(labels: Tensor, tokens: Tensor | None, **config: Any) -> float:
    batch = {"labels": labels} | ({} if tokens is None else {"input_ids": tokens})
    return float(weight_of(batch, SimpleNamespace(config=SimpleNamespace(**config))))  # type: ignore[arg-type]


def test_a_batch_weighs_as_many_labels_as_are_trained_on() -> None:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    assert weigh(tokens, tokens) == 8, "a causal model predicts no first token"
    assert weigh(tokens, tokens, is_encoder_decoder=True) == 10
    assert weigh(torch.ones(8, dtype=torch.int64), torch.ones(8, 5)) == 8, "a class for each sequence"
    assert weigh(torch.ones(2, 1), torch.ones(2, 5)) == 2
    masked = tokens.clone()
    masked[:, 1:4] = -100
    assert weigh(masked, tokens) == 2
    assert weigh(torch.full((2, 5), -100), tokens) == 1
    assert weight_of([tokens], nn.Linear(1, 1)) == 1


def test_a_hand_over_that_was_refused_before_it_was_made_is_not_kept_for_sending_again() -> None:
    transit = Transit(chunk=1)
    transit.handed_over = 1
    transit.decided(2)
    transit.decided(1)
    assert [transit.closed(round) for round in (1, 2, 3)] == [False, True, False]
    transit.handed_over = 2
    transit.decided(4)
    assert [transit.closed(round) for round in (2, 4)] == [False, True], "what is past is forgotten"
