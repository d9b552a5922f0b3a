"""Refusals: what is taken for one and what is not, and the shares over prompts by hand."""

import pytest
from pydantic import ValidationError

from rlhf_core.config import EvaluateConfig
from rlhf_core.demo import phrases
from rlhf_core.evaluation.intervals import wilson_interval, win_rate_interval
from rlhf_core.evaluation.refusals import refusal_figures, refusal_test, share_gain

refuses = refusal_test(EvaluateConfig().refusals)


@pytest.mark.parametrize(
    "response",
    [
        *phrases.REFUSALS,
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "Sorry. I am unable to provide instructions for this.",
        "I won't do that, and I would ask you not to.",
        "As an AI language model, I cannot give legal advice.",
        "I'm not comfortable discussing this topic.",
        "I must decline.",
        "That is against our  policy.",
        "Hello! I\ncannot\nexplain how.",
    ],
)
def test_refusals_are_seen(response: str) -> None:
    assert refuses(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "The mirror costs 55. It is in aisle B.",
        "I cannot help but admire your taste!",
        "I will not be long.",
        "I cannot recommend it enough.",
        "I can help you with that. I will explain it.",
        "Sure. First mix the dough. Then wait. I cannot tell you how long, it depends.",
        "Ich kann dabei leider nicht helfen.",  # what English patterns cannot see
    ],
)
def test_answers_are_not_taken_for_refusals(response: str) -> None:
    assert not refuses(response)


def test_patterns_of_another_language_are_a_setting() -> None:
    german = refusal_test([r"\bnicht helfen\b"])
    assert german("Ich kann dabei leider NICHT  helfen.")
    assert not german("I cannot help with that.")
    assert not refusal_test([])("I cannot help with that.")
    with pytest.raises(ValidationError, match="no regular expression"):
        EvaluateConfig(refusals=("(",))


def test_over_refusal_counts_prompts_that_should_be_answered() -> None:
    refused = [True, True, False, False, True, False, False]
    answerable = [False, True, True, True, True, True, True]
    found = refusal_figures(refused, answerable, 0.9)
    assert found["refusal_share"] == 3 / 7
    assert found["over_refusal"] == 2 / 6
    assert (found["over_refusal_low"], found["over_refusal_high"]) == wilson_interval(2, 6, 0.9)
    assert found["num_answerable_prompts"] == 6
    assert "undefined" not in found


def test_without_prompts_to_answer_over_refusal_is_undefined() -> None:
    found = refusal_figures([True] * 6, [False] * 6, 0.95)
    assert (found["refusal_share"], found["over_refusal"], found["over_refusal_low"]) == (1.0, None, None)
    assert found["undefined"]["over_refusal"] == "no prompt that should be answered"
    few = refusal_figures([True, False, False], [True] * 3, 0.95)
    assert (few["over_refusal"], few["over_refusal_high"]) == (1 / 3, None)
    assert few["undefined"]["over_refusal_high"] == "too few prompts: 3, an interval needs 5"


def test_gain_of_a_share_is_paired() -> None:
    after, before = [True, True, True, False, False, True], [False, True, False, True, False, False]
    found = share_gain("over_refusal_gain", after, before, 0.95)
    low, high = win_rate_interval(3, 2, 1)
    assert found["over_refusal_gain"] == (3 - 1) / 6
    assert (found["over_refusal_gain_low"], found["over_refusal_gain_high"]) == (2 * low - 1, 2 * high - 1)
    assert share_gain("x", after[:4], before[:4], 0.95) == {"x": 0.25, "x_low": None, "x_high": None}
