"""Hugging Face's Trainer, and those derived from it such as TRL's, as the training loop of a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from parablock_rt.client import Run
from parablock_rt.errors import ConfigError
from parablock_rt.integrations.optimizer import RunOptimizer

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("parablock")


def federate(trainer: Trainer, run: Run) -> None:
    """Has `trainer.train()` train `run`, to its end and no further:

        trainer = SFTTrainer(model, args=args, train_dataset=dataset)
        with pb.join(address, trainer.model, torch.optim.AdamW) as run:
            federate(trainer, run)
            trainer.train()

    The trainer keeps its learning rate and schedule, accumulation, clipping, evaluation, logs and checkpoints. The
    function given to `join` makes the optimiser, in place of the trainer's `optim`, `weight_decay` and so on. The
    length of the run replaces `max_steps` and `num_train_epochs`.

    The server is told the trainer's loss of each step. Its weight is the number of labels, where the trainer counts
    them because the model's loss needs it, else 1.

    Raises ConfigError when the trainer has another model than the run, an optimiser of its own, or several processes or
    devices.
    """
    if trainer.model is not run.model:
        raise ConfigError(
            f"expected a trainer of the model that joined, found one of another {type(trainer.model).__name__}: make "
            "the trainer first, as it may wrap or move the model, and join with trainer.model"
        )
    if trainer.optimizer is not None:
        raise ConfigError(
            f"expected a trainer without an optimiser, found {type(trainer.optimizer).__name__}: give join a function "
            "that makes it for each round; each run needs a trainer of its own"
        )
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise ConfigError(
            f"expected a trainer with one process and at most one GPU, found {trainer.args.world_size} processes with "
            f"{trainer.args.n_gpu} GPUs each: of a model that is wrapped after the join, only the first block's "
            "gradients are averaged; start it without torchrun or accelerate launch, and let it see one GPU"
        )
    optimizer = RunOptimizer(run, trainer.args.learning_rate)
    trainer.optimizer = optimizer
    # A GradScaler skips steps: the first ones until it has halved its scale far enough, later one in thousands.
    trainer.args.max_steps = optimizer.steps + (16 + optimizer.steps // 1000 if trainer.accelerator.scaler else 0)
    trainer.add_callback(_Callback(optimizer))
    take_step = trainer.training_step

    def training_step(model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss: Tensor = take_step(model, inputs, num_items_in_batch)
        if run.round is not None:
            block = set(run.block_parameters())
            for parameter in run.model.parameters():
                if parameter not in block:  # PEFT's disable_adapter un-freezes others, which are none of the clipping's
                    parameter.grad = None
        optimizer.loss = loss if optimizer.loss is None else optimizer.loss + loss
        if num_items_in_batch is not None:  # of all batches that the step accumulates
            optimizer.weight = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return loss

    trainer.training_step = training_step


class _Callback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends the training with the run."""

    def __init__(self, optimizer: RunOptimizer) -> None:
        self._optimizer = optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step > 0:
            raise ConfigError(
                f"expected a training that begins with the run's weights, found one that goes on after step "
                f"{state.global_step} of a checkpoint: a client that comes back joins again, without "
                "resume_from_checkpoint"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._optimizer.loss = None  # a GradScaler may have skipped the last step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop |= self._optimizer.run.finished

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not self._optimizer.run.finished:
            log.warning(
                "the trainer ended after %d of up to %d steps, before the run: the model is not the run's result",
                state.global_step,
                self._optimizer.steps,
            )
