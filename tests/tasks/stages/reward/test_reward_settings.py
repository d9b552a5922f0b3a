"""Stage `reward` beyond its defaults, from `params.yaml` and data files to what later stages and users load."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.project import change_sections

from rlhf_core.demo.gold import grade
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.scoring.ensemble import RewardEnsemble, load_reward_model
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.stages.evaluate import run as evaluate
from tasks.stages.preferences import run as preferences
from tasks.stages.reward import run as reward
from tasks.stages.validate import run as validate

BODIES = {"validate": validate, "preferences": preferences, "reward": reward, "align@ppo": align, "evaluate": evaluate}


def run(project: Path, stage: str, **sections: dict[str, Any]) -> int:
    """Run a stage in this process, with `params.yaml` changed first."""
    change_sections(project, **sections)
    return run_stage(stage, BODIES[stage].run, load_params(project / "params.yaml"), project)


def figures(project: Path, stage: str = "reward") -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def rows(project: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(project / "artifacts" / name).to_pylist()


def scores(project: Path, model: torch.nn.Module, texts: list[dict[str, Any]], side: str) -> list[float]:
    tokenizer = load_tokenizer(project / "artifacts/sft/model")
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in texts], 160)
    responses = encode_responses(tokenizer, [row[side] for row in texts], 56)
    return reward_scores(model, prompts, responses, pad_id=tokenizer.pad_token_id, batch_size=64)


def test_an_ensemble_is_published_judged_and_followed_by_the_stages_after_it(project: Path) -> None:
    settings = {"ensemble": {"members": 2, "aggregate": "pessimistic", "pessimism": 0.5}, "loss": {"name": "thurstone"}}
    assert run(project, "reward", reward=settings) == 0
    model = load_reward_model(project / "artifacts/reward/model")
    assert isinstance(model, RewardEnsemble)
    heldout, table = rows(project, "preferences/heldout.parquet"), rows(project, "reward/heldout_scores.parquet")
    assert [row["chosen_score"] for row in table] == pytest.approx(scores(project, model, heldout, "chosen"), abs=1e-4)
    assert all(row["margin_deviation"] > 0 for row in table)
    assert all(row["deviation"] > 0 for row in rows(project, "reward/graded_scores.parquet"))
    found = figures(project)
    assert found["uncertainty"]["mean_deviation"] == pytest.approx(
        sum(row["margin_deviation"] for row in table) / len(table)
    )
    members = [found["ensemble"][f"member-{number}"] for number in range(2)]
    for number, member in enumerate(members):
        own = RewardModel.load(project / f"artifacts/reward/model/member-{number}")
        sides = [scores(project, own, heldout, side) for side in ("chosen", "rejected")]
        right = [(one > other) + 0.5 * (one == other) for one, other in zip(*sides, strict=True)]
        assert member["pairwise_accuracy"] == pytest.approx(sum(right) / len(right), abs=2 / len(right))
        assert 0.0 <= member["left_out_accuracy"] <= 1.0
        assert member["weight"] == 0.5
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["steps"] == 2 * (found["steps"] // 2)
    assert run(project, "align@ppo") == 0
    assert run(project, "evaluate", align={"algorithms": ["ppo"]}, evaluate={"judges": ["reward_model"]}) == 0
    judged = [row["reward_model"] for row in rows(project, "evaluate/responses.parquet")]
    assert len(set(judged)) > len(judged) / 2


def test_a_student_is_published_in_place_of_its_ensemble(project: Path) -> None:
    settings = {"head": "attention", "ensemble": {"members": 2, "distill": "scores", "aggregate": "vote"}}
    assert run(project, "reward", reward=settings) == 0
    model = load_reward_model(project / "artifacts/reward/model")
    assert isinstance(model, RewardModel)
    assert model.spec.kind == "attention"
    assert set(figures(project)["ensemble"]) == {
        "member-0", "member-1", "majority_accuracy", "majority_accuracy_low", "majority_accuracy_high",
    }  # fmt: skip
    assert figures(project)["parameters"] == sum(p.numel() for p in model.parameters())
    assert "uncertainty" not in figures(project)
    assert {row["margin_deviation"] for row in rows(project, "reward/heldout_scores.parquet")} == {None}
    heldout = rows(project, "preferences/heldout.parquet")
    found = [row["chosen_score"] for row in rows(project, "reward/heldout_scores.parquet")]
    assert found == pytest.approx(scores(project, model, heldout, "chosen"), abs=1e-4)


def test_criteria_and_ties_come_from_the_data_files(project: Path) -> None:
    """Graded responses name a criterion, votes tie; both reach heads and losses by `params.yaml` alone."""
    with (project / "data/graded.jsonl").open("a") as file:
        for row in rows(project, "generate/responses.parquet"):
            score = grade(row["prompt"], row["response"]).harmless + len(row["response"]) / 1e4
            kept = {"prompt": row["prompt"], "response": row["response"], "criterion": "harmless", "score": score}
            if row["response"].strip() and row["response"].isprintable():
                file.write(json.dumps(kept) + "\n")
    assert run(project, "validate", validate={"criteria": ["overall", "harmless"]}) == 0
    assert run(project, "preferences", preferences={"keep_ties": True}) == 0
    counts = figures(project, "preferences")
    assert counts["criteria"]["harmless"] > 5
    assert counts["ties_train"] > 0
    before = figures(project)
    settings = {"head": "mixed", "criteria": {"overall": 1.0, "harmless": 0.5}, "loss": {"ties": "rao_kupper"}}
    assert run(project, "reward", reward=settings) == 0
    model = load_reward_model(project / "artifacts/reward/model")
    assert dict(model.spec.criteria) == {"overall": 1.0, "harmless": 0.5}
    head = load_file(project / "artifacts/reward/model/reward_head.safetensors")
    assert head["weight"].shape[0] == 2
    found = figures(project)
    assert found["num_train_pairs"] > before["num_train_pairs"]
    assert found["criteria"]["harmless"]["num_heldout_pairs"] > 0
    assert found["criteria"]["overall"]["num_heldout_pairs"] == found["num_heldout_pairs"]
    header = (project / "reports/plots/reward.csv").read_text().splitlines()[0]
    assert {"loss/ranking.overall", "loss/ranking.harmless"} <= set(header.split(","))


def test_a_criterion_without_pairs_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "reward", reward={"criteria": {"overall": 1.0, "truthful": 1.0}}) == 4
    assert "reward.criteria: no training pair on 'truthful'. Fix: grade responses" in capsys.readouterr().err


def test_adapters_train_a_joint_reward_model(project: Path) -> None:
    pytest.importorskip("peft")
    settings = {"auxiliary": {"sft_coef": 0.1, "contrastive_coef": 0.1}, "loss": {"average": "prompt"}}
    assert run(project, "reward", reward=settings, model={"lora": {"rank": 4, "stages": ["reward"]}}) == 0
    model = load_reward_model(project / "artifacts/reward/model")
    heldout = rows(project, "preferences/heldout.parquet")
    found = [row["chosen_score"] for row in rows(project, "reward/heldout_scores.parquet")]
    assert found == pytest.approx(scores(project, model, heldout, "chosen"), abs=1e-3)
    header = (project / "reports/plots/reward.csv").read_text().splitlines()[0]
    assert {"loss/sft", "loss/contrastive"} <= set(header.split(","))
