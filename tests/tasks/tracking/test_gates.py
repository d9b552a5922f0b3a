from types import MappingProxyType

import pytest

from rlhf_core.config import GatesConfig
from tasks.tracking.gates import Gate, gates_for, refusal
from tasks.tracking.names import ModelVersion, parse_reference

CONFIG = GatesConfig(
    min_win_rate_low=0.6, min_win_rate_low_champion=0.5, max_kl_to_sft=6.0, min_pairwise_accuracy=0.8, min_spearman=0.7
)
GOOD = MappingProxyType({"win_rate_low": 0.65, "kl_to_sft_high": 3.0})
REWARD = MappingProxyType({"pairwise_accuracy": 0.85, "pairwise_accuracy_low": 0.82, "spearman_low": 0.78})


def version(name="rlhf-policy", metrics=GOOD):
    return ModelVersion(
        name=name, version=3, stage="align@ppo", outputs_hash="x", aliases=(), metrics=metrics, tags={}, run_id="r",
        created=0.0,
    )  # fmt: skip


def manifest(reward=REWARD, dirty=()):
    return {"git": {"files": dict.fromkeys(dirty)}, "metrics": {"reward": {**reward, "note": "text", "inner": {}}}}


def failing(candidate, versus=None, config=CONFIG, made_from=None):
    gates = gates_for(candidate, made_from or manifest(), config, versus)
    return [gate.name for gate in gates if not gate.passed]


def test_a_good_policy_passes_every_gate():
    assert failing(version()) == []
    assert [gate.name for gate in gates_for(version(), manifest(), CONFIG, {"win_rate_low": 0.5})] == [
        "lineage", "min_win_rate_low", "min_win_rate_low_champion", "max_kl_to_sft", "min_pairwise_accuracy",
        "min_spearman",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "gate"),
    [
        ({**GOOD, "win_rate_low": 0.5999}, "min_win_rate_low"),
        ({**GOOD, "kl_to_sft_high": 6.001}, "max_kl_to_sft"),
        ({"kl_to_sft_high": 3.0}, "min_win_rate_low"),
        ({**GOOD, "win_rate_low": None}, "min_win_rate_low"),
        ({**GOOD, "win_rate_low": float("nan")}, "min_win_rate_low"),
        ({**GOOD, "kl_to_sft_high": float("nan")}, "max_kl_to_sft"),
        ({**GOOD, "kl_to_sft_high": float("-inf")}, "max_kl_to_sft"),
        ({**GOOD, "win_rate_low": float("inf")}, "min_win_rate_low"),
    ],
)
def test_a_figure_beyond_its_limit_or_undefined_does_not_pass(metrics, gate):
    assert failing(version(metrics=metrics)) == [gate]


def test_gates_read_the_end_of_the_interval_and_not_the_figure():
    """Beside it the figure itself may be as good as it likes."""
    metrics = {**GOOD, "win_rate": 0.99, "win_rate_low": 0.55, "kl_to_sft": 0.1, "kl_to_sft_high": 7.0}
    reward = {"pairwise_accuracy": 0.99, "pairwise_accuracy_low": 0.7, "spearman": 0.99, "spearman_low": 0.6}
    assert failing(version(metrics=metrics), made_from=manifest(reward)) == [
        "min_win_rate_low", "max_kl_to_sft", "min_pairwise_accuracy", "min_spearman",
    ]  # fmt: skip


def test_the_limit_itself_passes():
    assert failing(version(metrics={"win_rate_low": 0.6, "kl_to_sft_high": 6.0})) == []


def test_a_champion_must_be_beaten_and_an_impossible_comparison_is_no_pass():
    assert failing(version(), {"win_rate_low": 0.49}) == ["min_win_rate_low_champion"]
    assert failing(version(), {}) == ["min_win_rate_low_champion"]
    assert failing(version(), None) == []


def test_the_reward_model_behind_a_policy_is_held_to_its_gates():
    assert failing(version(), made_from=manifest({})) == ["min_pairwise_accuracy", "min_spearman"]
    assert failing(version(), made_from=manifest({**REWARD, "spearman_low": 0.69})) == ["min_spearman"]
    assert failing(version(), made_from=manifest({**REWARD, "spearman_low": None})) == ["min_spearman"]
    without = CONFIG.model_copy(update={"min_spearman": None})
    assert failing(version(), config=without, made_from=manifest({"pairwise_accuracy_low": 0.9})) == []


def test_a_reward_model_is_judged_by_its_own_figures():
    assert failing(version("rlhf-reward", metrics=REWARD), made_from=manifest({})) == []
    below = {**REWARD, "pairwise_accuracy_low": 0.79}
    assert failing(version("rlhf-reward", metrics=below)) == ["min_pairwise_accuracy"]
    asked = CONFIG.model_copy(update={"max_ece": 0.05})
    assert failing(version("rlhf-reward", metrics={**REWARD, "ece_high": 0.06}), config=asked) == ["max_ece"]
    assert failing(version("rlhf-reward", metrics={**REWARD, "ece_high": 0.05}), config=asked) == []
    assert failing(version("rlhf-reward", metrics=REWARD), config=asked) == ["max_ece"]


@pytest.mark.parametrize(
    ("figures", "gates"),
    [
        ({"heldout_loss_high": 1.0, "finished_share_low": 0.9}, []),
        ({"heldout_loss_high": 1.01, "finished_share_low": 0.9}, ["max_heldout_loss"]),
        ({"heldout_loss_high": 1.0, "finished_share_low": 0.89}, ["min_finished_share"]),
        ({}, ["max_heldout_loss", "min_finished_share"]),
        ({"heldout_loss_high": None, "finished_share_low": float("nan")}, ["max_heldout_loss", "min_finished_share"]),
    ],
)
def test_an_sft_model_is_judged_by_its_held_out_loss_and_by_whether_it_ends_its_replies(figures, gates):
    asked = CONFIG.model_copy(update={"max_heldout_loss": 1.0, "min_finished_share": 0.9})
    assert failing(version("rlhf-sft", metrics=figures), config=asked) == gates
    off = asked.model_copy(update={"max_heldout_loss": None, "min_finished_share": None})
    assert failing(version("rlhf-sft", metrics=figures), config=off) == []


def test_uncommitted_code_bars_and_carried_files_do_not():
    sft = version("rlhf-sft", metrics={"heldout_loss_high": 1.0, "finished_share_low": 1.0})
    assert failing(sft, made_from=manifest(dirty=["params.yaml", "dvc.lock", "data.dvc"])) == []
    dirty = manifest(dirty=["params.yaml", "tasks/stages/sft/run.py"])
    assert failing(sft, made_from=dirty) == ["lineage"]
    assert "tasks/stages/sft/run.py" in refusal("rlhf-sft/3", gates_for(sft, dirty, CONFIG, None))


def test_a_refusal_names_gate_figure_and_limit():
    poor = version(metrics={"win_rate_low": 0.512, "kl_to_sft_high": 9.5})
    text = refusal("rlhf-policy/3", gates_for(poor, manifest(), CONFIG, None))
    assert "min_win_rate_low" in text
    assert "0.512" in text
    assert ">= 0.6" in text
    assert "max_kl_to_sft" in text
    assert "9.5" in text
    assert "lineage" not in text
    assert refusal("x", [Gate(name="g", figure=1.0, limit=1.0, at_least=True, detail="d")]) is None


def test_references():
    assert parse_reference("rlhf-policy@candidate") == ("rlhf-policy", "candidate")
    assert parse_reference("rlhf-reward/12") == ("rlhf-reward", 12)
