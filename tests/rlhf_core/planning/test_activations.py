"""Formulas of the plan held against autograd itself, against numbers worked by hand, and against the engine's own."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.engine import matmul, output_layer, packed_weight
from rlhf_core.engine.batches import collate
from rlhf_core.models.adapters import add_adapters, parameter_counts
from rlhf_core.planning import activations
from rlhf_core.planning.activations import PassSettings, Reading, kept_bytes, logit_bytes, sampler_bytes
from rlhf_core.planning.parts import training
from rlhf_core.planning.shapes import ModelShape, shape_of_config, shape_of_numbers
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.compute_mode import ComputeMode, compute_mode, set_compute_mode

SMALL = ModelShape(hidden=64, layers=8, heads=4, kv_heads=2, head_size=16, feed_forward=160, vocabulary=500, tied=True)
LENGTHS = ((40, 30), (38, 31), (41, 28), (39, 29))
ROWS = [([5 + row] * prompt, [7] * response) for row, (prompt, response) in enumerate(LENGTHS)]


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def bytes_kept_by_autograd(model: LlamaForCausalLM) -> int:
    """Bytes of all tensors that a forward pass saves for its backward pass, parameters and what they share left out."""
    batch = collate([prompt for prompt, _ in ROWS], [response for _, response in ROWS], 0)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = response_logprobs(model, batch).sum()
    assert total.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def reading() -> Reading:
    responses = sum(len(response) for _, response in ROWS)
    tokens = responses + sum(len(prompt) for prompt, _ in ROWS)
    return Reading(tokens, responses, responses)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)])
def test_what_a_pass_keeps_is_what_autograd_saves(lora: LoraConfig | None) -> None:
    model = small_model()
    add_adapters(model, lora, 0)
    settings = PassSettings(rank=lora.rank if lora else 0)
    # the pieces that come and go with the logits are no saved tensors
    coming = logit_bytes(SMALL, reading().responses, learns=False, cpu=True)
    expected = kept_bytes(SMALL, reading(), settings) - coming
    assert bytes_kept_by_autograd(model) == pytest.approx(expected, rel=0.03)


def test_checkpointing_keeps_inputs_of_layers_alone() -> None:
    before = compute_mode()
    set_compute_mode(ComputeMode(activation_checkpointing=True))
    try:
        kept = bytes_kept_by_autograd(small_model())
    finally:
        set_compute_mode(before)
    whole = kept_bytes(SMALL, reading(), PassSettings())
    less = kept_bytes(SMALL, reading(), PassSettings(checkpointing=True))
    one_layer = whole - less - reading().tokens * 64 * 4  # the saved inputs; the layer that is made again is transient
    assert less < whole
    assert kept < less + one_layer


def test_parameters_are_those_of_the_model_and_its_adapters() -> None:
    model, lora = small_model(), LoraConfig(rank=8)
    assert SMALL.parameters == sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, lora, 0)
    assert SMALL.adapter_parameters(lora) == parameter_counts(model)["trained_parameters"]
    narrow = LoraConfig(rank=4, targets=("q_proj", "v_proj"))
    model = small_model()
    add_adapters(model, narrow, 0)
    assert SMALL.adapter_parameters(narrow) == parameter_counts(model)["trained_parameters"]


def test_a_configuration_of_transformers_and_the_numbers_of_ours_give_the_same_shape() -> None:
    assert shape_of_config(json.loads(small_model().config.to_json_string()), "config.json") == SMALL
    ours = shape_of_numbers(ModelConfig(hidden_size=64, layers=8, heads=4, intermediate_size=160, vocab_size=500))
    assert ours == SMALL.model_copy(update={"kv_heads": 4})


def test_bytes_of_a_step_worked_by_hand() -> None:
    """One layer of width 2, one head, feed-forward 3, vocabulary 5, ten tokens of which four are responses.

    A layer has 4 * 2 * 2 + 3 * 2 * 3 + 2 * 2 = 38 numbers, the model 5 * 2 + 38 + 2 = 50. A token keeps in attention
    its input 2, three heads' rows and one attended, 8 with 8 % of padding, and a float a head; its second half keeps at
    the four responses 2 and 6. States of width 2 stand twice, 20 logits once and, worked on, twice.
    """
    shape = ModelShape(hidden=2, layers=1, heads=1, kv_heads=1, head_size=2, feed_forward=3, vocabulary=5, tied=True)
    assert shape.parameters == 50
    settings, four = PassSettings(), Reading(10, 4, 4)
    kept = 10 * (2 + 1.08 * 8 + 1) + 4 * (2 + 6) + 2 * 4 * 2 + 20 + 2 * 20
    assert kept_bytes(shape, four, settings) == int(4 * kept)
    held = 3 * 50 * 4  # weights and two moments
    step, end = training(held, 50, four, settings, shape, several=False)
    assert step.bytes == held + int(4 * kept) + 2 * 10 * 4  # the embedding's gradient twice
    assert end.bytes == held + 50 * 4 + 2 * 10 * 4
    cache = 2 * 1 * 3 * 1 * 2 * (7 + 2) * 4  # keys and values of 3 rows, 7 tokens read and 2 written
    weights = 2 * 4 * (12 + 4 + 12 + 6 + 10)  # small products lie there twice, packed and plain
    draw = 4 * 3 * 5 * 4
    read = 3 * 7 * (6 + 4 + 4) * 4
    assert sampler_bytes(shape, 3, 7, 2, settings) == weights + cache + max(draw, read)


def test_numbers_of_the_engine_are_the_engines() -> None:
    assert activations.KEPT_LOGITS == output_layer.KEPT_LOGITS
    assert activations.LOGITS_AT_ONCE == output_layer.LOGITS_AT_ONCE
    assert activations.PIECES == matmul.PIECES
    assert activations.FEW == packed_weight.FEW
