"""How a version stands, asked without promoting."""

import pytest
from support.tracking import gated, record_policy

from rlhf_core.errors import EnvironmentProblem
from tasks.tracking import promote, read_audit, standing_of
from tasks.tracking.registry import aliases_of

PARAMS = gated(min_pairwise_accuracy=0.8, min_spearman=0.7, max_kl_to_sft=6.0)


def test_gates_and_champion_are_asked_and_nothing_moves(checkout, store):
    record_policy(checkout, "one", "first", scores=[0.0] * 40)
    first = standing_of(checkout, "rlhf-policy/1", PARAMS)
    assert (first.champion, first.is_champion, first.against, first.failed) == (None, False, {}, ())
    assert read_audit(checkout) == []
    promote(checkout, "rlhf-policy/1", params=PARAMS)
    assert standing_of(checkout, "rlhf-policy/1", PARAMS).is_champion
    record_policy(checkout, "two", "second", scores=[1.0] * 30 + [0.0] * 5 + [-1.0] * 5)
    before, trail = aliases_of(store, "rlhf-policy"), read_audit(checkout)
    second = standing_of(checkout, "rlhf-policy/2", PARAMS)
    assert second.champion == 1
    assert [second.against[key] for key in ("wins", "ties", "losses", "win_rate")] == [30, 5, 5, 32.5 / 40]
    assert any(gate.name == "min_win_rate_low_champion" and gate.passed for gate in second.gates)
    assert (aliases_of(store, "rlhf-policy"), read_audit(checkout)) == (before, trail)


def test_it_says_why_there_is_no_comparison_with_the_champion(checkout):
    record_policy(checkout, "one", "first", scores=[0.0] * 40)
    promote(checkout, "rlhf-policy/1", params=PARAMS)
    record_policy(checkout, "two", "second", scores=[1.0] * 40)
    cold = PARAMS.model_copy(update={"evaluate": PARAMS.evaluate.model_copy(update={"temperatures": (0.0,)})})
    found = standing_of(checkout, "rlhf-policy/2", cold)
    assert found.against == {}
    assert found.note == "rlhf-policy/2 and rlhf-policy/1 were not both judged at temperature 0"
    assert "min_win_rate_low_champion" in [gate.name for gate in found.failed]


def test_a_store_that_is_away_is_one_error(checkout, away):
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        standing_of(checkout, "rlhf-policy/1", PARAMS)
