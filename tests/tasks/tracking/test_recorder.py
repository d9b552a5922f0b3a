import json
import re
import threading
from pathlib import Path

import pytest
from support.tracking import MODEL, STAGE, git, record_policy, write_model

from rlhf_core.errors import ConfigError
from tasks.tracking import DataSet, Judging, Recorder, delivery, flush, list_versions, pending, resolve_version
from tasks.tracking.names import RUN_KEY
from tasks.tracking.store import open_store, runs_page


def rows(start, stop, offset=0.0):
    return [
        {"step": step, "time": 1.7e9 + step + offset, "metrics": {"loss/train": 1 / step}}
        for step in range(start, stop)
    ]


def runs_by_key(store):
    return {run.data.tags[RUN_KEY]: run for run in store.client.search_runs([store.experiment_id])}


def curve(store, key, name="loss/train"):
    history = store.client.get_metric_history(runs_by_key(store)[key].info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_one_parent_with_a_child_a_stage_curves_and_a_version(checkout, store):
    with Recorder(checkout, "run", tags={"prefect_flow_run_id": "f-1"}, params={"sft": {"lr": 0.1}}) as recorder:
        recorder.start_stage("sft")
        recorder.metrics("sft", rows(1, 1501))
        recorder.finish_stage("sft", "FINISHED", {"heldout_loss": 2.5, "note": "text", "undefined": None})
        recorder.start_stage(STAGE)
        key = recorder.register(STAGE, MODEL, {"reward": 1.5, "broken": float("nan")})
        recorder.finish_stage(STAGE)
        recorder.set_candidates({STAGE: key})
        version = recorder.version(key)
    runs = runs_by_key(store)
    assert set(runs) == {"run", "run/sft", f"run/{STAGE}"}
    parent = runs["run"]
    assert parent.data.params == {"sft.lr": "0.1"}
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} == {None, parent.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert curve(store, "run/sft") == [(step, 1 / step) for step in range(1, 1501)]
    assert runs["run/sft"].data.metrics["heldout_loss"] == 2.5
    assert str(version) == "rlhf-policy/1"
    assert version.aliases == ("candidate",)
    assert version.metrics == {"reward": 1.5, "broken": None}
    assert version.tags["prefect_flow_run_id"] == "f-1"
    assert version.tags["git_commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert recorder.delivery.pending == pending(checkout) == 0


def test_the_same_content_is_registered_once(checkout, store):
    for run in ("one", "two"):
        with Recorder(checkout, run) as recorder:
            recorder.start_stage(STAGE)
            key = recorder.register(STAGE, MODEL, {})
            assert str(recorder.version(key)) == "rlhf-policy/1"
    assert [str(version) for version in list_versions(checkout)] == ["rlhf-policy/1"]
    assert len(store.client.search_logged_models([store.experiment_id])) == 1
    write_model(checkout, "second")
    with Recorder(checkout, "three") as recorder:
        recorder.start_stage(STAGE)
        assert str(recorder.version(recorder.register(STAGE, MODEL, {}))) == "rlhf-policy/2"


def test_rows_given_again_after_a_resume_do_not_double(checkout, store):
    first = Recorder(checkout, "run")
    first.start_stage("sft")
    first.metrics("sft", rows(1, 8))
    first.close("KILLED")
    with Recorder(checkout, "run") as second:
        second.start_stage("sft")
        second.metrics("sft", rows(5, 11, offset=100.0))
        second.finish_stage("sft")
    assert curve(store, "run/sft") == [(step, 1 / step) for step in range(1, 11)]
    assert {run.info.status for run in runs_by_key(store).values()} == {"FINISHED"}


def test_a_store_that_is_away_is_told_later_once(checkout, away):
    key = None
    with Recorder(checkout, "run") as recorder:
        recorder.start_stage(STAGE)
        recorder.metrics(STAGE, rows(1, 30))
        key = recorder.register(STAGE, MODEL, {"reward": 1.0})
        recorder.attach(STAGE, key, {"win_rate_low": 0.6})
        recorder.set_candidates({STAGE: key})
        recorder.finish_stage(STAGE)
        assert recorder.version(key, patience_s=5.0) is None
    assert recorder.delivery.sent == 0
    assert recorder.delivery.pending == pending(checkout) > 5
    assert "127.0.0.1" in recorder.delivery.problem
    write_model(checkout, "what a later run made")

    assert flush(checkout).problem
    away.delenv("MLFLOW_TRACKING_URI")
    sent = flush(checkout)
    assert (sent.pending, sent.refused, sent.problem) == (0, (), None)
    assert flush(checkout) == delivery.Delivery()
    version = resolve_version(checkout, "rlhf-policy@candidate")
    assert version.outputs_hash == key
    assert version.metrics["win_rate_low"] == 0.6
    assert len(curve(open_store(checkout), f"run/{STAGE}")) == 29


def test_a_late_proposal_does_not_undo_a_newer_one(checkout, away):
    with Recorder(checkout, "old") as recorder:
        recorder.start_stage(STAGE)
        recorder.set_candidates({STAGE: recorder.register(STAGE, MODEL, {})})
    away.delenv("MLFLOW_TRACKING_URI")
    newer = record_policy(checkout, "new", "newer", scores=[1.0])
    assert flush(checkout).pending == 0
    assert len(list_versions(checkout, "rlhf-policy")) == 2
    assert resolve_version(checkout, "rlhf-policy@candidate").outputs_hash == newer


class Killed(BaseException):
    pass


def test_a_kill_between_sending_and_noting_doubles_nothing(checkout, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with Recorder(checkout, "run") as recorder:
        recorder.start_stage(STAGE, params={"lr": 1})
        recorder.metrics(STAGE, rows(1, 20))
        recorder.artifact(STAGE, checkout / "params.yaml", "settings")
        key = recorder.register(STAGE, MODEL, {"reward": 1.0})
        recorder.attach(STAGE, key, {"win_rate_low": 0.6})
        recorder.finish_stage(STAGE, "FINISHED", {"reward": 1.0})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    events = pending(checkout)

    class DiesAtTheSecond:
        def __init__(self):
            self.hits = 0

        def __call__(self, name):
            self.hits += 1
            if self.hits == 2:
                raise Killed(name)

    kills = 0
    for _ in range(2 * events):  # an event is sent, then the sender dies; the next one sends it again and goes one on
        with monkeypatch.context() as patch:
            patch.setattr(delivery, "faultpoint", DiesAtTheSecond())
            try:
                flush(checkout)
            except Killed:
                kills += 1
    assert pending(checkout) == 0
    assert kills >= events // 2 - 1
    assert set(runs_by_key(store)) == {"run", f"run/{STAGE}"}
    assert curve(store, f"run/{STAGE}") == [(step, 1 / step) for step in range(1, 20)]
    for name in ("reward", "win_rate_low"):
        assert len(curve(store, f"run/{STAGE}", name)) == 1
    assert [version.metrics for version in list_versions(checkout)] == [{"reward": 1.0, "win_rate_low": 0.6}]
    assert len(store.client.search_logged_models([store.experiment_id])) == 1
    assert not list((checkout / ".rlhf/spool/run.files").rglob("weights"))


def test_a_setting_that_a_resumed_run_changed_stands_beside_the_first_one(checkout, store):
    """MLflow lets no parameter change."""
    recorder = Recorder(checkout, "run")
    recorder.start_stage("sft", params={"lr": 1, "kept": "x"})
    recorder.start_stage("sft", params={"lr": 2, "kept": "x", "new": 3})
    recorder.finish_stage("sft")
    assert str(recorder.close()) == ""
    run = runs_by_key(store)["run/sft"]
    assert run.data.params == {"lr": "1", "kept": "x", "new": "3"}
    assert run.data.tags["params_changed"] == "lr: 1 -> 2"


def test_two_senders_at_once_send_each_event_once(checkout, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with Recorder(checkout, "run") as recorder:
        recorder.start_stage("sft")
        for step in range(1, 200):
            recorder.metrics("sft", rows(step, step + 1))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    results = []
    threads = [threading.Thread(target=lambda: results.append(flush(checkout))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pending(checkout) == 0
    assert sum(result.sent for result in results) == 199 + 3
    assert len(curve(store, "run/sft")) == 199


def test_the_page_opens_on_the_runs_once_a_store_was_opened(checkout, empty_store, monkeypatch):
    server = "http://127.0.0.1:5000"
    assert runs_page(checkout, server) == server
    store = open_store(checkout)
    page = f"{server}/#/experiments/{store.experiment_id}/runs?workflowType=machine_learning"
    assert runs_page(checkout, f"{server}/") == page
    assert store.client.get_experiment(store.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert runs_page(checkout, server) == server


def test_what_people_look_for_stands_on_runs_and_models(checkout, store):
    """Settings, data, why it failed; the logged model says as what it is registered."""
    data = DataSet(name="data", digest="d" * 36, source='{"uri": "data"}', context="training")
    with Recorder(checkout, "run", tags={"run": "run-1", "mlflow.user": "someone"}) as recorder:
        recorder.inputs(None, [data])
        recorder.start_stage(STAGE, params={"align": {"ppo": {"beta": 0.1}}})
        key = recorder.register(STAGE, MODEL, {"train_score": 1.5}, params={"align.ppo": {"beta": 0.1}})
        recorder.attach(
            STAGE,
            key,
            {"win_rate": 0.789, "win_rate_low": 0.755, "win_rate_high": 0.819, "kl_to_sft": 2.27, "gold_gain": None},
            verdict=Judging(judge="gold", simulated=True, temperature=1.0, num_prompts=500, confidence=0.95),
        )
        recorder.finish_stage(STAGE)
        recorder.start_stage("evaluate")
        recorder.finish_stage("evaluate", "FAILED", why="evaluate: no prompts")
        recorder.figures(None, {"ppo.win_rate": 0.789})
    assert str(recorder.delivery) == ""
    runs = runs_by_key(store)
    assert [one.dataset.name for one in runs["run"].inputs.dataset_inputs] == ["data"]
    assert runs["run"].data.metrics == {"ppo.win_rate": 0.789}
    assert runs["run"].data.tags["mlflow.user"] == "someone"
    child = runs[f"run/{STAGE}"]
    assert child.data.params == {"align.ppo.beta": "0.1"}
    assert child.data.metrics["win_rate"] == 0.789, "sorted and filtered beside its settings"
    assert runs["run/evaluate"].data.tags["mlflow.note.content"] == "**Failed**: evaluate: no prompts"
    (model,) = store.client.search_logged_models([store.experiment_id])
    assert model.params == {"align.ppo.beta": "0.1"}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "rlhf-policy", "version": 1}]
    described = store.client.get_model_version("rlhf-policy", "1").description
    for part in (
        "**Better than SFT**: win rate 0.789 (95% interval 0.755 to 0.819) against rlhf-sft by gold (simulated)",
        "KL to SFT 2.27 nats a response", "run `run-1`", "| win_rate_low | 0.755 |", "| gold_gain | undefined |",
    ):  # fmt: skip
        assert part in described
    (version,) = list_versions(checkout)
    assert version.metrics["gold_gain"] is None
    assert all(len(value) <= 64 for value in version.tags.values())


def test_the_filter_of_the_quick_start_finds_which_setting_gave_which_figure(checkout, store):
    (condition,) = re.findall(r"filter ``(.+?)``", (Path(__file__).parents[3] / "docs/quick-start.md").read_text())
    for run, beta, rate in (("one", 0.1, 0.75), ("two", 0.1, 0.6), ("three", 0.5, 0.8)):
        with Recorder(checkout, run, params={"align": {"dpo": {"beta": beta}}}) as recorder:
            recorder.figures(None, {"dpo.win_rate": rate})
    found = store.client.search_runs([store.experiment_id], condition)
    assert [run.data.tags[RUN_KEY] for run in found] == ["one"]
    ordered = store.client.search_runs([store.experiment_id], order_by=["metrics.`dpo.win_rate` DESC"])
    assert [run.data.tags[RUN_KEY] for run in ordered] == ["three", "one", "two"]


def test_a_description_that_a_person_wrote_is_kept_and_an_undefined_figure_may_become_defined(checkout, store):
    with Recorder(checkout, "run") as recorder:
        recorder.start_stage(STAGE)
        key = recorder.register(STAGE, MODEL, {"spearman": None, "kl": 1.0})
        recorder.version(key)
        store.client.update_model_version("rlhf-policy", "1", description="ours, do not use")
        recorder.attach(STAGE, key, {"spearman": 0.5, "kl": None})
    assert store.client.get_model_version("rlhf-policy", "1").description == "ours, do not use"
    (version,) = list_versions(checkout)
    assert version.metrics == {"spearman": 0.5, "kl": None}, "a figure that is undefined now is no longer its old value"


def test_an_exception_ends_the_run_as_failed(checkout, store):
    with pytest.raises(ValueError, match="boom"), Recorder(checkout, "run"):
        raise ValueError("boom")
    assert runs_by_key(store)["run"].info.status == "FAILED"


def test_stages_without_a_model_and_stores_without_a_registry_are_refused(checkout, monkeypatch):
    with Recorder(checkout, "run") as recorder, pytest.raises(ConfigError, match="makes no model"):
        recorder.register("validate", MODEL, {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///somewhere")
    with pytest.raises(ConfigError, match="holds no model registry"):
        Recorder(checkout, "other")
