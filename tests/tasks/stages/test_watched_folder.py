"""Which of the folders under models/ DVC watches for stage `generate`: those that the run reads, and no other."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.project import change_sections
from support.tracking import git

from rlhf_core.errors import ConfigError
from tasks.frame.changes import stage_changes
from tasks.lineage.model_folders import check_model_folders
from tasks.lineage.versioning import create_run_worktree
from tasks.params import check_params, load_params, parse_yaml, resolve_params

ROOT = Path(__file__).parents[3]
CODE = ("rlhf_core", "tasks", "models")
FILES = ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore")
OUTPUTS = (
    "artifacts/validate/table",
    "artifacts/sft/model",
    "artifacts/generate/table",
    "reports/metrics/generate.json",
)


def dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The real graph and code in a repository of its own, with outputs that are only said to be the stages'."""
    project = tmp_path / "project"
    for name in CODE:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, project / name)
    shutil.rmtree(project / "models")
    for name in (*OUTPUTS, "models/none/README.md", "models/used/weights", "models/unused/weights"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    git(project, "init", "--quiet", "--initial-branch", "main")
    dvc(project, "init", "--quiet")
    dvc(project, "config", "core.analytics", "false")
    return project


def reading(project: Path, **generate: object) -> Path:
    """The project, with settings for `generate`, and that stage's lock written as if it had run on what is there."""
    change_sections(project, generate=generate)
    dvc(project, "commit", "--force", "--quiet", "generate")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "start")
    return project


def reasons(project: Path) -> tuple[str, ...]:
    """What DVC says has changed among the inputs of `generate`; the stages before it have never run here."""
    return tuple(reason for reason in stage_changes(project)["generate"] if not reason.startswith("after "))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files under models/ whose bytes DVC reads to hash them, from now on."""
    from dvc_data.hashfile import hash as hashing

    found: list[str] = []
    real = hashing.file_md5

    def noted(fname: str, *arguments: object, **more: object) -> str:
        if "/models/" in fname and "rlhf_core" not in fname:
            found.append(fname.partition("/models/")[2])
        return real(fname, *arguments, **more)

    monkeypatch.setattr(hashing, "file_md5", noted)
    return found


def test_a_folder_that_no_run_reads_is_neither_hashed_nor_a_change(project: Path, hashed: list[str]) -> None:
    reading(project)
    shutil.rmtree(project / ".dvc/tmp", ignore_errors=True)  # with it DVC forgets what it has hashed
    shutil.rmtree(project / ".dvc/site_cache_dir", ignore_errors=True)
    (project / "models/later").mkdir()
    (project / "models/later/model.safetensors").write_bytes(b"\0" * 4096)
    (project / "models/none/README.md").write_text("read again")
    assert reasons(project) == ("models/none",), "the spy sees what is hashed"
    assert hashed == ["none/README.md"]
    (project / "models/none/README.md").write_text("models/none/README.md")
    (project / "models/unused/weights").write_text("others")
    assert reasons(project) == ()
    assert set(hashed) == {"none/README.md"}


@pytest.mark.parametrize(
    "settings",
    [
        {"models": ["models/used"], "models_folder": "models/used"},
        {"best_of": {"scorer": "reward_model", "reward_model": "models/used"}, "models_folder": "models/used"},
    ],
)
def test_a_folder_that_the_stage_reads_is_watched_and_its_neighbour_is_not(
    project: Path, hashed: list[str], settings: dict[str, object]
) -> None:
    reading(project, **settings)
    assert reasons(project) == ()
    (project / "models/unused/weights").write_text("others")
    assert reasons(project) == ()
    (project / "models/used/weights").write_text("others")
    assert reasons(project) == ("models/used",)
    assert set(hashed) == {"used/weights", "none/README.md"}, "the placeholder stands for a pretrained folder of sft"
    assert "models/used" in dvc(project, "status", "generate")


def test_a_worktree_watches_the_folders_that_its_run_names(project: Path) -> None:
    reading(project)
    shutil.copytree(project / "models/used", project / "models/scorer")
    overrides = ["generate.models=[models/used]", "generate.best_of.reward_model=models/scorer"]
    text = resolve_params(project / "params.yaml", None, overrides)
    worktree = create_run_worktree(project, "two", text, {})
    assert {path.name for path in (worktree / "models").iterdir()} == {"none", "used", "scorer"}
    for name in OUTPUTS:
        (worktree / name).parent.mkdir(parents=True, exist_ok=True)
        (worktree / name).write_text(name)
    dvc(worktree, "commit", "--force", "--quiet", "generate")
    assert reasons(worktree) == ()
    for name in ("used", "scorer"):
        (project / f"models/{name}/weights").write_text("others")
        assert reasons(worktree) == (), "the run has copies"
        (worktree / f"models/{name}/weights").write_text("others")
        assert reasons(worktree) == ("models",)
        (worktree / f"models/{name}/weights").write_text("models/used/weights")


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [
        ([], "models/none"),
        (["generate.models=[models/a]"], "models/a"),
        (["generate.models=[models/a]", "generate.models=[]"], "models/none"),
        (["generate.best_of.reward_model=models/r"], "models/r"),
        (["generate.models=[models/two/a, models/two/b]"], "models/two"),
        (["generate.models=[models/a, models/ab]"], "models"),
        (["generate.models=[models/two/a]", "generate.best_of.reward_model=models/two/r"], "models/two"),
        (["generate.models=[models/two/a]", "generate.models_folder=models/two"], "models/two"),
        (["generate.models=[models/a]", "generate.models=[models/b]"], "models/b"),
    ],
)
def test_a_run_with_settings_of_its_own_finds_the_folder_to_watch(overrides: list[str], watched: str) -> None:
    """By hand: the narrowest folder that holds all that are read; a wider one that somebody names stays."""
    text = resolve_params(ROOT / "params.yaml", None, overrides)
    assert check_params(parse_yaml(text, "p"), "p").generate.models_folder == watched


def test_a_profile_that_names_folders_needs_no_more(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("generate: {models: [models/a]}\n")
    text = resolve_params(ROOT / "params.yaml", profile, [])
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").generate.models_folder == "models/a"
    assert text.count("models_folder:") == 2  # the other one is of align


@pytest.mark.parametrize(
    ("generate", "part"),
    [
        ({"models": ["models/used"]}, "does not hold 'models/used': set generate.models_folder to models/used"),
        ({"models": ["models/used"], "models_folder": "models/use"}, "set generate.models_folder to models/used"),
        (
            {"models": ["models/used", "models/unused"], "models_folder": "models/used"},
            "does not hold 'models/unused': set generate.models_folder to models, which hashes all that lies there, or",
        ),
        ({"models_folder": "data"}, "folder 'data' must lie under models/"),
        ({"models_folder": "models/../data"}, "must lie under models/"),
    ],
)
def test_a_file_of_ones_own_that_watches_another_folder_is_refused(
    project: Path, generate: dict[str, object], part: str
) -> None:
    change_sections(project, generate=generate)
    with pytest.raises(ConfigError) as refused:
        load_params(project / "params.yaml")
    assert part in str(refused.value)
    assert "params.yaml:" in str(refused.value)


def test_a_watched_folder_that_nothing_reads_is_refused(project: Path) -> None:
    change_sections(project, generate={"models_folder": "models/unused"})
    text = (project / "params.yaml").read_text()
    with pytest.raises(ConfigError, match=r"models_folder: models/unused holds no folder .* Fix: .*: models/none"):
        check_model_folders(project, text)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("  models_folder: models/none # the one folder that DVC watches for `models`", "generate.models_folder"),
        ("  models_folder: models/none # the one folder that DVC watches for `ppo", "align.models_folder"),
        ("  path: models/none", "model.path"),
        ("  init: models/none", "reward.init"),
        ("  judge_model: models/none", "evaluate.judge_model"),
    ],
)
def test_a_file_that_does_not_name_what_dvc_needs_is_told_the_line(project: Path, line: str, key: str) -> None:
    """DVC knows no defaults: a `params.yaml` of before, or one that relies on them, cannot be read by it."""
    text = (project / "params.yaml").read_text()
    kept = [each for each in text.splitlines() if not each.startswith(line)]
    assert len(kept) == len(text.splitlines()) - 1
    (project / "params.yaml").write_text("\n".join(kept))
    with pytest.raises(ConfigError) as refused:
        stage_changes(project)
    assert str(refused.value).endswith(f"Fix: name it in params.yaml, such as its default: {key}: models/none")
