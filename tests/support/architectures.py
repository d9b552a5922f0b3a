"""Architectures of today, small and random, as the folders that plain transformers writes."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from support.tokenizer import byte_level

PAD, EOS, VOCABULARY = 0, 1, 320
WINDOW = 4
"""Places that a sliding layer sees: fewer than any row below has."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
    }
)
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama 3": ("llama", {"rope_parameters": LLAMA3}),
        "qwen 3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
        "smollm 3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
        "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
        "mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
        "gemma 3": (
            "gemma3_text",
            {
                "head_dim": 12,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 24,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        "phi 3": ("phi3", {"sliding_window": None}),
        "phi 3, sliding": ("phi3", {"sliding_window": WINDOW}),
        "phi 4 mini": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
        "phi 3, longrope": (
            "phi3",
            {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        ),
        "olmo 2": ("olmo2", {}),
    }
)


def random_model(name: str) -> PreTrainedModel:
    """With gains and biases away from where they start, or forgetting one would not show."""
    kind, settings = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **settings), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write_folder(name: str, folder: Path) -> Path:
    """What `save_pretrained` writes of model and tokenizer."""
    random_model(name).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder
