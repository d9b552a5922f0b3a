"""The language model: built from numbers or loaded from a folder, and saved."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)
from transformers.utils import logging as transformers_logging

from rlhf_core.config import ModelConfig
from rlhf_core.engine.states import hidden_states, response_states
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import FOLDER, has_adapters, merged, save_adapters
from rlhf_core.models.folders.architecture import check_numbers, outline, read_config

__all__ = [
    "build_policy",
    "check_vocabulary",
    "eos_token_ids",
    "hidden_states",
    "load_policy",
    "load_pretrained",
    "response_states",
    "save_policy",
]

transformers_logging.disable_progress_bar()  # a bar a file does not belong in a log


def build_policy(cfg: ModelConfig, vocab_size: int, pad_id: int, eos_id: int, seed: int) -> PreTrainedModel:
    """Build a decoder from scratch, float32, input and output embedding tied; the same arguments give the same weights.

    The random state of the process is left as it was.
    """
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.heads,
        "intermediate_size": cfg.intermediate_size,
        "initializer_range": cfg.init_std,
        "max_position_embeddings": cfg.max_prompt_tokens + cfg.max_response_tokens,
        "tie_word_embeddings": True,
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    config = LlamaConfig(**shared) if cfg.family == "llama" else Qwen2Config(**shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def load_policy(folder: Path | str) -> PreTrainedModel:
    """Load a causal language model from a local folder: float32 weights, dropout off, evaluation mode.

    Weights stay float32 because an optimiser's small steps vanish in bfloat16 weights.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: the folder asks for code of its own, or is not whole: see `read_config` and `outline`; or a weight
            is no finite number.
    """
    return load_pretrained(AutoModelForCausalLM, folder)


def load_pretrained(auto_class: Any, folder: Path | str) -> PreTrainedModel:
    """`load_policy` for any of the `AutoModel` classes."""
    folder = Path(folder)
    config = read_config(folder)
    outline(folder, auto_class, config)
    model = auto_class.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    check_numbers(model, folder)
    return model.eval()


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write a folder that plain `transformers` loads; the same weights give the same bytes, whatever their history.

    Adapters are folded into the weights, and stand alone in `adapter/` too, as peft reads them.
    """
    if has_adapters(model):
        save_adapters(model, Path(folder) / FOLDER)
        model = merged(model)
    model.config.name_or_path = ""  # where it was loaded from is no property of the model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can write tokens for which the model has no embedding.

    The largest number counts and not how many there are: a vocabulary can have holes.

    Raises:
        ConfigError: the two do not belong together.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[-1]
        raise ConfigError(
            f"its tokenizer has {len(beyond)} tokens without an embedding, such as {token!r} with number {number}: its "
            f"model has {rows} embeddings. Fix: use the tokenizer that was saved with the model"
        )


def check_room(model: PreTrainedModel, tokens: int) -> None:
    """Refuse rows longer than a model with a limited number of positions was made for.

    Under longrope (Ding et al. 2024) the limit is the length of its first training: beyond it transformers rotates all
    positions of all rows of a batch otherwise, so that a row's log-probabilities would depend on its company, and on
    how far it had been written when a token was drawn.

    Raises:
        ConfigError: the limits of `model` in `params.yaml` are too large for it.
    """
    fixed = [part["original_max_position_embeddings"] for part in _rotations(model) if part["rope_type"] == "longrope"]
    if fixed and tokens > min(fixed):
        raise ConfigError(
            f"max_prompt_tokens and max_response_tokens make {tokens}, this model reads {min(fixed)} before its "
            "positions depend on the length of the longest row of a batch (longrope). Fix: smaller limits"
        )
    # Architectures name the limit differently, and those with relative positions have none.
    named = (model.config.to_dict().get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    room = next((places for places in named if places is not None), None)
    if room is not None and tokens > room:
        raise ConfigError(
            f"max_prompt_tokens and max_response_tokens make {tokens}, this model reads {room}. Fix: smaller limits"
        )


def _rotations(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Rotary positions of a model: one kind, or one for each kind of layer; none where it has others."""
    found = model.config.to_dict().get("rope_parameters") or {}
    return [part for part in (found, *found.values()) if isinstance(part, dict) and "rope_type" in part]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and those of the generation configuration, in order."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    more = declared if isinstance(declared, list) else [declared]
    return tuple(sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)}))
