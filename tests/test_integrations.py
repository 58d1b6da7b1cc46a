"""Loops of other libraries: they train the bits that a loop written by hand trains, and end with the run."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_client import WIDTH, Net, serve, sgd, to_the_end
from torch import Tensor, nn

import parablock_rt as pb
from parablock_rt.errors import ConfigError
from parablock_rt.integrations import RunOptimizer

WAIT_S = 60.0
ROUNDS, STEPS, ACCUMULATED = 6, 2, 2

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
PLAIN: dict[str, Any] = {"rounds": ROUNDS, "local_steps": STEPS, "staleness": 0, "format": "fp32"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # an earlier test's trainer may have left it


def by_hand(
    model: nn.Module,
    steps: Sequence[Callable[[nn.Module], None]],
    optimizer: Factory,
    rates: Sequence[float],
    clip: float = 0.0,
) -> nn.Module:
    """Blockwise training without a run. Each of `steps` does the backward passes of one step on the model."""
    plan = pb.BlockPlan.from_model(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for index in range(ROUNDS):
        block = [model.get_parameter(name) for name in plan.blocks[index % len(plan.blocks)].parameters]
        start = [parameter.detach().clone() for parameter in block]
        for parameter in block:
            parameter.requires_grad_(True)
        made = optimizer(block)
        for step in range(index * STEPS, index * STEPS + STEPS):
            made.param_groups[0]["lr"] = rates[step]
            steps[step](model)
            if clip:
                nn.utils.clip_grad_norm_(block, clip)
            made.step()
            made.zero_grad()
        for parameter, before in zip(block, start, strict=True):
            with torch.no_grad():
                parameter.copy_(before + (parameter - before))
            parameter.requires_grad_(False)
    return model


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def rows(seed: int = 0) -> list[Tensor]:
    return list(torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(seed)))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).sub(batch.flip(1)).square().mean()
    return loss


PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
OPTIMIZER_CODE, TRAINER_CODE, ACCELERATE_CODE, _ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


# ---- RunOptimizer


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.0, momentum=0.9), partial(torch.optim.AdamW, lr=0.0, weight_decay=0.1)]
)
def test_an_ordinary_loop_with_a_scheduler_trains_the_bits_of_a_loop_by_hand(optimizer: Factory) -> None:
    rates: list[float] = []
    with serve(**PLAIN) as server, pb.join(server.address, Net(), optimizer) as run:
        made = RunOptimizer(run, lr=0.1)
        assert made.steps == ROUNDS * STEPS
        scheduler = torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=made.steps, cycle_momentum=False)
        for batch in run.stream(rows()):
            made.zero_grad()
            loss_of(run.model, batch).backward()
            rates.append(made.param_groups[0]["lr"])
            made.step()
            if not run.finished:
                scheduler.step()
        server.wait(WAIT_S)
    assert len(set(rates)) == ROUNDS * STEPS
    batches = [rows()[step % 5] for step in range(ROUNDS * STEPS)]
    steps = [lambda model, batch=batch: loss_of(model, batch).backward() for batch in batches]
    assert_same(server.state_dict(), by_hand(Net(), steps, optimizer, rates).state_dict())
    assert_same(server.state_dict(), run.model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_reaches_the_gradients_of_the_current_block_through_it(dtype: torch.dtype) -> None:
    with serve(Net(dtype), **PLAIN) as server, pb.join(server.address, Net(dtype), sgd) as run:
        optimizer = RunOptimizer(run, lr=0.1)
        (group,) = optimizer.param_groups
        assert set(group["params"]) == set(run.model.parameters())
        while not run.finished:
            loss_of(run.model, rows()[0].to(dtype)).backward()
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            assert set(found) == set(run.block_parameters())
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_scaler_and_clipping_work_on_it_as_on_any_optimiser(dtype: torch.dtype) -> None:
    results = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        with serve(Net(dtype), **PLAIN) as server, pb.join(server.address, Net(dtype), sgd) as run:
            optimizer = RunOptimizer(run, lr=0.1)
            for batch in run.stream(rows()):
                scaler.scale(loss_of(run.model, batch.to(dtype))).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
            server.wait(WAIT_S)
            results.append(server.state_dict())
    assert_same(*results)


def test_zero_grad_forgets_a_batch_whose_step_is_not_taken() -> None:
    results = []
    for skipped in (False, True):
        with serve(**PLAIN) as server, pb.join(server.address, Net(), sgd) as run:
            optimizer = RunOptimizer(run, lr=0.1)
            while not run.finished:
                if skipped:
                    loss_of(run.model, 3 * rows(1)[0]).backward()
                    optimizer.zero_grad()
                loss_of(run.model, rows()[0]).backward()
                optimizer.step()
            server.wait(WAIT_S)
            results.append(server.state_dict())
    assert_same(*results)


def test_loss_and_weight_are_of_one_step_and_a_closure_gives_the_loss_too() -> None:
    reports: list[pb.RoundReport] = []
    with (
        serve(rounds=3, local_steps=1) as server,
        pb.join(server.address, Net(), sgd, on_round=reports.append) as run,
    ):
        optimizer = RunOptimizer(run, lr=0.1)

        def closure() -> float:
            loss_of(run.model, rows()[0]).backward()
            return 0.25

        optimizer.loss, optimizer.weight = torch.tensor(7.0), 12
        closure()
        assert optimizer.step() is None
        assert optimizer.step(closure) == 0.25
        optimizer.loss = 8.0
        assert optimizer.step(closure) == 0.25
        assert [closed.weight for closed in server.wait(WAIT_S).rounds] == [12.0, 1.0, 1.0]
    assert [report.loss for report in reports] == [7.0, 0.25, 8.0]


def test_steps_after_the_end_change_nothing_and_the_model_can_do_without_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serve(**PLAIN) as server, pb.join(server.address, Net(), sgd) as run:
        optimizer = RunOptimizer(run, lr=0.1)
        for _ in range(optimizer.steps + 3):
            loss_of(run.model, rows()[0]).backward()
            optimizer.step()
        server.wait(WAIT_S)
        assert run.finished
        assert all(p.requires_grad and p.grad is None for p in run.model.parameters())
    assert_same(server.state_dict(), run.model.state_dict())
    assert [record.levelname for record in caplog.records if "end the training" in record.message] == ["WARNING"]


def test_a_saved_state_has_the_rate_alone_and_restores_no_more() -> None:
    with serve(**PLAIN) as server, pb.join(server.address, Net(), sgd) as run:
        optimizer = RunOptimizer(run, lr=0.1)
        optimizer.param_groups[0]["lr"] = 0.05
        saved = optimizer.state_dict()
        assert saved["state"] == {}
        optimizer.param_groups[0]["lr"] = 0.01
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))


def test_the_steps_that_are_told_are_those_of_the_client_s_own_rounds() -> None:
    told = {}

    def take_part() -> None:
        with pb.join(server.address, Net(), sgd) as run:
            steps = RunOptimizer(run, lr=0.1).steps
            to_the_end(run)
            told[run.client] = (steps, run.rounds * STEPS)

    with serve(clients=3, fraction=0.3, rounds=12, local_steps=STEPS) as server:
        threads = [threading.Thread(target=take_part) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert sorted(told) == [0, 1, 2]
    assert all(steps == taken for steps, taken in told.values())
    assert sum(taken for _, taken in told.values()) == 12 * STEPS


def test_rates_that_differ_within_a_round_are_refused_rather_than_made_equal() -> None:
    def layerwise(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.2)

    with serve() as server, pb.join(server.address, Net(), layerwise) as run:
        loss_of(run.model, rows()[0]).backward()
        with pytest.raises(ConfigError, match=r"expected one learning rate .*, found \[0\.1, 0\.2\]"):
            RunOptimizer(run, lr=0.1).step()


def test_it_cannot_be_made_between_rounds_or_after_the_run() -> None:
    refused: list[str] = []

    def make(done: object) -> None:
        with pytest.raises(ConfigError, match="between two rounds or over") as error:
            RunOptimizer(run, lr=0.1)
        refused.append(str(error.value))

    with serve(rounds=2) as server, pb.join(server.address, Net(), sgd, on_round=make) as run:
        to_the_end(run)
        make(None)
    assert len(refused) == 3


def test_it_needs_none_of_the_trainers_libraries() -> None:
    code = "import sys, parablock_rt.integrations; sys.exit(bool({'transformers', 'accelerate'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


def test_the_optimizer_runs_as_the_page_shows_it() -> None:
    with serve(**PLAIN) as server:
        namespace = {"address": server.address, "model": Net(), "loader": [(row, row.flip(1)) for row in rows()]}
        exec(OPTIMIZER_CODE, namespace)
        assert {closed.weight for closed in server.wait(WAIT_S).rounds} == {8.0}
    assert namespace["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert_same(server.state_dict(), namespace["model"].state_dict())


# ---- Hugging Face's Trainer

Hugging = Any  # the modules are optional


@pytest.fixture(scope="module")
def hugging() -> Hugging:
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


def llama(hugging: Hugging) -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    torch.manual_seed(0)
    model: nn.Module = hugging.LlamaForCausalLM(hugging.LlamaConfig(**sizes, **heads, use_cache=False))
    return model


def texts() -> list[dict[str, Tensor]]:
    """Ten texts of twelve tokens, of which the first i are no labels: batches differ in what they weigh."""
    tokens = torch.randint(0, 32, (10, 12), generator=torch.Generator().manual_seed(1))
    labels = [torch.cat([torch.full((1 + i,), -100), row[1 + i :]]) for i, row in enumerate(tokens)]
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


class Watch:
    """What a trainer did: its batches, step by step; the rates; and the losses that it logged."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Tensor]]] = [[]]
        self.rates: list[float] = []
        self.losses: list[float] = []


def trainer_of(hugging: Hugging, folder: Path, watch: Watch | None = None, **arguments: Any) -> Any:
    seen = watch or Watch()

    class Watched(hugging.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
            seen.steps[-1].append(inputs)
            return super().training_step(model, inputs, *rest, **options)

        def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
            if "loss" in logs:
                seen.losses.append(float(logs["loss"]))
            super().log(logs, *rest, **options)

    class Steps(hugging.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, *positional: Any, **named: Any) -> None:
            seen.rates.append(named["optimizer"].param_groups[0]["lr"])
            seen.steps.append([])

    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.1}
    return Watched(
        llama(hugging),
        hugging.TrainingArguments(str(folder), per_device_train_batch_size=2, **(common | arguments)),
        train_dataset=texts(),
        eval_dataset=texts()[:2],
        callbacks=[Steps()],
    )


@pytest.fixture
def federate(hugging: Hugging) -> Callable[[Any, pb.Run], None]:
    from parablock_rt.integrations.trainer import federate

    return federate


def train(hugging: Hugging, trainer: Any, optimizer: Factory = sgd, **options: Any) -> tuple[pb.Server, pb.Run]:
    from parablock_rt.integrations.trainer import federate

    with serve(llama(hugging), **PLAIN) as server:
        with pb.join(server.address, trainer.model, optimizer, **options) as run:
            federate(trainer, run)
            trainer.train()
        if run.finished:
            server.wait(WAIT_S)
    return server, run


def backward(batches: list[dict[str, Tensor]], autocast: bool, model: nn.Module) -> None:
    """The mean loss per label over several batches, as the trainer weighs it."""
    count = sum(counted(batch["labels"]) for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(**batch, num_items_in_batch=count).loss.backward()


def counted(labels: Tensor) -> Tensor:
    return (labels != -100).sum()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("optimizer", [sgd, torch.optim.AdamW])
def test_a_trainer_with_all_that_it_can_do_trains_the_bits_of_a_loop_by_hand(
    bf16: bool, optimizer: Factory, hugging: Hugging, tmp_path: Path
) -> None:
    """Accumulation, clipping, a schedule with a warm-up, autocast, evaluation and checkpoints in the middle."""
    watch, clip = Watch(), 0.05
    trainer = trainer_of(
        hugging,
        tmp_path,
        watch,
        bf16=bf16,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=clip,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=5,
    )
    reports: list[pb.RoundReport] = []
    server, run = train(hugging, trainer, optimizer, on_round=reports.append)
    assert run.finished
    assert trainer.state.global_step == ROUNDS * STEPS
    assert max(watch.rates) == 0.1
    assert len(set(watch.rates)) > 8
    steps = watch.steps[:-1]
    assert {len(step) for step in steps} == {1, ACCUMULATED}  # the fifth batch of an epoch is alone
    passes = [partial(backward, step, bf16) for step in steps]
    assert_same(server.state_dict(), by_hand(llama(hugging), passes, optimizer, watch.rates, clip).state_dict())
    assert_same(server.state_dict(), trainer.model.state_dict())
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (5, 10, 12)}
    last = hugging.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert_same(last.state_dict(), server.state_dict())

    labels = [sum(int(counted(batch["labels"])) for batch in step) for step in steps]
    assert [closed.weight for closed in server.outcome.rounds] == [sum(labels[i : i + 2]) for i in range(0, 12, 2)]
    assert [closed.loss for closed in server.outcome.rounds] == [report.loss for report in reports]
    means = [(watch.losses[i] + watch.losses[i + 1]) / 2 for i in range(0, 12, 2)]
    assert [report.loss for report in reports] == pytest.approx(means, abs=1e-4)


def test_trainer_and_accelerate_run_as_the_page_shows_them(hugging: Hugging, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    loader = torch.utils.data.DataLoader(texts(), batch_size=3)
    common = {"torch": torch, "pb": pb, "RunOptimizer": RunOptimizer, "SFTTrainer": hugging.Trainer}
    for code in (TRAINER_CODE, ACCELERATE_CODE):
        with serve(llama(hugging), **PLAIN) as server:
            namespace = {"address": server.address, "model": llama(hugging), "dataset": texts(), "loader": loader}
            namespace["args"] = hugging.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
            namespace["accelerator"] = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
            exec(code, common | namespace)
            server.wait(WAIT_S)
            assert_same(server.state_dict(), namespace["model"].state_dict())


def test_gradients_of_blocks_that_something_has_unfrozen_do_not_change_the_clipping(
    hugging: Hugging, tmp_path: Path
) -> None:
    """PEFT's disable_adapter un-freezes the adapters of all blocks, for example."""
    results = []
    for unfreezes in (False, True):
        trainer = trainer_of(hugging, tmp_path, max_grad_norm=0.05, seed=0)
        if unfreezes:
            trainer.model.register_forward_pre_hook(lambda model, _: model.model.layers.requires_grad_(True) and None)
        server, run = train(hugging, trainer)
        assert run.finished
        results.append(server.state_dict())
    assert_same(*results)


def test_steps_that_a_gradient_scaler_skips_are_made_up_for(hugging: Hugging, tmp_path: Path) -> None:
    trainer = trainer_of(hugging, tmp_path, fp16=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-30)  # the first step overflows
    trainer.accelerator.scaler = scaler
    server, run = train(hugging, trainer)
    assert run.finished
    assert trainer.state.global_step == ROUNDS * STEPS + 1
    assert all(closed.loss < 4.0 for closed in server.outcome.rounds)  # log 32 is 3.5: the skipped one's is not in them
    assert_same(server.state_dict(), trainer.model.state_dict())


def test_a_step_without_labels_weighs_one(hugging: Hugging, tmp_path: Path) -> None:
    trainer = trainer_of(hugging, tmp_path)
    trainer.train_dataset = [row | {"labels": torch.full((12,), -100)} for row in texts()]
    server, run = train(hugging, trainer)
    assert run.finished
    assert {closed.weight for closed in server.outcome.rounds} == {float(STEPS)}


def test_a_trainer_that_ends_before_the_run_says_so(
    hugging: Hugging, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Early(hugging.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop |= state.global_step == 3

    trainer = trainer_of(hugging, tmp_path)
    trainer.add_callback(Early())
    with caplog.at_level(logging.WARNING, "parablock"):
        _, run = train(hugging, trainer)
    assert not run.finished
    assert "the trainer ended after 3 of up to 12 steps, before the run" in caplog.text


def test_a_checkpoint_of_a_run_is_not_trained_on(hugging: Hugging, tmp_path: Path) -> None:
    train(hugging, trainer_of(hugging, tmp_path, save_strategy="steps", save_steps=6))
    trainer = trainer_of(hugging, tmp_path)
    trainer.train = partial(trainer.train, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with pytest.raises(ConfigError, match="goes on after step 6 of a checkpoint"):
        train(hugging, trainer)


def test_a_trainer_that_does_not_fit_the_run_is_refused(
    hugging: Hugging, federate: Callable[[Any, pb.Run], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(hugging, tmp_path)
    with serve(llama(hugging), clients=1) as server, pb.join(server.address, trainer.model, sgd) as run:
        with pytest.raises(ConfigError, match=r"join with trainer\.model"):
            federate(trainer_of(hugging, tmp_path), run)
        with monkeypatch.context() as several:
            several.setattr(hugging.TrainingArguments, "world_size", 2)
            with pytest.raises(ConfigError, match="found 2 processes with 0 GPUs each"):
                federate(trainer, run)
        federate(trainer, run)
        with pytest.raises(ConfigError, match="expected a trainer without an optimiser, found RunOptimizer"):
            federate(trainer, run)
