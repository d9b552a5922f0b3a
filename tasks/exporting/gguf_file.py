"""A policy as one GGUF file for llama.cpp and its kin, by the package `gguf`: its names of tensors, its keys, its form.

Written are what both llama.cpp and transformers read alike: Llama, Qwen2 and Qwen3 without scaled positions, with a
byte-level tokenizer whose splitting of text has a name there. Everything else is refused, since the file would hold
another model without saying so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.text.tokenizer import opening_tokens
from tasks.exporting.form import Source, WrittenForm
from tasks.lineage.provenance import UNKNOWN

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3_SPLIT: "llama-bpe", LLAMA3_SPLIT.replace("{1,3}", ""): "qwen2"}
"""Patterns that texts are split by before bytes are merged, and how llama.cpp calls them."""
LARGEST_HALF = 65504.0
QWEN3_HEAD = 128
"""Every published Qwen3 has heads of this width; transformers does not read any other from a file."""


def write_gguf(source: Source, folder: Path) -> WrittenForm:
    """Write one file; with float16, matrices of the loaded model are rounded as those in the file, vectors stay.

    Raises:
        ConfigError: the file could not hold this model.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    try:
        import gguf  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise EnvironmentProblem("gguf: the package gguf is missing. Fix: pip install 'rlhf-pipeline[gguf]'") from error
    subject, config = source.subject, source.model.config
    refuse_architecture(subject.reference, config.to_dict())
    if source.numbers == "float16":
        _round(source)
    short = {"float32": "f32", "float16": "f16"}[source.numbers]
    file = f"{subject.reference.replace('/', '-')}-{short}.gguf"
    writer = gguf.GGUFWriter(folder / file, config.model_type)
    writer.add_name(subject.reference.replace("/", "-"))
    if subject.licence != UNKNOWN:
        writer.add_license(subject.licence)
    kind = gguf.LlamaFileType.ALL_F32 if short == "f32" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(kind)
    _add_shape(writer, config)
    _add_tokenizer(writer, source)
    _add_tensors(writer, source, gguf.get_tensor_name_map(_architecture(config.model_type), config.num_hidden_layers))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    limits = [f"split of text before the tokenizer's merges: `{pre_tokenizer(source)}`, as llama.cpp names it"]
    if short == "f16":
        limits.append("matrices are rounded to float16; the check holds the file against the version rounded alike")
    return WrittenForm(named={"file": file}, limits=tuple(limits), loading=_loading(file), said={"file": file})


def refuse_architecture(reference: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that the file has no words for.

    Raises:
        ConfigError: names what it is.
    """
    kind = config["model_type"]
    positions = config.get("rope_parameters") or {}
    why = {
        f"model_type {kind}, not one of {', '.join(ARCHITECTURES)}": kind not in ARCHITECTURES,
        f"positions scaled by {positions.get('rope_type')}": positions.get("rope_type", "default") != "default",
        "a bias in attention": kind == "llama" and config.get("attention_bias"),
        "a bias in the MLP": config.get("mlp_bias"),
        f"heads of {config.get('head_dim')}, where transformers reads {QWEN3_HEAD} alone": (
            kind == "qwen3" and config.get("head_dim") != QWEN3_HEAD
        ),
        "a sliding window": config.get("use_sliding_window"),
        f"the activation {config.get('hidden_act')}": config.get("hidden_act") != "silu",
    }
    found = [what for what, is_so in why.items() if is_so]
    if found:
        raise ConfigError(
            f"{reference}: gguf: {'; '.join(found)}: not covered. Fix: --format hf, and llama.cpp's own converter"
        )


def pre_tokenizer(source: Source) -> str:
    """What llama.cpp calls the way in which the tokenizer splits a text.

    Raises:
        ConfigError: it has no name there, or the tokenizer is of another kind.
    """
    parts = _parts(source)
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    normal = parts["normalizer"]
    if parts["model"]["type"] == "BPE" and not parts["model"].get("byte_fallback") and plain:
        if len(steps) == 1 and last.get("use_regex") and normal is None:
            return "gpt-2"
        if len(steps) == 2 and steps[0]["type"] == "Split" and not last.get("use_regex"):
            name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None and (normal is None or (name, normal) == ("qwen2", {"type": "NFC"})):
                return name
    raise ConfigError(
        f"{source.subject.reference}: gguf: its tokenizer ({parts['model']['type']}, split by "
        f"{' then '.join(step.get('type', 'nothing') for step in steps)}) is none that is covered. Fix: --format hf"
    )


def _architecture(model_type: str) -> Any:
    import gguf

    return gguf.MODEL_ARCH[ARCHITECTURES[model_type]]


def _add_shape(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, source: Source) -> None:
    import gguf

    tokenizer, parts = source.tokenizer, _parts(source)
    rows = source.model.get_input_embeddings().weight.shape[0]
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [known.get(number, f"[PAD{number}]") for number in range(rows)]
    added = {entry["content"]: entry["special"] for entry in parts["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(source))
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds[added.get(token)] if number in known else gguf.TokenType.UNUSED for number, token in enumerate(tokens)]
    )
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in parts["model"]["merges"]])
    writer.add_add_bos_token(bool(opening_tokens(tokenizer)))
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):  # fmt: skip
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: Any, source: Source, names: Any) -> None:
    config = source.model.config
    shared = config.tie_word_embeddings
    for name, tensor in source.model.state_dict().items():
        if shared and name == "lm_head.weight":
            continue
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise ConfigError(f"{source.subject.reference}: gguf: no name for its tensor {name}. Fix: --format hf")
        wide = tensor.half() if source.numbers == "float16" and tensor.ndim > 1 else tensor.float()
        writer.add_tensor(named, _laid_out(name, wide, config).numpy())


def _laid_out(name: str, tensor: Tensor, config: Any) -> Tensor:
    """llama.cpp rotates neighbours, transformers halves: in Llama, rows of queries and keys stand in another order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((number for part, number in heads.items() if part in name), None)
    if count is None or config.model_type != "llama":
        return tensor.contiguous()
    return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


@torch.no_grad()
def _round(source: Source) -> None:
    for name, tensor in source.model.named_parameters():
        if tensor.ndim > 1:
            if tensor.abs().max() > LARGEST_HALF:
                raise ConfigError(f"{source.subject.reference}: {name} exceeds float16. Fix: --numbers float32")
            tensor.copy_(tensor.half())


def _parts(source: Source) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(source.tokenizer.backend_tokenizer.to_str())
    return parts


def _loading(file: str) -> str:
    return f"""```
llama-cli -m {file}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="{file}")
tokenizer = AutoTokenizer.from_pretrained("FOLDER", gguf_file="{file}")
```"""
