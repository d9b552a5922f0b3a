"""How every stage samples, scores and compares policies: held to sums by hand and to one model pass a response."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.evaluation.policy_measurement import (
    PolicyEvaluator,
    ResponseSet,
    response_logprob_sums,
    response_token_logprobs,
)
from rlhf_core.evaluation.response_scores import read_each, read_passes
from rlhf_core.models.adapters import adapted_layers, add_adapters, without_adapters
from rlhf_core.models.policy import build_policy
from rlhf_core.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["a few words of a small text"], 300)
PROMPTS, RESPONSES = [[5, 6, 7, 8], [9], [5, 6]], [[20, 21, 22], [23, 1], [24, 25, 26, 1]]


def small_policy(seed: int) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "init_std": 0.3}
    return build_policy(ModelConfig(**sizes, max_prompt_tokens=8, max_response_tokens=8), 300, 0, 1, seed).eval()


def evaluator(**more: int) -> PolicyEvaluator:
    return PolicyEvaluator(tokenizer=TOKENIZER, prompts=PROMPTS, max_new_tokens=4, **more)


def written() -> ResponseSet:
    return ResponseSet(model="a", temperature=1.0, response_ids=RESPONSES, texts=["", "", ""], finished=[False] * 3)


def by_hand(model: PreTrainedModel) -> list[list[float]]:
    """From the model's own logits, response by response."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0].double(), -1)
        found.append([rows[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)])
    return found


def test_logprobs_of_tokens_come_response_after_response() -> None:
    """Batches of like length take the rows in another order; what is read out of the model's own logits is the same."""
    model, options = small_policy(4), {"pad_id": 0, "batch_size": 2}
    told = response_token_logprobs(model, PROMPTS, RESPONSES, **options)
    each = by_hand(model)
    assert told.tolist() == pytest.approx([one for response in each for one in response], abs=1e-5)
    sums = response_logprob_sums(model, PROMPTS, RESPONSES, **options)
    assert sums.tolist() == pytest.approx([sum(response) for response in each], abs=1e-5)


def test_each_response_keeps_its_place_and_reads_beside_those_of_its_length() -> None:
    seen: list[list[int]] = []

    def read(batch: SequenceBatch) -> list[int]:
        seen.append(batch.mask_BS.sum(1).tolist())
        return batch.response_ids_BR[:, 0].tolist()

    assert read_each(read, PROMPTS, RESPONSES, pad_id=0, model=torch.nn.Linear(1, 1), batch_size=2) == [20, 23, 24]
    assert seen == [[3, 6], [7]]


def test_a_pass_that_comes_again_is_read_again() -> None:
    """Where a model is divided among processes, all pass through it equally often: the guard reads one pass twice."""
    passes, device = [[2, 0], [1], [2, 0]], torch.device("cpu")
    numbers = read_passes(
        lambda batch: batch.response_ids_BR[:, 0].tolist(), PROMPTS, RESPONSES, passes, pad_id=0, device=device
    )
    assert list(numbers) == [(2, 24), (0, 20), (1, 23), (2, 24), (0, 20)]


def test_a_policy_and_its_reference_are_asked_about_the_same_responses() -> None:
    policy, reference = small_policy(4), small_policy(5)
    policy_N, reference_N = evaluator(scored_at_once=2).logprobs(policy, reference, written())
    assert policy_N.tolist() == pytest.approx([sum(response) for response in by_hand(policy)], abs=1e-5)
    assert reference_N.tolist() == pytest.approx([sum(response) for response in by_hand(reference)], abs=1e-5)
    same_N, start_N = evaluator().logprobs(policy, policy, written())
    assert (same_N == start_N).all()


def test_a_reference_that_carries_adapters_is_the_model_below_them() -> None:
    policy, plain = small_policy(4), small_policy(4)
    add_adapters(policy, LoraConfig(rank=2), 0)
    for _, layer in adapted_layers(policy):
        torch.nn.init.ones_(layer.lora_B["default"].weight)
    own_N, reference_N = evaluator().logprobs(policy, policy, written())
    expected = response_logprob_sums(plain, PROMPTS, RESPONSES, pad_id=0)
    assert reference_N == pytest.approx(expected, abs=1e-5)
    assert np.abs(own_N - reference_N).min() > 1e-3
    with without_adapters(policy):
        assert evaluator().logprobs(policy, plain, written()).policy_N == pytest.approx(expected, abs=1e-5)


def test_samples_are_addressed_by_their_generator_and_read_as_text() -> None:
    policy = small_policy(4)

    def sample(seed: int, temperature: float = 1.0) -> ResponseSet:
        return evaluator().sample("a", policy, torch.Generator().manual_seed(seed), temperature=temperature)

    assert sample(1) == sample(1)
    assert sample(1).response_ids != sample(2).response_ids
    assert sample(1, 0.0).response_ids == sample(2, 0.0).response_ids
    assert sample(1).num_tokens == [len(ids) for ids in sample(1).response_ids]
