"""Log-probabilities against definitions written out in full."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf_core.config import ModelConfig
from rlhf_core.engine import output_layer
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.engine.output_layer import token_logprobs
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout import logprobs
from rlhf_core.rollout.logprobs import (
    response_logprobs,
    response_logprobs_and_entropy,
    response_logprobs_and_states,
)

VOCABULARY, PAD = 40, 0
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
RESPONSES = [[12, 1], [13, 14, 15, 16, 1], [17]]


def tiny(family: str) -> PreTrainedModel:
    if family == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
        )
        return GPT2LMHeadModel(config).eval()
    if family == "biased":  # an output layer that is more than a product
        model = tiny("llama")
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.linspace(-2.0, 2.0, VOCABULARY))
        return model
    cfg = ModelConfig(family=family, hidden_size=16, heads=2, layers=2, intermediate_size=16, init_std=0.3)
    return build_policy(cfg, VOCABULARY, PAD, 1, seed=0)


@pytest.fixture(params=["llama", "qwen2", "gpt2", "biased"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def batch() -> SequenceBatch:
    return collate(PROMPTS, RESPONSES, PAD)


def alone(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """The definition: the row by itself, no padding, every logit, negative cross-entropy of the shifted tokens."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return -F.cross_entropy(logits, torch.tensor(response), reduction="none")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_equal_to_cross_entropy_of_each_row_alone(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float
) -> None:
    """So padding and the company of other rows change nothing beyond rounding: 5e-6 nats here, in float32."""
    found = response_logprobs(model, batch, temperature)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = alone(model, prompt, response, temperature)
        torch.testing.assert_close(found[row, : len(response)], expected, atol=5e-6, rtol=0)
        assert (found[row, len(response) :] == 0).all()


def test_the_states_beside_them_cost_no_other_logprobs(model: PreTrainedModel, batch: SequenceBatch) -> None:
    """A head beside the output layer reads states; the output layer may be more than a product."""
    logprobs_BR, entropy_BR, states_ND = response_logprobs_and_states(model, batch, 0.7, with_entropy=True)
    expected_BR, expected_entropy_BR = response_logprobs_and_entropy(model, batch, 0.7)
    assert torch.equal(logprobs_BR, expected_BR)
    assert torch.equal(entropy_BR, expected_entropy_BR)
    assert states_ND.shape == (sum(map(len, RESPONSES)), 16)
    torch.testing.assert_close(logprobs_BR[2, 0], alone(model, PROMPTS[2], RESPONSES[2], 0.7)[0], atol=5e-6, rtol=0)


def test_no_output_layer_makes_the_logits_of_a_whole_batch(
    model: PreTrainedModel, batch: SequenceBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_logits", None)
    assert response_logprobs(model, batch).shape == (3, 5)


def test_padding_token_and_width_change_nothing(model: PreTrainedModel) -> None:
    narrow = response_logprobs(model, collate(PROMPTS[1:2], RESPONSES[1:2], PAD))
    wide = response_logprobs(model, collate([PROMPTS[1], [5] * 9], [RESPONSES[1], [6] * 9], pad_id=33))
    torch.testing.assert_close(wide[:1, : narrow.shape[1]], narrow, atol=5e-6, rtol=0)


def test_a_planted_token_shows_a_shift_by_one(batch: SequenceBatch) -> None:
    """A model that always predicts "previous token plus one": only rightly shifted log-probs see that it is sure."""
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.lm_head.weight = torch.nn.Parameter(torch.eye(VOCABULARY, 16).roll(1, 0) * 20)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, 16))
    counting = collate([[2, 3]], [[4, 5, 6]], PAD)
    assert (response_logprobs(model, counting) > -1e-6).all()
    assert (response_logprobs(model, collate([[2, 3]], [[5, 6, 7]], PAD))[0, 0] < -10).all()


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms in float32 whatever the weights are; in the type of their input they can be exact."""

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_those_of_a_plain_log_softmax(batch: SequenceBatch, temperature: float) -> None:
    weights = torch.tensor([[1.0, -2.0, 0.0, 0.0, 0.0], [0.5, 1.0, 2.0, -1.0, 3.0], [4.0, 0.0, 0.0, 0.0, 0.0]]).double()
    gradients = []
    for plain in (True, False):
        model = tiny("llama").double()
        if plain:
            logits = model(batch.ids_BS, attention_mask=batch.mask_BS, position_ids=batch.position_ids_BS).logits
            every = (logits[:, batch.prompt_width - 1 : -1] / temperature).log_softmax(-1)
            found = every.gather(-1, batch.response_ids_BR[..., None])[..., 0]
        else:
            found = response_logprobs(model, batch, temperature)
            assert found.dtype == torch.float64
        (found * weights).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


def random_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.tensor([0, 6, 3, 3, 1])


@pytest.fixture(params=["whole", "pieces kept", "pieces made again", "large", "large, made again"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the logits of a few tokens are worked on: together, or two tokens at a time, or as those of a large layer."""
    if request.param != "whole":
        monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", 1)
        monkeypatch.setattr(output_layer, "PIECES", (2, 2))
    if "large" in request.param:
        monkeypatch.setattr(output_layer, "LARGE", 0)
    if "made again" in request.param:
        monkeypatch.setattr(output_layer, "KEPT_LOGITS", 1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradcheck(temperature: float) -> None:
    hidden, weight, targets = random_inputs()
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, temperature)[0], (hidden, weight))


def test_chunks_equal_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = random_inputs()
    whole = token_logprobs(hidden, weight, targets, with_entropy=True)
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(output_layer, "PIECES", (2, 2))
    in_pieces = token_logprobs(hidden, weight, targets, with_entropy=True)
    torch.testing.assert_close(whole, in_pieces, atol=1e-14, rtol=0)
    monkeypatch.setattr(output_layer, "KEPT_LOGITS", 1)
    assert all(map(torch.equal, in_pieces, token_logprobs(hidden, weight, targets, with_entropy=True)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_that_of_the_distribution(model: PreTrainedModel, batch: SequenceBatch, temperature: float) -> None:
    found, entropy = response_logprobs_and_entropy(model, batch, temperature)
    logits = model(batch.ids_BS, attention_mask=batch.mask_BS, position_ids=batch.position_ids_BS).logits
    distribution = torch.distributions.Categorical(logits=logits[:, batch.prompt_width - 1 : -1] / temperature)
    expected = distribution.entropy() * batch.response_mask_BR
    torch.testing.assert_close(entropy, expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(found, response_logprobs(model, batch, temperature))
    embedding = model.get_input_embeddings().weight
    one, two = (torch.autograd.grad(number.sum(), embedding)[0] for number in (entropy, expected))
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_bfloat16_weights_give_float32_log_probabilities(batch: SequenceBatch) -> None:
    """Kept in float32 to the end, values near ln 40 have steps of 2e-7; rounded to bfloat16 they would have 0.016."""
    found = response_logprobs(tiny("llama").bfloat16(), batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_have_the_gradients_of_the_plain_form(temperature: float) -> None:
    """Both wanted together, in float64, whole and in pieces of two tokens; and against finite differences."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 13))
    targets_N = torch.tensor([0, 12, 3, 3, 7])
    pull_N, push_N = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    gradients = []
    for plain in (False, True):
        hidden_ND, weight_VD = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            logprobs_NV = torch.log_softmax(hidden_ND @ weight_VD.t() / temperature, -1)
            chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
            entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(1)
        else:
            chosen_N, entropy_N = token_logprobs(hidden_ND, weight_VD, targets_N, temperature, with_entropy=True)
        (pull_N * chosen_N + push_N * entropy_N).sum().backward()
        gradients.append((hidden_ND.grad, weight_VD.grad))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets_N, temperature, with_entropy=True), inputs, atol=1e-6
    )
