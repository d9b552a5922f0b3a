"""Candidates against each other, and task by task."""

from itertools import combinations

import pytest
from scipy.stats import binomtest

from rlhf_core.config import EvaluateConfig
from rlhf_core.config.evaluation import JUDGE_ROWS, JudgeName
from rlhf_core.evaluation.ab import Verdicts, both_orders, summarise
from rlhf_core.evaluation.head_to_head import by_task, head_to_head
from rlhf_core.evaluation.judges import score_judge


def verdicts(judge: JudgeName, ours: list[float], theirs: list[float]) -> Verdicts:
    tie_within = JUDGE_ROWS[judge].tie_within
    return both_orders(score_judge(tie_within), ["p"] * len(ours), ours, theirs)


def test_two_candidates_by_hand():
    settings = EvaluateConfig(temperatures=(1.0,), judges=("gold", "reward_model"))
    gold = verdicts("gold", [1.0] * 6 + [0.5, 0.0], [0.0] * 6 + [0.5, 1.0])
    reward = verdicts("reward_model", [0.0] * 8, [0.0] * 7 + [1.0])
    compared = {("ppo", "dpo", 1.0, "gold"): gold, ("ppo", "dpo", 1.0, "reward_model"): reward}
    found = head_to_head(settings, ("ppo", "dpo"), compared)
    assert list(found) == ["ppo_against_dpo"]
    by_gold = found["ppo_against_dpo"]["gold"]["T=1"]
    assert (by_gold["wins"], by_gold["ties"], by_gold["losses"], by_gold["win_rate"]) == (6, 1, 1, 6.5 / 8)
    assert by_gold["p_value"] == pytest.approx(binomtest(6, 7).pvalue)
    assert by_gold["win_rate_low"] < 6.5 / 8 < by_gold["win_rate_high"]
    by_reward = found["ppo_against_dpo"]["reward_model"]["T=1"]
    assert (by_reward["wins"], by_reward["ties"], by_reward["losses"]) == (0, 7, 1)


def test_three_candidates_are_three_pairs_whose_intervals_hold_at_once():
    settings = EvaluateConfig(temperatures=(0.0,), judges=("gold",))
    scores = {"a": [3.0] * 9, "b": [2.0] * 9, "c": [1.0] * 9}
    compared = {(a, b, 0.0, "gold"): verdicts("gold", scores[a], scores[b]) for a, b in combinations("abc", 2)}
    found = head_to_head(settings, ("a", "b", "c"), compared)
    assert list(found) == ["a_against_b", "a_against_c", "b_against_c"]
    assert found["a_against_c"]["gold"]["T=0"] == summarise(["win"] * 9, 0.95, 3)
    assert found["a_against_c"]["gold"]["T=0"]["p_value"] == pytest.approx(3 * 2 * 0.5**9)
    assert head_to_head(settings, ("a",), compared) == {}


def test_each_task_by_hand_and_few_prompts_have_no_interval():
    tasks = ["shop"] * 6 + ["unsafe"] * 2 + [""]
    found = by_task(["win"] * 5 + ["loss"] + ["tie", "win"] + ["loss"], tasks, 0.95, 1)
    assert list(found) == ["shop", "unsafe"]
    assert (found["shop"]["wins"], found["shop"]["losses"], found["shop"]["win_rate"]) == (5, 1, 5 / 6)
    assert found["shop"]["win_rate_low"] is not None
    few = found["unsafe"]
    assert (few["num_prompts"], few["win_rate"], few["win_rate_low"]) == (2, 0.75, None)
    assert "win_rate_low" in " ".join(few["undefined"])
    assert by_task(["win"], [""], 0.95, 1) == {}
