"""A run without Prefect: what is run, what is skipped, what is recorded, what is written down."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.project import edited_yaml

import flows.run.execution
import tasks.tracking
from flows.run.execution import Curves, PipelineRun
from flows.run.record import numbers
from flows.run.request import PreparedRun, RunRequest, pipeline_stages, prepare_run
from flows.run.summary import LIVE_FILE, StageSummary, read_summary, verdict_of
from tasks import paths
from tasks.frame.definition import stage_definition
from tasks.frame.runner import StageResult, Stop

ROOT = Path(__file__).parents[3]
NAMES = ["sft", "reward", "align@ppo", "align@dpo", "evaluate"]
DVC = """\
stages:
  sft: {cmd: x}
  reward: {cmd: x}
  align:
    matrix: {algorithm: "${align.algorithms}"}
    cmd: x
  evaluate: {cmd: x}
"""
VERDICT = {
    "best": "dpo", "judge": "gold", "simulated": True, "temperature": 1.0, "win_rate": 0.7, "win_rate_low": 0.6,
    "win_rate_high": 0.8, "p_value": 0.001, "confidence": 0.95, "kl_to_sft": 2.0, "num_prompts": 400,
}  # fmt: skip


class FakeRecorder:
    """Notes what it is told."""

    def __init__(self, root: Path, run_key: str, *, name: str, tags: dict, params: dict) -> None:
        self.run_key, self.told, self.closed, self.why = run_key, [], "", ""
        self.tags, self.params, self.judging, self.finished = tags, params, {}, {}
        self.patience: list[float] = []
        FakeRecorder.last = self

    last: "FakeRecorder"
    away = False

    def start_stage(self, stage: str, *, params: dict) -> None:
        self.told.append(("start", stage, params))

    def inputs(self, stage: str | None, inputs: Iterable) -> None:
        self.told.append(("inputs", stage, list(inputs)))

    def figures(self, stage: str | None, metrics: dict) -> None:
        self.told.append(("figures", stage, metrics))

    def metrics(self, stage: str, rows: list) -> None:
        self.told.append(("metrics", stage, [row["step"] for row in rows]))

    def artifact(self, stage: str | None, path: Path) -> None:
        self.told.append(("artifact", stage, path.as_posix()))

    def register(self, stage: str, folder: Path, metrics: dict, *, params: dict) -> str:
        self.told.append(("register", stage, folder.as_posix()))
        return f"hash-{stage}"

    def attach(self, stage: str, content: str, metrics: dict, *, verdict: tasks.tracking.Judging | None) -> None:
        self.told.append(("attach", stage, content, metrics))
        self.judging[stage] = verdict

    def attach_responses(self, stage: str, content: str, table: Path, *, rows_of: str) -> None:
        self.told.append(("responses", stage, rows_of))

    def set_candidates(self, contents: dict) -> None:
        self.told.append(("candidates", contents))

    def finish_stage(self, stage: str, status: str, metrics: dict | None = None, *, why: str = "") -> None:
        self.told.append(("finish", stage, status, *([why] if why else [])))
        self.finished[stage] = metrics

    def version(self, content: str, patience_s: float) -> str | None:
        self.patience.append(patience_s)
        return None if self.away else f"rlhf/{content}"

    def close(self, status: str, patience_s: float, *, why: str) -> tasks.tracking.Delivery:
        self.closed, self.why = status, why
        self.patience.append(patience_s)
        return tasks.tracking.Delivery(pending=3 if self.away else 0)

    def of(self, kind: str) -> list[tuple]:
        return [entry for entry in self.told if entry[0] == kind]


class FakeWatch:
    """Looks at nothing, and tells the recorder when."""

    def __init__(self, recorder: FakeRecorder, every_s: float) -> None:
        self.told = recorder.told

    def begin(self, stage: str) -> None:
        self.told.append(("watched", stage))

    def end(self, stage: str) -> None:
        self.told.append(("seen", stage))

    def stop(self) -> None:
        self.told.append(("watch over",))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "params.yaml").write_text("align: {algorithms: [ppo, dpo]}\ndata: {prompts: data/p.jsonl}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/p.jsonl").write_text("{}\n")
    for stage in NAMES:
        path = tmp_path / paths.metrics_file(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = {"train_loss": 1.5, "nothing": None, "good": True, "inner": {"x": 1}}
        if stage == "evaluate":
            figures = {
                "sft": {"kl_to_sft": 0.0},
                "ppo": {"win_rate": 0.6},
                "dpo": {"win_rate": 0.7},
                "verdict": VERDICT,
            }
        path.write_text(json.dumps(figures))
    monkeypatch.setattr(tasks.tracking, "Recorder", FakeRecorder)
    monkeypatch.setattr(tasks.tracking, "SystemWatch", FakeWatch)
    monkeypatch.setattr(FakeRecorder, "away", False)
    return tmp_path


def fake_stage(monkeypatch: pytest.MonkeyPatch, results: dict[str, StageResult], stop: Stop | None = None) -> list[str]:
    ran: list[str] = []

    def run(root, stage, *, stop, on_line, on_event, timeout_s, forks) -> StageResult:
        ran.append(stage)
        on_line(f"line of {stage}")
        on_event({"event": "progress", "step": 1, "total": 1, "time": 1.0, "metrics": {"loss/train": 2.0}, "tokens": 5})
        return results.get(stage) or StageResult(
            stage=stage, exit_code=0, ran=True, wall_s=2.0, compute_s=0.5, peak_memory_mb=100.0, tokens=50
        )

    monkeypatch.setattr(flows.run.execution, "run_stage_process", run)
    return ran


def go(project: Path, changed: set[str], stop: Stop | None = None, names: Sequence[str] = NAMES) -> PipelineRun:
    run = PipelineRun(prepare_run(project, RunRequest()), changed, stop=stop or Stop())
    run.open({"prefect_flow_run_url": "http://127.0.0.1:1/x"})
    status, code, message = "done", 0, ""
    for name in names:
        stage = run.run_stage(name, on_line=lambda line: None)
        if stage.status in ("failed", "interrupted"):
            status, code, message = stage.status, stage.exit_code or 1, stage.message
            break
    run.close(status, code, message)  # type: ignore[arg-type]
    return run


def test_a_whole_run_is_recorded_and_summed_up(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = fake_stage(monkeypatch, {})
    run = go(project, set(NAMES))
    told = FakeRecorder.last
    assert ran == NAMES
    assert [entry[1] for entry in told.of("register")] == ["sft", "reward", "align@ppo", "align@dpo"]
    assert [entry[1] for entry in told.of("attach")] == ["sft", "align@ppo", "align@dpo"]
    by_gold = tasks.tracking.Judging(judge="gold", simulated=True, temperature=1.0, confidence=0.95, num_prompts=400)
    assert told.judging == {"sft": None, "align@ppo": by_gold, "align@dpo": by_gold}
    together = {stage: f"hash-{stage}" for stage in ("sft", "reward", "align@dpo")}
    assert told.of("candidates") == [("candidates", together)]
    assert told.told.index(("candidates", together)) > max(told.told.index(one) for one in told.of("responses"))
    assert {entry[2] for entry in told.of("responses")} == {"sft", "ppo", "dpo"}
    assert {entry[1]: entry[2] for entry in told.of("metrics")} == {name: [1] for name in NAMES}
    assert told.closed == "FINISHED"
    summary = read_summary(project / paths.SUMMARY)
    assert summary is not None
    assert summary == run.summary == read_summary(project / LIVE_FILE)
    assert (summary.status, summary.exit_code) == ("done", 0)
    assert summary.model_versions == {stage: f"rlhf/hash-{stage}" for stage in NAMES[:-1]}
    assert summary.compute_s == 2.5
    assert summary.flow_run_url == "http://127.0.0.1:1/x"
    sft = summary.stage("sft")
    assert sft.wall_s is not None
    assert sft.overhead_s == pytest.approx(sft.wall_s - 0.5)
    assert sft.tokens_per_s == 100
    assert summary.verdict is not None
    assert summary.verdict.better_than_sft


def test_settings_stand_on_the_child_and_headline_figures_on_the_parent(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that MLflow can sort, filter and plot which setting gave which figure."""
    with edited_yaml(project / "dvc.yaml") as graph:
        graph["stages"]["align"]["params"] = ["seed", "align.${item.algorithm}"]
    with edited_yaml(project / "params.yaml") as params:
        params["align"]["dpo"] = {"beta": 0.3}
    (project / paths.metrics_file("align@dpo")).write_text(json.dumps({"train_score": 1.0, "train_kl_to_sft": 2.0}))
    figures = {
        "sft": {"kl_to_sft": 0.0, "lengths": {"T=1": {"finished_share": 0.97}}},
        "ppo": {"win_rate": None, "judges": {}},
        "dpo": {"win_rate": 0.7, "kl_to_sft": 2.5, "judges": {}, "wins": 3},
        "verdict": VERDICT,
    }
    (project / paths.metrics_file("evaluate")).write_text(json.dumps(figures))
    fake_stage(monkeypatch, {})
    run = go(project, set(NAMES))
    told = FakeRecorder.last
    settings = {entry[1]: entry[2] for entry in told.of("start")}
    assert settings["align@dpo"]["seed"] == 0
    assert settings["align@dpo"]["align.dpo"]["beta"] == 0.3
    parent: dict[str, float] = {}
    for _, stage, found in told.of("figures"):
        assert stage is None
        parent |= found
    assert parent == {
        "dpo.train_score": 1.0,
        "dpo.train_kl_to_sft": 2.0,
        "dpo.win_rate": 0.7,
        "dpo.kl_to_sft": 2.5,
        "verdict.win_rate": 0.7,
        "verdict.win_rate_low": 0.6,
        "verdict.win_rate_high": 0.8,
        "verdict.kl_to_sft": 2.0,
    }
    assert {key: told.finished["evaluate"][key] for key in parent if "verdict" in key} == {
        key: figure for key, figure in parent.items() if "verdict" in key
    }, "on the evaluation's own run too"
    assert told.params["align"]["dpo"]["beta"] == 0.3
    assert told.tags["kind"] == "in place"
    assert told.tags["run"] == run.summary.run
    assert told.tags["mlflow.user"]
    assert told.tags["mlflow.source.name"] == "rlhf", "also where an engine of Prefect's began it"
    (sft,) = [entry for entry in told.of("attach") if entry[1] == "sft"]
    assert sft[3] == {"kl_to_sft": 0.0, "finished_share": 0.97}
    order = [entry[:2] for entry in told.told if entry[0] in ("start", "watched", "seen", "finish")]
    assert order[:4] == [("start", "sft"), ("watched", "sft"), ("seen", "sft"), ("finish", "sft")]


def test_chains_and_combined_policies_are_registered_and_may_be_the_candidate(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a policy version of its own, with the figures and answers of its own name."""
    names = ["align@chain", "align@dpo", "combine@weights", "combine@probabilities", "evaluate"]
    with edited_yaml(project / "params.yaml") as params:
        params["align"] = {"algorithms": ["chain", "dpo"], "chain": ["dpo", "ppo"]}
        params["combine"] = {"methods": ["weights", "probabilities"], "members": ["chain", "dpo"]}
    with edited_yaml(project / "dvc.yaml") as graph:
        graph["stages"] = {
            "align": {"matrix": {"algorithm": "${align.algorithms}"}, "cmd": "x"},
            "combine": {"matrix": {"method": "${combine.methods}"}, "cmd": "x"},
            "evaluate": {"cmd": "x"},
        }
    for name in names[:-1]:
        (project / paths.metrics_file(name)).write_text(json.dumps({"value": 1.0, "links": [{"steps": 2}]}))
    of = {stage: {"win_rate": rate / 10} for rate, stage in enumerate(("chain", "dpo", "weights", "probabilities"), 5)}
    figures = of | {"verdict": VERDICT | {"best": "probabilities"}}
    (project / paths.metrics_file("evaluate")).write_text(json.dumps(figures))
    ran = fake_stage(monkeypatch, {})
    summary = go(project, set(names), names=names).summary
    told = FakeRecorder.last
    assert ran == names == [stage.name for stage in summary.stages]
    assert told.of("register") == [
        ("register", "align@chain", "artifacts/align/chain/model"),
        ("register", "align@dpo", "artifacts/align/dpo/model"),
        ("register", "combine@weights", "artifacts/align/weights/model"),
        ("register", "combine@probabilities", "artifacts/align/probabilities/model"),
    ]
    assert [entry[1:] for entry in told.of("attach")] == [
        (stage, f"hash-{stage}", of[stage.partition("@")[2]]) for stage in names[:-1]
    ]
    assert [entry[2] for entry in told.of("responses")] == list(of)
    assert told.of("candidates") == [("candidates", {"combine@probabilities": "hash-combine@probabilities"})]
    assert summary.model_versions == {stage: f"rlhf/hash-{stage}" for stage in names[:-1]}
    assert summary.verdict is not None
    assert summary.verdict.best == "probabilities"


def test_a_second_run_does_nothing_and_registers_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, {})
    first = go(project, set(NAMES)).summary
    del FakeRecorder.last
    ran = fake_stage(monkeypatch, {})
    second = go(project, set()).summary
    assert ran == []
    assert not hasattr(FakeRecorder, "last")
    assert {stage.status for stage in second.stages} == {"unchanged"}
    assert second.model_versions == first.model_versions
    assert second.verdict == first.verdict
    assert second.run_key != first.run_key


def test_a_place_of_its_own_where_nothing_was_to_do_leaves_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = [{"path": "data", "md5": "1"}, {"path": "tasks/tables.py", "md5": "2"}]
    lock = {"stages": {name: {"cmd": "x", "deps": [*deps]} for name in ("validate", *NAMES)}}
    (project / "dvc.lock").write_text(json.dumps(lock))
    fake_stage(monkeypatch, {})
    first = go(project, set(NAMES)).summary
    read = [
        (stage, one.name, one.digest, one.context)
        for _, stage, found in FakeRecorder.last.of("inputs")
        for one in found
    ]
    assert read == [(of, "data", "1", "training") for of in (None, *NAMES[:-1])] + [
        ("evaluate", "data", "1", "evaluation")
    ], "data, no code"
    (project / LIVE_FILE).unlink()  # as in a new worktree
    second = go(project, set()).summary
    told = FakeRecorder.last
    assert {entry[0] for entry in told.told} <= {"inputs", "figures", "watch over"}
    assert told.of("figures")[-1][2]["verdict.win_rate"] == 0.7, "its headline figures, all the same"
    assert told.closed == "FINISHED"
    assert second.model_versions == first.model_versions
    (project / LIVE_FILE).unlink()
    lock["stages"]["reward"]["deps"][0] = {"path": "data", "md5": "3"}  # another result than the one that was recorded
    (project / "dvc.lock").write_text(json.dumps(lock))
    go(project, set())
    assert [entry[1] for entry in FakeRecorder.last.of("register")] == ["reward"]


def test_what_a_killed_run_left_unrecorded_is_recorded_by_the_next(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_stage(monkeypatch, {})
    run = PipelineRun(prepare_run(project, RunRequest()), set(NAMES), stop=Stop())
    run.open({})
    run.run_stage("sft", on_line=lambda line: None)
    note = json.loads((project / LIVE_FILE).read_text())  # as a kill between DVC's end and the record leaves it
    note["stages"][1] |= {"status": "running"}
    (project / LIVE_FILE).write_text(json.dumps(note))
    stream = project / paths.progress_file("reward")
    stream.parent.mkdir(parents=True, exist_ok=True)
    stream.write_text(json.dumps({"event": "progress", "step": 7, "time": 2.0, "metrics": {"a": 1.0}}) + "\n")
    ran = fake_stage(monkeypatch, {})
    resumed = go(project, {"align@ppo", "align@dpo", "evaluate"})
    told = FakeRecorder.last
    assert ran == NAMES[2:]
    assert resumed.summary.run_key == run.summary.run_key == told.run_key
    assert [entry[1] for entry in told.of("register")] == ["reward", "align@ppo", "align@dpo"]
    assert ("metrics", "reward", [7]) in told.told
    assert resumed.summary.stage("sft").outputs_hash == "hash-sft"


def test_a_stage_without_a_model_is_recorded_later_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, {})
    go(project, set(NAMES))
    note = json.loads((project / LIVE_FILE).read_text())
    note["stages"][-1]["recorded"] = False
    (project / LIVE_FILE).write_text(json.dumps(note))
    again = go(project, set()).summary
    assert [entry[1] for entry in FakeRecorder.last.of("finish")] == ["evaluate"]
    (proposed,) = FakeRecorder.last.of("candidates")
    assert set(proposed[1]) == {"sft", "reward", "align@dpo"}
    assert again.stage("evaluate").recorded


def test_a_failure_stops_the_run_and_keeps_its_exit_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = StageResult(stage="reward", exit_code=3, ran=True, wall_s=1.0, message="accuracy 0.4 < 0.5")
    ran = fake_stage(monkeypatch, {"reward": refused})
    summary = go(project, set(NAMES)).summary
    assert ran == ["sft", "reward"]
    assert (summary.status, summary.exit_code, summary.message) == ("failed", 3, "accuracy 0.4 < 0.5")
    assert [stage.status for stage in summary.stages] == ["done", "failed", "waiting", "waiting", "waiting"]
    assert ("finish", "reward", "FAILED", "reward: accuracy 0.4 < 0.5") in FakeRecorder.last.told
    assert FakeRecorder.last.of("candidates") == []
    assert (FakeRecorder.last.closed, FakeRecorder.last.why) == ("FAILED", "accuracy 0.4 < 0.5")


def test_an_interrupted_run_keeps_its_key_and_a_failed_one_does_not(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    stop.request("SIGINT")
    ended = StageResult(stage="sft", exit_code=130, ran=True, wall_s=1.0, message="ended")
    fake_stage(monkeypatch, {"sft": ended})
    first = go(project, set(NAMES), stop).summary
    assert (first.status, first.stage("sft").status, FakeRecorder.last.closed) == (
        "interrupted",
        "interrupted",
        "KILLED",
    )
    assert ("finish", "sft", "KILLED", "sft: ended") in FakeRecorder.last.told
    assert FakeRecorder.last.patience == [0.3], "whoever ends a run does not wait for the record"
    fake_stage(monkeypatch, {"sft": StageResult(stage="sft", exit_code=6, ran=True, wall_s=1.0, message="nan")})
    second = go(project, set(NAMES)).summary
    assert second.run_key == first.run_key
    fake_stage(monkeypatch, {})
    assert go(project, set(NAMES)).summary.run_key != second.run_key


def test_a_store_that_is_away_stops_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRecorder, "away", True)
    fake_stage(monkeypatch, {})
    summary = go(project, set(NAMES)).summary
    assert (summary.status, summary.model_versions) == ("done", {})
    assert FakeRecorder.last.patience[:3] == [60.0, 0.3, 0.3], "waited for once, not for every model"
    assert "3 records wait" in summary.tracking
    assert "rlhf sync" in summary.tracking


def test_a_stage_that_is_left_out_keeps_what_is_known_of_its_record(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_stage(monkeypatch, {})
    go(project, set(NAMES))
    part = PipelineRun(prepare_run(project, RunRequest(until_stage="reward")), {"reward"}, stop=Stop())
    left_out = part.summary.stage("align@ppo")
    assert (left_out.status, left_out.recorded) == ("left out", True)
    assert (left_out.outputs_hash, left_out.model_version) == ("hash-align@ppo", "rlhf/hash-align@ppo")


@pytest.mark.parametrize(("minutes", "seconds"), [(7, 420.0), (None, None)])
def test_a_stage_gets_the_time_that_is_asked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, minutes: int | None, seconds: float | None
) -> None:
    given = []

    def run_stage(root: Path, stage: str, *, timeout_s: float | None, **_: Any) -> StageResult:
        given.append(timeout_s)
        return StageResult(stage=stage, exit_code=0, ran=True, wall_s=1.0)

    monkeypatch.setattr(flows.run.execution, "run_stage_process", run_stage)
    run = PipelineRun(prepare_run(project, RunRequest(stage_timeout_minutes=minutes)), {"sft"}, stop=Stop())
    run.run_stage("sft", on_line=lambda line: None)
    assert given == [seconds]


def test_what_dvc_finds_unchanged_after_all_is_unchanged(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, {"sft": StageResult(stage="sft", exit_code=0, ran=False, wall_s=1.0)})
    summary = go(project, set(NAMES)).summary
    assert summary.stage("sft").status == "unchanged"
    assert summary.stage("sft").overhead_s is None
    assert summary.stage("sft").recorded


def test_the_order_of_dvc_yaml_is_an_order_one_can_run_in() -> None:
    names = pipeline_stages(ROOT)
    assert names[0] == "validate"
    assert {"align@ppo", "align@dpo"} <= set(names)
    made: set[str] = set()
    for name in names:
        definition = stage_definition(ROOT, name)
        needed = {dep for dep in definition.deps if dep.startswith(("artifacts/", "reports/"))}
        for dep in needed:
            assert any(out == dep or out.startswith(f"{dep}/") for out in made), f"{name} reads {dep} before it is made"
        made |= set(definition.outs)


def test_numbers_leaves_out_what_is_none() -> None:
    assert numbers({"a": 1, "b": None, "c": True, "d": {"x": 1}, "e": 0.5, "f": "text"}) == {
        "a": 1,
        "b": None,
        "e": 0.5,
    }


def test_an_undefined_verdict_is_none() -> None:
    assert verdict_of({"verdict": VERDICT | {"win_rate": None}}) is None
    assert verdict_of({}) is None
    for change in ({"win_rate_low": 0.45}, {"p_value": 0.06}):
        worse = verdict_of({"verdict": VERDICT | change})
        assert worse is not None
        assert not worse.better_than_sft


def test_points_of_curves_are_handed_on_together_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = FakeRecorder(Path(), "key", name="run", tags={}, params={})
    curves = Curves(recorder, "sft")  # type: ignore[arg-type]

    def add(step: int) -> list[list[int]]:
        curves.add({"event": "start"})
        curves.add({"event": "progress", "step": step, "time": 1.0, "metrics": {}})
        return [steps for _, _, steps in recorder.of("metrics")]

    assert [add(1), add(2)] == [[], []], "each hand-over waits for the disk"
    monkeypatch.setattr(flows.run.execution, "CURVE_SECONDS", -1.0)
    assert [add(3), add(4)] == [[[1, 2, 3]], [[1, 2, 3], [4]]]
    curves.send()
    assert len(recorder.of("metrics")) == 2, "nothing is left to send"


def test_a_stage_summary_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="extra"):
        StageSummary(name="x", colour="red")  # type: ignore[call-arg]


def test_prepared_run_in_place(project: Path) -> None:
    prepared = prepare_run(project, RunRequest())
    assert isinstance(prepared, PreparedRun)
    assert (prepared.root, prepared.home) == (project, project)
    assert prepared.name.startswith("run-2")
