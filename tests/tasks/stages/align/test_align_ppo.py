"""Stage `align@ppo` with what `params.yaml` can ask of it: functions of one's own, the guard, adapters, groups."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.project import edited_yaml

from rlhf_core.errors import WaitingForPeople
from rlhf_core.models.policy import load_policy
from rlhf_core.text.identity import prompt_id
from rlhf_core.trainers.ppo.curriculum import choose_prompts
from rlhf_core.trainers.ppo.trainer import train_ppo
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.tables import read_table

CODE = "def short(responses, finished):\n    return [-len(one) / 100 for one in responses]\n"


def align_with(project: Path, ppo: dict[str, Any], deps: tuple[str, ...] = (), **model: Any) -> int:
    """Change parameters and inputs of the stage, run it in this process, return its exit code."""
    with edited_yaml(project / "params.yaml") as params:
        params["align"]["ppo"].update(ppo)
        params["model"].update(model)
    with edited_yaml(project / "dvc.yaml") as graph:
        graph["stages"]["align"]["deps"] += list(deps)
    return run_stage("align@ppo", align.run, load_params(project / "params.yaml"), project)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_that_the_guard_ends_says_so_and_gives_the_best_policy_back(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "shortness.py").write_text(CODE)
    ppo = {
        "value": {"model": "shared"},
        "scores": {"terms": {"shortness:short": 0.5, "length": -0.1}},
        "guard": {
            "every": 1,
            "scorer": "rlhf_core.evaluation.judges:gold_scores",
            "prompts": 8,
            "max_kl": 0.0001,
        },
    }
    assert align_with(project, ppo, deps=("shortness.py",)) == 0
    figures = read_json(project / "reports/metrics/align-ppo.json")
    assert figures["stopped_by_guard"] is True
    assert figures["guard_best_step"] == 0
    assert figures["guard_stopped_at"] == figures["steps"] >= 1
    assert "above max_kl 0.0001" in figures["guard_reason"]
    assert figures["train_kl_to_sft"] == 0.0
    said = capsys.readouterr().out
    assert f"the guard ended training at step {figures['steps']}: KL to the reference" in said
    assert "back to the policy of step 0" in said
    events = [json.loads(line) for line in (project / ".rlhf/progress/align-ppo.jsonl").read_text().splitlines()]
    assert [one["best_step"] for one in events if one["event"] == "stopped_by_guard"] == [0]
    sft, aligned = (load_policy(project / f"artifacts/{name}/model") for name in ("sft", "align/ppo"))
    assert all(torch.equal(one, two) for one, two in zip(sft.parameters(), aligned.parameters(), strict=True))
    columns = (project / "reports/plots/align-ppo.csv").read_text().splitlines()[0].split(",")
    assert {"reward/term_shortness:short", "reward/term_length", "eval/stopped_by_guard"} <= set(columns)


def test_responses_that_are_no_numbers_are_counted_and_named_in_the_metrics(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model that gives NaN for one prompt: the stage ends well, and says which prompt it was."""
    texts: list[str] = []

    def spoilt(
        cfg: Any, state: Any, reference: Any, rewards: Any, prompts: list[list[int]], run: Any, **more: Any
    ) -> Any:
        chosen = choose_prompts(cfg, state, len(prompts), run.seed)[0]
        bad = prompts[chosen]
        table = read_table(project / "artifacts/validate/prompts.parquet")
        texts.append(list(dict.fromkeys(row["prompt"] for row in table))[chosen])

        def score(batch: Any) -> torch.Tensor:
            told = [row[batch.prompt_width - len(bad) : batch.prompt_width] == bad for row in batch.ids_BS.tolist()]
            return rewards.score(batch).masked_fill(torch.tensor(told), math.nan)

        return train_ppo(cfg, state, reference, replace(rewards, score=score), prompts, run, **more)

    monkeypatch.setattr("tasks.stages.align.ppo.train_ppo", spoilt)
    assert align_with(project, {}) == 0
    figures = read_json(project / "reports/metrics/align-ppo.json")
    assert figures["responses_set_aside"] >= 1
    assert figures["rollouts_with_set_aside"] >= 1
    assert figures["set_aside"][0] == {
        "step": 1, "prompt": texts[0], "prompt_id": prompt_id(texts[0]), "reason": "score",
    }  # fmt: skip
    assert figures["refused_steps"] == 0
    assert "responses set aside, not a finite number" in capsys.readouterr().out


def test_groups_of_responses_train_adapters_against_the_policy_without_them(project: Path) -> None:
    ppo = {
        "advantages": {"method": "rloo"},
        "responses_per_prompt": 2,
        "guard": {"every": 1, "scorer": "artifacts/reward/model", "prompts": 8},
    }
    assert align_with(project, ppo, lora={"rank": 4, "stages": ["align"]}) == 0
    folder = project / "artifacts/align/ppo/model"
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    figures = read_json(project / "reports/metrics/align-ppo.json")
    assert "stopped_by_guard" not in figures
    assert figures["train_kl_to_sft"] != 0.0
    sft, aligned = load_policy(project / "artifacts/sft/model"), load_policy(folder)
    moved = {
        name.split(".")[-2]
        for (name, one), two in zip(sft.named_parameters(), aligned.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    rows = (project / "reports/plots/align-ppo.csv").read_text().splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert float(first["rollout/kl_to_reference"]) == 0.0
    # The scorer is the reward model, asked in batches of its own.
    assert float(first["eval/heldout_score"]) == pytest.approx(float(first["eval/proxy_score"]), abs=1e-5)


def test_n28_the_policy_has_the_epsilon_asked_for_and_no_weight_decay(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def look(cfg: Any, state: Any, *_: Any, **__: Any) -> None:
        seen.update({name: optimizer.param_groups for name, optimizer in state.optimizers.items()})
        raise WaitingForPeople("seen enough")

    monkeypatch.setattr("tasks.stages.align.ppo.train_ppo", look)
    assert align_with(project, {"adam_eps": 0.001}) == 5
    assert set(seen) == {"policy", "value"}
    for group in (group for groups in seen.values() for group in groups):
        assert (group["eps"], group["weight_decay"], group["betas"]) == (1e-3, 0.0, (0.9, 0.95))


def test_what_cannot_be_used_is_refused_before_training(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "theirs.py").write_text(CODE)
    assert align_with(project, {"scores": {"terms": {"theirs:short": 0.5}}}) == 2
    assert "theirs.py is no input of stage align@ppo" in capsys.readouterr().err
    guard = {"every": 1, "scorer": "models/gold"}
    assert align_with(project, {"scores": {}, "guard": guard}) == 2
    assert "align.ppo.guard.scorer: models/gold is no input of stage align@ppo" in capsys.readouterr().err
