"""What a candidate gained: by hand, on prompts whose responses are known."""

import numpy as np
import pytest

from rlhf_core.demo.gold import Grade
from rlhf_core.evaluation.gains import paired_gains
from rlhf_core.evaluation.intervals import mean_interval, win_rate_interval
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.policy_measurement import ResponseSet


def grade(gold: float, truthful: bool) -> Grade:
    return Grade(
        helpful=1.0, truthful=float(truthful), harmless=1.0, concise=1.0, gold=gold, words=1, polite=0, rude=0,
        unknown=0, wellformed=True,
    )  # fmt: skip


def judged(tokens: list[int], scores: list[float], grades: list[Grade]) -> JudgedSet:
    count = len(tokens)
    responses = ResponseSet(
        model="any", temperature=1.0, response_ids=[[5] * number for number in tokens], texts=["said"] * count,
        finished=[True] * count,
    )  # fmt: skip
    return JudgedSet(responses=responses, scores={"reward_model": scores}, grades=grades)


TOKENS = ([12, 30, 14, 16, 18, 20], [10, 11, 12, 13, 14, 12])
SCORES = ([1.0, 2.0, 0.5, 1.5, 0.0, 3.0], [0.0, 1.0, 1.0, 0.5, 0.0, 1.0])
GOLD = [(0.9, True), (0.8, True), (0.7, True), (0.9, False), (0.5, True), (1.0, True)]
GOLD_SFT = [(0.5, False), (0.8, True), (0.9, False), (0.5, True), (0.5, True), (0.5, False)]


def test_gains_by_hand() -> None:
    ours = judged(TOKENS[0], SCORES[0], [grade(*row) for row in GOLD])
    sft = judged(TOKENS[1], SCORES[1], [grade(*row) for row in GOLD_SFT])
    refused = ([True, True, False, False, False], [False, False, False, True, False])
    found = paired_gains(ours, sft, refused, 0.9)
    assert found["truthful_share_gain"] == pytest.approx((3 - 1) / 6)
    low, _ = win_rate_interval(3, 2, 1, 0.9)
    assert found["truthful_share_gain_low"] == 2 * low - 1
    assert found["gold_gain"] == pytest.approx((0.4 + 0 - 0.2 + 0.4 + 0 + 0.5) / 6)
    longer = np.subtract(*TOKENS)
    assert found["tokens_gain"] == longer.mean() == (2 + 19 + 2 + 3 + 4 + 8) / 6
    assert (found["tokens_gain_low"], found["tokens_gain_high"]) == mean_interval(longer, 0.9)
    assert found["tokens_ratio"] == pytest.approx(110 / 72)
    assert found["grew_longer"] is True
    assert (found["score_gain_low"], found["score_gain_high"]) == mean_interval(np.subtract(*SCORES), 0.9)
    assert found["over_refusal_gain"] == (2 - 1) / 5
    assert found["over_refusal_gain_high"] == 2 * win_rate_interval(2, 2, 1, 0.9)[1] - 1
    assert "undefined" not in found


def test_length_that_only_chance_tells_apart_has_not_grown() -> None:
    ours, sft = (judged(tokens, SCORES[0], []) for tokens in ([12, 8, 14, 11, 13, 15], [10, 11, 12, 13, 14, 12]))
    found = paired_gains(ours, sft, ([], []), 0.95)
    assert found["tokens_gain"] > 0
    assert found["grew_longer"] is False


def test_what_cannot_be_had_says_why() -> None:
    ours = judged(TOKENS[0][:4], SCORES[0][:4], [])
    found = paired_gains(ours, ours, ([], []), 0.95)
    assert found["gold_gain"] is None
    assert found["grew_longer"] is False
    assert found["undefined"]["gold_gain"] == "gold is no judge"
    assert found["undefined"]["tokens_gain_low"] == "too few prompts: 4, an interval needs 5"
    assert found["undefined"]["over_refusal_gain"] == "no prompt that should be answered"
