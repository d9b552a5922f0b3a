"""Stages `reward` and `align`: their figures are those of their outputs, their refusals name the cure.

The finished project's stages ran as processes of their own; what is run again here runs in this one, which saves its
imports.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.project import edited_yaml

from rlhf_core.config import RewardConfig
from rlhf_core.engine.batches import collate
from rlhf_core.errors import GateRefused
from rlhf_core.evaluation.policy_measurement import PolicyEvaluator, ResponseSet
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.stages.reward import run as reward
from tasks.tables import SCHEMAS


def run_here(project: Path, stage: str) -> int:
    """Run a stage in this process and return its exit code."""
    body = {"reward": reward.run}.get(stage, align.run)
    return run_stage(stage, body, load_params(project / "params.yaml"), project)


def change_params(project: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with edited_yaml(project / "params.yaml") as content:
        change(content)


def keep_no_rows(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def curves(project: Path, stage: str) -> list[dict[str, str]]:
    return list(csv.DictReader((project / f"reports/plots/{stage}.csv").read_text().splitlines()))


def score(project: Path, prompts: list[str], responses: list[str]) -> list[float]:
    """Scores by the published reward model, one row at a time."""
    folder = project / "artifacts/reward/model"
    model, tokenizer = RewardModel.load(folder), load_tokenizer(folder)
    scores = []
    for prompt, response in zip(
        encode_prompts(tokenizer, prompts, 160), encode_responses(tokenizer, responses, 56), strict=True
    ):
        with torch.no_grad():
            scores.append(model(collate([prompt], [response], 0)).item())
    return scores


def test_the_figures_of_reward_are_those_of_its_outputs(finished_project: Path) -> None:
    folder = finished_project / "artifacts/reward"
    figures = read_json(finished_project / "reports/metrics/reward.json")
    heldout = pq.read_table(finished_project / "artifacts/preferences/heldout.parquet").to_pylist()
    table = pq.read_table(folder / "heldout_scores.parquet")
    assert table.schema.equals(SCHEMAS["heldout_scores"])
    rows = table.to_pylist()
    assert [row["pair_id"] for row in rows] == [row["pair_id"] for row in heldout]
    right = [(row["chosen_score"] > row["rejected_score"]) + 0.5 * (row["margin"] == 0) for row in rows]
    assert figures["pairwise_accuracy"] == pytest.approx(sum(right) / len(right))
    assert figures["pairwise_accuracy_low"] < figures["pairwise_accuracy"] < figures["pairwise_accuracy_high"]
    longer = [(row["chosen_chars"] > row["rejected_chars"]) + 0.5 * (row["chosen_chars"] == row["rejected_chars"])
              for row in rows]  # fmt: skip
    assert figures["longer_accuracy"] == pytest.approx(sum(longer) / len(longer))
    assert figures["num_heldout_pairs"] == len(rows)
    train = pq.read_table(finished_project / "artifacts/preferences/train.parquet")
    assert 0 < figures["num_train_pairs"] <= train.num_rows
    assert figures["num_train_prompts"] == len(set(train.column("prompt").to_pylist()))
    calibration = read_json(folder / "calibration.json")
    assert sum(one["count"] for one in calibration["bins"]) == len(rows)
    assert calibration["margin_scale"] == pytest.approx(RewardModel.load(folder / "model").scale.item())


def test_the_published_model_gives_the_published_scores(finished_project: Path) -> None:
    folder = finished_project / "artifacts"
    heldout = pq.read_table(folder / "preferences/heldout.parquet").to_pylist()[:6]
    rows = pq.read_table(folder / "reward/heldout_scores.parquet").to_pylist()[:6]
    for side in ("chosen", "rejected"):
        again = score(finished_project, [row["prompt"] for row in heldout], [row[side] for row in heldout])
        assert [row[f"{side}_score"] for row in rows] == pytest.approx(again, abs=1e-4)
    table = pq.read_table(folder / "reward/graded_scores.parquet")
    assert table.schema.equals(SCHEMAS["graded_scores"])
    graded = table.to_pylist()[:6]
    again = score(finished_project, [row["prompt"] for row in graded], [row["response"] for row in graded])
    assert [row["model_score"] for row in graded] == pytest.approx(again, abs=1e-4)


def test_scores_of_training_responses_are_standardised(finished_project: Path) -> None:
    train = pq.read_table(finished_project / "artifacts/preferences/train.parquet").to_pylist()
    texts = dict.fromkeys((row["prompt"], row[side]) for row in train for side in ("chosen", "rejected"))
    scores = torch.tensor(score(finished_project, [one for one, _ in texts], [two for _, two in texts]))
    assert scores.mean().item() == pytest.approx(0.0, abs=0.02)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=0.02)


def test_a_reward_model_below_the_gate_is_not_published(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = read_json(project / "reports/metrics/reward.json")["pairwise_accuracy"]
    shutil.rmtree(project / "artifacts/reward")
    (project / "reports/metrics/reward.json").unlink()
    change_params(project, lambda params: params["reward"].update(min_pairwise_accuracy=1.0))
    assert run_here(project, "reward") == 3
    said = capsys.readouterr().err
    assert f"(pairwise_accuracy {accuracy:.3f} on" in said
    assert "reward.min_pairwise_accuracy 1.0" in said
    assert "Fix:" in said
    assert not (project / "artifacts/reward").exists()
    assert not (project / "reports/metrics/reward.json").exists()


CARD = {
    "pairwise_accuracy": 0.9, "spearman": 0.8, "kendall": 0.6, "ece": 0.02, "num_heldout_pairs": 9, "num_graded": 9,
    "pairwise_accuracy_low": 0.8, "spearman_low": 0.7, "kendall_low": 0.5, "ece_high": 0.05, "undefined": {},
}  # fmt: skip
GATES = {"min_pairwise_accuracy": 0.8, "min_spearman": 0.7, "min_kendall": 0.5, "max_ece": 0.05}


def test_figures_on_the_gates_pass() -> None:
    reward.check_gates(CARD, RewardConfig(**GATES))


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("pairwise_accuracy_low", 0.79, "pairwise_accuracy_low 0.790 .* below reward.min_pairwise_accuracy 0.8"),
        ("spearman_low", 0.69, "spearman_low 0.690 .spearman 0.800 .* below reward.min_spearman 0.7"),
        ("kendall_low", 0.49, "kendall_low 0.490 .* below reward.min_kendall 0.5"),
        ("ece_high", 0.06, "ece_high 0.060 .* above reward.max_ece 0.05"),
        ("spearman_low", None, r"spearman_low undefined \(why\)"),
    ],
)
def test_each_figure_on_the_wrong_side_of_its_gate_is_refused(figure: str, value: float | None, said: str) -> None:
    card = CARD | {figure: value, "undefined": {figure: "why"} if value is None else {}}
    with pytest.raises(GateRefused, match=said):
        reward.check_gates(card, RewardConfig(**GATES))
    unset = GATES | {key: None for key in GATES if key.partition("_")[2] in figure}
    if figure != "pairwise_accuracy_low":
        reward.check_gates(card, RewardConfig(**unset))


def test_an_undefined_accuracy_never_passes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_no_rows(project / "artifacts/preferences/heldout.parquet")
    assert run_here(project, "reward") == 3
    said = capsys.readouterr().err
    assert "pairwise_accuracy is undefined (no held-out pairs)" in said


def test_without_graded_responses_rank_correlation_is_null(project: Path) -> None:
    keep_no_rows(project / "artifacts/validate/graded.parquet")
    assert run_here(project, "reward") == 0
    figures = read_json(project / "reports/metrics/reward.json")
    assert figures["spearman"] is None
    assert figures["undefined"]["spearman"] == "no graded responses"
    assert pq.read_table(project / "artifacts/reward/graded_scores.parquet").num_rows == 0


@pytest.mark.parametrize("stage", ["reward", "align@dpo"])
def test_without_pairs_there_is_nothing_to_learn(project: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    keep_no_rows(project / "artifacts/preferences/train.parquet")
    assert run_here(project, stage) == 4
    said = capsys.readouterr().err
    assert "preferences/train.parquet: no pair to learn from" in said


def test_ppo_without_prompts_says_where_they_come_from(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_no_rows(project / "artifacts/validate/prompts.parquet")
    assert run_here(project, "align@ppo") == 4
    said = capsys.readouterr().err
    assert "validate/prompts.parquet: no training prompt" in said


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
def test_an_aligned_policy_stands_beside_its_samples(finished_project: Path, algorithm: str) -> None:
    folder = finished_project / f"artifacts/align/{algorithm}"
    figures = read_json(finished_project / f"reports/metrics/align-{algorithm}.json")
    samples = read_json(folder / "samples.json")
    assert len(samples) == 20
    assert set(samples[0]) == {"prompt_id", "prompt", "sft", "sft_score", "aligned", "aligned_score"}
    heldout = pq.read_table(finished_project / "artifacts/validate/heldout_prompts.parquet")["prompt"].to_pylist()
    assert not {sample["prompt"] for sample in samples} & set(heldout)
    sft, aligned = load_policy(finished_project / "artifacts/sft/model"), load_policy(folder / "model")
    moved = [not torch.equal(one, two) for one, two in zip(sft.parameters(), aligned.parameters(), strict=True)]
    assert all(moved)
    assert figures["train_kl_to_sft_low"] <= figures["train_kl_to_sft"] <= figures["train_kl_to_sft_high"]
    rows = curves(finished_project, f"align-{algorithm}")
    assert figures["steps"] == len(rows) == int(rows[-1]["step"])
    namespaces = {key.partition("/")[0] for key in rows[0]} - {"step"}
    assert namespaces <= {"loss", "policy", "reward", "implicit_reward", "rollout", "optim"}


def test_samples_keep_prompt_response_and_score_together(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], PolicyEvaluator.sample

    def sample(*arguments: Any, **options: Any) -> ResponseSet:
        seen.append(plain(*arguments, **options))
        return seen[-1]

    def sum_of_tokens(_: PolicyEvaluator, model: RewardModel, responses: ResponseSet) -> list[float]:
        return [float(sum(ids)) for ids in responses.response_ids]

    monkeypatch.setattr(PolicyEvaluator, "sample", sample)
    monkeypatch.setattr(PolicyEvaluator, "scores", sum_of_tokens)
    assert run_here(project, "align@dpo") == 0
    samples = read_json(project / "artifacts/align/dpo/samples.json")
    figures = read_json(project / "reports/metrics/align-dpo.json")
    assert [one.model for one in seen] == ["sft", "aligned"]
    for one in seen:
        sums = [float(sum(ids)) for ids in one.response_ids]
        assert [(row[one.model], row[f"{one.model}_score"]) for row in samples] == list(
            zip(one.texts[:20], sums[:20], strict=True)
        )
        suffix = "_sft" if one.model == "sft" else ""
        assert figures[f"train_score{suffix}"] == pytest.approx(sum(sums) / len(sums))
        assert figures[f"train_response_tokens{suffix}"] == pytest.approx(sum(map(len, one.response_ids)) / len(sums))


def test_dpo_starts_at_ln_2_and_ppo_at_its_reference(finished_project: Path) -> None:
    """In whole processes, model folders read back from disk: policy and reference are the same to the bit."""
    dpo, ppo = curves(finished_project, "align-dpo")[0], curves(finished_project, "align-ppo")[0]
    assert float(dpo["loss/preference"]) == torch.tensor(2.0).log().item()
    assert float(dpo["implicit_reward/margin"]) == 0.0
    assert float(ppo["rollout/kl_to_reference"]) == 0.0
