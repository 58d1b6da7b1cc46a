"""What would train nothing, or other weights than are handed over, and what ends a run in the middle: it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
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


# ---- Weights that are elsewhere


def test_blocks_that_something_makes_trainable_add_no_gradient_to_those_of_the_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PEFT does so whenever it switches adapters."""
    digests, norms = [], []
    for disturbed in (False, True):
        norms.append([])
        with serve(rounds=3, local_steps=3) as server, join(server) as run:
            while not run.finished:
                if disturbed and run.round == 0:
                    run.model.requires_grad_(True)
                run.model(torch.ones(2, WIDTH)).square().sum().backward()
                norms[-1].append(float(nn.utils.clip_grad_norm_(run.block_parameters(), 1e9)))
                run.step()
                trainable = [name for name, p in run.model.named_parameters() if p.requires_grad or p.grad is not None]
                assert trainable == ([] if run.block is None else [*run.plan.blocks[run.block].parameters])
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None
    assert norms[0] == norms[1]
    assert caplog.text.count("had a gradient in a round that does not train it") == 1
    assert "run.block_parameters()" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "path/to/model"}, "expected model to be a torch.nn.Module, found a str"),
        ({"plan": 3}, "expected plan to be a BlockPlan, found a int"),
        ({"on_round": [print]}, "expected on_round to be a function of the round's report, found a list"),
    ],
)
def test_an_argument_of_join_that_is_of_the_wrong_kind_is_refused_before_any_connection(
    changes: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"address": "127.0.0.1:1", "model": Net(), "optimizer": sgd} | changes
    with pytest.raises(ConfigError, match=words):
        pb.join(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"weight": 1},), "expected model to be a torch.nn.Module, found a dict"),
        ((Net(), 12), "expected config to be a RunConfig, found a int; or give its fields as keywords"),
    ],
)
def test_an_argument_of_serve_that_is_of_the_wrong_kind_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pb.serve(*arguments)


def test_a_model_that_another_client_here_uses_is_refused_before_a_seat_is_asked_for() -> None:
    """A cell of a notebook that is run twice: there is one seat, and this process has it."""
    with serve(clients=1) as server, join(server) as run, pytest.raises(ConfigError, match="in use by a client"):
        join(server, model=run.model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_changed_in_place_between_steps_are_trained_on_from_there(dtype: torch.dtype) -> None:
    """A mask, say. The steps are smaller than 16 bits resolve: where nothing was changed, fp32 copies add them up."""
    results = []
    for masked in (False, True):
        with (
            serve(Net(dtype), rounds=1, local_steps=64, format="fp32") as server,
            join(server, tiny_steps, Net(dtype)) as run,
        ):
            while not run.finished:
                weight = run.block_parameters()[0]
                if masked and run.round == 0:
                    with torch.no_grad():
                        weight[0].zero_()
                weight.sum().backward()
                run.step()
            server.wait(WAIT_S)
            results.append(server.state_dict()["layers.0.weight"].float())
    free, masked_out = results
    assert masked_out[0].abs().max() < 1e-3 < free[0].abs().max()
    assert torch.equal(masked_out[1:], free[1:])
    assert not torch.equal(free, Net(dtype).layers[0].weight.float())


def tiny_steps(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-5)


def test_a_buffer_over_a_parameters_memory_is_refused() -> None:
    model = Net()
    model.register_buffer("same", model.layers[0].weight.detach())
    with pytest.raises(PlanError, match=r"'(layers.0.weight|same)' and '(layers.0.weight|same)' share memory"):
        pb.serve(model, rounds=1, clients=1, local_steps=1)


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
    with pytest.raises(CodecError, match="expected a residual in fp32"):
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


def test_what_is_not_trained_and_has_changed_at_the_end_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.mean += 1
            return super().forward(x)

    with caplog.at_level(logging.WARNING, "parablock"):
        with serve(Counting(), rounds=1) as server, join(server, model=Counting()) as run:
            to_the_end(run)
        assert "1 tensors that the plan does not train, such as buffer mean, have changed" in caplog.text
        caplog.clear()
        with serve(rounds=1) as server, join(server) as run:
            to_the_end(run)
        assert "does not train" not in caplog.text


def test_training_that_gives_nan_is_told_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "parablock"), serve(rounds=2) as server, join(server) as run:
        while not run.finished:
            run.train_step(torch.ones(2, WIDTH), lambda model, b: model(b).sum() * float("nan"))
        server.wait(WAIT_S)
    assert "parts of block 0 were NaN or infinite after training and went up as zeros" in caplog.text
    assert "parts of what client 0 trained were NaN or infinite and count as no change" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_that_raises_leaves_no_gradient_to_the_next(dtype: torch.dtype) -> None:
    """A weight that cannot be, and an optimiser that fails once, against a run without either."""

    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            if run.model.fails:  # type: ignore[truthy-bool]
                raise ValueError("once")
            super().step()

    digests = []
    for fails in (True, False):
        with serve(Net(dtype), rounds=1) as server, join(server, partial(Failing, lr=0.1), Net(dtype)) as run:
            run.model.fails = fails
            if fails:
                with pytest.raises(ConfigError):
                    one_step(run, weight=0.0)
                with pytest.raises(ValueError, match="once"):
                    one_step(run)
                run.model.fails = False
            to_the_end(run)
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


def test_between_two_rounds_no_block_trains_and_that_is_what_is_said() -> None:
    said: list[str] = []

    def look(_: pb.RoundReport) -> None:
        with pytest.raises(ParaBlockError) as failure:
            run.block_parameters()
        said.append(str(failure.value))

    with serve(rounds=1) as server, join(server, on_round=look) as run:
        to_the_end(run)
    assert said == ["no block trains between two rounds, where on_round is called"]


def test_batches_may_be_skipped() -> None:
    with serve(rounds=2) as server, join(server) as run:
        for i, batch in enumerate(run.stream([torch.ones(2, WIDTH)])):
            if i % 3 == 2:
                run.train_step(batch, lambda model, b: model(b).square().sum())
        assert run.finished


def test_a_default_device_of_the_program_changes_nothing() -> None:
    digests = []
    for device in ("meta", "cpu"):
        model, server_model, batch = Net(), Net(), torch.ones(2, WIDTH)
        # Not set_default_device, which torch 2.6 cannot undo.
        with torch.device(device), serve(server_model, rounds=4) as server, join(server, model=model) as run:
            while not run.finished:
                run.train_step(batch, lambda model, b: model(b).square().sum())
            digests.append(run.digest)
    assert digests[0] == digests[1] is not None


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
