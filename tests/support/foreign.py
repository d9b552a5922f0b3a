"""Reward models as others save them: sequence classifiers with random weights and tokenizers of their own."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from support.tokenizer import CHATML, byte_level

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gpt2")
ENCODERS = ("bert", "deberta-v2")
_SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def classifier(family: str, **more: Any) -> PreTrainedModel:
    sizes = dict(_SIZES)
    if family == "gpt2":
        sizes = {"vocab_size": 600, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    elif family in ENCODERS:
        sizes = {name: value for name, value in _SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
        sizes |= {"type_vocab_size": 2 if family == "bert" else 0}
    config = AutoConfig.for_model(family, **sizes, **({"num_labels": 1} | more))
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def joining() -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that joins two texts: [CLS] one [SEP] other [SEP]."""
    made = byte_level()
    made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    made.eos_token = None
    named = [(token, made.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=named
    )
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def chatting(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template whose padding is not the end of a turn."""
    made = byte_level(template)
    made.add_special_tokens({"pad_token": "<|pad|>"})
    return made


def foreign_folder(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A folder as `save_pretrained` writes it, of a chat model or of an encoder of two texts."""
    tokenizer = joining() if family in ENCODERS else chatting()
    model = classifier(family, **more)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
