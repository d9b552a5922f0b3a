"""Weights that count adapters in, against the layers' own forward."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rlhf_core.engine.effective import effective_linear


def adapted(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"], lora_dropout=0.3, **settings), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()[0]


def through(layer: nn.Module, x: Tensor) -> Tensor:
    linear = effective_linear(layer)
    assert linear is not None
    return nn.functional.linear(x, linear.weight, linear.bias)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_the_product_equals_the_layers_forward_whatever_its_adapters_do(settings: dict[str, bool]) -> None:
    layer, x = adapted(**settings), torch.randn(4, 6)
    with_adapter = layer(x)
    torch.testing.assert_close(through(layer, x), with_adapter)
    layer.enable_adapters(False)
    torch.testing.assert_close(through(layer, x), layer(x))
    assert not torch.allclose(layer(x), with_adapter, atol=0.1)
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(through(layer, x), with_adapter)


def test_a_plain_layer_gives_its_own_weight() -> None:
    layer = nn.Linear(3, 2)
    assert effective_linear(layer) == (layer.weight, layer.bias)


def test_what_no_plain_layer_computes_is_said() -> None:
    assert effective_linear(nn.Bilinear(2, 2, 2)) is None
    both = adapted(use_dora=True)
    both.update_layer("second", 2, 4, config=LoraConfig(r=2, lora_alpha=4))
    both.set_adapter(["default", "second"])
    assert effective_linear(both) is None, "what DoRA's lengths apply to depends on the order of the adapters"
    assert effective_linear(adapted(lora_bias=True)) is None
    merged = adapted()
    merged.merge()
    merged.enable_adapters(False)
    assert effective_linear(merged) is None, "its weight still holds the adapter that is disabled"
