"""The optimiser of a round: which are refused, what they are told, and who takes their step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_client import WIDTH, Net, one_step, serve, sgd, to_the_end
from test_misuse import DTYPES, join
from torch import nn

import parablock_rt as pb
from parablock_rt.errors import ConfigError, ParaBlockError


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


def test_an_optimiser_that_needs_a_closure_is_refused() -> None:
    with serve() as server, pytest.raises(ConfigError, match=r"needs no closure, found LBFGS"):
        join(server, torch.optim.LBFGS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimisers_own_step_beside_the_runs_is_an_error(dtype: torch.dtype) -> None:
    with serve(Net(dtype)) as server, join(server, sgd, Net(dtype)) as run:
        with pytest.raises(ParaBlockError, match=r"do not call run\.optimizer\.step"):
            run.optimizer.step()
        one_step(run)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_scaled_loss_trains_as_the_loss_itself_would(dtype: torch.dtype) -> None:
    """The scale is a power of two, so that scaling is exact."""
    digests = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)):
        with serve(Net(dtype), rounds=4) as server, join(server, sgd, Net(dtype)) as run:
            while not run.finished:
                run.train_step(torch.ones(2, WIDTH, dtype=dtype), lambda model, b: model(b).sum(), scaler=scaler)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


def test_a_step_whose_scaled_gradients_overflow_is_left_out() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with serve(rounds=1) as server, join(server) as run:
        run.train_step(torch.ones(2, WIDTH), lambda model, b: model(b).sum() * 1e10, scaler=scaler)
        assert scaler.get_scale() < 2.0**120
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), Net().parameters(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learning_rate_scheduler_may_be_made_with_the_optimiser_of_each_round(dtype: torch.dtype) -> None:
    rates: list[list[float]] = []

    def halving(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = sgd(parameters)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        seen: list[float] = []
        rates.append(seen)

        def after_step(*_: object) -> None:
            seen.extend(scheduler.get_last_lr())
            scheduler.step()

        optimizer.register_step_post_hook(after_step)
        return optimizer

    with serve(Net(dtype), rounds=3, local_steps=2) as server, join(server, halving, Net(dtype)) as run:
        to_the_end(run)
    assert rates == [[0.1, 0.05]] * 3


def test_an_optimiser_that_needs_a_closure_is_refused_also_behind_a_scheduler() -> None:
    def searching(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.LBFGS(parameters)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return optimizer

    with serve() as server, pytest.raises(ConfigError, match=r"step\(\) needs no closure, found LBFGS"):
        join(server, searching)


def test_a_learning_rate_scheduler_of_a_former_rounds_optimiser_is_an_error() -> None:
    with serve(rounds=4) as server, join(server) as run:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, gamma=0.5)
        one_step(run)
        with pytest.raises(ParaBlockError, match="each round has a new one"):
            scheduler.step()
        to_the_end(run)


def test_one_optimiser_of_the_whole_model_may_serve_in_all_rounds_where_it_trains_in_place() -> None:
    model = Net()
    kept = torch.optim.Adam(model.parameters(), lr=0.01)
    with serve(rounds=4) as server, join(server, lambda parameters: kept, model) as run:
        to_the_end(run)
    assert all(state["step"] == 2 for state in kept.state.values())
    assert len(kept.state) == 4


def test_what_a_program_has_marked_parameters_with_is_on_their_copies_too() -> None:
    def marked(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        assert [getattr(p, "_no_weight_decay", False) for p in parameters] == [False, True]
        return torch.optim.SGD(parameters, lr=0.1)

    model = Net(torch.bfloat16)
    for layer in model.layers:
        layer.bias._no_weight_decay = True  # type: ignore[attr-defined]
    with serve(Net(torch.bfloat16), rounds=1) as server, join(server, marked, model) as run:
        to_the_end(run)


def test_names_that_the_program_has_bound_itself_stay_as_they_are() -> None:
    def named(parameters: list[nn.Parameter], names: str) -> torch.optim.Optimizer:
        assert names == "mine"
        return sgd(parameters)

    with serve(rounds=1) as server, join(server, partial(named, names="mine")) as run:
        to_the_end(run)


def test_a_parameter_of_the_loss_in_the_same_optimiser_trains_as_in_a_plain_loop() -> None:
    """A learnable scale, say: nobody else clears its gradient."""

    def steps(scale: nn.Parameter, losses: list[float], run: pb.Run) -> None:
        while not run.finished:
            loss = (run.model(torch.ones(2, WIDTH)).square().mean() * scale - 1).square()
            losses.append(loss.item())
            loss.backward()
            run.step()

    def plainly(scale: nn.Parameter, losses: list[float]) -> None:
        model = Net()
        for round in range(3):
            parameters = [*model.layers[round % 2].parameters(), scale]
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            for _ in range(4):
                loss = (model(torch.ones(2, WIDTH)).square().mean() * scale - 1).square()
                losses.append(loss.item())
                model.zero_grad()
                scale.grad = None
                loss.backward()
                optimizer.step()

    found: list[float] = []
    wanted: list[float] = []
    mine, theirs = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    settings = {"rounds": 3, "local_steps": 4, "staleness": 0, "format": "fp32"}
    with (
        serve(**settings) as server,
        join(server, lambda parameters: torch.optim.SGD([*parameters, mine], lr=0.1)) as run,
    ):
        steps(mine, found, run)
    plainly(theirs, wanted)
    assert found == wanted
    assert torch.equal(mine, theirs)


def test_a_wrapper_that_is_an_optimiser_in_name_only_trains_like_what_it_wraps() -> None:
    """As accelerate's: a subclass that has not called its base's __init__."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, wrapped: torch.optim.Optimizer) -> None:
            self.wrapped = wrapped

        param_groups = property(lambda self: self.wrapped.param_groups)  # type: ignore[assignment]
        state = property(lambda self: self.wrapped.state)  # type: ignore[assignment]

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.wrapped.step()

    digests = []
    for optimizer in (sgd, lambda parameters: Wrapper(sgd(parameters))):
        with serve(rounds=3) as server, join(server, optimizer) as run:
            to_the_end(run)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None
