"""Several policies as one: averaged weights, mixed distributions, in sampling and in scoring alike."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import collate
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.mixture import (
    DESCRIPTION,
    PolicyMixture,
    averaged_weights,
    load_any_policy,
    mixed_logprobs,
    tokenizer_folder,
)
from rlhf_core.models.policy import build_policy, eos_token_ids, save_policy
from rlhf_core.rollout import logprobs
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer

CONFIG = ModelConfig(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=16,
    init_std=0.3,
    max_prompt_tokens=8,
    max_response_tokens=12,
)
VOCABULARY = 300


@pytest.fixture
def members() -> list[PreTrainedModel]:
    return [build_policy(CONFIG, VOCABULARY, 0, 1, seed) for seed in (1, 2)]


@pytest.fixture
def three(members: list[PreTrainedModel]) -> list[PreTrainedModel]:
    return [*members, build_policy(CONFIG, VOCABULARY, 0, 1, 3)]


def next_probs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Through the model's own forward."""
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)


def test_mixed_logprobs_are_the_logarithm_of_the_mean_probability() -> None:
    one, two = torch.tensor([-1.0, -200.0, 0.0]).double(), torch.tensor([-3.0, -201.0, 0.0]).double()
    mixed = mixed_logprobs([one, two], (0.25, 0.75))
    assert mixed[0].item() == pytest.approx(math.log(0.25 * math.exp(-1) + 0.75 * math.exp(-3)), abs=1e-12)
    assert mixed[1].item() == pytest.approx(-200 + math.log(0.25 + 0.75 * math.exp(-1)), abs=1e-12)
    assert mixed[2].item() == pytest.approx(0.0, abs=1e-12)


def test_three_logprobs_mixed_by_hand() -> None:
    rows = [torch.tensor([-1.0, -300.0]).double(), torch.tensor([-2.0, -301.0]).double(), torch.zeros(2).double()]
    mixed = mixed_logprobs(rows, (0.5, 0.3, 0.2))
    by_hand = math.log(0.5 * math.exp(-1) + 0.3 * math.exp(-2) + 0.2)
    assert mixed.tolist() == pytest.approx([by_hand, math.log(0.2)], abs=1e-14)


@pytest.mark.parametrize("shares", [(0.3, 0.7), (0.2, 0.5, 0.3)])
def test_a_mixture_samples_and_scores_the_same_distribution(
    three: list[PreTrainedModel], shares: tuple[float, ...]
) -> None:
    """Token by token, against probabilities mixed by hand; what the sampler reports is what scoring gives."""
    members = three[: len(shares)]
    mixture = PolicyMixture(members, shares)
    prompts = [[5, 6, 7], [8, 9], [8, 9], [10]]
    samples = sample_responses(
        mixture,
        prompts,
        Sampling(eos_ids=(1,), pad_id=0, max_new_tokens=6),
        temperature=1.0,
        generator=torch.Generator().manual_seed(3),
        batch_size=3,
    )
    with torch.no_grad():
        scored_BR = response_logprobs(mixture, collate(prompts, samples.response_ids, 0))
    for row, (prompt, response, reported) in enumerate(
        zip(prompts, samples.response_ids, samples.logprobs, strict=True)
    ):
        for place, token in enumerate(response):
            probs = [next_probs(member, prompt + response[:place])[token].item() for member in members]
            by_hand = math.log(sum(share * prob for share, prob in zip(shares, probs, strict=True)))
            assert reported[place] == pytest.approx(by_hand, abs=1e-4)
            assert scored_BR[row, place].item() == pytest.approx(by_hand, abs=1e-4)
        assert not scored_BR[row, len(response) :].any()


def first_tokens(mixture: PolicyMixture, prompt: list[int], count: int, *, temperature: float, seed: int) -> Any:
    """How often each token comes first in `count` responses to one prompt."""
    samples = sample_responses(
        mixture,
        [prompt] * count,
        Sampling(eos_ids=(1,), pad_id=0, max_new_tokens=1),
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        batch_size=count,
    )
    return torch.bincount(torch.tensor([ids[0] for ids in samples.response_ids]), minlength=VOCABULARY).numpy()


def test_a_mixture_draws_tokens_as_often_as_it_says(members: list[PreTrainedModel]) -> None:
    mixture, prompt, count = PolicyMixture(members, (0.5, 0.5)), [5, 6], 4000
    seen = first_tokens(mixture, prompt, count, temperature=1.0, seed=4)
    probs = [next_probs(member, prompt) for member in members]
    assert chisquare(seen, (count * sum(probs) / 2).numpy()).pvalue > 1e-3
    assert all(chisquare(seen, (count * one).numpy()).pvalue < 1e-6 for one in probs)


def test_greedy_takes_the_likeliest_token_of_the_mixture(members: list[PreTrainedModel]) -> None:
    samples = sample_responses(
        PolicyMixture(members, (0.4, 0.6)),
        [[5, 6]],
        Sampling(eos_ids=(1,), pad_id=0, max_new_tokens=1),
        temperature=0.0,
        generator=torch.Generator(),
        batch_size=1,
    )
    mixed = 0.4 * next_probs(members[0], [5, 6]) + 0.6 * next_probs(members[1], [5, 6])
    assert samples.response_ids[0][0] == mixed.argmax().item()


def tempered(probs: list[torch.Tensor], shares: tuple[float, ...], temperature: float) -> torch.Tensor:
    """softmax(log p / T) of the mixture p, in float64 and without a logarithm."""
    powered = sum(share * one for share, one in zip(shares, probs, strict=True)) ** (1 / temperature)
    return powered / powered.sum()


@pytest.mark.parametrize(("temperature", "shares"), [(0.4, (0.3, 0.7)), (2.5, (0.3, 0.7)), (0.4, (0.2, 0.5, 0.3))])
def test_a_tempered_mixture_samples_and_scores_what_is_computed_directly(
    three: list[PreTrainedModel], temperature: float, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored in pieces of two tokens; members that are tempered before they are mixed give something else."""
    monkeypatch.setattr(logprobs, "MIXED_LOGITS_AT_ONCE", 2 * VOCABULARY)
    members, prompts = three[: len(shares)], [[5, 6, 7], [8, 9], [10]]
    mixture = PolicyMixture(members, shares)
    samples = sample_responses(
        mixture,
        prompts,
        Sampling(eos_ids=(1,), pad_id=0, max_new_tokens=5),
        temperature=temperature,
        generator=torch.Generator().manual_seed(6),
        batch_size=3,
    )
    with torch.no_grad():
        scored_BR = response_logprobs(mixture, collate(prompts, samples.response_ids, 0), temperature)
    apart = []
    for row, (prompt, response) in enumerate(zip(prompts, samples.response_ids, strict=True)):
        for place, token in enumerate(response):
            probs = [next_probs(member, prompt + response[:place]) for member in members]
            direct = tempered(probs, shares, temperature)[token].log().item()
            assert samples.logprobs[row][place] == pytest.approx(direct, abs=1e-4)
            assert scored_BR[row, place].item() == pytest.approx(direct, abs=1e-4)
            before = sum(s * tempered([one], (1.0,), temperature) for s, one in zip(shares, probs, strict=True))
            apart.append(abs(before[token].log().item() - direct))
        assert not scored_BR[row, len(response) :].any()
    assert max(apart) > 0.05


def test_a_tempered_mixture_draws_tokens_as_often_as_it_says(members: list[PreTrainedModel]) -> None:
    mixture, prompt, count = PolicyMixture(members, (0.4, 0.6)), [5, 6], 4000
    seen = first_tokens(mixture, prompt, count, temperature=0.6, seed=7)
    probs = [next_probs(member, prompt) for member in members]
    assert chisquare(seen, (count * tempered(probs, (0.4, 0.6), 0.6)).numpy()).pvalue > 1e-3
    assert chisquare(seen, (count * tempered(probs, (0.4, 0.6), 1.0)).numpy()).pvalue < 1e-6


def test_pieces_other_output_layers_and_gradients_of_a_tempered_mixture(
    members: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member through the model's own output layer; at T near 1 it meets the way that reads chosen tokens alone."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        other = GPT2LMHeadModel(config).eval()
    mixture, batch = PolicyMixture([members[0], other], (0.5, 0.5)), collate([[5, 6], [7]], [[8, 9, 1], [10]], 0)
    whole_BR = response_logprobs(mixture, batch, 0.7)
    probs = [next_probs(member, [5, 6, 8]) for member in mixture.members]
    assert whole_BR[0, 1].item() == pytest.approx(tempered(probs, (0.5, 0.5), 0.7)[9].log().item(), abs=1e-4)
    torch.testing.assert_close(
        response_logprobs(mixture, batch, 1 + 1e-7), response_logprobs(mixture, batch), atol=1e-4, rtol=0
    )
    (grad,) = torch.autograd.grad(whole_BR.sum(), [members[0].get_output_embeddings().weight])
    monkeypatch.setattr(logprobs, "MIXED_LOGITS_AT_ONCE", 1)
    pieces_BR = response_logprobs(mixture, batch, 0.7)
    torch.testing.assert_close(pieces_BR, whole_BR)
    (again,) = torch.autograd.grad(pieces_BR.sum(), [members[0].get_output_embeddings().weight])
    torch.testing.assert_close(again, grad, atol=1e-5, rtol=1e-4)
    assert grad.abs().sum() > 0
    assert response_logprobs(mixture, collate([[5, 6]], [[]], 0), 0.7).shape == (1, 0)


@pytest.mark.parametrize("shares", [(0.5, 0.6), (1.0, 0.0), (1.0,), (0.25, 0.5, 0.25)])
def test_shares_that_are_no_distribution_are_refused(members: list[PreTrainedModel], shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one each, positive, 1 in sum"):
        PolicyMixture(members, shares)


def test_averaged_weights_are_the_means_by_share(members: list[PreTrainedModel]) -> None:
    model = averaged_weights(members, (0.25, 0.75))
    first, second = (dict(member.named_parameters()) for member in members)
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, 0.25 * first[name] + 0.75 * second[name], atol=1e-7)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    same = averaged_weights([members[0], members[0]], (0.25, 0.75))
    assert all(torch.equal(one, two) for one, two in zip(same.parameters(), members[0].parameters(), strict=True))


def test_weights_of_three_are_averaged_by_hand(three: list[PreTrainedModel]) -> None:
    """Every number, summed in Python's floats; float32 keeps 24 bits of it."""
    made = averaged_weights(three, (0.5, 0.2, 0.3))
    for name, tensor in made.named_parameters():
        rows = [dict(member.named_parameters())[name].flatten().tolist() for member in three]
        by_hand = [0.5 * one + 0.2 * two + 0.3 * other for one, two, other in zip(*rows, strict=True)]
        assert torch.equal(tensor.flatten(), torch.tensor(by_hand, dtype=torch.float64).float()), name


def test_other_shapes_cannot_be_averaged(members: list[PreTrainedModel]) -> None:
    wider = build_policy(CONFIG.model_copy(update={"intermediate_size": 24}), VOCABULARY, 0, 1, 3)
    with pytest.raises(ConfigError, match=r"other weights by name or shape\. Fix: methods: \[probabilities\]"):
        averaged_weights([members[0], wider], (0.5, 0.5))


def saved_three(three: list[PreTrainedModel], folder: Path) -> Path:
    PolicyMixture(three, (0.2, 0.5, 0.3)).save(train_tokenizer(["words"], VOCABULARY), folder)
    return folder


def test_a_saved_mixture_loads_whole_and_its_members_alone(three: list[PreTrainedModel], tmp_path: Path) -> None:
    members = three[:2]
    tokenizer = train_tokenizer(["some words to learn from"], VOCABULARY)
    mixture = PolicyMixture(members, (0.25, 0.75))
    mixture.save(tokenizer, tmp_path / "model")
    loaded = load_any_policy(tmp_path / "model")
    assert isinstance(loaded, PolicyMixture)
    assert loaded.shares == (0.25, 0.75)
    batch = collate([[5, 6]], [[7, 8, 1]], 0)
    with torch.no_grad():
        assert torch.equal(response_logprobs(loaded, batch), response_logprobs(mixture, batch))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model/member-2")
    assert all(torch.equal(one, two) for one, two in zip(alone.parameters(), members[1].parameters(), strict=True))
    assert load_tokenizer(tokenizer_folder(tmp_path / "model")).eos_token_id == tokenizer.eos_token_id
    assert eos_token_ids(loaded, tokenizer) == (1,)

    again = load_any_policy(saved_three(three, tmp_path / "three"))
    assert isinstance(again, PolicyMixture)
    assert again.shares == (0.2, 0.5, 0.3)
    for one, member in zip(again.members, three, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), member.parameters(), strict=True))

    save_policy(members[0], tokenizer, tmp_path / "plain")
    assert isinstance(load_any_policy(tmp_path / "plain"), PreTrainedModel)
    assert tokenizer_folder(tmp_path / "plain") == tmp_path / "plain"


@pytest.mark.parametrize(
    "text",
    [
        '{"shares": [0.5, 0.5]}',
        '{"members": ["../x", "y"], "shares": [0.5, 0.5]}',
        '{"members": ["member-1", "member-2"], "shares": [0.5, 0.25, 0.25]}',
        '{"members": [], "shares": []}',
        "[]",
    ],
)
def test_a_description_that_says_something_else_is_refused(
    members: list[PreTrainedModel], tmp_path: Path, text: str
) -> None:
    PolicyMixture(members, (0.5, 0.5)).save(train_tokenizer(["words"], VOCABULARY), tmp_path)
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(ConfigError, match="Fix: "):
        load_any_policy(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(EnvironmentProblem):
        load_any_policy(tmp_path)
