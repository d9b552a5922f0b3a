"""A run's files as the stages leave them, with figures computed by the project's own statistics."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.config import Params
from rlhf_core.evaluation.ab import compare_scores
from rlhf_core.evaluation.calibration import calibration_bins
from rlhf_core.evaluation.reward_card import ScoredPairs, reward_card

REPOSITORY = Path(__file__).parents[4]
QUALITY = {"sft": 0.70, "ppo": 0.86, "dpo": 0.84}
RunMaker = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Return a function that writes a whole run below `tmp_path` and returns its root."""

    def make(params: Params, *, graded: bool = True, texts: tuple[str, ...] = ()) -> Path:
        gold = "gold" in params.evaluate.judges
        shutil.copy(REPOSITORY / "dvc.yaml", tmp_path / "dvc.yaml")
        rng = np.random.Generator(np.random.PCG64(7))
        _data_stages(tmp_path)
        _reward_stage(tmp_path, rng, graded)
        for name in params.align.algorithms:
            _write(tmp_path, f"artifacts/align/{name}/model/config.json", "{}")
            _curves(tmp_path, f"align-{name}", _align_rows(rng, name))
            _write_json(tmp_path, f"reports/metrics/align-{name}.json", {"steps": 24})
        _evaluate_stage(tmp_path, rng, params, gold, texts)
        return tmp_path

    return make


def _write(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _write_json(root: Path, name: str, value: Any) -> None:
    _write(root, name, json.dumps(value))


def _curves(root: Path, slug: str, rows: list[dict[str, float]]) -> None:
    columns = ["step", *sorted({key for row in rows for key in row} - {"step"})]
    lines = [",".join(columns), *(",".join(str(row.get(column, "")) for column in columns) for row in rows)]
    _write(root, f"reports/plots/{slug}.csv", "\n".join(lines) + "\n")


def _table(root: Path, name: str, columns: dict[str, list[Any]]) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _data_stages(root: Path) -> None:
    _write(root, "data/prompts.jsonl", '{"prompt": "Hello"}\n')
    _write(root, "artifacts/validate/quarantine.jsonl", "")
    _write(root, "artifacts/sft/model/config.json", "{}")
    _write(root, "artifacts/preferences/train.parquet", "stands for a table")
    losses = [
        {"step": step, "loss/train": 0.9 + 3 * math.exp(-step / 60), "optim/learning_rate": 0.003 * (1 - step / 600)}
        | ({"loss/heldout": 0.98 + 3 * math.exp(-step / 60)} if step % 110 == 0 else {})
        for step in range(10, 551, 10)
    ]
    _curves(root, "sft", losses)
    _write_json(root, "reports/metrics/sft.json", {"heldout_loss": 0.981, "steps": 550})
    _write_json(root, "reports/metrics/validate.json", {"rows": {"demonstrations": 7200, "prompts": 1536}, "bad": 0})
    annotators = {
        f"annotator-{number}": {
            "num_votes": 4400 - number,
            "tie_share": 0.04,
            "first_share": 0.51,
            "agreement": 0.9 - 0.06 * number,
            "mean_seconds": None,
        }
        for number in range(5)
    }
    _write_json(root, "artifacts/label/annotators.json", {"source": "simulated", "annotators": annotators})
    _write_json(
        root, "reports/metrics/label.json", {"num_labelled_pairs": 6100, "tie_share": 0.041, "fleiss_kappa": None}
    )
    counts = [("ties", 6100, 5850), ("near_duplicates", 5850, 5702), ("leakage", 5702, 5702)]
    steps = [
        {
            "step": name,
            "pairs_in": before,
            "pairs_out": after,
            "removed": before - after,
            "reason": f"because of {name}",
        }
        for name, before, after in counts
    ]
    _write_json(root, "artifacts/preferences/funnel.json", steps)
    split = {"pairs_train": 3502, "pairs_heldout": 2200, "prompts_train": 700, "prompts_heldout": 400}
    _write_json(root, "reports/metrics/preferences.json", split)


def _reward_stage(root: Path, rng: np.random.Generator, graded: bool) -> None:
    pairs = 2200
    chosen, rejected = rng.normal(0.7, 1.0, pairs), rng.normal(-0.6, 1.0, pairs)
    prompts = [f"prompt-{row % 400}" for row in range(pairs)]
    chars = rng.integers(20, 120, (2, pairs))
    given = rng.uniform(0.2, 1.0, 4000)
    scores = 3 * given + rng.normal(0, 0.5, 4000)
    rows = ([f"prompt-{row % 400}" for row in range(4000)], given, scores) if graded else None
    card = reward_card(ScoredPairs(chosen, rejected, chars[0], chars[1], prompts), rows)
    columns = {
        "pair_id": [str(row) for row in range(pairs)],
        "prompt_id": prompts,
        "chosen_score": chosen.tolist(),
        "rejected_score": rejected.tolist(),
        "margin": (chosen - rejected).tolist(),
    }
    _table(root, "artifacts/reward/heldout_scores.parquet", columns)
    kept = {"score": given.tolist(), "model_score": scores.tolist()} if graded else {"score": [], "model_score": []}
    _table(root, "artifacts/reward/graded_scores.parquet", kept)
    _write_json(
        root, "artifacts/reward/calibration.json", {"bins": calibration_bins(chosen - rejected), "ece": card["ece"]}
    )
    _write_json(root, "reports/metrics/reward.json", card)
    rows = [
        {"step": step, "loss/train": 0.69 - 0.003 * step, "reward/accuracy": 0.5 + 0.003 * step}
        for step in range(1, 117)
    ]
    _curves(root, "reward", rows)


def _align_rows(rng: np.random.Generator, name: str) -> list[dict[str, float]]:
    if name == "dpo":
        return [
            {"step": step, "loss/train": 0.69 - 0.002 * step, "implicit_reward/margin": 0.01 * step}
            for step in range(1, 138)
        ]
    return [
        {
            "step": step,
            "rollout/score": 0.1 * step + float(rng.normal(0, 0.05)),
            "rollout/length": 21 + 0.1 * step,
            "policy/kl_to_reference": 0.02 * step**1.5,
            "policy/clip_fraction": 0.1,
            "loss/value": 1 / step,
        }
        for step in range(1, 25)
    ]


def _evaluate_stage(root: Path, rng: np.random.Generator, params: Params, gold: bool, texts: tuple[str, ...]) -> None:
    labels = [f"T={temperature:g}" for temperature in params.evaluate.temperatures]
    names = ("sft", *params.align.algorithms)
    scores = {name: rng.normal(QUALITY[name], 0.2, 500).round(2) for name in names}
    metrics: dict[str, Any] = {name: _model_figures(name, labels, gold) for name in names}
    for name in params.align.algorithms:
        figures = compare_scores(scores[name], scores["sft"])
        judges = {
            judge: dict.fromkeys(labels, figures | {"order_consistency": 1.0}) for judge in params.evaluate.judges
        }
        metrics[name] |= figures | {"judges": judges, "truthful_share_gain": 0.14 if gold else None}
    best = params.align.algorithms[0]
    shown = ("win_rate", "win_rate_low", "win_rate_high", "p_value", "num_prompts")
    judge = params.evaluate.judges[0]
    metrics["verdict"] = {key: metrics[best][key] for key in shown} | {
        "judge": judge,
        "simulated": judge == "gold",
        "temperature": params.evaluate.temperatures[0],
        "best": best,
        "confidence": 0.95,
    }
    _write_json(root, "reports/metrics/evaluate.json", metrics)
    prompt = "Notes: The broom: aisle F, price 45, stock 8.\nCustomer: Hello. Is the broom in stock?\nAssistant:"
    replies = texts or ("For the broom we still have 8 left.", "We have 3 left. Anything else?")
    samples = [
        {
            "why": "largest loss" if row >= 4 else "drawn",
            "prompt": texts[row % len(texts)] if texts else prompt,
            "temperature": 1.0,
            "responses": {
                name: {
                    "text": replies[(row + place) % len(replies)],
                    "finished": row != 2,
                    "scores": dict.fromkeys(params.evaluate.judges, 0.5),
                }
                for place, name in enumerate(names)
            },
        }
        for row in range(max(6, len(texts)))
    ]
    _write_json(root, "artifacts/evaluate/samples.json", samples)


def _model_figures(name: str, labels: list[str], gold: bool) -> dict[str, Any]:
    quality = QUALITY[name]
    criteria = ("gold", "helpful", "truthful", "harmless", "concise", "truthful_share", "wellformed_share")
    lengths = {"tokens_mean": 21.4, "tokens_p95": 40.0, "words_mean": 13.1, "finished_share": 0.99}
    lengths |= {"distinct_share": 0.95, "repetition": 0.01}
    return {
        "kl_to_sft": 0.0 if name == "sft" else 2.2,
        "lengths": dict.fromkeys(labels, lengths),
        "reward_model_score": dict.fromkeys(labels, quality),
        "gold": {label: dict.fromkeys(criteria, quality) for label in labels} if gold else None,
    }
