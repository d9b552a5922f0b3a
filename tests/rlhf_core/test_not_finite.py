"""NaN is neither more nor less than any number, so each place that compares has to ask: an error with its cause."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.ppo import CFG, EOS, PAD, PROMPTS, changed, make_state, run, share_of_good, tiny_policy
from support.preference import toy_groups
from torch import Tensor

from rlhf_core.engine.batches import collate
from rlhf_core.errors import Diverged, GateRefused, check_finite
from rlhf_core.evaluation.drift import drift_figures
from rlhf_core.evaluation.judges import score_judge
from rlhf_core.evaluation.response_scores import read_responses, reward_scores
from rlhf_core.evaluation.shares import best_parts
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.best_of_n import pick
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.rollout.token_draw import OPEN, CutOff, draw_tokens
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.preference.reference import reference_logprobs
from rlhf_core.trainers.reward.plan import Phase
from rlhf_core.trainers.reward.teacher import fit_aggregation
from rlhf_core.trainers.reward.trainer import standardise
from rlhf_core.trainers.sft import note_heldout_loss

RUN = RunContext(seed=0, pad_id=PAD)

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
def test_the_first_number_that_is_none_is_named(bad: float) -> None:
    check_finite([0.0, -1e308], "score of response")
    with pytest.raises(Diverged, match=rf"score of response 1 is {bad}. Fix:"):
        check_finite([0.0, bad, math.nan], "score of response")


@pytest.mark.parametrize("cut_off", [OPEN, CutOff(top_k=3), CutOff(top_p=0.5)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, "mixed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing allowed"])
def test_logits_that_are_no_distribution_give_no_token(bad: Any, temperature: Any, cut_off: CutOff) -> None:
    """Half-way they gave the last token of the vocabulary, in silence."""
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    if bad == "nothing allowed":
        logits[1] = -math.inf
    else:
        logits[1, 5] = bad
    how = torch.tensor([0.0, 0.0, 1.0]) if temperature == "mixed" else temperature
    with pytest.raises(Diverged, match="1 of 3 tokens have logits that are NaN or infinite"):
        draw_tokens(logits, how, torch.rand(3), cut_off)
    logits[1] = -math.inf
    logits[1, 5] = 0.0
    assert draw_tokens(logits, how, torch.rand(3), cut_off).tokens_B[1].item() == 5, "forbidding tokens is allowed"


def test_sampling_from_a_spoilt_policy_is_an_error() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.layers[0].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(Diverged, match="logits that are NaN or infinite"):
        sample_responses(
            policy,
            PROMPTS[:4],
            Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=4),
            temperature=1.0,
            generator=torch.Generator(),
            batch_size=4,
        )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("keep", ["best", "contrast"])
def test_a_candidate_without_a_score_is_never_the_best(keep: Any, bad: float) -> None:
    with pytest.raises(Diverged, match="the score of candidate 2 is"):
        pick(torch.tensor([[1.0, 2.0, bad, 0.5]]), 4, keep)


@pytest.mark.parametrize("bad", BAD)
def test_a_share_without_a_value_is_never_chosen(bad: float) -> None:
    """NaN first in the list was kept as the best, and anywhere else passed over."""
    for place in range(3):
        values = [0.1, 0.2, 0.3]
        values[place] = bad
        with pytest.raises(Diverged, match=f"the value of candidate {place} is"):
            best_parts([(1, 3), (2, 2), (3, 1)], values)


@pytest.mark.parametrize("bad", BAD)
def test_a_judge_does_not_call_nan_worse(bad: float) -> None:
    judge = score_judge(1e-4)
    assert judge(["p"], [2.0], [1.0]) == ["first"]
    for first, second in (([bad], [1.0]), ([1.0], [bad]), ([bad], [bad])):
        with pytest.raises(Diverged, match="the score of response 0 is"):
            judge(["p"], first, second)


@pytest.mark.parametrize("bad", BAD)
def test_a_divergence_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(Diverged, match="the policy's log-probability of response 1 is"):
        drift_figures(np.array([-2.0, bad]), np.array([-5.0, -7.0]), [3, 5])
    with pytest.raises(Diverged, match="the reference's log-probability of response 0 is"):
        drift_figures(np.array([-2.0, -6.0]), np.array([bad, -7.0]), [3, 5])


def spoilt_reward_model() -> RewardModel:
    """NaN for every response with token 11 in it, a number for others."""
    model = RewardModel.from_policy(tiny_policy(), "last", seed=1)
    with torch.no_grad():
        model.body.embed_tokens.weight[11] = math.nan
    return model


def test_a_reward_model_that_gives_no_number_is_an_error_that_names_the_response() -> None:
    model, prompts, responses = spoilt_reward_model(), [[7], [8], [9]], [[5, EOS], [5, 11, EOS], [5, 6, EOS]]
    for read in (reward_scores, read_responses):
        assert len(read(model, prompts[:1], responses[:1], pad_id=PAD, batch_size=2)) == 1
        with pytest.raises(Diverged, match="the score of response 1 is nan"):
            read(model, prompts, responses, pad_id=PAD, batch_size=2)


@pytest.mark.parametrize("aggregate", ["median", "vote"])
def test_a_members_infinite_score_does_not_hide_behind_the_others(aggregate: Any) -> None:
    """The median of three, and a rank, are numbers although one of them is infinite; their deviation is not."""
    spoilt = RewardModel.from_policy(tiny_policy(), "last", seed=1)
    with torch.no_grad():
        spoilt.head.scalar.bias.fill_(math.inf)
    members = [RewardModel.from_policy(tiny_policy(), "last", seed=seed) for seed in (2, 3)]
    ensemble = RewardEnsemble([*members, spoilt], aggregate)
    ensemble.reference_MQ = torch.arange(4.0).repeat(3, 1)
    assert ensemble.eval()(collate([[7]], [[5, EOS]], PAD)).isfinite().all()
    with pytest.raises(Diverged, match=r"of the score of response 0 is|member 2: the score of response 0 is"):
        read_responses(ensemble, [[7]], [[5, EOS]], pad_id=PAD, batch_size=2)


@pytest.mark.parametrize("bad", BAD)
def test_scores_that_are_no_numbers_are_not_said_to_be_all_alike(bad: float) -> None:
    model = RewardModel.from_policy(tiny_policy(), "last", seed=1)
    with pytest.raises(Diverged, match="the score of training response 1 is"):
        standardise(model, [0.5, bad, 1.0])
    with pytest.raises(ValueError, match="finite"):
        model.standardise(bad, 1.0)
    with pytest.raises(ValueError, match="finite"):
        model.standardise(0.0, abs(bad))


@pytest.mark.parametrize("level", [0.0, 100.0, 1e4])
def test_scores_apart_by_rounding_are_refused_as_alike(level: float) -> None:
    """Dividing by their deviation would make the last digits of a model's scores its opinion."""
    model = RewardModel.from_policy(tiny_policy(), "last", seed=1)
    one = torch.tensor(level)
    scores = [level, torch.nextafter(one, one + 1).item(), level, level]
    with pytest.raises(GateRefused, match="the same score"):
        standardise(model, scores)
    standardise(model, [level, level + 1.0])
    assert model.scale.item() == 0.5


def test_an_ensembles_member_that_gives_no_number_is_named() -> None:
    groups = toy_groups(12)
    members = [RewardModel.from_policy(tiny_policy(), "last", seed=1), spoilt_reward_model()]
    plan = [
        Phase(name=f"member-{n}", address=f"m{n}", start=n, end=n + 1, drawn=(0,), distills=False) for n in range(2)
    ]
    with pytest.raises(Diverged, match="member 1: the score of training response"):
        fit_aggregation(RewardEnsemble(members, "accuracy"), groups, plan, ["overall"], PAD)


def test_a_reference_that_gives_no_number_is_an_error_before_training() -> None:
    """Each step with such a response was refused, in every pass, and nobody told why."""
    groups, reference = toy_groups(12), tiny_policy()
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    with torch.no_grad():
        reference.model.embed_tokens.weight[groups[3].responses[0][0]] = math.nan
    with pytest.raises(Diverged, match="the reference's log-probability of training response"):
        reference_logprobs(reference, groups, [list(range(12))], RUN)


@pytest.mark.parametrize("bad", BAD)
def test_a_heldout_loss_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(Diverged, match="step 4: the held-out loss is"):
        note_heldout_loss(TrainState(step=4), bad, 2)


def test_a_guard_that_reads_no_number_says_so() -> None:
    """No bound is passed by NaN: the guard would look on to the end."""

    def rate(rows: Sequence[Any]) -> list[float]:
        return [0.0 for _ in rows]

    def score(batch: Any) -> Tensor:
        return share_of_good(batch).masked_fill(batch.ids_BS[:, batch.prompt_width - 1] == 12, math.nan)

    guarded = changed(CFG, guard={"every": 1, "scorer": "m:f"})
    with pytest.raises(Diverged, match=r"guard: the reward model's score of the response to held-out prompt 1 is nan"):
        run(guarded, reward_fn=score, watch=Watch(prompts=[[9, 8], [12], [20, 7]], rate=rate))
    reference = tiny_policy()
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    with torch.no_grad():
        reference.model.embed_tokens.weight[20] = math.nan
    with pytest.raises(Diverged, match=r"guard: the divergence of the response to held-out prompt 2 is nan"):
        run(guarded, make_state(), reference=reference, watch=Watch(prompts=[[9, 8], [12], [20, 7]], rate=rate))
