"""Attention, mixed pooling, several criteria and variances: by hand, in gradients, on disk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import collate
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.heads import Head, HeadSpec, ScoreHead, attention, mean_state
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import encode_responses, train_tokenizer

# Hidden states of size 1 after a prompt token (9): a response of three tokens, one of one token, an empty one.
STATES = torch.tensor([[9.0, 2.0, 3.0, 5.0], [9.0, 7.0, 8.0, 8.0], [4.0, 8.0, 8.0, 8.0]])[..., None]
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
BATCH = collate([[11, 12], [13]], [[2, 3, 5], [7]], pad_id=0)


def head(kind: Head, **more: Any) -> ScoreHead:
    """A head whose token value is 10 h + 1."""
    made = ScoreHead(HeadSpec(kind=kind, **more), 1)
    with torch.no_grad():
        made.scalar.weight.fill_(10.0)
        made.scalar.bias.fill_(1.0)
    return made


def policy() -> Any:
    cfg = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=16, init_std=0.5)
    return build_policy(cfg, 270, 0, 1, seed=0)


def test_attention_by_hand() -> None:
    """Values 21, 31, 51; weights softmax(0.5 * (2, 3, 5)), D = 1. An empty response scores 0."""
    made = head("attention")
    with torch.no_grad():
        made.query_CD.fill_(0.5)
    powers = [math.exp(0.5 * h) for h in (2.0, 3.0, 5.0)]
    expected = sum(p * v for p, v in zip(powers, (21.0, 31.0, 51.0), strict=True)) / sum(powers)
    assert made(STATES, MASK)[:, 0].tolist() == pytest.approx([expected, 71.0, 0.0])


def test_attention_starts_as_the_mean_and_ignores_padding() -> None:
    torch.testing.assert_close(head("attention")(STATES, MASK), head("mean")(STATES, MASK))
    query = torch.tensor([[0.3], [-2.0]])
    weights = attention(STATES, MASK, query)
    torch.testing.assert_close(weights.sum(1), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    changed = STATES.clone()
    changed[1, 2:] = 1e6
    assert torch.equal(attention(changed, MASK, query), weights)


def test_attention_looks_at_the_scale_of_large_states() -> None:
    """q . h / sqrt(D): the quotient that keeps the softmax soft."""
    states = torch.tensor([[[0.0] * 4, [1.0] * 4, [2.0] * 4]])
    weights = attention(states, torch.ones(1, 2), torch.full((1, 4), 0.25))
    assert weights[0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(0.5)))


@pytest.mark.parametrize(("alpha", "share"), [(None, 0.5), (0.2, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_mixed_is_a_share_of_last_and_the_rest_of_mean(alpha: float | None, share: float) -> None:
    """Last 51, mean 103 / 3; alpha is 1/2 at first where it is learned."""
    scores = head("mixed", alpha=alpha)(STATES[:2], MASK[:2])[:, 0]
    assert scores.tolist() == pytest.approx([share * 51.0 + (1 - share) * 103.0 / 3, 71.0])


def test_a_learned_alpha_moves_and_a_given_one_does_not() -> None:
    made = head("mixed")
    made(STATES, MASK).sum().backward()
    assert made.mixing_C.grad.item() != 0.0
    assert "mixing_C" not in dict(head("mixed", alpha=0.5).named_parameters())


def test_the_last_state_alone_is_enough_for_last() -> None:
    last = torch.tensor([[[5.0]], [[7.0]], [[4.0]]])
    assert torch.equal(head("last")(last, MASK), head("last")(STATES, MASK))


def test_each_criterion_has_its_own_head_and_the_score_is_their_weighted_sum() -> None:
    made = ScoreHead(HeadSpec(kind="mean", criteria={"helpful": 2.0, "harmless": 0.5}), 1)
    with torch.no_grad():
        made.scalar.weight.copy_(torch.tensor([[1.0], [10.0]]))
        made.scalar.bias.zero_()
    scores = made(STATES[:2], MASK[:2])
    torch.testing.assert_close(scores, torch.tensor([[10 / 3, 100 / 3], [7.0, 70.0]]))
    torch.testing.assert_close(made.combine(scores), torch.tensor([2 * 10 / 3 + 50 / 3, 14.0 + 35.0]))


def test_a_gated_head_keeps_its_criteria_apart() -> None:
    model = RewardModel.from_policy(policy(), HeadSpec(kind="gated", criteria={"a": 1.0, "b": 3.0}), 0)
    with torch.no_grad():
        model.head.scalar.bias.copy_(torch.tensor([1.0, 0.0, 2.0, 3.0]))
        scores = model.read(BATCH).scores_BC
        gate = ((response_logprobs(policy(), BATCH).clamp_min(-8.0) + 1.0) * BATCH.response_mask_BR).sum(1)
    torch.testing.assert_close(scores[:, 0], torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(scores[:, 1], 2.0 * torch.tensor([3.0, 1.0]) + 3.0 * gate)


def test_variances_are_read_beside_the_scores() -> None:
    """log-variance 0.1 h + 1, of the last state for `last` and of the mean state otherwise; within +-8."""
    for kind, states in (("last", (5.0, 7.0)), ("mean", (10 / 3, 7.0))):
        made = head(kind, spread=True)
        with torch.no_grad():
            made.log_variance.weight.fill_(0.1)
            made.log_variance.bias.fill_(1.0)
        expected = [0.1 * state + 1.0 for state in states]
        assert made.log_variances(STATES[:2], MASK[:2])[:, 0].tolist() == pytest.approx(expected)
        with torch.no_grad():
            made.log_variance.bias.fill_(100.0)
        assert made.log_variances(STATES[:2], MASK[:2]).max().item() == 8.0
    with pytest.raises(ValueError, match="without a variance"):
        head("last").log_variances(STATES, MASK)


def test_deviations_of_independent_criteria_add_in_squares() -> None:
    made = ScoreHead(HeadSpec(kind="last", criteria={"a": 2.0, "b": 3.0}, spread=True), 1)
    variances = torch.tensor([[0.25, 4.0]])
    assert made.combined_deviation(variances.log()).item() == pytest.approx(math.sqrt(4 * 0.25 + 9 * 4.0))


def test_a_pessimistic_model_takes_deviations_off() -> None:
    kind = RewardModel.from_policy(policy(), HeadSpec(kind="mean", spread=True, pessimism=1.5), 0)
    plain = RewardModel.from_policy(policy(), HeadSpec(kind="mean", spread=True), 0)
    for model in (kind, plain):
        with torch.no_grad():
            model.head.log_variance.weight.normal_(generator=torch.Generator().manual_seed(2))
        model.standardise(0.5, 2.0)
    with torch.no_grad():
        found, other = kind.details(BATCH), plain.details(BATCH)
        torch.testing.assert_close(found.scores_B, kind(BATCH))
        assert torch.equal(found.deviations_B, other.deviations_B)
        torch.testing.assert_close(found.scores_B, other.scores_B - 1.5 * other.deviations_B)


SPECS = [
    HeadSpec(kind="attention"),
    HeadSpec(kind="mixed"),
    HeadSpec(kind="mixed", alpha=0.25),
    HeadSpec(kind="gated", criteria={"harmless": 2.0, "helpful": 1.0}),
    HeadSpec(kind="last", spread=True, pessimism=0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_head_is_saved_whole(tmp_path: Path, spec: HeadSpec) -> None:
    model = RewardModel.from_policy(policy(), spec, seed=0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.standardise(0.25, 1.5)
    model.save(tmp_path / "one", train_tokenizer(["some words"], 270))
    loaded = RewardModel.load(tmp_path / "one")
    assert loaded.spec == model.spec
    assert list(loaded.spec.criteria) == list(model.spec.criteria), "weights belong to heads by their order"
    assert torch.equal(loaded(BATCH), model(BATCH))
    loaded.save(tmp_path / "two", train_tokenizer(["some words"], 270))
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_a_folder_of_before_reads_as_a_plain_head(tmp_path: Path) -> None:
    """What the description held when heads had neither criteria nor variances; a plain head still writes just that."""
    RewardModel.from_policy(policy(), "gated", 0).save(tmp_path, train_tokenizer(["some words"], 270))
    assert json.loads((tmp_path / "reward_head.json").read_text()) == {"head": "gated", "outputs": 2}
    assert RewardModel.load(tmp_path).spec == HeadSpec(kind="gated")


def test_one_pass_reads_all_that_training_asks_for() -> None:
    model = RewardModel.from_policy(policy(), "last", 0, keep_output=True)
    with torch.no_grad():
        plain, full = model.read(BATCH), model.read(BATCH, ["states", "logprobs"])
        torch.testing.assert_close(full.scores_BC, plain.scores_BC)
        torch.testing.assert_close(full.logprobs_B, response_logprobs(policy(), BATCH).sum(1))
        states = model.body(BATCH.ids_BS, attention_mask=BATCH.mask_BS, position_ids=BATCH.position_ids_BS)
        own = [states.last_hidden_state[0, 2:].mean(0), states.last_hidden_state[1, 2]]
        torch.testing.assert_close(full.states_BD, torch.stack(own))
    assert plain.states_BD is None
    assert plain.logprobs_B is None


def test_n39_scores_are_float32_whatever_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made = head("attention", spread=True)
    narrow: Tensor = STATES.bfloat16()
    assert made(narrow, MASK).dtype == torch.float32
    assert made.log_variances(narrow, MASK).dtype == torch.float32
    torch.testing.assert_close(made(narrow, MASK), made(STATES, MASK))
    assert mean_state(narrow, MASK).dtype == torch.float32


def test_n23_heads_start_at_one_over_root_d_plus_one_without_bias() -> None:
    """Drawn numbers over root(D + 1) (Stiennon et al. 2020): scores start of size 1, at 0 in the mean."""
    made = ScoreHead(HeadSpec(kind="last"), 4095)
    made.start(seed=3)
    assert made.scalar.weight.std().item() * 64 == pytest.approx(1.0, abs=0.05)
    assert isinstance(made.scalar, nn.Linear)
    assert not made.scalar.bias.any()
    gated = ScoreHead(HeadSpec(kind="gated", spread=True), 64)
    gated.start(seed=3)
    assert not any(parameter.any() for parameter in gated.parameters())


def test_n40_the_end_token_is_scored_alike_in_training_and_in_ppo() -> None:
    """A finished sample carries the end token as an encoded text does; `last` reads there, and nowhere else.

    A response that was cut has no end token on either side, and is read at its last own token.
    """
    tokenizer = train_tokenizer(["some words are here", "and some are not"], 270)
    (whole,), (cut,) = (encode_responses(tokenizer, ["some words"], most) for most in (20, 3))
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut
    language_model = policy()
    model = RewardModel.from_policy(language_model, "last", 0)
    samples = sample_responses(
        language_model,
        [[11, 12]] * 40,
        Sampling(eos_ids=tuple(range(40, 60)), pad_id=0, max_new_tokens=20),
        temperature=1.0,
        batch_size=40,
        generator=torch.Generator().manual_seed(0),
    )
    ended = [ids for ids in samples.response_ids if ids[-1] in range(40, 60)]
    assert ended, "nothing ended"
    assert not any(token in range(40, 60) for ids in ended for token in ids[:-1])
    with torch.no_grad():
        for ids in ended[:3]:
            rolled = collate([[11, 12], [13]], [ids, [5] * 30], pad_id=40)  # padded as in a rollout, by an end token
            states = model.body(torch.tensor([[11, 12, *ids]])).last_hidden_state[0, -1]
            torch.testing.assert_close(model(rolled)[0], model.head.scalar(states)[0])
