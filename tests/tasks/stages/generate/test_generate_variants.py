"""Stage `generate` beyond its defaults: cut-off distributions, several models, best of n with contrast."""

import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.project import edited_yaml
from support.warm_processes import run_stage
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.policy import build_policy, load_policy, save_policy
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.text.tokenizer import encode_prompt, encode_response, load_tokenizer
from tasks.params import load_params

NUM_PROMPTS, NUM_HELDOUT = 6, 2
Rows = list[dict[str, Any]]


@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Path:
    """The code and the inputs of stage `generate`, copied from the finished project, with a second model."""
    project = tmp_path / "project"
    kept = ("rlhf_core", "tasks", "models", "artifacts/validate", "artifacts/sft")
    for name in kept:
        shutil.copytree(finished_project / name, project / name)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(finished_project / name, project / name)
    tokenizer = load_tokenizer(project / "artifacts/sft/model")
    cfg = load_params(project / "params.yaml").model
    other = build_policy(cfg, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=9)
    save_policy(other, tokenizer, project / "models/other")
    return project


def generate(project: Path, **settings: Any) -> tuple[Rows, dict[str, Any]]:
    with edited_yaml(project / "params.yaml") as params:
        params["generate"] = {"num_prompts": NUM_PROMPTS, "num_heldout_prompts": NUM_HELDOUT, **settings}
    done = run_stage(project, "generate")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(project / "artifacts/generate/responses.parquet").to_pylist()
    return rows, json.loads((project / "reports/metrics/generate.json").read_text())


def by_prompt(rows: Rows) -> list[Rows]:
    found = defaultdict(list)
    for row in rows:
        found[row["prompt_id"]].append(row)
    return list(found.values())


def test_models_and_temperatures_take_turns_and_log_probabilities_are_exact(project: Path) -> None:
    rows, _ = generate(
        project,
        responses_per_prompt=5,
        temperatures=[0.5, 1.5],
        models=["models/other"],
        models_folder="models/other",
        top_k=30,
        top_p=0.8,
    )
    assert len(by_prompt(rows)) == NUM_PROMPTS + NUM_HELDOUT
    turns = [(row["model"], row["temperature"]) for row in by_prompt(rows)[0]]
    assert turns == [("sft", 0.5), ("sft", 1.5), ("models/other", 0.5), ("models/other", 1.5), ("sft", 0.5)]
    for row in by_prompt(rows)[1]:
        assert row["score"] is None
        folder = project / ("artifacts/sft/model" if row["model"] == "sft" else row["model"])
        prompt = encode_prompt(load_tokenizer(folder), row["prompt"], 160)
        with torch.no_grad():
            logits = load_policy(folder)(torch.tensor([prompt + row["response_ids"]])).logits[0, len(prompt) - 1 : -1]
        logits = logits.double() / row["temperature"]
        chosen = torch.tensor(row["response_ids"])[:, None]
        kept = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(30)(None, logits))
        for column, scores in (("logprobs", logits), ("behaviour_logprobs", kept)):
            expected = scores.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
            assert row[column] == pytest.approx(expected, abs=1e-4)


def test_best_and_worst_of_n_by_likelihood(project: Path) -> None:
    plain, _ = generate(project, responses_per_prompt=6)
    rows, figures = generate(project, responses_per_prompt=4, best_of={"candidates": 3, "keep": "contrast"})
    assert figures["best_of_kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert figures["best_score"] > figures["candidates_score"]
    assert figures["best_score"] == pytest.approx(sum(row["score"] for row in rows if row["sample"] % 2 == 0) / 16)
    for candidates, kept in zip(by_prompt(plain), by_prompt(rows), strict=True):
        assert [row["sample"] for row in kept] == [0, 1, 2, 3]
        for pool in (0, 1):
            scores = {row["response"]: mean_logprob(project, row) for row in candidates[3 * pool : 3 * pool + 3]}
            best, worst = kept[2 * pool : 2 * pool + 2]
            assert best["response"] == max(scores, key=scores.__getitem__)
            assert worst["response"] == min(scores, key=scores.__getitem__)
            assert best["score"] == pytest.approx(scores[best["response"]], abs=1e-4)
            assert worst["score"] == pytest.approx(scores[worst["response"]], abs=1e-4)


def mean_logprob(project: Path, row: dict[str, Any]) -> float:
    """Of the text as a response is written, without an end that the model did not write."""
    tokenizer = load_tokenizer(project / "artifacts/sft/model")
    prompt, ids = encode_prompt(tokenizer, row["prompt"], 160), encode_response(tokenizer, row["response"], 56)
    if not row["finished"] and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    with torch.no_grad():
        logits = load_policy(project / "artifacts/sft/model")(torch.tensor([prompt + ids])).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None]).mean().item()


def test_a_reward_model_of_an_earlier_round_picks_the_best(project: Path, finished_project: Path) -> None:
    shutil.copytree(finished_project / "artifacts/reward/model", project / "models/judge")
    rows, figures = generate(
        project,
        responses_per_prompt=2,
        best_of={"candidates": 4, "scorer": "reward_model", "reward_model": "models/judge"},
        models_folder="models/judge",
    )
    tokenizer = load_tokenizer(project / "models/judge")
    finished = [row for row in rows if row["finished"]]
    scores = reward_scores(
        load_reward_model(project / "models/judge"),
        [encode_prompt(tokenizer, row["prompt"], 160) for row in finished],
        [encode_response(tokenizer, row["response"], 56) for row in finished],
        pad_id=tokenizer.pad_token_id,
        batch_size=8,
    )
    assert finished
    assert [row["score"] for row in finished] == pytest.approx(scores, abs=1e-3)
    assert Counter(row["prompt_id"] for row in rows).most_common()[0][1] == 2
    assert figures["best_score"] == pytest.approx(sum(row["score"] for row in rows) / len(rows))
    assert figures["best_score"] > figures["candidates_score"]


def test_a_folder_that_is_not_there_is_named(project: Path) -> None:
    with edited_yaml(project / "params.yaml") as params:
        settings = {"models": ["models/absent"], "models_folder": "models"}
        params["generate"] = {"num_prompts": 1, "num_heldout_prompts": 0, **settings}
    done = run_stage(project, "generate")
    assert done.returncode == 7
    assert "models/absent: there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr
