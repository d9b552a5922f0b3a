"""Delicate points that belong to no one module: what models, optimisers and data promise each other.

`docs/numerics.md` lists all 42 points with the tests that are named after them.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.data.batching.pairs import encode_pairs
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.tokenizer import train_tokenizer
from rlhf_core.trainers.optimisation import apply_gradients, make_optimizer
from rlhf_core.trainers.schedule import learning_rate

PAD, EOS, VOCABULARY = 0, 1, 24
TINY = ModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, init_std=0.2, vocab_size=512)
PROMPTS = [[5, 9], [7, 8, 9, 10, 11, 12, 13], [4]]
RESPONSES = [[6, 7, 8, EOS], [9, EOS], [10, 11, 12, 13, 14, 15]]


@pytest.fixture
def llama() -> PreTrainedModel:
    return build_policy(TINY, VOCABULARY, PAD, EOS, seed=1)


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """Absolute positions: a position that is off by one gives other numbers, which rotary ones would hide."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        bos_token_id=EOS, eos_token_id=EOS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def batch(rows: list[int], pad_id: int = PAD) -> SequenceBatch:
    return collate([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows], pad_id)


@torch.no_grad()
def alone_and_together(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities of each response from a batch of its own and from a batch of all three."""
    together_BR = response_logprobs(model, batch([0, 1, 2]))
    pairs = []
    for i, response in enumerate(RESPONSES):
        pairs.append((response_logprobs(model, batch([i]))[0], together_BR[i, : len(response)]))
    return pairs


def test_n03_log_probabilities_have_more_digits_than_the_weights(llama: PreTrainedModel) -> None:
    """Computed in float32 from bfloat16 weights and never rounded back: bfloat16 keeps 8 bits, 3 digits."""
    logprobs_BR = response_logprobs(llama.bfloat16(), batch([0, 1, 2]))
    assert logprobs_BR.dtype == torch.float32
    counted = logprobs_BR[logprobs_BR != 0]
    assert (counted != counted.bfloat16().float()).float().mean().item() > 0.9


def test_n09_a_score_is_read_at_the_last_token_of_the_mask_whatever_that_token_is(llama: PreTrainedModel) -> None:
    """A response that ends with the padding token as a token of its own is one token longer, not the same."""
    model = RewardModel.from_policy(llama, "last", seed=2)
    longer, shorter = [5, 6, PAD], [5, 6]
    with torch.no_grad():
        together_B = model(collate([[9, 9], [9, 9]], [longer, shorter], PAD))
        alone_B = torch.cat([model(collate([[9, 9]], [response], PAD)) for response in (longer, shorter)])
    torch.testing.assert_close(together_B, alone_B, rtol=0, atol=1e-5)
    assert (together_B[0] - together_B[1]).abs().item() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_n10_positions_are_counted_from_the_first_real_token(family: str, request: pytest.FixtureRequest) -> None:
    """Beside a longer prompt a row is padded on the left: its positions, and so its numbers, stay as they were."""
    for alone_R, together_R in alone_and_together(request.getfixturevalue(family)):
        torch.testing.assert_close(alone_R, together_R, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_n42_in_float32_the_company_of_a_row_moves_its_log_probabilities_by_rounding_only(
    family: str, request: pytest.FixtureRequest
) -> None:
    """The bound is 1e-5 nats a token, and the very same batch gives the very same bits.

    In bfloat16 another batch may be computed by another kernel and no bound is promised; whatever is compared there,
    a policy with its reference or a run with another, is computed on the same batches.
    """
    model = request.getfixturevalue(family)
    assert max((one - two).abs().max().item() for one, two in alone_and_together(model)) < 1e-5
    for precision in ("float32", "bfloat16"):
        with computing(ComputeMode(precision=precision)), torch.no_grad():
            first_BR, second_BR = (response_logprobs(model, batch([0, 1, 2])) for _ in range(2))
        assert torch.equal(first_BR, second_BR)


@pytest.fixture
def two_models() -> tuple[TrainState, Callable[[], None]]:
    """A policy and a value model of two weights each, and a way to give them gradients of norm 5 and 0.5."""
    modules = {"policy": nn.Linear(2, 1, bias=False), "value": nn.Linear(2, 1, bias=False)}
    optimizers = {name: torch.optim.SGD(module.parameters(), lr=1.0) for name, module in modules.items()}

    def give() -> None:
        modules["policy"].weight.grad = torch.tensor([[3.0, 4.0]])
        modules["value"].weight.grad = torch.tensor([[0.3, 0.4]])

    return TrainState(modules=modules, optimizers=optimizers), give


def test_n27_each_model_is_clipped_by_its_own_norm_which_is_reported(
    two_models: tuple[TrainState, Callable[[], None]],
) -> None:
    state, give = two_models
    before = {name: module.weight.detach().clone() for name, module in state.modules.items()}
    give()
    norms = {name: apply_gradients(state, name, 0.0, max_grad_norm=1.0) for name in state.modules}
    assert norms == {"policy": pytest.approx(5.0), "value": pytest.approx(0.5)}
    moved = {name: (before[name] - module.weight).norm().item() for name, module in state.modules.items()}
    assert moved == {"policy": pytest.approx(1.0, rel=1e-5), "value": pytest.approx(0.5, rel=1e-5)}


def test_n28_adams_epsilon_reaches_every_group_and_only_matrices_decay(llama: PreTrainedModel) -> None:
    optimizer = make_optimizer(llama, 1e-3, weight_decay=0.01, eps=1e-5)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    assert {group["weight_decay"] for group in make_optimizer(llama, 1e-3).param_groups} == {0.0}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_n28_a_rate_may_fall_to_zero_at_the_last_step(shape: str) -> None:
    rates = [learning_rate(step, 20, 1.0, 2, 0.0, shape) for step in range(20)]
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert min(rates[:-1]) > 0.0


def test_n30_weights_and_moments_stay_float32_so_that_small_steps_are_not_lost(llama: PreTrainedModel) -> None:
    """A step of 1e-6 on weights of about 0.2: in bfloat16, whose steps there are 1e-3, nothing would ever move."""
    optimizer = make_optimizer(llama, 1e-6)
    before = [parameter.detach().clone() for parameter in llama.parameters()]
    with computing(ComputeMode(precision="bfloat16")):
        response_logprobs(llama, batch([0, 1, 2])).sum().backward()
    optimizer.step()
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}
    moments = [tensor for entry in optimizer.state.values() for tensor in entry.values() if tensor.ndim]
    assert {tensor.dtype for tensor in moments} == {torch.float32}
    moved = torch.cat([(a != b).flatten() for a, b in zip(before, llama.parameters(), strict=True)])
    lost = torch.cat(
        [(a.bfloat16() == b.bfloat16()).flatten() for a, b in zip(before, llama.parameters(), strict=True)]
    )
    assert moved.float().mean().item() > 0.7
    assert lost.float().mean().item() > 0.95


def test_n35_both_responses_are_cut_alike_and_pairs_that_the_cut_made_equal_are_dropped() -> None:
    tokenizer = train_tokenizer(["one two three four five six seven eight nine"] * 5, 300)
    rows = [
        {"prompt": "say", "chosen": "one two three four five", "rejected": "nine eight seven six five four"},
        {"prompt": "say", "chosen": "one two three four five", "rejected": "one two three nine nine"},
        {"prompt": "say", "chosen": "", "rejected": "one"},
    ]
    uncut = encode_pairs(tokenizer, rows, max_prompt_tokens=50, max_response_tokens=50)
    assert len(uncut) == 3
    limit = 3
    (first, empty) = encode_pairs(tokenizer, rows, max_prompt_tokens=50, max_response_tokens=limit)
    assert first.chosen == uncut[0].chosen[:limit]
    assert first.rejected == uncut[0].rejected[:limit]
    # an empty response still has its end token, so no row is without a token to learn from
    assert empty.chosen[-1] == tokenizer.eos_token_id
