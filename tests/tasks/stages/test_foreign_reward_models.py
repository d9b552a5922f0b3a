"""Reward models from elsewhere in the stages: start, picker, reward, guard and judge, each against the model itself."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.foreign import foreign_folder
from support.project import change_sections, edited_yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_core.models.scoring.foreign import ForeignRewardModel
from rlhf_core.text.tokenizer import load_tokenizer
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.stages.evaluate import run as evaluate
from tasks.stages.generate import run as generate
from tasks.stages.reward import run as reward

BODIES = {"reward": reward, "align@ppo": align, "evaluate": evaluate, "generate": generate}


def run(project: Path, stage: str, **sections: dict[str, Any]) -> int:
    change_sections(project, **sections)
    return run_stage(stage, BODIES[stage].run, load_params(project / "params.yaml"), project)


def run_ppo(project: Path, watched: str, **ppo: Any) -> int:
    with edited_yaml(project / "params.yaml") as params:
        params["align"]["models_folder"] = watched
        params["align"]["ppo"].update(ppo)
    return run(project, "align@ppo")


def figures(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def table(project: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(project / "artifacts" / name).to_pylist()


def plainly(folder: Path, rows: list[dict[str, Any]], batch: int = 32) -> list[float]:
    """Scores of prompts and responses by transformers alone, by the folder's own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"].strip()}, {"role": "assistant", "content": row["response"]}],
            tokenize=False,
        )
        for row in rows
    ]
    scores: list[float] = []
    for start in range(0, len(texts), batch):
        given = tokenizer(texts[start : start + batch], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores += model(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, 0].tolist()
    return scores


def test_it_picks_among_candidates(project: Path) -> None:
    folder = foreign_folder(project / "models/foreign")
    best_of = {"candidates": 2, "scorer": "reward_model", "reward_model": "models/foreign"}
    settings = {"num_prompts": 4, "num_heldout_prompts": 2, "best_of": best_of, "models_folder": "models/foreign"}
    assert run(project, "generate", generate=settings) == 0
    rows = table(project, "generate/responses.parquet")
    assert [row["score"] for row in rows] == pytest.approx(plainly(folder, rows), abs=1e-5)
    said = figures(project, "generate")
    assert said["best_score"] > said["candidates_score"]


def test_it_judges_the_policies(project: Path) -> None:
    folder = foreign_folder(project / "models/foreign")
    settings = {"judges": ["judge_model", "reward_model"], "judge_model": "models/foreign", "num_prompts": 8}
    assert run(project, "evaluate", evaluate=settings) == 0
    rows = table(project, "evaluate/responses.parquet")
    assert [row["judge_model"] for row in rows] == pytest.approx(plainly(folder, rows), abs=1e-5)
    said = figures(project, "evaluate")
    assert said["verdict"]["judge"] == "judge_model"
    assert said["verdict"]["simulated"] is False


def test_of_a_judge_that_is_not_asked_there_is_nothing(project: Path) -> None:
    assert run(project, "evaluate", evaluate={"num_prompts": 4, "judges": ["reward_model"]}) == 0
    assert "judge_model" not in table(project, "evaluate/responses.parquet")[0]


def test_ppo_learns_from_it_and_the_guard_reads_another(project: Path) -> None:
    foreign_folder(project / "models/foreign/llama")
    foreign_folder(project / "models/foreign/bert", "bert")
    seen: list[float] = []
    read = ForeignRewardModel.score_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ForeignRewardModel,
            "score_texts",
            lambda self, *rows: seen.append(type(self.model).__name__) or read(self, *rows),
        )
        guard = {"every": 1, "scorer": "models/foreign/bert", "prompts": 4, "max_kl": 1000.0}
        settings = {"reward_model": "models/foreign/llama", "scores": {"normalise": "running"}, "guard": guard}
        assert run_ppo(project, "models/foreign", **settings) == 0
    assert set(seen) == {"LlamaForSequenceClassification", "BertForSequenceClassification"}
    assert "stopped_by_guard" not in figures(project, "align-ppo")


def test_a_guard_that_nobody_watches_names_the_key(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign_folder(project / "models/foreign")
    assert run_ppo(project, "models/none", guard={"every": 1, "scorer": "models/foreign"}) == 2
    assert "align.models_folder: models/foreign" in capsys.readouterr().err


def same_vocabulary(project: Path, folder: Path) -> Path:
    """A classifier with the vocabulary of the run's SFT model, as somebody else may have trained it."""
    tokenizer = load_tokenizer(project / "artifacts/sft/model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_training_starts_from_its_body_and_head(project: Path) -> None:
    folder = same_vocabulary(project, project / "models/foreign")
    settings = {"init": "models/foreign", "head": "last", "learning_rate": 0.00015, "min_pairwise_accuracy": 0.0}
    off = {"min_spearman": None, "min_kendall": None, "max_ece": None, "weight_decay": 0.0}
    assert run(project, "reward", reward=settings | off) == 0
    trained = load_file(project / "artifacts/reward/model/model.safetensors")
    start = load_file(folder / "model.safetensors")
    assert trained.keys() == start.keys()
    for name in start.keys() - {"score.weight"}:
        torch.testing.assert_close(trained[name], start[name], atol=5e-3, rtol=0)
    head = load_file(project / "artifacts/reward/model/reward_head.safetensors")
    torch.testing.assert_close(head["weight"], start["score.weight"], atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("family", "head", "says"),
    [("llama", "last", "another vocabulary than the SFT model's"), ("own", "gated", "has head 'last', not 'gated'")],
)
def test_what_training_cannot_start_from_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], family: str, head: str, says: str
) -> None:
    folder = project / "models/foreign"
    same_vocabulary(project, folder) if family == "own" else foreign_folder(folder, family)
    assert run(project, "reward", reward={"init": "models/foreign", "head": head}) == 2
    said = capsys.readouterr().err
    assert "reward.init: " in said
    assert says in said
