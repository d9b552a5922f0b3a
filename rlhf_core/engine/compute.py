"""The mode of the process (`rlhf_core.state.compute_mode`) around a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_core.state.compute_mode import compute_mode


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in the precision of the mode.

    Without autocast's cache of converted weights: it would keep those of the step before an optimiser's step where
    a block spans both, and each weight is converted once a forward anyhow.
    """
    on = compute_mode().precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on, cache_enabled=False)


@contextmanager
def own_forward(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The mode around a forward pass of transformers' own.

    Its layers make themselves again in the backward pass only while they train, and our models stay in evaluation
    mode, which keeps dropout off. So for this forward the layers alone say that they train; nothing inside them does.
    """
    layers: list[nn.Module] = []
    if compute_mode().activation_checkpointing and torch.is_grad_enabled():
        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        model.activation_checkpointing_enable({"use_reentrant": False})
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        with autocast(device):
            yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
        if layers:
            model.activation_checkpointing_disable()
