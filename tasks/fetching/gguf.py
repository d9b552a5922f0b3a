"""A `.gguf` file as a folder of full-precision weights: its numbers dequantised through transformers."""

from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem


def dequantise(path: Path, folder: Path) -> str:
    """Write model and tokenizer of a GGUF file into `folder` as `save_pretrained` does, float32; returns its licence.

    Raises:
        EnvironmentProblem: the package `gguf` is not installed.
        ConfigError: transformers cannot read the file, or knows no such architecture.
    """
    try:
        import gguf  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path}: the package gguf is missing. Fix: pip install 'rlhf-pipeline[gguf]'"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        licence = _field(gguf.GGUFReader(path), "general.license")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **named)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **named)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path}: no model can be made of it ({why}). Fix: a whole file of an architecture that transformers reads"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return licence


def _field(reader: Any, key: str) -> str:
    found = reader.get_field(key)
    return str(found.contents()) if found is not None else "unknown"
