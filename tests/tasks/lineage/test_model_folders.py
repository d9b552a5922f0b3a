"""Model folders that `params.yaml` names: which, what is refused before anything starts, and copies in worktrees."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_core.config import ModelConfig, Params
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.policy import build_policy, save_policy
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import train_tokenizer
from tasks.lineage.model_folders import ModelFolder, check_model_folders, copy_model_folders, model_folders

ROOT = Path(__file__).parents[3]
OWN = "model: {source: folder, path: models/own}\n"
FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}


def model_folder(folder: Path) -> Path:
    """Files as a model has them, for what only copies them."""
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folder `models`: a language model (`good`), reward models, and one of each that lacks a tensor."""
    models, tokenizer = tmp_path_factory.mktemp("checkout") / "models", train_tokenizer(["some words"], 270)
    cfg = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=16)
    policy = build_policy(cfg, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    save_policy(policy, tokenizer, models / "good")
    scorer = RewardModel.from_policy(policy, "last", seed=0)
    scorer.save(models / "scorer", tokenizer)
    RewardEnsemble([scorer, scorer], "mean").save(models / "scorers", tokenizer)
    for name, file in (("good", "."), ("scorer", "."), ("scorers", "member-1")):
        shutil.copytree(models / name, models / f"less-{name}")
        weights = models / f"less-{name}" / file / "model.safetensors"
        tensors = load_file(weights)
        tensors.pop(next(key for key in tensors if key.endswith("layers.0.mlp.down_proj.weight")))
        save_file(tensors, weights, metadata={"format": "pt"})
    (models / "half").mkdir()
    (models / "half/w.bin").write_text("{}")
    return models


def test_every_key_that_names_a_folder_is_known() -> None:
    """Those that the schema describes as folders, and no others; a guard that is off reads none."""
    text = (
        "model: {source: folder, path: /abs/a}\n"
        "generate: {models: [models/b, models/c], best_of: {reward_model: models/d}}\n"
        "align: {ppo: {reward_model: models/i, guard: {every: 1, scorer: models/e}},\n"
        "  chain: {ppo: {reward_model: models/j, guard: {every: 2, scorer: models/f}}}}\n"
        "reward: {init: models/g}\n"
        "evaluate: {judge_model: models/h}"
    )
    found = model_folders(text)
    assert found == [
        ModelFolder("model.path", "/abs/a"),
        ModelFolder("generate.models", "models/b"),
        ModelFolder("generate.models", "models/c"),
        ModelFolder("generate.best_of.reward_model", "models/d"),
        ModelFolder("reward.init", "models/g"),
        ModelFolder("evaluate.judge_model", "models/h"),
        ModelFolder("align.ppo.reward_model", "models/i"),
        ModelFolder("align.chain.ppo.reward_model", "models/j"),
        ModelFolder("align.ppo.guard.scorer", "models/e"),
        ModelFolder("align.chain.ppo.guard.scorer", "models/f"),
    ]
    assert [folder.is_relative for folder in found] == [False, *[True] * (len(found) - 1)]
    schema = Params.model_json_schema(by_alias=True)

    def described(section: dict[str, Any], before: str) -> Iterator[str]:
        for name, field in section.get("properties", {}).items():
            yield from described(schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}), f"{before}{name}.")
            if re.match(r"(local )?folders? ", field.get("description", "")):
                yield f"{before}{name}"

    assert set(described(schema, "")) == {folder.key for folder in found}
    assert model_folders("align: {ppo: {guard: {every: 0, scorer: models/e}}}") == []
    assert model_folders("align: {ppo: {guard: {every: 1, scorer: 'own.module:function'}}}") == []


def test_models_from_numbers_need_no_folder(tmp_path: Path) -> None:
    demo = (ROOT / "params.yaml").read_text()
    assert model_folders(demo) == []
    check_model_folders(tmp_path, demo)
    assert model_folders("{}") == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (OWN, r"params\.yaml: model\.path: .*/models/own: there is no such folder\. Fix: "),
        (
            "model: {source: folder, path: models/half}",
            r"model\.path: .*/models/half: missing config\.json; model\.safetensors \(w\.bin is not read.*\. Fix: ",
        ),
        (
            "model: {source: folder, path: ../models/good}",
            r"model\.path: \.\./models/good leads out of the checkout.*Fix: an",
        ),
        ("model: {path: models/good}", r"model\.path: models/good would not be read: model\.source is config\. Fix: "),
        ("generate: {models: [models/good, models/x]}", r"generate\.models: .*/models/x: there is no such folder"),
        (
            "generate: {best_of: {reward_model: models/r}}",
            r"best_of\.reward_model: .*/models/r: there is no such folder",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_with_key_and_cure(models: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        check_model_folders(models.parent, text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


GUARD = "guard: {{every: 1, scorer: {}}}"


@pytest.mark.parametrize(
    ("text", "key", "folder"),
    [
        ("model: {source: folder, path: models/less-good}", "model.path", "less-good"),
        ("generate: {models: [models/good, models/less-good]}", "generate.models", "less-good"),
        ("generate: {best_of: {reward_model: models/less-scorer}}", "generate.best_of.reward_model", "less-scorer"),
        ("generate: {best_of: {reward_model: models/less-scorers}}", "generate.best_of.reward_model", "less-scorers"),
        (f"align: {{ppo: {{{GUARD.format('models/less-scorer')}}}}}", "align.ppo.guard.scorer", "less-scorer"),
        (
            f"align: {{chain: {{ppo: {{{GUARD.format('models/less-scorer')}}}}}}}",
            "align.chain.ppo.guard.scorer",
            "less-scorer",
        ),
    ],
)
def test_a_missing_tensor_is_named_whatever_key_names_the_folder(
    models: Path, text: str, key: str, folder: str
) -> None:
    words = (
        rf"^params\.yaml: {key}: .*/{folder}(/member-1)?: .* 1 missing: (model\.)?layers\.0\.mlp\.down_proj\.weight\."
    )
    with pytest.raises(ConfigError, match=words):
        check_model_folders(models.parent, text)
    check_model_folders(models.parent, text.replace("less-", ""))


def test_the_limits_of_the_run_are_held_against_what_the_model_reads(models: Path) -> None:
    own = "model: {source: folder, path: models/good, max_prompt_tokens: %d, max_response_tokens: 16}"
    check_model_folders(models.parent, own % 200)
    with pytest.raises(ConfigError, match=r"model\.path: .*/good: .* make 217, this model reads 216"):
        check_model_folders(models.parent, own % 201)
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.chat: .*good has no chat template"):
        check_model_folders(models.parent, own.replace("max_prompt", "chat: template, max_prompt") % 200)


def test_what_can_be_used_is_not_refused(models: Path, tmp_path: Path) -> None:
    check_model_folders(
        models.parent,
        "model: {source: folder, path: models/good}\n"
        "generate: {models: [models/good], best_of: {reward_model: models/scorers}}\n"
        f"align: {{ppo: {{{GUARD.format('models/scorer')}}}}}",
    )
    check_model_folders(tmp_path / "elsewhere", f"model: {{source: folder, path: {models / 'good'}}}")


def test_a_worktree_gets_copies_with_links_followed_and_its_own_files_kept(tmp_path: Path) -> None:
    """As a download cache lays a folder out: a link to a folder of links to files."""
    home, worktree, store = tmp_path / "home", tmp_path / "worktree", tmp_path / "store"
    model_folder(store / "blobs")
    (store / "snapshot").mkdir()
    for name in FILES:
        (store / "snapshot" / name).symlink_to(store / "blobs" / name)
    (home / "models").mkdir(parents=True)
    (home / "models/own").symlink_to(store / "snapshot")
    (worktree / "models/own").mkdir(parents=True)
    (worktree / "models/own/config.json").write_text("committed")
    copy_model_folders(home, worktree, OWN + "generate: {models: [models/own, models/gone]}")
    copied = worktree / "models/own"
    assert {path.name: path.read_text() for path in copied.iterdir()} == FILES | {"config.json": "committed"}
    assert not any(path.is_symlink() for path in (copied, *copied.iterdir()))
    (copied / "tokenizer.json").write_text("changed in the run")
    assert (store / "blobs/tokenizer.json").read_text() == "{}"


def test_a_folder_with_an_absolute_path_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And needs no room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    own = model_folder(tmp_path / "elsewhere/own")
    (tmp_path / "worktree").mkdir()
    before = tree_digest(tmp_path)
    copy_model_folders(tmp_path, tmp_path / "worktree", f"model: {{source: folder, path: {own}}}")
    assert tree_digest(tmp_path) == before


def test_a_disk_without_room_is_said_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "home/models/own")
    (tmp_path / "worktree").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(EnvironmentProblem, match=r"model\.path: a copy of models/own takes .* Fix: free some space"):
        copy_model_folders(tmp_path / "home", tmp_path / "worktree", OWN)
    assert not list((tmp_path / "worktree").iterdir())


def test_a_copy_that_was_broken_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, worktree = tmp_path / "home", tmp_path / "worktree"
    (home / "models/own").mkdir(parents=True)
    (home / "models/own/model.safetensors").write_bytes(b"all of it")
    worktree.mkdir()
    params = "model: {source: folder, path: models/own}\n"

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tasks.lineage.model_folders.shutil.copyfile", half)
        with pytest.raises(KeyboardInterrupt):
            copy_model_folders(home, worktree, params)
    copy_model_folders(home, worktree, params)
    assert {path.name: path.read_bytes() for path in (worktree / "models/own").iterdir()} == {
        "model.safetensors": b"all of it"
    }
