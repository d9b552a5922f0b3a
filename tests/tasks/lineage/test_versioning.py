import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tracking import git

from rlhf_core.errors import ConfigError, DataError, EnvironmentProblem
from tasks import paths
from tasks.frame.changes import changed_stages
from tasks.lineage.manifest import build_manifest
from tasks.lineage.reproduce import reproduce
from tasks.lineage.versioning import (
    create_run_worktree,
    data_target,
    lock_entry,
    remove_run_worktree,
    tracked_data_hash,
)

# A pipeline in miniature with the interface of the real one: `python -m tasks` is not needed to test DVC and git.
STEP = """\
import json, os, sys
from pathlib import Path
name, source, target = sys.argv[1:]
text = Path(source).read_text()
noise = os.urandom(8).hex() if "random" in text else ""
Path(target).parent.mkdir(parents=True, exist_ok=True)
Path(target).write_text(f"{name}({text.strip()}){noise}")
print("made", target)
"""
DVC_FILE = """\
stages:
  first:
    cmd: python step.py first data/prompts.jsonl artifacts/first/out
    deps: [data, step.py]
    outs: [artifacts/first]
  align:
    matrix: {algorithm: [ppo, dpo]}
    cmd: python step.py ${item.algorithm} artifacts/first/out artifacts/align/${item.algorithm}/out
    deps: [artifacts/first, step.py]
    params: ["align.${item.algorithm}"]
    outs: ["artifacts/align/${item.algorithm}"]
  last:
    cmd: python step.py last artifacts/align/ppo/out artifacts/last/out
    deps: [artifacts/align]
    outs: [artifacts/last]
"""
PARAMS = "data:\n  prompts: data/prompts.jsonl\nalign:\n  ppo: 1\n  dpo: 1\n"
ALL = {"first", "align@ppo", "align@dpo", "last"}


def dvc(root, *arguments):
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )  # for `python step.py`
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout


def file_md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    (root / ".dvc/config").write_text(
        "[core]\n    analytics = false\n    remote = store\n['remote \"store\"']\n    url = ../store\n"
    )
    for name, text in {
        ".gitignore": "/runs/\n/.rlhf/\n/artifacts/\n/data\n",
        ".dvcignore": "/runs/\n/.rlhf/\n",
        "dvc.yaml": DVC_FILE,
        "params.yaml": PARAMS,
        "step.py": STEP,
        "data/prompts.jsonl": "facts\n",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    dvc(root, "add", "--quiet", "data")
    dvc(root, "push", "--quiet")
    dvc(root, "repro", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "start")
    return root


@pytest.fixture
def project(template, tmp_path):
    root = tmp_path / "project"
    subprocess.run(["cp", "-a", str(template), str(root)], check=True)
    return root


def test_nothing_has_changed_after_a_run(project):
    assert changed_stages(project) == set()


def test_a_changed_stage_takes_those_behind_it_along(project):
    (project / "params.yaml").write_text(PARAMS.replace("dpo: 1", "dpo: 2"))
    assert changed_stages(project) == {"align@dpo", "last"}
    (project / "params.yaml").write_text(PARAMS)
    (project / "data/prompts.jsonl").write_text("other facts\n")
    assert changed_stages(project) == ALL


def test_a_broken_pipeline_file_is_a_configuration_error(project):
    (project / "dvc.yaml").write_text("stages:\n  first:\n    nonsense: 1\n")
    with pytest.raises(ConfigError, match=r"dvc\.yaml"):
        changed_stages(project)


def test_lock_entries(project):
    assert lock_entry(project, "align@ppo")["cmd"].startswith("python step.py ppo")
    assert lock_entry(project, "sft") is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("x/harmless-base.test.jsonl.gz", "comparisons.jsonl.gz"),
        ("a.parquet", "comparisons.parquet"),
        ("a.ndjson", "comparisons.ndjson"),
        ("PAIRS.JSONL", "comparisons.jsonl"),
        ("a.jsonl.GZ", "comparisons.jsonl.gz"),
        ("a.csv.jsonl", "comparisons.jsonl"),
        ("X.CSV", "comparisons.csv"),
    ],
)
def test_a_given_file_keeps_its_format_in_its_name(tmp_path, source, target):
    assert data_target("comparisons", tmp_path / source) == paths.DATA / target


@pytest.mark.parametrize("source", ["a", "a.txt", "a.gz", "a.parquet.gz", "a.jsonl.bz2"])
def test_a_given_file_of_no_known_format_is_refused(tmp_path, source):
    with pytest.raises(DataError, match=r"unknown format .* Fix: use one of \.csv"):
        data_target("comparisons", tmp_path / source)


def test_a_run_with_other_parameters_starts_from_the_same_data_and_the_shared_cache(project):
    before = git(project, "status", "--porcelain")
    worktree = create_run_worktree(project, "fast", PARAMS.replace("dpo: 1", "dpo: 2"), {})
    assert worktree == project / "runs/fast"
    assert (worktree / "data/prompts.jsonl").read_text() == "facts\n"
    assert tracked_data_hash(worktree) == tracked_data_hash(project)
    assert paths.home(worktree) == project
    dvc(worktree, "checkout", "--quiet")  # outputs come out of the shared cache
    assert changed_stages(worktree) == {"align@dpo", "last"}
    assert not list((worktree / ".dvc").glob("cache/files/*"))
    assert git(project, "status", "--porcelain") == before
    assert changed_stages(project) == set()
    remove_run_worktree(project, "fast")
    assert not worktree.exists()
    assert "runs/fast" not in git(project, "worktree", "list")


def test_a_run_with_data_of_its_own_has_its_own_data_hash(project, tmp_path):
    given = tmp_path / "mine.v2.jsonl"
    given.write_text("mine\n")
    worktree = create_run_worktree(project, "mine", "# kept\n" + PARAMS, {"prompts": given})
    assert [path.name for path in (worktree / "data").iterdir()] == ["prompts.jsonl"]
    assert (worktree / "data/prompts.jsonl").read_text() == "mine\n"
    assert tracked_data_hash(worktree) != tracked_data_hash(project)
    assert changed_stages(worktree) == ALL
    assert (project / "data/prompts.jsonl").read_text() == "facts\n"


def test_given_data_beside_the_committed_one_and_named_in_the_parameters(project, tmp_path):
    given = tmp_path / "votes.csv"
    given.write_text("a,b\n")
    worktree = create_run_worktree(project, "both", "# kept\n" + PARAMS, {"votes": given})
    assert sorted(path.name for path in (worktree / "data").iterdir()) == ["prompts.jsonl", "votes.csv"]
    text = (worktree / "params.yaml").read_text()
    assert "votes: data/votes.csv" in text
    assert text.startswith("# kept\n")


def test_data_that_left_the_cache_comes_from_the_remote(project):
    subprocess.run(["rm", "-rf", str(project / ".dvc/cache")], check=True)
    worktree = create_run_worktree(project, "pulled", PARAMS, {})
    assert (worktree / "data/prompts.jsonl").read_text() == "facts\n"


def test_names_that_are_taken_or_no_names_are_refused_and_failures_leave_nothing(project, tmp_path):
    create_run_worktree(project, "taken", PARAMS, {})
    with pytest.raises(ConfigError, match="a run of this name is there"):
        create_run_worktree(project, "taken", PARAMS, {})
    with pytest.raises(ConfigError, match="not a plain name"):
        create_run_worktree(project, "../out", PARAMS, {})
    git(project, "rm", "-r", "--quiet", "store")
    git(project, "commit", "--quiet", "--message", "no store")
    subprocess.run(["rm", "-rf", str(project / ".dvc/cache")], check=True)
    with pytest.raises(EnvironmentProblem, match="dvc pull"):
        create_run_worktree(project, "lost", PARAMS, {})
    assert not (project / "runs/lost").exists()


@pytest.mark.integration
def test_a_version_is_built_again_from_its_manifest_alone(project):
    manifest = json.loads(json.dumps(build_manifest(project, "last"), sort_keys=True))  # as a version carries it
    (project / "step.py").write_text("raise SystemExit('the working copy is not used')\n")
    (project / "params.yaml").write_text("{}\n")
    lines = []
    found = reproduce(project, "rlhf-policy/1", manifest, on_line=lines.append)
    assert found.identical, str(found)
    assert found.stages[0] == "first"
    assert found.stages[-1] == "last"
    assert found.files == 4
    assert {line for line in lines if line.startswith("made")} == {
        f"made artifacts/{name}/out" for name in ("first", "align/ppo", "align/dpo", "last")
    }
    assert not list((project / "runs").iterdir())


@pytest.mark.integration
def test_the_first_stage_that_differs_is_named_with_what_may_explain_it(project):
    manifest = build_manifest(project, "last")
    manifest["outputs"]["align@ppo"]["artifacts/align/ppo/out"] = "0" * 64
    manifest["environment"]["torch"] = "1.0"
    found = reproduce(project, "rlhf-policy/1", manifest)
    assert found.stage == "align@ppo"
    assert found.differing == ("artifacts/align/ppo/out",)
    assert found.why[0].startswith("torch was 1.0, is ")
    assert found.stages[0] == "first"
    assert "last" not in found.stages
    assert found.worktree.is_dir()
    assert "align@ppo differs first: artifacts/align/ppo/out" in str(found)


@pytest.mark.integration
def test_a_stage_that_is_not_exact_is_found(project):
    (project / "data/prompts.jsonl").write_text("random\n")
    dvc(project, "add", "--quiet", "data")
    dvc(project, "repro", "--quiet")
    found = reproduce(project, "rlhf-policy/2", build_manifest(project, "last"))
    assert found.stage == "first"


@pytest.fixture
def with_folder(project):
    """The project with a pretrained folder that git ignores; its first stage depends on it, and all stages have run."""
    for name, before, after in (
        ("dvc.yaml", "deps: [data, step.py]", 'deps: [data, step.py, "${model.path}"]'),
        ("params.yaml", "data:\n", "model: {source: folder, path: models/own}\ndata:\n"),
        (".gitignore", "/data\n", "/data\n/models/*\n"),
    ):
        (project / name).write_text((project / name).read_text().replace(before, after))
    (project / "models/own").mkdir(parents=True)
    (project / "models/own/weights").write_text("pretrained")
    dvc(project, "repro", "--quiet")
    git(project, "commit", "--all", "--quiet", "--message", "own folder")
    return project


@pytest.mark.integration
def test_a_version_made_from_a_folder_is_built_again_from_the_same_one_only(with_folder):
    manifest, weights = build_manifest(with_folder, "align@dpo"), with_folder / "models/own/weights"
    found = reproduce(with_folder, "rlhf-policy/1", manifest)
    assert found.identical, str(found)
    assert weights.read_text() == "pretrained"

    weights.write_text("fine-tuned")
    changed = (
        r"rlhf-policy/1: model\.path: \S*/models/own was changed since .* 1 files, 10 bytes and DVC's hash \w+\.dir\."
    )
    with pytest.raises(EnvironmentProblem, match=changed):
        reproduce(with_folder, "rlhf-policy/1", manifest)
    weights.unlink()
    weights.parent.rmdir()
    with pytest.raises(EnvironmentProblem, match=r"rlhf-policy/1: model\.path: \S*/models/own is gone, .* Fix: put"):
        reproduce(with_folder, "rlhf-policy/1", manifest)
    assert not list((with_folder / "runs").iterdir())


@pytest.mark.integration
def test_an_input_with_other_content_is_named_where_a_stage_differs(project):
    manifest = build_manifest(project, "last")
    manifest["dvc_lock"] = manifest["dvc_lock"].replace(file_md5(project / "step.py"), "0" * 32)
    manifest["outputs"]["first"]["artifacts/first/out"] = "0" * 64
    assert reproduce(project, "rlhf-policy/1", manifest).why == ("step.py had other content",)


def test_a_run_in_a_worktree_has_the_folder_and_dvc_knows_it(with_folder):
    worktree = create_run_worktree(with_folder, "own", (with_folder / "params.yaml").read_text(), {})
    assert (worktree / "models/own/weights").read_text() == "pretrained"
    assert not (worktree / "models/own").is_symlink()
    dvc(worktree, "checkout", "--quiet")
    assert changed_stages(worktree) == set()
    assert git(worktree, "status", "--porcelain") == ""
    (with_folder / "models/own/weights").write_text("changed later")
    assert changed_stages(worktree) == set()
    assert changed_stages(with_folder) == ALL


def test_a_commit_that_is_gone_is_said_to_be(project):
    manifest = build_manifest(project, "last")
    manifest["git"]["commit"] = "0" * 40
    with pytest.raises(EnvironmentProblem, match="git worktree add"):
        reproduce(project, "rlhf-policy/1", manifest)
    assert not list((project / "runs").glob("*"))
