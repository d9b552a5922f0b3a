"""Somebody deletes things in the MLflow page while runs and people go on."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.tracking import MODEL, STAGE, gated, record_policy, write_model

from rlhf_core.errors import EnvironmentProblem, GateRefused
from tasks.tracking import Recorder, compare_versions, flush, list_versions, pending, promote, read_audit, rollback
from tasks.tracking.names import RUN_KEY
from tasks.tracking.registry import aliases_of
from tasks.tracking.store import open_store

PARAMS = gated(min_pairwise_accuracy=0.0)


def record(checkout: Path, key: str, content: str | None = None):
    """A run with one stage, curves and a registered model."""
    write_model(checkout, content or key)
    recorder = Recorder(checkout, key)
    recorder.start_stage(STAGE, params={"lr": 0.1})
    recorder.metrics(STAGE, [{"step": step, "metrics": {"loss/train": 1.0}} for step in range(3)])
    recorder.register(STAGE, MODEL, {"reward": 1.0})
    recorder.finish_stage(STAGE)
    return recorder.close()


def run_names(store):
    return sorted(run.data.tags[RUN_KEY] for run in store.client.search_runs([store.experiment_id]))


def type_in(checkout, told):
    """Type the command that is named as the cure, as it stands and where the person stands."""
    command = re.search(r"restore it \((.*?)\)+[;,]", str(told))[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    before = sorted(path.name for path in checkout.iterdir())
    typed = ["env", *shlex.split(command)]  # which takes `NAME=value` in front of a command as a shell does
    done = subprocess.run(typed, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in checkout.iterdir()) == before, "and leaves nothing behind"


def test_records_wait_for_a_deleted_experiment_and_come_when_it_is_restored(checkout, store):
    assert str(record(checkout, "one")) == ""
    store.client.delete_experiment(store.experiment_id)
    told = record(checkout, "two")
    assert (told.sent, told.refused) == (0, ())
    assert told.pending == pending(checkout) > 4
    assert "experiment 'rlhf' was deleted in MLflow" in str(told)
    assert f"mlflow experiments restore --experiment-id {store.experiment_id}" in str(told)
    assert "rlhf sync" in str(told)
    assert flush(checkout).pending == told.pending
    type_in(checkout, told)
    assert str(flush(checkout)) == ""
    assert pending(checkout) == 0
    assert run_names(store) == ["one", f"one/{STAGE}", "two", f"two/{STAGE}"]
    assert len(list_versions(checkout, "rlhf-policy")) == 2


def test_an_experiment_that_was_renamed_stays_the_one_that_runs_belong_to(checkout, store):
    recorder = Recorder(checkout, "run")
    recorder.start_stage(STAGE)
    recorder.version("none", 30.0)
    store.client.rename_experiment(store.experiment_id, "shop assistant")
    recorder.metrics(STAGE, [{"step": 1, "metrics": {"loss/train": 1.0}}])
    recorder.finish_stage(STAGE)
    assert str(recorder.close()) == ""
    assert str(record(checkout, "two")) == ""
    assert run_names(store) == ["run", f"run/{STAGE}", "two", f"two/{STAGE}"]
    assert sorted(one.name for one in store.client.search_experiments()) == ["Default", "shop assistant"]


def test_an_experiment_of_somebody_else_is_not_taken_for_ours(checkout, store):
    """The note of a store outlives its database: the number may be another experiment's by then."""
    store.client.rename_experiment(store.experiment_id, "theirs")
    assert open_store(checkout).experiment_id != store.experiment_id


def test_records_wait_for_a_run_that_was_deleted_while_it_went_on(checkout, store):
    recorder = Recorder(checkout, "run")
    recorder.start_stage(STAGE)
    recorder.version("none", 30.0)
    child = recorder.run_id(STAGE)
    store.client.delete_run(child)
    recorder.metrics(STAGE, [{"step": 1, "metrics": {"loss/train": 1.0}}])
    recorder.finish_stage(STAGE, "FINISHED", {"loss": 0.2})
    told = recorder.close()
    assert told.pending == 4
    assert told.refused == ()
    assert f"run run/{STAGE} was deleted in MLflow" in str(told)
    assert child in str(told)
    type_in(checkout, told)
    assert flush(checkout).pending == 0
    assert store.client.get_run(child).data.metrics == {"loss/train": 1.0, "loss": 0.2}
    assert store.client.get_run(child).info.status == "FINISHED"


def test_a_store_that_lost_everything_gets_the_run_anew(checkout, store, empty_store):
    recorder = Recorder(checkout, "run", params={"seed": 1})
    recorder.start_stage(STAGE)
    recorder.version("none", 30.0)
    (checkout / ".rlhf/mlflow.db").write_bytes(empty_store.read_bytes())
    recorder.metrics(STAGE, [{"step": 1, "metrics": {"loss/train": 1.0}}])
    recorder.finish_stage(STAGE)
    told = recorder.close()
    told = told if not told.pending else flush(checkout)
    assert (told.pending, told.refused) == (0, ())
    assert run_names(store) == ["run", f"run/{STAGE}"]


def test_what_the_store_refuses_is_said_kept_and_sent_by_a_later_sync(checkout, store, monkeypatch):
    from mlflow.exceptions import MlflowException

    from tasks.tracking import registration

    def too_old(*_, **__):
        raise MlflowException("no such thing as a logged model here", error_code=4)  # a server of years ago

    with monkeypatch.context() as patch:
        patch.setattr(registration.logged_model, "log", too_old)
        told = record(checkout, "run")
    assert told.pending == 0
    assert told.refused == ("registration of rlhf-policy: no such thing as a logged model here",)
    assert "registration of rlhf-policy: no such thing as a logged model here" in str(told)
    assert "rlhf sync" in str(told)
    assert pending(checkout) == 1
    assert list_versions(checkout) == []
    write_model(checkout, "what a later run made")
    assert str(flush(checkout)) == ""
    assert [str(version) for version in list_versions(checkout)] == ["rlhf-policy/1"]
    assert pending(checkout) == 0
    assert not list((checkout / ".rlhf/spool/run.files").rglob("weights"))


def test_thousands_of_uncommitted_files_bar_no_registration(checkout, store):
    for number in range(3000):
        (checkout / f"document_of_a_customer_{number:05d}.json").write_text("{}")
    assert str(record(checkout, "run")) == ""
    (version,) = list_versions(checkout)
    assert all(len(value) < 100 for value in version.tags.values())
    with pytest.raises(GateRefused, match=r"lineage.*is 3000"):
        promote(checkout, "rlhf-policy/1", params=PARAMS)


def test_a_value_that_is_too_long_is_cut_marked_and_said(checkout, store):
    recorder = Recorder(checkout, "run", tags={"overrides": "x" * 9000}, params={"long": "y" * 7000, "short": "z"})
    told = recorder.close(why="boom " * 3000)
    assert (told.pending, told.refused) == (0, ())
    assert set(told.cut) == {"tag overrides", "long", "tag failure", "tag mlflow.note.content"}
    assert "cut there: tag overrides, long" in str(told)
    run = store.client.search_runs([store.experiment_id])[0]
    assert run.data.params["short"] == "z"
    assert run.data.params["long"].endswith("… (cut: 7000 characters in all)")
    assert len(run.data.params["long"]) == 6000
    assert len(run.data.tags["overrides"]) == 8000


@pytest.fixture
def promoted(checkout):
    """`rlhf-policy/1` was champion before `rlhf-policy/2`."""
    record_policy(checkout, "one", "first", scores=[0.0] * 40)
    record_policy(checkout, "two", "second", scores=[1.0] * 40)
    promote(checkout, "rlhf-policy/1", params=PARAMS)
    promote(checkout, "rlhf-policy/2", params=PARAMS)
    return checkout


def test_rollback_to_a_version_that_was_deleted_is_one_line_and_moves_nothing(promoted, store):
    store.client.delete_model_version("rlhf-policy", "1")
    before = len(read_audit(promoted))
    for _ in range(2):
        with pytest.raises(GateRefused, match=r"policy/1, champion before .* was deleted.*Fix: promote") as refused:
            rollback(promoted, "rlhf-policy")
        assert "\n" not in str(refused.value)
    assert aliases_of(store, "rlhf-policy") == {"candidate": 2, "champion": 2}
    assert len(read_audit(promoted)) == before


def test_rollback_passes_over_a_deleted_version_that_was_previous_before(promoted, store):
    record_policy(promoted, "three", "third", scores=[2.0] * 40)
    promote(promoted, "rlhf-policy/3", params=PARAMS)
    store.client.delete_model_version("rlhf-policy", "1")
    assert rollback(promoted, "rlhf-policy").champion == 2
    assert aliases_of(store, "rlhf-policy") == {"candidate": 3, "champion": 2}


def test_rollback_of_a_champion_or_a_model_that_was_deleted(promoted, store):
    store.client.delete_model_version("rlhf-policy", "2")
    with pytest.raises(GateRefused, match="champion is none, the last promotion on record is of rlhf-policy/2"):
        rollback(promoted, "rlhf-policy")
    store.client.delete_registered_model("rlhf-policy")
    with pytest.raises(GateRefused, match="no promotion to undo"):
        rollback(promoted, "rlhf-policy")
    assert list_versions(promoted) == []


def test_a_version_that_goes_while_it_is_promoted_is_refused_and_the_attempt_closed(promoted, store, monkeypatch):
    from tasks.tracking import promotion

    record_policy(promoted, "three", "third", scores=[2.0] * 40)
    note = promotion.append_audit

    def delete_then_note(home, row):
        if row.outcome == "intended":
            store.client.delete_model_version("rlhf-policy", "3")
        return note(home, row)

    monkeypatch.setattr(promotion, "append_audit", delete_then_note)
    with pytest.raises(GateRefused, match="rlhf-policy/3, to be champion, was deleted"):
        promote(promoted, "rlhf-policy/3", params=PARAMS)
    assert aliases_of(store, "rlhf-policy")["champion"] == 2
    assert [row.outcome for row in read_audit(promoted)[-2:]] == ["intended", "abandoned"]


def test_a_logged_model_that_was_deleted_leaves_a_version_without_figures(promoted, store):
    (model,) = [
        model.model_id
        for model in store.client.search_logged_models([store.experiment_id])
        if json.loads(model.tags["mlflow.modelVersions"])[0]["version"] == 1
    ]
    store.client.delete_logged_model(model)
    one, two = list_versions(promoted)
    assert (one.metrics, two.metrics["win_rate_low"]) == ({}, 0.7)
    for ask in (
        lambda: compare_versions(promoted, "rlhf-policy/1", "rlhf-policy/2", judge="gold", confidence=0.95),
        lambda: promote(promoted, "rlhf-policy/1", params=PARAMS),
    ):
        with pytest.raises(EnvironmentProblem) as problem:
            ask()
        assert "\n" not in str(problem.value)


def test_figures_of_a_version_that_was_deleted_are_set_aside_and_said(checkout, store):
    recorder = Recorder(checkout, "run")
    recorder.start_stage(STAGE)
    key = recorder.register(STAGE, MODEL, {})
    assert str(recorder.version(key)) == "rlhf-policy/1"
    store.client.delete_model_version("rlhf-policy", "1")
    recorder.attach(STAGE, key, {"win_rate_low": 0.7})
    recorder.set_candidates({STAGE: key})
    told = recorder.close()
    assert len(told.refused) == 2
    assert "figures of rlhf-policy: rlhf-policy has no version" in str(told)
    assert "deleted in MLflow" in str(told)
