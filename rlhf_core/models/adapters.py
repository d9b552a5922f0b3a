"""Low-rank adapters (LoRA; Hu et al. 2022) by peft: put in, set aside for a while, folded in, written out.

An adapted linear layer computes W x + s B A x with W frozen, s = alpha / rank, or alpha / sqrt(rank) in rsLoRA
(Kalajdzievski 2023). DoRA (Liu et al. 2024, eq. 5) divides each row of W + s B A by its length, which counts as a
constant in the gradient, and multiplies it by a length m of its own, |W| at first. B starts at zero, so adapters change
nothing until they are trained, and setting them aside gives the model they were added to: the frozen reference at no
cost. peft is imported where it is needed: without adapters the library runs without it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_core.config.lora import LoraConfig
from rlhf_core.engine.effective import effective_linear
from rlhf_core.engine.quantised import QuantisedLinear, quantised_layers
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import write_json

ADAPTER, FOLDER = "default", "adapter"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, cfg: LoraConfig | None, seed: int) -> None:
    """Freeze a model and put a trainable adapter on its linear layers, in place; null settings change nothing.

    The class and the results of the model stay. No dropout: log-probabilities of one policy must agree. Heads
    outside `model`, such as a reward model's, stay trainable. The same seed gives the same adapters, on any device,
    and the random state of the process is left as it was. Move the model to its device before: DoRA's lengths are
    taken where the model lies, and another device gives other last bits.

    Raises:
        EnvironmentProblem: peft is not installed.
        ConfigError: the model has no layer of a name in `cfg.targets`, or one that cannot be adapted.
    """
    if cfg is None:
        return
    try:
        import peft
    except ImportError as error:
        raise EnvironmentProblem("model.lora: peft is not installed. Fix: pip install peft") from error
    layers = _linear_layers(model)
    targets = _chosen(layers, cfg)
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=0.0,
        use_rslora=cfg.use_rslora,
        use_dora=cfg.use_dora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
    )
    device = model.device
    with torch.random.fork_rng(devices=[]):  # peft draws weights, which are drawn again below
        model.add_adapter(settings, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            down = layer.lora_A[ADAPTER].weight
            bound = down.shape[1] ** -0.5  # that of nn.Linear, as peft has it (He et al. 2015, with a = sqrt(5))
            down.copy_((torch.rand(down.shape, generator=generator) * 2 - 1) * bound)
    model.to(device)


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of the model carries an adapter."""
    return next(adapted_layers(model), None) is not None


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """`parameters` of a model, adapters folded in, and `trained_parameters`: those that training changes."""
    named = list(model.named_parameters())
    rounded = list(quantised_layers(model))
    codes = {id(tensor) for _, layer in rounded for tensor in (layer.codes, layer.scales)}
    counted = [tensor.numel() for name, tensor in named if "lora_" not in name and id(tensor) not in codes]
    return {
        "parameters": sum(counted) + sum(layer.in_features * layer.out_features for _, layer in rounded),
        "trained_parameters": sum(parameter.numel() for _, parameter in named if parameter.requires_grad),
    }


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the layers that carry an adapter."""
    for name, module in model.named_modules():
        # peft's layers are the only ones that wrap another under this name; asking so costs no import of peft
        if "base_layer" in module._modules:
            yield name, module


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Set all adapters of a model aside for the time of a `with`: it is then the model they were added to.

    Gradients of the adapters are neither computed nor lost meanwhile. A model without adapters is left as it is.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the adapters folded into the weights, a plain model of transformers; without adapters, itself.

    Weights in 8 or 4 bits become those in float32 that they stand for: what the adapters were trained on.
    """
    if not has_adapters(model):
        return model
    plain = copy.deepcopy(model)
    for name, layer in list(adapted_layers(plain)):
        _replace(plain, name, _folded(layer))
    for name, rounded in list(quantised_layers(plain)):
        _replace(plain, name, _whole(rounded))
    del plain.peft_config
    plain._hf_peft_config_loaded = False
    return plain.requires_grad_()


def _folded(layer: Any) -> nn.Module:
    """The layer under an adapter, with what the adapter adds."""
    if isinstance(layer.base_layer, QuantisedLinear):
        return _whole(layer)
    layer.merge()
    return layer.base_layer


def _whole(layer: nn.Module) -> nn.Linear:
    """A plain linear layer that computes what `layer` does now."""
    linear = effective_linear(layer)
    if linear is None:
        raise TypeError(f"{type(layer).__name__} computes what no plain linear layer does")
    weight, bias = linear
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias.detach())
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def save_adapters(model: PreTrainedModel, folder: Path | str) -> None:
    """Write the adapters alone, as `peft.PeftModel.from_pretrained(base, folder)` reads them.

    The same adapters give the same bytes. What they were trained on is not named: that is a path of one machine.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": found[name].detach().cpu().contiguous() for name in sorted(found)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    described = model.peft_config[ADAPTER].to_dict()
    described |= {"base_model_name_or_path": None, "inference_mode": True}
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
    write_json(folder / CONFIG_FILE, ordered)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers by full name, but for the output layer, whose weight log-probabilities read directly."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }


def _chosen(layers: dict[str, nn.Module], cfg: LoraConfig) -> list[str]:
    """The last parts of the names of the layers to adapt."""
    known = sorted({name.rpartition(".")[2] for name in layers})
    unknown = sorted(set(cfg.targets or ()) - set(known))
    if unknown:
        raise ConfigError(
            f"params.yaml: model.lora.targets: the model has no linear layer {', '.join(unknown)}. "
            f"Fix: some of {', '.join(known)}, or null for all of them"
        )
    return sorted(set(cfg.targets or known))
