"""The forms that versions are exported in, an entry each: which kind of model has it, and how it is made and tried."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.exporting import onnx_graph
from tasks.exporting.adapter import write_adapter
from tasks.exporting.form import Made, Order
from tasks.exporting.gguf_file import write_gguf
from tasks.exporting.hf import write_hf
from tasks.exporting.onnx_graph import write_onnx
from tasks.exporting.policies import policy_as
from tasks.exporting.rewards import classifier_of
from tasks.exporting.subject import FormatName, Kind, Numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A form.

    Attributes:
        docs: one line for documentation.
        make: writes it into a folder that is there and empty, and lets a stranger read it back.
        numbers: what its weights may be written in, the default first.
    """

    docs: str
    make: Callable[[Order, Path], Made]
    numbers: tuple[Numbers, ...] = ("float32",)


FORMATS: Mapping[tuple[Kind, FormatName], Format] = {
    ("policy", "hf"): Format(docs="a folder of transformers", make=policy_as("hf", write_hf)),
    ("policy", "adapter"): Format(docs="LoRA adapters alone, for peft", make=policy_as("adapter", write_adapter)),
    ("policy", "gguf"): Format(
        docs="one file for llama.cpp and its kin", make=policy_as("gguf", write_gguf), numbers=("float32", "float16")
    ),
    ("policy", "onnx"): Format(
        docs="a graph for onnxruntime", make=policy_as("onnx", write_onnx, onnx_graph.TOLERANCE)
    ),
    ("reward", "hf"): Format(docs="a sequence classifier of transformers with one output", make=classifier_of),
}
