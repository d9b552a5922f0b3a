"""Output layers that do more than a product: the numbers of the plain form, at the cost of a piece of its logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.memory import Memory
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
)

from rlhf_core.engine import output_layer, own_output
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.engine.own_output import own_logits, takes_states
from rlhf_core.engine.states import predicting_states
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.models.policy import load_policy
from rlhf_core.rollout import logprobs
from rlhf_core.rollout.logprobs import (
    response_logprobs,
    response_logprobs_and_entropy,
    response_logprobs_and_states,
)
from rlhf_core.state.compute_mode import ComputeMode, computing

VOCABULARY, PAD = 40, 0
RESPONSES = [[12, 1], [13, 14, 15, 16, 1], [17]]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, Any] = {
    "gemma2": lambda **k: Gemma2Config(**SIZES, **k, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0),
    "granite": lambda **k: GraniteConfig(**SIZES, **k, num_key_value_heads=2, logits_scaling=3.0),
    "cohere": lambda **k: CohereConfig(**SIZES, **k, logit_scale=0.3),
    "phi": lambda **k: PhiConfig(**SIZES, **k),
    "gptj": lambda **k: GPTJConfig(n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4, **k),
    "opt": lambda **k: OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=8, **k
    ),
    "adapted mistral": lambda **k: MistralConfig(**SIZES, **k, num_key_value_heads=2, tie_word_embeddings=False),
}
"""A cap, scales, biases, a projection behind the last layer, and an adapter on the output layer itself."""


def tiny(kind: str, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A model whose output layer shows what it is: all weights and biases large, adapters trained."""
    config = CONFIGS[kind](vocab_size=vocabulary, pad_token_id=PAD, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if kind.startswith("adapted"):
        import peft

        model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def batch() -> SequenceBatch:
    """Prompts of one length: in float64 transformers' eager attention makes nan of padding on the left."""
    return collate([[5, 6, 7], [9, 8, 8], [10, 11, 5]], RESPONSES, PAD)


@pytest.fixture
def pieces_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_output, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(own_output, "LEAST_TOKENS", 3)


def plain(model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by a plain log-softmax of all logits of the model's own forward."""
    ids = {"input_ids": batch.ids_BS, "attention_mask": batch.mask_BS, "position_ids": batch.position_ids_BS}
    logits_BRV = model(**ids, use_cache=False).logits[:, batch.prompt_width - 1 : -1]
    every_BRV = (logits_BRV / temperature).log_softmax(-1)
    chosen_BR = every_BRV.gather(-1, batch.response_ids_BR[..., None])[..., 0]
    entropy_BR = -(every_BRV.exp() * every_BRV).sum(-1)
    return chosen_BR * batch.response_mask_BR, entropy_BR * batch.response_mask_BR


@pytest.mark.usefixtures("pieces_of_three")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_values_and_gradients_are_those_of_the_plain_form(
    model: PreTrainedModel, batch: SequenceBatch, dtype: torch.dtype, bound: float
) -> None:
    """Some norms of transformers are float32 whatever the weights are, so float64 gradients agree to 1e-6."""
    model = model.to(dtype)
    pull_BR, push_BR = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, gradients = [], []
    for function in (response_logprobs_and_entropy, plain):
        values.append(function(model, batch, 0.7))
        loss = (pull_BR * values[-1][0] + push_BR * values[-1][1]).sum()
        gradients.append(torch.autograd.grad(loss, trained(model), allow_unused=True))
    torch.testing.assert_close(*values, atol=bound, rtol=0)
    assert values[0][0].dtype == dtype
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=max(1e-6, 10 * bound), rtol=1e-5)


def trained(model: PreTrainedModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", ["gemma2", "phi", "adapted mistral"])
def test_no_pass_holds_more_than_a_piece_of_the_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a step makes is a weight's gradient; the plain form holds all logits several times."""
    monkeypatch.setattr(own_output, "LOGITS_AT_ONCE", 2**15)
    monkeypatch.setattr(own_output, "LEAST_TOKENS", 8)
    model = tiny(kind, vocabulary=4096)
    ids = torch.randint(5, 4096, (16, 17), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([row[:1] for row in ids], [row[1:] for row in ids], PAD)
    assert takes_states(model)
    found = []
    for function in (response_logprobs_and_entropy, plain):
        with Memory() as memory:
            chosen_BR, entropy_BR = function(model, batch)
            (chosen_BR.sum() + entropy_BR.sum()).backward()
        found.append(memory)
    ours, theirs = found
    logits, weight = 4 * 256 * 4096, 4 * 4096 * 16
    assert ours.largest <= max(weight, 4 * 2**15)
    assert theirs.largest >= logits
    assert theirs.peak > 3 * logits
    assert ours.peak < logits


def test_states_beside_cost_no_second_pass_and_no_other_bits(model: PreTrainedModel, batch: SequenceBatch) -> None:
    """With gradients or without, with states beside or without: PPO's first log-ratio is exactly 0."""
    with torch.no_grad():
        old_BR = response_logprobs(model, batch, 0.7)
    passes: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    new_BR, _, states_ND = response_logprobs_and_states(model, batch, 0.7, with_entropy=True)
    assert torch.equal(old_BR, new_BR)
    assert states_ND.shape == (sum(map(len, RESPONSES)), model.get_output_embeddings().in_features)
    assert len(passes) == 1


def test_in_bfloat16_logits_are_still_float32(model: PreTrainedModel, batch: SequenceBatch) -> None:
    """The body is computed in bfloat16, so numbers move; values near ln 40 in bfloat16 would have steps of 0.016."""
    exact_BR = response_logprobs(model, batch)
    with computing(ComputeMode(precision="bfloat16")), torch.no_grad():
        found_BR = response_logprobs(model, batch)
        logits_NV = own_logits(model, predicting_states(model.get_decoder(), batch))
    assert logits_NV.dtype == found_BR.dtype == torch.float32
    assert not torch.equal(logits_NV, logits_NV.bfloat16().float())
    assert 0 < (found_BR - exact_BR).abs().max() < 0.3


@pytest.mark.usefixtures("pieces_of_three")
def test_a_mixture_of_equal_members_is_the_member(batch: SequenceBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temperature, where whole distributions are mixed, some tokens at a time."""
    monkeypatch.setattr(logprobs, "MIXED_LOGITS_AT_ONCE", 2 * VOCABULARY)
    monkeypatch.setattr(logprobs, "_logits", None)
    model = tiny("gemma2")
    mixed_BR = response_logprobs(PolicyMixture([model, copy.deepcopy(model)], [0.25, 0.75]), batch, 0.7)
    torch.testing.assert_close(mixed_BR, response_logprobs(model, batch, 0.7), atol=5e-6, rtol=0)


class Fading(LlamaForCausalLM):
    """Its logits shrink along the text: they are not of states alone."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        found.logits = found.logits / torch.arange(1, found.logits.shape[1] + 1).flip(0)[:, None]
        return found


def test_where_logits_are_not_of_states_alone_it_is_said_once(
    batch: SequenceBatch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_layer, "PLAIN_HEADS", frozenset())
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, pad_token_id=PAD, initializer_range=0.3)
    model, takes = Fading(config).eval(), LlamaForCausalLM(config).eval()
    assert takes_states(takes)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        found_BR = response_logprobs(model, batch)
    assert capsys.readouterr().out.startswith("Fading: logits of all response tokens at a time, for logits of the same")
    torch.testing.assert_close(found_BR, plain(model, batch)[0], atol=5e-6, rtol=0)
    assert torch.equal(response_logprobs_and_states(model, batch)[0], found_BR)


def test_a_decoder_that_the_forward_does_not_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder would then be run on tokens that stand for nothing."""
    model = tiny("opt")
    monkeypatch.setattr(model, "get_decoder", lambda: model.model)
    assert not takes_states(model)


def test_a_folder_whose_attention_has_no_fused_kernel_is_loaded(batch: SequenceBatch, tmp_path: Path) -> None:
    """Gemma 2 caps its attention too, which PyTorch's kernel does not do."""
    model = tiny("gemma2")
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # a policy's folder has one; it is not read here
    assert torch.equal(response_logprobs(load_policy(tmp_path), batch), response_logprobs(model, batch))
