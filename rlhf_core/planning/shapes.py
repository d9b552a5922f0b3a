"""The numbers of a model that its memory and its work follow from, read without making the model.

Nothing here imports torch: a plan is made in the time that a command line has.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError

PACKED = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Architectures whose layers go the packed way (`rlhf_core.engine.packed`): what they keep is known by formula."""


class ModelShape(BaseModel):
    """A decoder in numbers.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads, kv_heads: of queries, and of keys and values.
        head_size: width of a head.
        feed_forward: width between the two feed-forward products.
        vocabulary: rows of the embedding.
        tied: the output layer is the embedding.
        biases: queries, keys and values have one.
        kind: transformers' name of the architecture.
    """

    model_config = ConfigDict(frozen=True)

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool
    biases: bool = False
    kind: str = "llama"

    @property
    def attention_width(self) -> int:
        """Outputs of the query projection."""
        return self.heads * self.head_size

    @property
    def joined_width(self) -> int:
        """Outputs of the query, key and value projections together."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer: four attention projections, three of the feed-forward part, two norms."""
        attention = self.hidden * (self.joined_width + self.attention_width)
        return attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden + self.biases * self.joined_width

    @property
    def embedding_parameters(self) -> int:
        """Numbers in the embedding, and in an output layer of the same size."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """Numbers in the decoder without output layer: what a reward or value model has beside its head."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """Numbers in the language model."""
        return self.body_parameters + (0 if self.tied else self.embedding_parameters)

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Numbers in the adapters that `lora` puts on the layers: rank times inputs and outputs of each projection."""
        width, key_values = self.attention_width, self.kv_heads * self.head_size
        sizes = {
            "q_proj": self.hidden + width,
            "k_proj": self.hidden + key_values,
            "v_proj": self.hidden + key_values,
            "o_proj": width + self.hidden,
            "gate_proj": self.hidden + self.feed_forward,
            "up_proj": self.hidden + self.feed_forward,
            "down_proj": self.feed_forward + self.hidden,
        }
        targets = lora.targets or tuple(sizes)
        return self.layers * lora.rank * sum(sizes.get(name, 0) for name in targets)


def shape_of_numbers(cfg: ModelConfig) -> ModelShape:
    """The model that `rlhf_core.models.policy.build_policy` makes of `model.source: config`."""
    return ModelShape(
        hidden=cfg.hidden_size,
        layers=cfg.layers,
        heads=cfg.heads,
        kv_heads=cfg.heads,
        head_size=cfg.hidden_size // cfg.heads,
        feed_forward=cfg.intermediate_size,
        vocabulary=cfg.vocab_size,
        tied=True,
        biases=cfg.family == "qwen2",
        kind=cfg.family,
    )


def shape_of_config(config: Mapping[str, Any], place: str) -> ModelShape:
    """The model that a `config.json` of transformers describes.

    Raises:
        ConfigError: it lacks one of the numbers under the names that decoders of the Llama family have for them.
    """
    config = config.get("text_config") or config
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return ModelShape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            feed_forward=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            biases=config.get("model_type") == "qwen2",
            kind=str(config.get("model_type", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{place}: {error}: the sizes of this architecture are not known by name. "
            "Fix: a decoder whose configuration has hidden_size, num_hidden_layers and intermediate_size"
        ) from error
