"""Candidates against each other, and task by task."""

import pytest
from scipy.stats import binomtest

from rlhf_core.config import EvaluateConfig
from rlhf_core.evaluation.ab import summarise
from rlhf_core.evaluation.head_to_head import by_task, head_to_head
from rlhf_core.evaluation.response_set import JudgedSet, ResponseSet


def judged(name: str, temperature: float, gold: list[float], reward: list[float]) -> JudgedSet:
    count = len(gold)
    responses = ResponseSet(
        model=name, temperature=temperature, response_ids=[[5]] * count, texts=["x"] * count, finished=[True] * count
    )
    return JudgedSet(responses=responses, scores={"gold": gold, "reward_model": reward}, grades=[])


def test_two_candidates_by_hand():
    settings = EvaluateConfig(temperatures=(1.0,), judges=("gold", "reward_model"))
    ppo = judged("ppo", 1.0, [1.0] * 6 + [0.5, 0.0], [0.0] * 8)
    dpo = judged("dpo", 1.0, [0.0] * 6 + [0.5, 1.0], [0.0] * 7 + [1.0])
    found = head_to_head(settings, ("ppo", "dpo"), {("ppo", 1.0): ppo, ("dpo", 1.0): dpo})
    assert list(found) == ["ppo_against_dpo"]
    gold = found["ppo_against_dpo"]["gold"]["T=1"]
    assert (gold["wins"], gold["ties"], gold["losses"], gold["win_rate"]) == (6, 1, 1, 6.5 / 8)
    assert gold["p_value"] == pytest.approx(binomtest(6, 7).pvalue)
    assert gold["win_rate_low"] < 6.5 / 8 < gold["win_rate_high"]
    reward = found["ppo_against_dpo"]["reward_model"]["T=1"]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (0, 7, 1)


def test_three_candidates_are_three_pairs_whose_intervals_hold_at_once():
    settings = EvaluateConfig(temperatures=(0.0,), judges=("gold",))
    sets = {
        (name, 0.0): judged(name, 0.0, [score] * 9, [0.0] * 9) for name, score in zip("abc", (3, 2, 1), strict=True)
    }
    found = head_to_head(settings, ("a", "b", "c"), sets)
    assert list(found) == ["a_against_b", "a_against_c", "b_against_c"]
    assert found["a_against_c"]["gold"]["T=0"] == summarise(["win"] * 9, 0.95, 3)
    assert found["a_against_c"]["gold"]["T=0"]["p_value"] == pytest.approx(3 * 2 * 0.5**9)
    assert head_to_head(settings, ("a",), sets) == {}


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
