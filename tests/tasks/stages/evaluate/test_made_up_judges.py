"""A judge that the registry is given by a test works through the whole stage, without any other edit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlhf_core.config import Params
from rlhf_core.config.evaluation import JUDGE_ROWS, JudgeRow
from rlhf_core.evaluation.ab import Judge
from rlhf_core.evaluation.judge_registry import JUDGES, Material, PairwiseJudge, PointwiseJudge, Scored
from rlhf_core.evaluation.policy_measurement import ResponseSet
from rlhf_core.evaluation.verdict import SFT
from tests.support.evaluate_stage import PARAMS, run

ROW = JudgeRow(docs="prefers short replies", title="shortness", simulated="a rule prefers short replies")
Rows = list[dict[str, Any]]


def judged_by(*names: str) -> Params:
    settings = PARAMS.evaluate.model_copy(update={"judges": names, "temperatures": (1.0,)})
    return PARAMS.model_copy(update={"evaluate": settings})


def tables(out: Path) -> tuple[dict[str, Rows], Rows]:
    """The responses by model, in the order of the prompts, and all comparisons."""
    responses: dict[str, Rows] = {}
    for row in pq.read_table(out / "responses.parquet").to_pylist():
        responses.setdefault(row["model"], []).append(row)
    return responses, pq.read_table(out / "comparisons.parquet").to_pylist()


def brevity(material: Material) -> Any:
    assert len(material.prompts) == len(material.evaluator.prompts) == 12

    def score(responses: ResponseSet) -> Scored:
        return Scored([-float(len(text)) for text in responses.texts])

    return score


def test_a_pointwise_judge(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "brevity", PointwiseJudge(row=ROW, open=brevity))
    metrics, out, _ = run(root, judged_by("brevity", "reward_model"))
    responses, comparisons = tables(out)
    assert metrics["verdict"]["judge"] == "brevity"
    assert metrics["verdict"]["simulated"] is True
    assert [row["brevity"] for row in responses["dpo"]] == [-len(row["response"]) for row in responses["dpo"]]
    won = [len(a["response"]) < len(b["response"]) for a, b in zip(responses["dpo"], responses[SFT], strict=True)]
    assert metrics["dpo"]["wins"] == sum(won) > 0
    mine = [row for row in comparisons if (row["model"], row["judge"]) == ("dpo", "brevity")]
    assert [row["score"] for row in mine] == [row["brevity"] for row in responses["dpo"]]
    samples = json.loads((out / "samples.json").read_text())
    assert set(samples[0]["responses"]["dpo"]["scores"]) == {"reward_model", "brevity"}


def short(material: Material) -> Judge[str]:
    """The shorter response, but the one shown first as long as it is longer by no more than two characters."""

    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Any]:
        assert list(prompts) == list(material.prompts)
        return ["first" if len(one) <= len(other) + 2 else "second" for one, other in zip(first, second, strict=True)]

    return judge


def surely_short(material: Material) -> Judge[str]:
    """Probability by length, 1/2 for equal ones."""

    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Any]:
        return [(len(other) + 1.0) / (len(one) + len(other) + 2.0) for one, other in zip(first, second, strict=True)]

    return judge


def test_a_pairwise_judge_is_asked_in_both_orders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "short", PairwiseJudge(row=ROW, open=short))
    metrics, out, _ = run(root, judged_by("short", "gold"))
    responses, comparisons = tables(out)
    assert "short" not in responses["dpo"][0]

    def outcomes(a: str, b: str) -> list[str]:
        gaps = [len(x["response"]) - len(y["response"]) for x, y in zip(responses[a], responses[b], strict=True)]
        return ["win" if gap < -2 else "loss" if gap > 2 else "tie" for gap in gaps]  # near: the first

    mine = [row for row in comparisons if (row["model"], row["judge"]) == ("dpo", "short")]
    assert [row["outcome"] for row in mine] == outcomes("dpo", SFT)
    assert {(row["outcome"], row["score"], row["sft_score"]) for row in mine} == {
        ("win", 1.0, 0.0), ("tie", 0.5, 0.5), ("loss", 0.0, 1.0),
    }  # fmt: skip
    found = metrics["dpo"]["judges"]["short"]["T=1"]
    assert (found["wins"], found["ties"]) == (outcomes("dpo", SFT).count("win"), outcomes("dpo", SFT).count("tie"))
    assert found["order_consistency"] == 1.0 - found["ties"] / 12
    between = metrics["head_to_head"]["ppo_against_dpo"]["short"]["T=1"]
    assert (between["wins"], between["losses"]) == tuple(map(outcomes("ppo", "dpo").count, ("win", "loss")))
    assert metrics["verdict"]["judge"] == "short"
    lost = [row for row in json.loads((out / "samples.json").read_text()) if row["why"] == "largest loss"]
    best = metrics["verdict"]["best"]
    assert len(lost) == min(2, outcomes(best, SFT).count("loss")), "of four samples, half at most"
    assert all(len(row["responses"][best]["text"]) > len(row["responses"][SFT]["text"]) for row in lost)


def test_a_pairwise_judge_may_answer_with_probabilities(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = JudgeRow(docs=ROW.docs, title=ROW.title, tie_within=0.15)
    monkeypatch.setitem(JUDGES, "short", PairwiseJudge(row=row, open=surely_short))
    metrics, out, _ = run(root, judged_by("short"))
    responses, comparisons = tables(out)
    mine = [row for row in comparisons if row["model"] == "dpo"]
    for found, ours, sft in zip(mine, responses["dpo"], responses[SFT], strict=True):
        one, other = len(ours["response"]) + 1, len(sft["response"]) + 1
        assert found["score"] == pytest.approx(other / (one + other))
        assert found["score"] + found["sft_score"] == 1.0
        expected = "tie" if abs(found["score"] - 0.5) <= 0.15 else "win" if one < other else "loss"
        assert found["outcome"] == expected
    assert metrics["verdict"]["simulated"] is False
    assert metrics["dpo"]["judges"]["short"]["T=1"]["order_consistency"] == 1.0


def test_every_judge_of_the_schema_can_be_asked() -> None:
    assert list(JUDGES) == list(JUDGE_ROWS)
    assert all(JUDGES[name].row is row for name, row in JUDGE_ROWS.items())
