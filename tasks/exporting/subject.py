"""What is exported: a registered version with all that is known of it, as the command found it in the registry."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import LoraConfig
from tasks.lineage.manifest import flat_params
from tasks.lineage.provenance import UNKNOWN

Kind = Literal["policy", "reward"]
FormatName = Literal["hf", "adapter", "gguf", "onnx"]
Numbers = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFound:
    """A gate of `params.yaml` as it stood when the version was exported: whether it passed, in words."""

    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A registered version.

    Attributes:
        reference: `rlhf-policy/3`.
        kind: whether it writes or scores.
        stage: that made it.
        content: its outputs hash.
        folder: its model folder, a copy on this machine.
        home: main checkout, with the data that the lineage names.
        manifest: its lineage (`tasks.lineage.manifest.build_manifest`).
        metrics: its figures.
        gates: what it was held against.
        base: for adapters, the registered version that they were trained on, and its folder; None where that is the
            pretrained folder.
    """

    reference: str
    kind: Kind
    stage: str
    content: str
    folder: Path
    home: Path
    manifest: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    gates: tuple[GateFound, ...] = ()
    base: tuple[str, Path] | None = None

    def param(self, key: str) -> Any:
        """A value of the `params.yaml` that it was made with, by dotted key; None where that does not name it."""
        return flat_params(self.manifest["params"]).get(key)

    def limit(self, name: str) -> int:
        """`max_prompt_tokens` or `max_response_tokens` of its training."""
        value = self.param(f"model.{name}")
        return int(ModelConfig.model_fields[name].default if value is None else value)

    @property
    def pretrained(self) -> Mapping[str, Any] | None:
        """Note of the pretrained folder that it comes from, with its `path`; None for a model from numbers."""
        for path, note in self.manifest.get("model_folders", {}).items():
            if note["key"] == "model.path":
                return {"path": path, **note}
        return None

    @property
    def licence(self) -> str:
        """That of the pretrained model; `unknown` where there is none, or where nobody noted it."""
        return str((self.pretrained or {}).get("licence", UNKNOWN))

    @property
    def lora_rank(self) -> int | None:
        """Rank of the adapters that it was trained with; None where all of its weights were."""
        if not any(key.startswith("model.lora.") for key in flat_params(self.manifest["params"])):
            return None
        return int(self.param("model.lora.rank") or LoraConfig.model_fields["rank"].default)
