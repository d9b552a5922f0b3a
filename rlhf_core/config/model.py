"""Settings of the machine and of the language model."""

from typing import Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section
from rlhf_core.config.lora import AdaptedStage, LoraConfig
from rlhf_core.config.watched import PLACEHOLDER

BaseWeights = Literal["float32", "int8", "nf4"]
MOST_WORKERS = 1024
"""Threads or processes: more than any one machine has cores, and soon more than its kernel gives."""


class ComputeConfig(Section):
    """Where and how tensors are computed; part of what decides the bytes of a result."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    threads: int = Field(
        1,
        ge=1,
        le=MOST_WORKERS,
        description="CPU threads of a stage; another number gives other last bits. Several wait for each other, and on "
        "cores that others use too a stage then takes up to ten times as long",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of matrix products and attention in training, scoring and sampling; bfloat16 keeps weights, "
        "norms, log-probabilities and losses in float32",
    )
    activation_checkpointing: bool = Field(
        False, description="compute each layer again in the backward pass: less memory, about a third more work"
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="how sampling launches a token's kernels on a GPU: auto as one CUDA graph, or, where capturing "
        "fails, one by one, and a line says why; off always one by one. The same kernels, so the same tokens",
    )
    sampled_rows: PositiveInt | None = Field(
        None,
        description="responses written at once, at most; null: up to 256 (PPO: all of a rollout), as many as "
        "`memory_gb` holds. Another number gives other last bits",
    )
    scored_rows: PositiveInt | None = Field(
        None,
        description="responses that a model reads at once when it does not learn, at most; null: up to 64, in `reward` "
        "and `align` 256, as many as `memory_gb` holds. Another number gives other last bits",
    )
    memory_gb: PositiveFloat | None = Field(
        None,
        description="memory, in GB, that writing or reading responses may take beside the models; batches that would "
        "take more are cut. null: an eighth of the machine's and at most 2 on a CPU, a quarter of a GPU's",
    )
    processes: int = Field(
        1, ge=1, le=MOST_WORKERS, description="processes of a stage that trains; they share its CPU threads"
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp divides weights, gradients and moments among the processes; none copies them"
    )


class ModelConfig(Section):
    """The language model that every stage starts from: built from numbers, or loaded from a local folder."""

    source: Literal["config", "folder"] = Field("config", description="build from these numbers, or load `path`")
    path: str = Field(
        PLACEHOLDER,
        min_length=1,
        description="local folder with a pretrained model and tokenizer (source: folder); DVC watches its content",
    )
    family: Literal["llama", "qwen2"] = Field("llama", description="architecture (source: config)")
    hidden_size: PositiveInt = Field(128, description="width (source: config)")
    layers: PositiveInt = Field(2, description="decoder layers (source: config)")
    heads: PositiveInt = Field(4, description="attention heads (source: config)")
    intermediate_size: PositiveInt = Field(256, description="width of the feed-forward part (source: config)")
    init_std: PositiveFloat = Field(0.05, description="standard deviation of the initial weights (source: config)")
    vocab_size: PositiveInt = Field(1024, description="largest vocabulary of the tokenizer trained on the corpus")
    max_prompt_tokens: PositiveInt = Field(160, description="longer prompts lose their beginning")
    max_response_tokens: PositiveInt = Field(56, description="longer responses lose their end")
    chat: Literal["auto", "plain", "template"] = Field(
        "auto", description="the folder's chat template: used where there is one, never, or required (source: folder)"
    )
    lora: LoraConfig | None = Field(None, description="train low-rank adapters; null: all weights")
    base_weights: BaseWeights = Field(
        "float32",
        description="how the frozen weights under adapters are held in training: int8 takes a quarter of the memory, "
        "nf4 a seventh (QLoRA); needs bitsandbytes, source folder and adapters in every stage",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "folder" and self.path == PLACEHOLDER:
            raise ValueError("source 'folder' needs `path`, a local folder with model and tokenizer")
        if self.lora and self.source == "config" and "sft" in self.lora.stages:
            raise ValueError("lora.stages names sft, but adapters beside random weights learn little: leave sft out")
        if self.base_weights != "float32":
            self._can_be_quantised()
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} must divide hidden_size {self.hidden_size}")
        return self

    def _can_be_quantised(self) -> None:
        if self.source == "config":
            raise ValueError(
                f"base_weights {self.base_weights!r}: a model from scratch trains all of its weights. "
                "Use float32, or source 'folder' and lora"
            )
        left = [stage for stage in get_args(AdaptedStage) if self.lora_at(stage) is None]
        if left:
            raise ValueError(
                f"base_weights {self.base_weights!r}: {', '.join(left)} would train all weights, and rounded ones "
                "cannot be trained. Use float32, or lora with these in lora.stages"
            )

    def lora_at(self, stage: AdaptedStage) -> LoraConfig | None:
        """The adapters that a stage trains; null where it trains all weights."""
        return self.lora if self.lora and stage in self.lora.stages else None
