"""What `params.yaml` names is what is computed: the first step of each variant, worked out from the data files.

A policy that is still its reference, and a gated head that still scores everything 0, leave of each loss a number that
labels, weights and settings alone decide. So a setting that does not arrive, or a label that is lost between the
stages, shows as a wrong number and not as a slightly different curve.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.project import change_sections

from rlhf_core.config import ComputeConfig
from rlhf_core.models.policy import load_policy
from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode
from rlhf_core.text.tokenizer import encode_prompt, encode_response, load_tokenizer
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.stages.reward import run as reward
from tasks.stages.sft import run as sft

LN_2 = math.log(2.0)
WHOLE = 1000  # prompts a step: all of them
Rows = list[dict[str, Any]]


def curves(project: Path, stage: str, **sections: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of a stage's curves, run in this process with `params.yaml` changed first."""
    change_sections(project, **sections)
    body = {"sft": sft.run, "reward": reward.run}.get(stage, align.run)
    assert run_stage(stage, body, load_params(project / "params.yaml"), project) == 0
    lines = (project / f"reports/plots/{stage.replace('@', '-')}.csv").read_text().splitlines()
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


@pytest.fixture
def pairs(project: Path) -> Rows:
    rows = pq.read_table(project / "artifacts/preferences/train.parquet").to_pylist()
    assert len({row["margin"] for row in rows}) > 3, "labels that are all alike would hide a weight that is lost"
    return rows


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what stage `align` measures after training, which is most of its time here."""
    monkeypatch.setattr(align, "_compare", lambda *_: ({}, []))


def mean(values: list[float], weights: list[float] | None = None) -> float:
    weights = weights or [1.0] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def token_means(project: Path, rows: Rows) -> list[tuple[float, float]]:
    """Mean log-probability a token of both responses of each pair under the SFT model's own forward."""
    folder = project / "artifacts/sft/model"
    model, tokenizer = load_policy(folder), load_tokenizer(folder)

    def of(prompt: str, response: str) -> float:
        before, after = encode_prompt(tokenizer, prompt, 160), encode_response(tokenizer, response, 56)
        with torch.no_grad():
            logprobs = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(after)[:, None]).mean().item()

    return [(of(row["prompt"], row["chosen"]), of(row["prompt"], row["rejected"])) for row in rows]


AT_THE_REFERENCE = {
    "conservative": ({"options": {"label_smoothing": 0.2}}, LN_2),
    "robust": ({"options": {"label_smoothing": 0.2}}, LN_2),
    "hinge": ({}, 1.0),
    "ipo": ({"beta": 0.4}, 1.25**2),
    "ipo_sum": ({"beta": 0.4}, 1.25**2),
    "kto": ({"options": {"desirable_weight": 1.4, "undesirable_weight": 0.4}}, (1.4 + 0.4) / 4),
}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("loss", AT_THE_REFERENCE)
def test_a_preference_loss_begins_where_its_formula_says(project: Path, loss: str) -> None:
    settings, expected = AT_THE_REFERENCE[loss]
    rows = curves(project, "align@dpo", align={"dpo": {"loss": loss, "epochs": 2, "prompts_per_step": 8, **settings}})
    assert rows[0]["loss/preference"] == pytest.approx(expected, abs=1e-6)
    assert rows[-1]["implicit_reward/margin"] != 0.0


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("weigh", ["none", "agreement", "strength"])
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_weigh_the_pairs_of_the_data(
    project: Path, pairs: Rows, loss: str, weigh: str
) -> None:
    """SimPO with beta 2 and gamma 0.6, ORPO with weight 0.5: from token means and the labels in train.parquet."""
    weights = {"none": [1.0] * len(pairs), "agreement": [row["agreement"] for row in pairs],
               "strength": [row["margin"] for row in pairs]}[weigh]  # fmt: skip
    each = []
    for chosen, rejected in token_means(project, pairs):
        odds = [one - math.log1p(-math.exp(one)) for one in (chosen, rejected)]
        orpo, simpo = 0.5 * softplus(odds[1] - odds[0]), softplus(0.6 - 2.0 * (chosen - rejected))
        each.append(orpo if loss == "orpo" else simpo)
    more = {"beta": 0.5, "nll_coef": 1.0} if loss == "orpo" else {"beta": 2.0, "options": {"simpo_margin": 0.6}}
    dpo = {"loss": loss, "pair_weights": weigh, "prompts_per_step": WHOLE, "prompts_per_forward": 9, **more}
    (row,) = curves(project, "align@dpo", align={"dpo": dpo})
    assert row["loss/preference"] == pytest.approx(mean(each, weights), abs=1e-5)


def scores_of_nothing(rows: Rows) -> dict[str, tuple[dict[str, Any], float]]:
    """For reward settings the first ranking loss where every score is 0."""
    agreement, strength = [row["agreement"] for row in rows], [row["margin"] for row in rows]
    a_prompt = Counter(row["prompt"] for row in rows)
    fair = [1 / a_prompt[row["prompt"]] for row in rows]
    stronger = [softplus(0.3 * one) for one in strength]
    both = [share * one for share, one in zip(agreement, fair, strict=True)]
    margin = {"name": "margin", "margin": 0.3, "margin_from": "strength"}
    return {
        "bradley_terry": ({}, LN_2),
        "margin": ({"name": "margin", "margin": 0.7}, softplus(0.7)),
        "hinge": ({"name": "hinge", "margin": 0.7}, 0.7),
        "thurstone": ({"name": "thurstone"}, LN_2),
        "rao_kupper": ({"ties": "rao_kupper", "tie_threshold": 0.4}, softplus(0.4)),
        "margin by strength": (margin, mean(stronger)),
        "by agreement": ({**margin, "weights": "agreement"}, mean(stronger, agreement)),
        "by strength": ({**margin, "weights": "strength"}, mean(stronger, strength)),
        "by difficulty": ({**margin, "weights": "difficulty"}, mean(stronger)),
        "by prompt and agreement": ({**margin, "weights": "agreement", "average": "prompt"}, mean(stronger, both)),
    }


@pytest.mark.parametrize("name", scores_of_nothing([{"agreement": 1.0, "margin": 1.0, "prompt": ""}]))
def test_a_reward_loss_begins_where_the_labels_put_it(
    project: Path, pairs: Rows, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, expected = scores_of_nothing(pairs)[name]
    monkeypatch.setattr(reward, "read_table", lambda path, read=reward.read_table: short(read(path), path))
    more = {"head": "gated", "prompts_per_step": WHOLE, "epochs": 2, "order": "easy_first", "loss": settings}
    rows = curves(project, "reward", reward=more)
    assert rows[0]["loss/ranking"] == pytest.approx(expected, abs=1e-5)
    assert rows[1]["reward/margin"] != 0.0


def short(table: Any, path: Path) -> Any:
    """A table of which only pairs to learn from are read whole: scoring the others costs more than training."""
    whole = path.name in ("train.parquet", "other_pairs.parquet")
    return table if whole else table.select(range(min(8, len(table))))


PPO = {"steps": 3, "rollout_batch": 8, "minibatch": 4, "epochs": 2, "target_kl": 10.0, "warmup_steps": 0}


@pytest.mark.usefixtures("unmeasured")
def test_ppo_remembers_charges_and_replays_as_told(project: Path) -> None:
    """Two minibatches and one of replay, two passes; beta moves by the published rule from each row to the next."""
    more = {
        "entropy_coef": 0.01,
        "microbatch": 3,
        "kl": {"estimator": "k3", "controller": "adaptive", "target": 0.5, "horizon": 40.0},
        "scores": {"normalise": "running", "terms": {"diversity": 0.2}},
        "replay": {"rows": 4, "capacity": 12},
        "curriculum": {"start_share": 0.25, "steps": 8},
    }
    rows = curves(project, "align@ppo", align={"ppo": PPO | more})
    assert [row["policy/updates"] for row in rows] == [4, 6, 6]
    assert [row["rollout/replay_stored"] for row in rows] == [8, 12, 12]
    assert all(0.0 < row["reward/term_diversity"] <= 1.0 for row in rows)
    coef = 0.2
    for row in rows:
        assert row["reward/kl_coef"] == pytest.approx(coef, rel=1e-9)
        coef *= 1 + min(max(row["rollout/kl_to_reference"] / 0.5 - 1, -0.2), 0.2) * 8 / 40.0
    assert rows[0]["reward/kl_coef"] != rows[1]["reward/kl_coef"]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ["reinforce", "grpo"])
def test_ppo_without_a_value_model_pays_between_quantiles(project: Path, method: str) -> None:
    """Of two scores the lower becomes -1 and the higher 1: what a rollout earns is its price on length alone."""
    more = {
        "rollout_batch": 2,
        "minibatch": 2,
        "advantages": {"method": method, "scaling": "none"},
        "responses_per_prompt": 2,
        "temperature": 0.8,
        "missing_end_penalty": 0.0,
        "scores": {"normalise": "quantile", "quantiles": [0.0, 1.0], "window": 2, "terms": {"length": -0.5}},
    }
    rows = curves(project, "align@ppo", align={"ppo": PPO | {"steps": 2} | more})
    assert not any(key.startswith(("loss/value", "rollout/explained")) for key in rows[0])
    assert rows[0]["reward/score_std"] > 0, "two scores that are alike have no scale"
    assert rows[0]["reward/total"] == pytest.approx(-0.5 * rows[0]["reward/term_length"], abs=1e-6)
    assert 0.0 < rows[0]["reward/term_length"] <= 1.0


@pytest.fixture
def plain_mode() -> Callable[[], None]:
    yield
    set_compute_mode(ComputeMode())


@pytest.mark.usefixtures("plain_mode")
def test_a_stage_trains_in_the_precision_asked_for_and_publishes_float32(project: Path) -> None:
    """Half the digits in the products, no layer kept for the backward pass; near the float32 run and not on it."""
    steps = {"max_steps": 6, "save_every": 3}
    exact = curves(project, "sft", sft=steps)
    halved = curves(project, "sft", compute={"precision": "bfloat16", "activation_checkpointing": True})
    apart = [abs(one["loss/train"] - two["loss/train"]) for one, two in zip(exact, halved, strict=True)]
    assert 1e-5 < max(apart) < 0.05
    assert halved[-1]["loss/train"] < halved[0]["loss/train"]
    weights = load_file(project / "artifacts/sft/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert ComputeConfig().precision == "float32"
    assert json.loads((project / "reports/metrics/sft.json").read_text())["steps"] == 6
