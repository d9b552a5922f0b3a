"""Stages on so few rows, or on such, that a share of them would be nothing, or a figure would flatter."""

from pathlib import Path

import pytest

from rlhf_core.config import Params
from rlhf_core.data.cleaning.splits import is_heldout, next_heldout
from rlhf_core.text.identity import prompt_group
from tasks import paths
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.reward import run as reward
from tasks.stages.sft import run as sft
from tasks.tables import SCHEMAS, write_table


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    definition = StageDefinition(name="sft", deps=(), params=(), outs=())
    return Stage(definition, Params(), tmp_path, tmp_path / "out", Progress(tmp_path / "progress.jsonl"))


def write_demonstrations(*prompts: str) -> None:
    rows = [
        {"id": prompt, "prompt": prompt, "response": "r", "task": "", "source": "file", "split": "train"}
        for prompt in prompts
    ]
    write_table(paths.VALIDATE / "demonstrations.parquet", rows, SCHEMAS["demonstrations"])


def test_of_few_prompts_one_is_kept_for_the_held_out_loss(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"Say {number}?" for number in range(5)]
    assert not any(is_heldout(f"sft {prompt_group(prompt)}", 0.03) for prompt in prompts), "0.03 of five is none"
    write_demonstrations(*prompts, prompts[0].upper())
    train, kept = sft.split_demonstrations(stage)
    groups = {prompt_group(row["prompt"]) for row in kept}
    assert len(groups) == 1
    assert groups.isdisjoint(prompt_group(row["prompt"]) for row in train)
    assert len(train) + len(kept) == 6
    said = "warning: sft.heldout_share 0.03 of 5 prompt groups is none; one is kept all the same"
    assert said in capsys.readouterr().out


def test_of_one_prompt_nothing_is_kept(stage: Stage) -> None:
    write_demonstrations("Ask?", "ask?")
    assert len(sft.split_demonstrations(stage)[0]) == 2


def test_a_held_out_loss_of_nothing_says_why_it_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_demonstrations("Ask?", "ask?")
    write_table(paths.VALIDATE / "heldout_replies.parquet", [], SCHEMAS["heldout_replies"])
    tiny = {"hidden_size": 16, "heads": 2, "intermediate_size": 16, "layers": 1, "vocab_size": 300}
    params = Params.model_validate({"model": tiny, "sft": {"max_steps": 2, "warmup_steps": 1}})
    definition = StageDefinition(name="sft", deps=(), params=(), outs=())
    stage = Stage(definition, params, tmp_path, tmp_path / "out", Progress(tmp_path / "progress.jsonl"))
    found = sft.run(stage)
    assert found["heldout_loss"] is found["heldout_perplexity"] is None
    assert found["train_loss"] > 0
    nothing = "no demonstration is kept for it"
    assert (found["undefined"]["heldout_loss"], found["undefined"]["heldout_perplexity"]) == (nothing, nothing)
    assert {name for name, value in found.items() if value is None} == set(found["undefined"])


def test_the_group_kept_is_the_first_that_a_growing_share_would_hold_out() -> None:
    groups = [prompt_group(f"Ask {number}?") for number in range(20)]
    share = next(step / 1000 for step in range(1001) if any(is_heldout(group, step / 1000) for group in groups))
    assert is_heldout(next_heldout(groups), share)


def test_grades_on_prompts_that_are_trained_on_do_not_judge_the_model(stage: Stage) -> None:
    pair = {
        "pair_id": "q", "prompt_id": "p", "prompt": "Trained?", "task": "", "chosen": "x", "rejected": "y",
        "agreement": 1.0, "margin": 1.0, "source": "file",
    }  # fmt: skip
    write_table(paths.PREFERENCES / "train.parquet", [pair], SCHEMAS["train"])
    grades = [
        {"id": prompt, "prompt": prompt, "response": "x", "score": 1.0} for prompt in ("TRAINED? ", "New?", "Other?")
    ]
    write_table(paths.VALIDATE / "graded.parquet", grades, SCHEMAS["graded"])
    kept, left_out = reward.grades_to_judge_by(stage)
    assert ([row["prompt"] for row in kept], left_out) == (["New?", "Other?"], 1)
