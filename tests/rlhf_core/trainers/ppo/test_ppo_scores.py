"""From scores to rewards: normalisation, further terms, KL estimators, the adaptive coefficient."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.ppo import CFG, changed, make_state, roll, run
from support.preference import in_processes
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.errors import DataError
from rlhf_core.trainers.ppo.credit import assign_credit
from rlhf_core.trainers.ppo.parts import Rollout
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.scores import earned_scores, with_terms
from rlhf_core.trainers.ppo.terms import RewardTerm, diversity_term, length_term, rarity, rate_responses


def written(*scores: float, finished: bool = True, further: float = 0.0) -> list[Written]:
    return [Written(prompt=0, response_ids=[7], finished=finished, score=s, further=further) for s in scores]


def scored(normalise: str, **more: Any) -> PPOConfig:
    scores = {"normalise": normalise, **more}
    return changed(CFG, scores=scores, score_clip=100.0, missing_end_penalty=0.0)


def test_scores_stay_as_they_are_by_default() -> None:
    extra: dict[str, Any] = {}
    assert earned_scores(scored("none"), extra, written(1.5, -2.0), range(2)).tolist() == [1.5, -2.0]
    assert extra == {}


def test_running_normalisation_worked_by_hand() -> None:
    """First 1, 3: mean 2, deviation 1. Then 2, 6 as well: mean 3, deviation sqrt(14 / 4)."""
    cfg, extra = scored("running"), {}
    assert earned_scores(cfg, extra, written(1.0, 3.0), range(2)).tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)
    deviation = math.sqrt(14 / 4)
    second = earned_scores(cfg, extra, written(2.0, 6.0, 3.0), range(2))
    assert second.tolist() == pytest.approx([-1 / deviation, 3 / deviation, 0.0], abs=1e-6)
    assert extra["score_moments"]["count"] == 4, "a replayed score is normalised, and not counted again"


def test_quantile_normalisation_worked_by_hand() -> None:
    """Of the recent 0, 1, 2, 3, 4 the quarters lie at 1 and 3: they become -1 and 1."""
    cfg = scored("quantile", quantiles=(0.25, 0.75), window=5)
    extra: dict[str, Any] = {"score_window": [100.0, 100.0, 100.0]}
    assert earned_scores(cfg, extra, written(0.0, 1.0, 2.0, 3.0, 4.0), range(5)).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert extra["score_window"] == [0.0, 1.0, 2.0, 3.0, 4.0], "the oldest went"
    assert earned_scores(cfg, {}, written(3.0, 3.0), range(2)).tolist() == [0.0, 0.0], "all alike: no scale"


def test_an_adaptive_price_does_not_start_from_zero() -> None:
    with pytest.raises(ValidationError, match="start from a kl_coef above 0"):
        changed(CFG, kl_coef=0.0, kl={"controller": "adaptive"})
    assert changed(CFG, kl_coef=0.0).kl_coef == 0.0


@pytest.mark.parametrize("normalise", ["running", "quantile"])
@pytest.mark.parametrize("level", [0.0, 0.5, 30_000.0])
def test_scores_that_differ_by_rounding_are_alike(normalise: str, level: float) -> None:
    """Scores 1e-6 apart became -1.25 to 1.25: a policy would be taught the last digits of its reward model."""
    scores = (torch.full((11,), level) + torch.linspace(0.0, 1e-6, 11)).tolist()
    assert earned_scores(scored(normalise), {}, written(*scores), range(11)).abs().max().item() < 0.05


@pytest.mark.parametrize("normalise", ["running", "quantile"])
def test_a_score_that_is_no_number_spoils_only_itself(normalise: str) -> None:
    cfg, extra = scored(normalise), {}
    earned_scores(cfg, extra, written(math.nan, 1.0, 3.0, math.inf), range(4))
    after = earned_scores(cfg, extra, written(1.0, 3.0), range(2))
    assert bool(after.isfinite().all())
    assert after[1] > after[0]


def test_n14_a_missing_end_is_subtracted_before_clipping_and_after_normalising() -> None:
    cfg = changed(CFG, score_clip=2.0, missing_end_penalty=1.5)
    assert earned_scores(cfg, {}, written(1.0, -1.0, finished=False), range(2)).tolist() == [-0.5, -2.0]
    running = changed(cfg, scores={"normalise": "running"})
    assert earned_scores(running, {}, written(10.0, 30.0, finished=False), range(2)).tolist() == pytest.approx(
        [-2.0, -0.5]
    )


@pytest.mark.parametrize("normalise", ["none", "running", "quantile"])
def test_n20_no_reward_but_that_of_the_last_token_is_shifted(normalise: str) -> None:
    """Scaling or shifting the reward of each token would pay for length; the score alone is normalised."""
    cfg = changed(CFG, scores={"normalise": normalise}, kl_coef=0.5)
    rollout = drifted(roll(cfg, make_state()))
    minibatches, _ = assign_credit(cfg, {}, rollout)
    for credited in (one for minibatch in minibatches for one in minibatch.parts):
        part, mask_BR = credited.part, credited.part.batch.response_mask_BR
        last_BR = (mask_BR.cumsum(1) == mask_BR.sum(1, keepdim=True)) & (mask_BR == 1)
        charged_BR = -0.5 * (part.old_logprobs_BR - part.ref_logprobs_BR)
        assert torch.equal(credited.rewards_BR[~last_BR], (charged_BR * mask_BR)[~last_BR])


def drifted(rollout: Rollout) -> Rollout:
    """The rollout as if the reference thought otherwise, also of its padding."""
    parts = [
        [replace(p, ref_logprobs_BR=p.ref_logprobs_BR - 0.3 - 0.1 * torch.arange(p.ref_logprobs_BR.shape[1]))
         for p in own]
        for own in rollout.minibatches
    ]  # fmt: skip
    return replace(rollout, minibatches=parts)


@pytest.mark.parametrize(
    ("estimator", "charge"),
    [("k1", lambda x: x), ("k2", lambda x: x * x / 2), ("k3", lambda x: torch.exp(-x) - 1 + x)],
)
def test_n05_n07_n15_each_token_pays_the_chosen_estimate_padding_nothing_and_the_last_earns_the_score(
    estimator: str, charge: Any
) -> None:
    cfg = changed(CFG, kl={"estimator": estimator}, kl_coef=0.25, missing_end_penalty=0.0)
    rollout = drifted(roll(cfg, make_state()))
    minibatches, _ = assign_credit(cfg, {}, rollout)
    for credited in (one for minibatch in minibatches for one in minibatch.parts):
        part, mask_BR = credited.part, credited.part.batch.response_mask_BR
        wanted_BR = -0.25 * charge(part.old_logprobs_BR - part.ref_logprobs_BR) * mask_BR
        for place, row in enumerate(part.rows):
            wanted_BR[place, len(rollout.responses[row].response_ids) - 1] += rollout.responses[row].score
        torch.testing.assert_close(credited.rewards_BR, wanted_BR, atol=1e-5, rtol=1e-5)
        assert not bool(credited.rewards_BR[mask_BR == 0].any())


def test_n31_the_adaptive_coefficient_follows_the_published_rule() -> None:
    """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon, KL being that of the rollout."""
    cfg = changed(CFG, steps=5, learning_rate=2e-2, warmup_steps=0, kl_coef=0.1,
                  kl={"controller": "adaptive", "target": 0.5, "horizon": 40.0})  # fmt: skip
    state = run(cfg)
    coef = 0.1
    for row in state.history:
        assert row["reward/kl_coef"] == pytest.approx(coef, rel=1e-12)
        error = min(max(row["rollout/kl_to_reference"] / 0.5 - 1, -0.2), 0.2)
        coef *= 1 + error * 16 / 40.0
    assert state.extra["kl_coef"] == pytest.approx(coef, rel=1e-12)
    assert len({row["reward/kl_coef"] for row in state.history}) == 5


def test_the_adapted_coefficient_is_the_one_that_is_charged() -> None:
    rollout = drifted(roll(CFG, make_state()))
    adaptive = changed(CFG, kl={"controller": "adaptive"})
    credited = assign_credit(adaptive, {"kl_coef": 3.0}, rollout)[0][0].parts[0]
    by_hand = assign_credit(changed(CFG, kl_coef=3.0), {}, rollout)[0][0].parts[0]
    assert torch.equal(credited.rewards_BR, by_hand.rewards_BR)


def test_length_and_diversity_worked_by_hand() -> None:
    """Pairs: a {78, 89}, b {78}, c {66} and d's lone token. a's 78 is lacked by 2 of 3 others, its 89 by all 3."""
    rows = [Written(prompt=0, response_ids=ids, finished=True) for ids in ([7, 8, 9], [7, 8], [6, 6, 6], [4])]
    assert rarity(rows) == pytest.approx([(2 / 3 + 1) / 2, 2 / 3, 1.0, 1.0])
    assert rarity(rows[:1]) == [1.0]
    assert length_term(1.0, 6).rate(rows) == pytest.approx([0.5, 1 / 3, 0.5, 1 / 6])
    terms = [length_term(-2.0, 6), diversity_term(0.5)]
    rated, figures = with_terms(terms, rows)
    assert [row.further for row in rated] == pytest.approx(
        [-1 + 5 / 12, -2 / 3 + 1 / 3, -1 + 0.5, -1 / 3 + 0.5]
    )  # fmt: skip
    assert figures["reward/term_length"] == pytest.approx((0.5 + 1 / 3 + 0.5 + 1 / 6) / 4)


def test_terms_add_to_the_normalised_score_of_their_own_response() -> None:
    cfg = scored("running")
    rows = [replace(row, further=further) for row, further in zip(written(1.0, 3.0), (0.5, -0.25), strict=True)]
    assert earned_scores(cfg, {}, rows, range(2)).tolist() == pytest.approx([-0.5, 0.75], abs=1e-6)


def test_a_price_on_length_shortens_and_a_reward_for_it_lengthens() -> None:
    def nothing(batch: SequenceBatch) -> Tensor:
        return torch.zeros(len(batch.ids_BS))

    lengths = []
    for weight in (-3.0, 3.0):
        cfg = changed(CFG, steps=20, rollout_batch=32, learning_rate=5e-3, kl_coef=0.0, missing_end_penalty=0.0)
        state = run(cfg, reward_fn=nothing, terms=[length_term(weight, 8)])
        lengths.append(state.history[-1]["rollout/response_tokens"])
        assert state.history[0]["reward/total"] == pytest.approx(weight * state.history[0]["reward/term_length"])
    assert lengths[0] < 2.0 < 5.0 < lengths[1]


def test_each_process_asks_a_function_of_its_own_responses_and_diversity_of_all() -> None:
    rows = [Written(prompt=0, response_ids=[7 + i, 8, 9], finished=True) for i in range(6)]
    asked: dict[int, int] = {}

    def work(world: Any) -> tuple[list[float], list[float]]:
        def count(mine: Any) -> list[float]:
            asked[world.rank] = len(mine)
            return [float(row.response_ids[0]) for row in mine]

        outside = RewardTerm(name="m:f", weight=1.0, rate=count)
        return rate_responses(outside, rows, world), rate_responses(diversity_term(1.0), rows, world)

    first, second = in_processes(2, work)
    assert first == second == ([7.0, 8.0, 9.0, 10.0, 11.0, 12.0], rarity(rows))
    assert asked == {0: 3, 1: 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0], r"m:f: 1 numbers for 2 responses. Fix:"),
        ([1.0, math.nan], r"m:f: nan for response 1 of 2. Fix: finite"),
        ([1e308, 1e308], r"m:f: 1e\+308 for response 0 of 2. Fix: finite"),
        ([1.0, "much"], r"m:f: it returned \[1.0, 'much'\]. Fix: one number a response"),
        ([1.0, 10**400], r"m:f: it returned \[1.0, 1000.* Fix: one number a response"),
        (None, r"m:f: it returned None. Fix:"),
    ],
)
def test_a_term_that_gives_no_number_is_named(given: Any, said: str) -> None:
    term = RewardTerm(name="m:f", weight=1.0, rate=lambda rows: given)
    with pytest.raises(DataError, match=said):
        with_terms([term], written(1.0, 2.0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scores": {"terms": {"lenght": 1.0}}}, "no term 'lenght'; length, diversity or package.module:function"),
        ({"scores": {"terms": {"a.b:c.d": 1.0}}}, "no term"),
        ({"scores": {"quantiles": (0.9, 0.1)}}, "quantiles 0.9 and 0.1 must rise"),
        ({"advantages": {"method": "rloo"}}, "responses_per_prompt >= 2"),
        ({"advantages": {"method": "reinforce"}, "value": {"model": "shared"}}, "has no value model"),
        ({"advantages": {"method": "reinforce"}, "rollout_batch": 1, "minibatch": 1}, "rollout_batch >= 2"),
        ({"responses_per_prompt": 3}, "responses_per_prompt 3 must divide rollout_batch 16"),
        ({"minibatch": 5}, "minibatch 5 must divide rollout_batch 16"),
        ({"replay": {"rows": 4}}, "replay.rows 4 must be a multiple of minibatch 8"),
        ({"replay": {"rows": 8, "capacity": 4}}, "replay.rows 8 is more than replay.capacity 4 holds"),
        ({"guard": {"every": 2}}, "a guard needs `scorer`"),
        ({"curriculum": {"start_share": 0.0}}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        changed(CFG, **wrong)


def test_names_of_functions_are_recognised() -> None:
    terms = {"length": 0.1, "rewards:tone": 1.0, "my.rewards.tone:politeness": -2.0}
    assert changed(CFG, scores={"terms": terms}).scores.terms == terms
