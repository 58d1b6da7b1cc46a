"""Embeddings and heads cut into rows: the same function, the same names in a state dict, blocks of bounded size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from federations import sgd
from harness import run_federation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import parablock_rt as pb
from parablock_rt.blocks.rows import RowEmbedding, RowLinear, split_rows
from parablock_rt.errors import ConfigError, PlanError

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 50, 32


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


TOKENS = torch.arange(VOCABULARY).reshape(2, -1)


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss  # type: ignore[no-any-return]


@given(rows=st.integers(1, 40), columns=st.integers(1, 8), limit=st.integers(8, 64), padding=st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_cut_embedding_gives_the_same_rows_and_the_same_gradients(
    rows: int, columns: int, limit: int, padding: bool
) -> None:
    plain = nn.Embedding(rows, columns, padding_idx=rows // 2 if padding else None)
    model = nn.Sequential(nn.Embedding.from_pretrained(plain.weight.detach().clone(), False, plain.padding_idx))
    cut = split_rows(model, limit)
    assert cut == (["0"] if rows * columns > limit else [])
    assert all(part.numel() <= limit for part in model.parameters())
    tokens = torch.arange(2 * rows).reshape(2, rows) % rows
    weight = torch.arange(1.0, 1 + tokens.numel() * columns).reshape(2, rows, columns)
    for module in (plain, model):
        (module(tokens) * weight).sum().backward()
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(torch.cat([p.grad for p in model.parameters() if p.grad is not None]), plain.weight.grad)


@pytest.mark.parametrize("bias", [False, True])
def test_a_cut_projection_gives_the_same_outputs(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 21, bias=bias)
    model = nn.Sequential(nn.Linear(8, 21, bias=bias))
    model[0].load_state_dict(plain.state_dict())
    assert split_rows(model, 40) == ["0"]
    assert isinstance(model[0], RowLinear)
    inputs = torch.randn(3, 4, 8)
    torch.testing.assert_close(model(inputs), plain(inputs))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_cut_language_model_computes_the_same_loss_and_keeps_its_names(tied: bool) -> None:
    plain, cut = llama(tied), llama(tied)
    assert split_rows(cut, VOCABULARY * WIDTH // 3) == ["model.embed_tokens", "lm_head"]
    torch.testing.assert_close(loss_of(cut), loss_of(plain))
    assert cut.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(cut.state_dict()[name], value)
    if tied:
        assert cut.get_parameter("lm_head.parts.1") is cut.get_parameter("model.embed_tokens.parts.1")


def test_a_state_dict_of_the_whole_model_loads_into_a_cut_one_and_back() -> None:
    source, cut = llama(), llama()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    split_rows(cut, 500)
    cut.load_state_dict(source.state_dict())
    back = llama()
    back.load_state_dict(cut.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), source.parameters(), strict=True))


def test_a_cut_model_is_saved_as_a_whole_one(tmp_path: Path) -> None:
    cut, plain = llama(), llama()
    split_rows(cut, 500)
    cut.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_only_the_part_that_trains_has_a_gradient() -> None:
    model = llama()
    split_rows(model, 500)
    model.requires_grad_(False)
    part = model.get_parameter("lm_head.parts.2").requires_grad_(True)
    loss_of(model).backward()
    assert [p for p in model.parameters() if p.grad is not None] == [part]


def test_outer_blocks_stay_within_the_limit_and_hold_every_outer_parameter_once() -> None:
    model = llama()
    limit = 500
    split_rows(model, limit)
    plan = pb.BlockPlan.from_model(model, outer="train", outer_limit=limit)
    outer = [block for block in plan.blocks if "layers" not in block.name]
    assert [block.name for block in outer] == [f"embeddings.{i}" for i in range(4)] + [f"head.{i}" for i in range(4)]
    assert all(block.numel <= limit for block in outer)
    names = list(itertools.chain.from_iterable(block.parameters for block in plan.blocks))
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert plan.frozen == []


def test_an_outer_parameter_above_the_limit_is_refused_with_what_cuts_it() -> None:
    with pytest.raises(PlanError, match=r"'model.embed_tokens.weight' has 1,600 elements.*split_rows"):
        pb.BlockPlan.from_model(llama(), outer="train", outer_limit=500)
    with pytest.raises(ConfigError, match="expected outer_limit to be at least 1 element, found 0"):
        pb.BlockPlan.from_model(llama(), outer="train", outer_limit=0)


def test_embeddings_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 8 elements, a row of 0\.weight, found 7"):
        split_rows(nn.Sequential(nn.Embedding(4, 8)), 7)
    with pytest.raises(PlanError, match="max_norm"):
        split_rows(nn.Sequential(nn.Embedding(4, 8, max_norm=1.0)), 8)


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.table(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return F.cross_entropy(self.head(hidden), (tokens + 1) % 30)


def test_a_federation_trains_every_row() -> None:
    def cut() -> nn.Module:
        model = Bigram()
        assert split_rows(model, 80) == ["table", "head"]
        return model

    before = {name: p.detach().clone() for name, p in cut().named_parameters()}
    plan = pb.BlockPlan.from_model(cut(), outer="train", outer_limit=80)
    assert len(plan.blocks) == 7
    result = run_federation(
        cut,
        lambda seat: [torch.arange(30)],
        lambda model, batch: model(batch),
        sgd,
        plan_blocks=[block.parameters for block in plan.blocks],
        clients=2,
        rounds=7,
        local_steps=2,
    )
    assert isinstance(result.model.table, RowEmbedding)
    changed = {name for name, p in result.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before)


@pytest.mark.parametrize("token", [-1, 10, 50_000])
def test_a_token_that_a_cut_embedding_has_no_row_for_is_an_error_as_in_the_whole_one(token: int) -> None:
    model = nn.Sequential(nn.Embedding(10, 8))
    tokens = torch.tensor([1, token])
    with pytest.raises(IndexError):
        model(tokens)
    split_rows(model, 40)
    with pytest.raises(IndexError, match=f"expected tokens from 0 to 9, found {min(1, token)} to {max(1, token)}"):
        model(tokens)
    assert model(torch.empty(0, dtype=torch.int64)).shape == (0, 8)


def test_a_weight_that_is_tied_to_a_module_that_cannot_be_cut_is_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.Module()
    model.embed = Scaled(10, 8)
    model.head = nn.Linear(8, 10, bias=False)
    model.head.weight = model.embed.weight
    with pytest.raises(PlanError, match=r"head\.weight cannot be cut into rows: it is tied to embed, a Scaled"):
        split_rows(model, 40)
    assert model.head.weight is model.embed.weight
