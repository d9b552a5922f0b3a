"""A policy as an ONNX graph of its whole forward pass, by torch's own exporter: token ids in, logits out, no cache."""

import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.policy import load_policy
from tasks.exporting.adapter import OF_THE_TOKENIZER
from tasks.exporting.form import Source, WrittenForm

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Nats: onnxruntime computes in float32, whose rounding over some tens of layers is more than 1e-5."""
MOST_ROWS = 4096
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class NextTokens(nn.Module):
    """What a graph is made of: logits of every position from ids and mask, padding on either side."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the next token at each place."""
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        found: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        return found


def write_onnx(source: Source, folder: Path) -> WrittenForm:
    """Write the graph, its weights beside it where they are many, and the tokenizer's files.

    Raises:
        EnvironmentProblem: a package is missing.
        ConfigError: torch cannot make a graph of this architecture.
    """
    _check_packages()
    longest = int(source.model.config.max_position_embeddings)
    _export(source, folder / FILE, longest)
    for pattern in ("config.json", "generation_config.json", *OF_THE_TOKENIZER):
        for path in sorted(source.subject.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    limits = (
        "the graph has no cache: each new token reads the whole text again",
        f"log-probabilities are computed in float32 by onnxruntime and held to {TOLERANCE:g}",
        f"at most {longest} tokens a row",
    )
    return WrittenForm(named={"file": FILE}, limits=limits, loading=LOADING, said={"file": FILE})


def _check_packages() -> None:
    import importlib.util

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"onnx: missing {', '.join(missing)}. Fix: pip install 'rlhf-pipeline[onnx]'")


def _export(source: Source, file: Path, longest: int) -> None:
    """Trace a model of its own: the attention that is traced is not the one that it answers with."""
    model = load_policy(source.subject.folder)
    model.set_attn_implementation("eager")
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    rows, tokens = torch.export.Dim("rows", min=1, max=MOST_ROWS), torch.export.Dim("tokens", min=1, max=longest)
    shape, names = {0: rows, 1: tokens}, ["input_ids", "attention_mask"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                NextTokens(model).eval(), (ids, torch.ones_like(ids)), file, input_names=names,
                output_names=["logits"], dynamic_shapes=(shape, shape), dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # each step of the exporter has its own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{source.subject.reference}: onnx: torch makes no graph of {model.config.model_type} ({why}). "
            "Fix: --format hf"
        ) from error


LOADING = """```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = np.array([tokenizer("…")["input_ids"]], dtype=np.int64)
(logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
```"""
