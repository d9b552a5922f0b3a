"""Lengths, variety, drift, the side-by-side table and the metrics of stage `evaluate`."""

import json
import math

import numpy as np
import pytest
import torch

from rlhf_core.config import EvaluateConfig
from rlhf_core.config.evaluation import JUDGE_ROWS
from rlhf_core.demo.gold import Grade
from rlhf_core.evaluation.ab import both_orders
from rlhf_core.evaluation.drift import drift_figures
from rlhf_core.evaluation.intervals import mean_interval
from rlhf_core.evaluation.judge_registry import model_pairs
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.judges import score_judge
from rlhf_core.evaluation.policy_measurement import ResponseSet
from rlhf_core.evaluation.samples import side_by_side
from rlhf_core.evaluation.text import length_figures, repeated_share, variety_figures
from rlhf_core.evaluation.verdict import evaluation_metrics, gold_means


def grade_of(gold: float, truthful: float = 1.0) -> Grade:
    return Grade(
        helpful=gold,
        truthful=truthful,
        harmless=1.0,
        concise=1.0,
        gold=gold,
        words=3,
        polite=0,
        rude=0,
        unknown=0,
        wellformed=True,
    )


def judged(name: str, temperature: float, gold: list[float], truthful: list[float] | None = None) -> JudgedSet:
    count = len(gold)
    responses = ResponseSet(
        model=name,
        temperature=temperature,
        response_ids=[[5, 6, 1]] * count,
        texts=[f"{name} reply {row}" for row in range(count)],
        finished=[True] * count,
    )
    grades = [grade_of(*row) for row in zip(gold, truthful or [1.0] * count, strict=True)]
    return JudgedSet(responses=responses, scores={"gold": gold, "reward_model": gold}, grades=grades)


def test_lengths_by_hand():
    figures = length_figures([1, 2, 3, 10], ["", "a b", "a", "a b c d e"], [True, True, True, False])
    assert figures["tokens_mean"] == 4.0
    assert figures["tokens_median"] == 2.5
    assert figures["tokens_p95"] == pytest.approx(3 + 0.85 * 7)
    assert figures["words_mean"] == 2.0
    assert figures["chars_mean"] == (0 + 3 + 1 + 9) / 4
    assert figures["finished_share"] == 0.75
    assert figures["finished_share_low"] is None, "of four responses"


def test_the_share_that_ended_has_wilsons_interval():
    figures = length_figures([1] * 10, [""] * 10, [True] * 8 + [False] * 2)
    # by hand, 8 of 10: (0.8 + z^2 / 20 -+ z sqrt(0.016 + z^2 / 400)) / (1 + z^2 / 10), z = 1.959964
    assert [figures["finished_share_low"], figures["finished_share_high"]] == pytest.approx(
        [0.490162, 0.943318], abs=2e-6
    )


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("one two", 0.0), ("one two three four", 0.0), ("a b c a b c", 1 / 4), ("No no NO no no", 2 / 3)],
)
def test_repeated_share(text: str, share: float):
    assert repeated_share(text) == pytest.approx(share)


def test_variety():
    assert variety_figures(["a", "a", "b", "a a a a a"]) == {"distinct_share": 0.75, "repetition": pytest.approx(1 / 6)}


def test_drift_by_hand():
    figures = drift_figures(np.array([-2.0, -6.0]), np.array([-5.0, -7.0]), [3, 5])
    assert figures["kl_to_sft"] == 2.0
    assert figures["kl_per_token"] == 4.0 / 8
    assert figures["perplexity_under_sft"] == pytest.approx(math.exp(12 / 8))


def test_drift_has_the_interval_of_a_mean_from_five_responses_up():
    logprobs, reference = np.array([-2.0, -6.0, -3.0, -1.0, -7.0]), np.array([-5.0, -7.0, -3.5, -1.5, -9.0])
    figures = drift_figures(logprobs, reference, [3, 5, 2, 2, 4], 0.9)
    assert (figures["kl_to_sft_low"], figures["kl_to_sft_high"]) == mean_interval(logprobs - reference, 0.9)
    figures = drift_figures(logprobs[:4], reference[:4], [3, 5, 2, 2])
    assert (figures["kl_to_sft_low"], figures["kl_to_sft_high"]) == (None, None)


def test_samples_show_losses_beside_a_random_draw():
    prompts = [f"prompt {row}" for row in range(30)]
    sft, dpo = judged("sft", 1.0, [0.5] * 30), judged("dpo", 1.0, [0.6] * 28 + [0.1, 0.3])
    rows = side_by_side(
        prompts,
        {"sft": sft, "dpo": dpo},
        best="dpo",
        gains=[0.1] * 28 + [-0.4, -0.2],
        count=30,
        generator=torch.Generator().manual_seed(1),
    )
    assert [row["prompt"] for row in rows if row["why"] == "largest loss"] == ["prompt 28", "prompt 29"]
    drawn = [row["prompt"] for row in rows if row["why"] == "drawn"]
    assert len(set(drawn)) == len(drawn) == 28
    assert not {"prompt 28", "prompt 29"} & set(drawn)
    assert rows[-1]["responses"]["dpo"] == {
        "text": "dpo reply 29",
        "finished": True,
        "scores": {"gold": 0.3, "reward_model": 0.3},
    }


def test_samples_never_show_more_losses_than_half():
    prompts = [f"prompt {row}" for row in range(30)]
    sets = {"sft": judged("sft", 1.0, [0.5] * 30), "ppo": judged("ppo", 1.0, [0.1] * 30)}
    generator = torch.Generator().manual_seed(1)
    rows = side_by_side(prompts, sets, best="ppo", gains=[-0.4] * 30, count=10, generator=generator)
    assert [row["why"] for row in rows].count("largest loss") == 5


def test_a_reward_model_ties_what_only_rounding_tells_apart():
    scores, other = [1.5, 1.5, -0.25], [1.500002, 1.49, -0.2500007]
    verdicts = both_orders(score_judge(JUDGE_ROWS["reward_model"].tie_within), ["p"] * 3, scores, other)
    assert verdicts[:2] == (["tie", "win", "tie"], 1.0)
    assert both_orders(score_judge(JUDGE_ROWS["gold"].tie_within), ["p"], [0.71], [0.709]).outcomes == ["win"]


def test_metrics_name_the_best_and_repeat_the_first_judge():
    settings = EvaluateConfig(temperatures=(1.0, 0.0), judges=("gold", "reward_model"))
    gold = {"sft": [0.5, 0.5, 0.5, 0.5], "ppo": [0.6, 0.6, 0.5, 0.4], "dpo": [0.9, 0.9, 0.9, 0.2]}
    truthful = {"sft": [1.0, 0.5, 0.5, 1.0], "ppo": [1.0, 1.0, 1.0, 0.5], "dpo": [1.0] * 4}
    sets = {(name, at): judged(name, at, gold[name], truthful[name]) for name in gold for at in (1.0, 0.0)}
    compared = {
        (a, b, at, judge): both_orders(score_judge(JUDGE_ROWS[judge].tie_within), ["p"] * 4, gold[a], gold[b])
        for a, b in model_pairs(("ppo", "dpo"), "sft")
        for at in (1.0, 0.0)
        for judge in settings.judges
    }
    drift = {name: {"kl_to_sft": kl} for name, kl in (("sft", 0.0), ("ppo", 2.0), ("dpo", 1.0))}
    metrics = evaluation_metrics(settings, ("ppo", "dpo"), sets, compared, drift, ["x", "unsafe", "x", "x"])
    assert (metrics["ppo"]["wins"], metrics["ppo"]["ties"], metrics["ppo"]["losses"]) == (2, 1, 1)
    assert metrics["verdict"]["best"] == "dpo"
    assert metrics["verdict"]["win_rate"] == 0.75
    assert metrics["verdict"]["simulated"] is True
    assert metrics["verdict"]["kl_to_sft"] == 1.0
    assert metrics["dpo"]["judges"]["reward_model"]["T=0"]["wins"] == 3
    assert metrics["ppo"]["truthful_share_gain"] == pytest.approx(0.25)
    assert metrics["dpo"]["gold_gain"] == pytest.approx(0.725 - 0.5)
    assert "win_rate" not in metrics["sft"]
    assert metrics["ppo"]["undefined"]["win_rate_low"] == "too few prompts: 4, an interval needs 5"
    assert metrics["ppo"]["undefined"]["over_refusal_gain_high"] == "too few prompts: 3, an interval needs 5"
    assert metrics["sft"]["refusals"]["T=1"]["num_answerable_prompts"] == 3
    json.dumps(metrics, allow_nan=False)


def test_truthful_share_counts_replies_and_truthful_averages_grades():
    means = gold_means([grade_of(0.5, 1.0), grade_of(0.7, 0.5)])
    assert (means["truthful"], means["truthful_share"], means["gold"]) == (0.75, 0.5, pytest.approx(0.6))
