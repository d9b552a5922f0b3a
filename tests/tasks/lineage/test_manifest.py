import json

import pytest
from support.tracking import DVC_LOCK, STAGE, git, make_checkout

from rlhf_core.errors import EnvironmentProblem
from tasks.lineage.manifest import (
    bars_promotion,
    build_manifest,
    data_hash,
    flat_params,
    git_state,
    lineage_tags,
    stage_order,
    upstream,
)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "empty").touch()
    return make_checkout(tmp_path / "checkout", tmp_path / "empty")


def test_a_clean_checkout_is_clean(checkout):
    state = git_state(checkout)
    assert state.files == {}
    assert state.digest == "clean"
    assert state.commit == git(checkout, "rev-parse", "HEAD").strip()


def test_changed_new_and_deleted_files_are_named_and_told_apart_by_content(checkout):
    (checkout / "code.py").write_text("changed")
    (checkout / "new name.py").write_text("new")
    (checkout / "dvc.yaml").unlink()
    first = git_state(checkout)
    assert set(first.files) == {"code.py", "new name.py", "dvc.yaml"}
    assert first.files["dvc.yaml"] is None
    (checkout / "code.py").write_text("changed again")
    second = git_state(checkout)
    assert set(second.files) == set(first.files)
    assert first.digest != second.digest != "clean"


def test_only_files_that_the_manifest_carries_may_be_uncommitted():
    assert bars_promotion(["dvc.lock", "data.dvc", "params.yaml"]) == []
    assert bars_promotion(["tasks/stages/sft/run.py", "dvc.lock"]) == ["tasks/stages/sft/run.py"]


def test_a_manifest_carries_what_a_rebuild_needs(checkout):
    manifest = build_manifest(checkout, STAGE)
    assert manifest["params"] == (checkout / "params.yaml").read_text()
    assert manifest["dvc_lock"] == DVC_LOCK
    assert list(manifest["outputs"]) == ["reward", STAGE]
    assert set(manifest["outputs"]["reward"]) == {"artifacts/reward/model/weights", "reports/metrics/reward.json"}
    bounds = {"pairwise_accuracy_low": 0.86, "spearman_low": 0.88}
    assert manifest["metrics"]["reward"] == {"pairwise_accuracy": 0.88, "spearman": 0.9, **bounds}
    assert manifest["environment"]["threads"] == "2"
    assert manifest["environment"]["torch"]
    assert json.loads(json.dumps(manifest)) == manifest


def test_lineage_follows_inputs_and_parameters_and_not_comments(checkout):
    manifest = build_manifest(checkout, STAGE)
    before = lineage_tags(manifest)
    (checkout / "params.yaml").write_text("# a comment\n" + (checkout / "params.yaml").read_text())
    commented = lineage_tags(build_manifest(checkout, STAGE))
    assert commented["params_hash"] == before["params_hash"]
    assert commented["git_dirty"] == before["git_dirty"] == "clean", "the manifest carries the parameters itself"
    (checkout / "code.py").write_text("other code")
    changed = build_manifest(checkout, STAGE)
    assert lineage_tags(changed)["git_dirty"] not in ("clean", before["git_dirty"])
    assert changed["inputs_hash"] != manifest["inputs_hash"]


def test_a_stage_that_never_ran_has_no_manifest(checkout):
    with pytest.raises(EnvironmentProblem, match="no record of stage sft"):
        build_manifest(checkout, "sft")


def test_order_follows_paths_whichever_is_the_folder():
    lock = """
stages:
  a_report: {cmd: x, deps: [{path: reports/metrics}, {path: out/b/part}]}
  b: {cmd: x, deps: [{path: out/z}], outs: [{path: out/b}]}
  z: {cmd: x, outs: [{path: out/z}, {path: reports/metrics/z.json}]}
  other: {cmd: x, outs: [{path: out/bb}]}
"""
    order = stage_order(lock)
    assert order.index("z") < order.index("b") < order.index("a_report")
    assert upstream(lock, "a_report") == ["z", "b", "a_report"]
    assert upstream(lock, "z") == ["z"]


def test_small_readers():
    assert flat_params("a: {b: 1, c: [1, 2]}\nd: x\n") == {"a.b": 1, "a.c": [1, 2], "d": "x"}
    assert flat_params("") == {}
    assert data_hash("outs:\n- md5: abc.dir\n  path: data\n") == "abc.dir"
    assert data_hash("") == ""


def test_a_folder_without_git_is_said_to_be_one(tmp_path):
    with pytest.raises(EnvironmentProblem, match="git rev-parse"):
        git_state(tmp_path)
