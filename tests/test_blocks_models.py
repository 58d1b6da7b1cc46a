"""BlockPlan on tiny, randomly initialised Hugging Face causal LMs of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parablock_rt.blocks.plan import BlockPlan

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FFN = {**COMMON, "intermediate_size": 32}
LLAMA_LIKE = {**FFN, "num_key_value_heads": 1}
# family -> (settings, path of the layers, parameters of the first block, parameters of the last block)
FAMILIES: dict[str, tuple[dict[str, Any], str, list[str], list[str]]] = {
    "GPT2": (
        {**COMMON, "n_inner": 32},
        "transformer.h",
        ["transformer.wte.weight", "transformer.wpe.weight"],
        ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    ),
    "OPT": (
        {**COMMON, "ffn_dim": 32, "word_embed_proj_dim": 8},
        "model.decoder.layers",
        [f"model.decoder.{n}.weight" for n in ("embed_tokens", "embed_positions", "project_in")],
        [f"model.decoder.{n}" for n in ("project_out.weight", "final_layer_norm.weight", "final_layer_norm.bias")],
    ),
    "GPTNeoX": (
        FFN,
        "gpt_neox.layers",
        ["gpt_neox.embed_in.weight"],
        ["gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"],
    ),
    "Qwen2": (LLAMA_LIKE, "model.layers", ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]),
    "Gemma": ({**LLAMA_LIKE, "head_dim": 8}, "model.layers", ["model.embed_tokens.weight"], ["model.norm.weight"]),
    "Mixtral": (
        {**LLAMA_LIKE, "num_local_experts": 8},
        "model.layers",
        ["model.embed_tokens.weight"],
        ["model.norm.weight", "lm_head.weight"],
    ),
    "Llama": (LLAMA_LIKE, "model.layers", ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]),
}
TOKENS = torch.arange(3, 15).reshape(2, 6)


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family][0], **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_order_and_every_parameter_is_in_one_block_or_listed(family: str) -> None:
    _, path, first, last = FAMILIES[family]
    model = build(family)
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "embed_out"):  # of GPT-NeoX, before transformers 5
        last = ["embed_out.weight" if name == "lm_head.weight" else name for name in last]
    plan = BlockPlan.from_model(model)
    assert [b.name for b in plan.blocks] == [f"{path}.{i}" for i in range(3)]
    for block in plan.blocks:
        assert block.parameters == [n for n in names if n.startswith(f"{block.name}.")]
    assert [n for n, _ in plan.frozen] == [n for n in names if n in first + last]

    everything = BlockPlan.from_model(model, outer="train")
    assert everything.blocks[1:-1] == plan.blocks
    assert sorted(everything.blocks[0].parameters) == sorted(first)
    assert sorted(everything.blocks[-1].parameters) == sorted(last)
    assert everything.frozen == []
    assert sum(b.numel for b in everything.blocks) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_homing_leaves_the_output_bit_identical_and_training_moves_the_flat_buffers(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = model(TOKENS).logits
        homes = BlockPlan.from_model(model, outer="train").materialise(model)
        assert torch.equal(model(TOKENS).logits, expected)
    before = [home.flats[0].clone() for home in homes]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for home, old in zip(homes, before, strict=True):
        assert not torch.equal(home.flats[0], old)
        for param, view in zip(home.params, home.views(home.flats[0]), strict=True):
            assert param.data_ptr() == view.data_ptr()
            assert torch.equal(param, view)


@pytest.mark.parametrize("tie", [False, True])
def test_a_homed_model_is_saved_and_loaded_with_the_same_names_and_values(tmp_path: Path, tie: bool) -> None:
    model = build("Llama", tie_word_embeddings=tie).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = BlockPlan.from_model(model, outer="train")
    plan.materialise(model)
    assert plan.aliases == ({"model.embed_tokens.weight": ["lm_head.weight"]} if tie else {})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    model.save_pretrained(tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    once = {name: tensor for name, tensor in after.items() if not (tie and name == "lm_head.weight")}
    save_file(once, tmp_path / "plain.safetensors")
    for file in ("hf/model.safetensors", "plain.safetensors"):
        saved = load_file(tmp_path / file)
        assert set(saved) == set(once)
        assert all(torch.equal(saved[name], before[name]) for name in once)
    assert (tmp_path / "plain.safetensors").stat().st_size < sum(t.nbytes for t in once.values()) + 8192

    # The weights of another model go into the flat buffers in place.
    homes = plan.materialise(model)
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    assert not any(flat.any() for home in homes for flat in home.flats)


def test_server_and_client_copies_of_a_tied_model_agree_on_plan_and_fingerprint() -> None:
    server, client = build("GPT2"), build("GPT2")
    plan = BlockPlan.from_model(server)
    theirs = BlockPlan.from_spec(client, plan.spec())
    assert theirs.digest == plan.digest
    assert theirs.frozen_fingerprint(client) == plan.frozen_fingerprint(server)
    with torch.no_grad():
        client.lm_head.weight[0, 0] += 1
    assert theirs.frozen_fingerprint(client) != plan.frozen_fingerprint(server)


def test_a_model_of_mixed_dtypes_gets_one_segment_a_dtype() -> None:
    model = build("Llama").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = BlockPlan.from_model(model)
    homes = plan.materialise(model)
    for home in homes:
        assert [flat.dtype for flat in home.flats] == [torch.float32, torch.bfloat16]
        assert home.block.segments[0].length == 2 * 128
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
