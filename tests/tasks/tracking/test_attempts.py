"""Attempts on one champion share the error, and the audit trail remembers them."""

import numpy as np
import pytest
from support.tracking import gated, record_policy

from rlhf_core.errors import GateRefused
from rlhf_core.evaluation.ab import summarise
from rlhf_core.evaluation.intervals import win_rate_interval
from rlhf_core.evaluation.selection import confidence_of_attempt
from tasks.tracking import promote, promotion, read_audit, rollback
from tasks.tracking.attempts import Attempts, attempts_so_far, prompts_key, win_rate_low_over_sft
from tasks.tracking.audit import AuditRow
from tasks.tracking.names import ModelVersion

PARAMS = gated(min_pairwise_accuracy=0.8, min_spearman=0.7, max_kl_to_sft=6.0)


def row(content: str, champion: int | None = 1, prompts: str = "p", **more: object) -> AuditRow:
    given = {"action": "refuse", "outcome": "done", "gates": [{"name": "lineage"}], **more}
    return AuditRow(
        attempt=1, model="rlhf-policy", version=2, champion_before=champion, previous_before=None, outputs_hash=content,
        prompts=prompts, **given,
    )  # fmt: skip


def count(rows: list[AuditRow], content: str = "new", champion: int | None = 1, prompts: str = "p") -> Attempts:
    version = ModelVersion(
        name="rlhf-policy", version=3, stage="align@ppo", outputs_hash=content, aliases=(), metrics={}, tags={},
        run_id="r", created=0.0,
    )  # fmt: skip
    return attempts_so_far(rows, version, champion, prompts)


def test_attempts_are_counted_by_opponent_prompts_and_files() -> None:
    rows = [row("a"), row("b", champion=None), row("a"), row("c", prompts="q"), row("d", action="rollback")]
    assert count(rows) == Attempts(at_sft=3, at_champion=2)
    assert count(rows, "a") == Attempts(at_sft=1, at_champion=1), "the same files draw nothing new"
    assert count(rows, champion=7) == Attempts(at_sft=3, at_champion=1), "a new champion is a new question"
    assert count(rows, prompts="q") == Attempts(at_sft=2, at_champion=2)
    assert count([row("a", prompts="")], prompts="") == Attempts(), "without recorded prompts nothing is compared"
    assert prompts_key(["b", "a", "b"]) == prompts_key(["a", "b"]) != prompts_key(["a"])
    assert prompts_key([]) == ""


def test_the_bound_over_sft_is_that_of_its_attempt_and_never_above_the_published_one() -> None:
    figures = {"win_rate_low": 0.6, "wins": 300.0, "ties": 50.0, "losses": 150.0, "num_candidates": 2.0}
    level = 1 - 0.05 / 2 * 6 / (np.pi * 3) ** 2
    assert win_rate_low_over_sft(figures, 0.95, 3) == pytest.approx(min(0.6, win_rate_interval(300, 50, 150, level)[0]))
    assert win_rate_low_over_sft({**figures, "win_rate_low": 0.2}, 0.95, 1) == 0.2
    assert win_rate_low_over_sft({"win_rate_low": 0.7}, 0.95, 9) == 0.7
    assert win_rate_low_over_sft({**figures, "win_rate_low": None}, 0.95, 1) is None


def test_forty_equals_in_a_row_seldom_pass_and_did_without_counting() -> None:
    rng, passed, naive = np.random.default_rng(6), 0, 0
    for _ in range(300):
        ever = [False, False]
        for attempt in range(1, 41):
            rows = rng.choice(["win", "tie", "loss"], size=200, p=[0.4, 0.2, 0.4]).tolist()
            found = summarise(rows)
            ever[0] |= summarise(rows, confidence_of_attempt(0.95, attempt))["win_rate_low"] > 0.5
            ever[1] |= found["win_rate_low"] > 0.5
        passed, naive = passed + ever[0], naive + ever[1]
    assert passed / 300 <= 0.045  # 0.025 are meant; three standard errors above
    assert naive / 300 > 0.4


def test_a_later_attempt_on_the_same_champion_must_show_more(checkout, store) -> None:
    """24 wins and 10 losses are enough at the first attempt, and at the third no longer."""
    record_policy(checkout, "one", "champion", scores=[0.0] * 40)
    promote(checkout, "rlhf-policy/1", params=PARAMS)
    ahead = [1.0] * 24 + [0.0] * 6 + [-1.0] * 10
    behind = [-1.0] * 20 + [1.0] * 20
    for number, (content, scores) in enumerate((("second", behind), ("third", behind), ("fourth", ahead)), start=2):
        record_policy(checkout, f"run{number}", content, scores=scores)
        if content != "fourth":
            said = (
                "min_win_rate_low_champion" if number == 2 else "min_win_rate_low_champion.*attempt 2 on these prompts"
            )
            for _ in range(2):  # tried twice: one attempt
                with pytest.raises(
                    GateRefused,
                    match=said,
                ):
                    promote(checkout, f"rlhf-policy/{number}", params=PARAMS)
    with pytest.raises(GateRefused, match=r"min_win_rate_low_champion.*attempt 3"):
        promote(checkout, "rlhf-policy/4", params=PARAMS)
    last = read_audit(checkout)[-1]
    assert last.prompts == prompts_key(f"p{number}" for number in range(40))
    low = next(gate["figure"] for gate in last.gates if gate["name"] == "min_win_rate_low_champion")
    assert low == pytest.approx(win_rate_interval(24, 6, 10, confidence_of_attempt(0.95, 3))[0])
    assert win_rate_interval(24, 6, 10, confidence_of_attempt(0.95, 1))[0] > 0.5
    assert rollback(checkout, "rlhf-policy").champion is None


def test_an_attempt_that_came_between_is_counted(checkout, monkeypatch) -> None:
    record_policy(checkout, "one", "champion", scores=[0.0] * 40)
    promote(checkout, "rlhf-policy/1", params=PARAMS)
    record_policy(checkout, "two", "second", scores=[-1.0] * 40)
    record_policy(checkout, "three", "third", scores=[1.0] * 40)
    stand = promotion.stand

    def stand_while_another_tries(*arguments):
        found = stand(*arguments)
        monkeypatch.setattr(promotion, "stand", stand)
        with pytest.raises(GateRefused):
            promote(checkout, "rlhf-policy/2", params=PARAMS)
        return found

    monkeypatch.setattr(promotion, "stand", stand_while_another_tries)
    with pytest.raises(GateRefused, match="another attempt came between"):
        promote(checkout, "rlhf-policy/3", params=PARAMS)
    assert promote(checkout, "rlhf-policy/3", params=PARAMS).champion == 3
