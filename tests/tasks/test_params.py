"""params.yaml: everything wrong is refused in one line with place and cure; overlays merge; comments survive."""

from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError
from tasks.params import check_params, load_params, parse_yaml, resolve_params

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nsft:\n  max_stepz: 3\n", ["p:3", "sft.max_stepz", "unknown key", "'max_steps'"]),
        ("sfd:\n  max_steps: 3\n", ["p:1", "sfd", "unknown key", "'sft'"]),
        ("sft:\n  learning_rate: 1e-5\n", ["p:2", "learning_rate", "1.0e-5"]),
        ("sft:\n  max_steps: 0\n", ["p:2", "sft.max_steps", "greater than 0", "not 0"]),
        ("sft:\n  max_steps: '5'\n", ["p:2", "sft.max_steps", "integer"]),
        ("sft:\n  max_steps: true\n", ["p:2", "sft.max_steps", "integer"]),
        ("sft:\n  learning_rate: .nan\n", ["p:2", "sft.learning_rate", "finite"]),
        ("seed: 1\nseed: 2\n", ["p:2", "duplicate key"]),
        ("sft: [\n", ["p:", "not YAML"]),
        ("- 1\n", ["p:1", "expected `section:` lines"]),
        ("align:\n  ppo:\n    rollout_batch: 10\n    minibatch: 3\n", ["p:2", "align.ppo", "must divide"]),
        ("model:\n  source: folder\n", ["p:1", "model", "needs `path`"]),
        ("sft:\n  accumulation: 5\n", ["p:1", "must divide batch_size"]),
    ],
)
def test_bad_parameters_are_refused_in_one_line(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_params(parse_yaml(text, "p"), "p")
    message = str(refused.value)
    assert "\n" not in message
    assert "Fix: " in message or "expected" in message
    for part in parts:
        assert part in message


def test_missing_file_and_bad_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 6"):
        load_params(tmp_path / "params.yaml")


def test_what_the_project_ships_is_valid() -> None:
    load_params(ROOT / "params.yaml")
    for profile in sorted((ROOT / "profiles").glob("*.yaml")):
        resolve_params(ROOT / "params.yaml", profile, [])


def test_profile_then_override_and_comments_stay(tmp_path: Path) -> None:
    base, profile = tmp_path / "params.yaml", tmp_path / "small.yaml"
    base.write_text("# why this seed\nseed: 3\nsft:\n  max_steps: 10 # enough\n  batch_size: 8\n")
    profile.write_text("sft:\n  max_steps: 5\n")
    text = resolve_params(base, profile, ["sft.learning_rate=0.01", "align.algorithms=[dpo]"])
    params = check_params(parse_yaml(text, "p"), "p")
    assert (params.seed, params.sft.max_steps, params.sft.batch_size) == (3, 5, 8)
    assert params.sft.learning_rate == 0.01
    assert params.align.algorithms == ("dpo",)
    assert "# why this seed" in text


def test_a_profile_replaces_the_data_files_whole(tmp_path: Path) -> None:
    base, profile = tmp_path / "params.yaml", tmp_path / "other.yaml"
    base.write_text("data:\n  demonstrations: data/demonstrations.jsonl\n")
    profile.write_text("data:\n  comparisons: data/comparisons.jsonl\n")
    params = check_params(parse_yaml(resolve_params(base, profile, []), "p"), "p")
    assert params.data.demonstrations is None
    assert params.data.comparisons == "data/comparisons.jsonl"


@pytest.mark.parametrize("override", ["sft.max_steps", "=3", "sft..x=1"])
def test_overrides_of_the_wrong_form(tmp_path: Path, override: str) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"not of the form section\.key=value"):
        resolve_params(tmp_path / "params.yaml", None, [override])


def test_an_override_is_checked_and_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"--set sft\.max_steps=-1.*greater than 0"):
        resolve_params(tmp_path / "params.yaml", None, ["sft.max_steps=-1"])


def test_overriding_one_data_file_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("data:\n  demonstrations: data/a.jsonl\n  prompts: data/b.jsonl\n")
    text = resolve_params(tmp_path / "params.yaml", None, ["data.prompts=data/c.jsonl", "data.heldout_share=0.25"])
    data = check_params(parse_yaml(text, "p"), "p").data
    assert (data.demonstrations, data.prompts, data.heldout_share) == ("data/a.jsonl", "data/c.jsonl", 0.25)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"seed={2**63}", "seed: more than 9,223,372,036,854,775,807"),
        (f"sft.max_steps={10**30}", "sft.max_steps: more than 9,223,372,036,854,775,807"),
        (f"reward.learning_rate={10**30}", "reward.learning_rate: more than"),
        ("compute.threads=1025", "compute.threads: input should be less than or equal to 1024"),
        ("compute.processes=1025", "compute.processes: input should be less than or equal to 1024"),
    ],
)
def test_numbers_that_no_library_has_room_for_are_refused_before_the_run(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set {override}: {words}.*Fix: "):
        resolve_params(ROOT / "params.yaml", None, [override])
    assert f"seed: {2**63 - 1}" in resolve_params(ROOT / "params.yaml", None, [f"seed={2**63 - 1}"])
