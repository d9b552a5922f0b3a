"""Frozen weights of a language model into 8 or 4 bits, under the adapters that are trained."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import AdaptedStage
from rlhf_core.engine.quantised import QuantisedLinear
from rlhf_core.errors import ConfigError


def quantise(model: PreTrainedModel, cfg: ModelConfig, stage: AdaptedStage) -> None:
    """Hold the linear layers of a model as `model.base_weights` says, in place; float32 changes nothing.

    All linear layers but the output layer, which log-probabilities read directly, and embeddings and norms, which are
    small or no products. One layer after the other, so what is needed beside the model is one layer.

    Raises:
        EnvironmentProblem: bitsandbytes is not installed.
        ConfigError: the model keeps its weights in layers of another kind.
    """
    if cfg.base_weights == "float32" or cfg.lora_at(stage) is None:
        return
    others = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    if others:
        raise ConfigError(
            f"params.yaml: model.base_weights: {cfg.base_weights}: {type(model).__name__} has layers that are no plain "
            f"linear ones, such as {others[0]}. Fix: float32, or another architecture"
        )
    output = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not output]
    for name in names:  # names and not layers: each old one can go as soon as its codes are made
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedLinear(model.get_submodule(name), cfg.base_weights))
