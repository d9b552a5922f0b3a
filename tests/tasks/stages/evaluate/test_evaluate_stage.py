"""Stage `evaluate` on tiny models: what it writes, that it repeats itself, that it refuses what it cannot judge."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_core.config import EvaluateConfig, MachineConfig
from rlhf_core.errors import ConfigError, DataError, RlhfError
from rlhf_core.evaluation import policy_measurement
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import encode_prompts, load_tokenizer
from tasks import paths
from tests.support.evaluate_stage import PARAMS, run, write_prompts


def test_figures_tables_and_samples(root: Path):
    metrics, out, log = run(root)
    json.dumps(metrics, allow_nan=False)
    assert metrics["num_prompts"] == 12
    for name in ("ppo", "dpo"):
        assert metrics[name]["wins"] + metrics[name]["ties"] + metrics[name]["losses"] == 12
        assert metrics[name]["win_rate_low"] <= metrics[name]["win_rate"] <= metrics[name]["win_rate_high"]
        assert set(metrics[name]["judges"]) == {"gold", "reward_model"}
        assert set(metrics[name]["judges"]["gold"]) == {"T=1", "T=0"}
        assert metrics[name]["judges"]["reward_model"]["T=1"]["order_consistency"] == 1.0
    responses = pq.read_table(out / "responses.parquet").to_pylist()
    assert len(responses) == 3 * 2 * 12
    assert {row["prompt"] for row in responses} == set(
        pq.read_table(root / paths.VALIDATE / "heldout_prompts.parquet")["prompt"].to_pylist()[-12:]
    )
    comparisons = pq.read_table(out / "comparisons.parquet").to_pylist()
    assert len(comparisons) == 2 * 2 * 2 * 12
    won = [row for row in comparisons if (row["model"], row["temperature"], row["judge"]) == ("dpo", 1.0, "gold")]
    assert len(won) == 12
    assert sum(row["outcome"] == "win" for row in won) == metrics["dpo"]["wins"]
    assert all((row["score"] > row["sft_score"]) == (row["outcome"] == "win") for row in won)
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples) == 4
    assert all(set(sample["responses"]) == {"sft", "ppo", "dpo"} for sample in samples)
    assert log.rows[-1] == (6, 6, sum(row["num_tokens"] for row in responses))


def test_equal_weights_do_not_drift_and_draw_other_samples(root: Path):
    metrics, out, _ = run(root)
    assert metrics["ppo"]["kl_to_sft"] == 0.0
    assert metrics["dpo"]["kl_to_sft"] > 0.01
    assert metrics["ppo"]["judges"]["reward_model"]["T=0"]["ties"] == 12
    rows = pq.read_table(out / "responses.parquet").to_pylist()
    texts = {
        name: [row["response"] for row in rows if (row["model"], row["temperature"]) == (name, 1.0)]
        for name in ("sft", "ppo")
    }
    assert texts["sft"] != texts["ppo"]


def test_the_same_response_ties_in_whatever_batch_it_is_scored(root: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = iter([5, 3, 12] * 4)
    scorer = policy_measurement.reward_scores
    monkeypatch.setattr(
        policy_measurement, "reward_scores", lambda *a, **k: scorer(*a, **(k | {"batch_size": next(sizes)}))
    )
    metrics, _, _ = run(root)
    assert metrics["ppo"]["judges"]["reward_model"]["T=0"]["ties"] == 12


def test_the_same_run_writes_the_same_bytes(root: Path):
    first, one, _ = run(root)
    second, other, _ = run(root, out="again")
    assert first == second
    assert tree_digest(one) == tree_digest(other)


def test_models_side_by_side_and_one_after_the_other_write_the_same_bytes(root: Path):
    outcomes = {}
    for at_once in (1, 3):
        params = PARAMS.model_copy(update={"machine": MachineConfig(at_once=at_once)})
        metrics, out, log = run(root, params, f"out-{at_once}")
        outcomes[at_once] = metrics, tree_digest(out), log.rows[-1]
    assert outcomes[1] == outcomes[3]


def test_texts_that_are_cut_are_counted_once_however_many_models_read_them(root: Path):
    prompts = pq.read_table(root / paths.VALIDATE / "heldout_prompts.parquet")["prompt"].to_pylist()
    tokenizer = load_tokenizer(root / paths.SFT / "model")
    lengths = sorted(len(ids) for ids in encode_prompts(tokenizer, prompts[-12:], 10_000))
    limit = lengths[7]  # cuts what is longer
    cut = sum(length > limit for length in lengths)
    assert 0 < cut < 12
    found = {}
    for at_once in (1, 2):
        model = PARAMS.model.model_copy(update={"max_prompt_tokens": limit})
        params = PARAMS.model_copy(update={"machine": MachineConfig(at_once=at_once), "model": model})
        found[at_once] = run(root, params, f"out-{at_once}")[0]
    assert found[1]["prompts_cut"] == cut
    assert found[1] == found[2]


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_policy_that_is_not_there_is_one_error(root: Path, at_once: int, capfd: pytest.CaptureFixture[str]):
    shutil.rmtree(root / "artifacts/align/dpo/model")
    params = PARAMS.model_copy(update={"machine": MachineConfig(at_once=at_once)})
    with pytest.raises(RlhfError, match=r"artifacts/align/dpo/model.*Fix: "):
        run(root, params)
    assert "Traceback" not in capfd.readouterr().err


def test_drift_is_measured_at_temperature_one_whatever_is_compared(root: Path):
    full, _, _ = run(root)
    greedy = PARAMS.model_copy(update={"evaluate": PARAMS.evaluate.model_copy(update={"temperatures": (0.0,)})})
    metrics, out, _ = run(root, greedy, "greedy")
    assert metrics["dpo"]["kl_to_sft"] == full["dpo"]["kl_to_sft"]
    assert set(metrics["dpo"]["lengths"]) == {"T=0"}
    assert {row["temperature"] for row in pq.read_table(out / "responses.parquet").to_pylist()} == {0.0}


def test_other_data_is_judged_by_the_reward_model_and_not_by_gold(root: Path):
    write_prompts(root, ["Human: how do I boil an egg?", "Human: what is the capital of France?"])
    with pytest.raises(ConfigError, match=r"evaluate\.judges: 'gold'.*Fix: evaluate\.judges: \[reward_model\]"):
        run(root)
    settings = EvaluateConfig(judges=("reward_model",), num_samples=1)
    metrics, out, _ = run(root, PARAMS.model_copy(update={"evaluate": settings}), "again")
    assert metrics["verdict"]["judge"] == "reward_model"
    assert metrics["verdict"]["simulated"] is False
    assert metrics["dpo"]["gold"] is None
    assert metrics["dpo"]["truthful_share_gain"] is None
    assert all(row["gold"] is None for row in pq.read_table(out / "responses.parquet").to_pylist())


def test_no_heldout_prompts_is_refused(root: Path):
    write_prompts(root, [])
    with pytest.raises(DataError, match=r"no held-out prompts\. Fix"):
        run(root)


def test_reward_scores_do_not_depend_on_the_batch(root: Path):
    model = RewardModel.load(root / "artifacts/reward/model")
    prompts, responses = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]], [[20, 1], [21, 22, 23, 1], [24], [25, 26, 1]]
    alone = [reward_scores(model, [p], [r], pad_id=0, batch_size=1)[0] for p, r in zip(prompts, responses, strict=True)]
    together = reward_scores(model, prompts, responses, pad_id=0, batch_size=3)
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 4
