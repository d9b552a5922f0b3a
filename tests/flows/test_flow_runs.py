"""Names, tags, log lines and artifacts of a run; which faults are tried again; writes that do not come through."""

import io
import json
import logging
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from markdown_it import MarkdownIt
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.settings import get_current_settings
from prefect.states import Failed

import flows.artifacts
import flows.flow_runs
import flows.pipeline
from flows.artifacts import publish_stage, summary_page
from flows.cli.result import print_result
from flows.flow_runs import RETRY_SECONDS, heartbeats, retrying, tell_server, under_worker
from flows.run.names import folder_of, run_name, run_tags
from flows.run.request import RunRequest, prepare_run, profiles
from flows.run.stage_lines import own_lines
from flows.run.summary import RunSummary, StageSummary
from rlhf_core.errors import ConfigError
from tasks.frame.runner import Stop

WHEN = 1_796_007_600.0


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.parametrize(
    ("fields", "stem"),
    [
        ({}, "run"),
        ({"profile": "tiny"}, "tiny"),
        ({"profile": "hh-harmless", "data": {"comparisons": "/a/Own Pairs.jsonl.gz"}}, "hh-harmless-own-pairs"),
        ({"data": {"votes": "v.csv", "comparisons": "c.parquet"}}, "run-v-c"),
        ({"name": "mine", "profile": "tiny", "data": {"votes": "v.csv"}}, "mine"),
        ({"data": {"votes": "/a/....jsonl"}}, "run"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_profile_data_and_date(fields: dict[str, Any], stem: str) -> None:
    assert run_name(RunRequest(**fields), WHEN) == f"{stem}-20261130-030000"


def test_a_name_is_one_that_a_folder_and_a_form_take() -> None:
    request = RunRequest(profile="a" * 60, data={"votes": "b" * 99 + ".jsonl"})
    name = run_name(request, WHEN, of="8e3ed01d-0e4e-4d0f-b7c3-df42ea4ce5d0")
    assert len(name) == 64
    assert name.endswith("-20261130-030000-ea4ce5d0")
    assert RunRequest(name=name).name == name


def test_tags_say_profile_and_data() -> None:
    assert run_tags(RunRequest()) == ["profile:none"]
    tags = run_tags(RunRequest(profile="tiny", data={"votes": "/x/v.jsonl", "graded": "g.csv"}))
    assert tags == ["profile:tiny", "data:v", "data:g"]


def test_a_prefect_run_finds_the_folder_that_it_made(tmp_path: Path) -> None:
    for name in ("tiny-20261130-030000-11111111", "tiny-20261130-030000-ea4ce5d0"):
        (tmp_path / name).mkdir()
    found = folder_of(tmp_path, "8e3ed01d-0e4e-4d0f-b7c3-df42ea4ce5d0")
    assert found is not None
    assert found.name == "tiny-20261130-030000-ea4ce5d0"
    assert folder_of(tmp_path, "8e3ed01d-0e4e-4d0f-b7c3-df4200000000") is None


def test_a_resumed_run_remembers_what_it_was_made_for(counting_project: Path) -> None:
    made = prepare_run(
        counting_project, RunRequest(name="one", overrides=("sft.max_steps=4",), stage_timeout_minutes=7)
    )
    again = prepare_run(made.root, RunRequest(run_timeout_minutes=9))
    assert (again.root, again.name, again.params.sft.max_steps) == (made.root, "one", 4)
    assert again.request == made.request.model_copy(update={"run_timeout_minutes": 9})


def test_the_profile_is_a_choice_in_the_form(counting_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (counting_project / "profiles").mkdir()
    for name in ("small", "big"):
        (counting_project / f"profiles/{name}.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(counting_project)
    assert profiles(counting_project) == ["big", "small"]
    offered = RunRequest.model_json_schema()["properties"]["profile"]
    assert offered["anyOf"] == [{"enum": ["big", "small"], "type": "string"}, {"type": "null"}]


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ({"overrides": ["rubbish"]}, "run.overrides.0: 'rubbish'"),
        ({"name": "Bad Name"}, "run.name: 'Bad Name'"),
        ({"profil": "tiny"}, "run.profil: 'tiny': Extra inputs are not permitted"),
        ({"retries": 99}, "run.retries: 99"),
        ("text", "run: 'text'"),
    ],
)
def test_a_wrong_form_is_one_line(
    form: object, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flows.pipeline, "get_run_logger", lambda: logging.getLogger("here"))
    with caplog.at_level(logging.ERROR, "here"):
        state = flows.pipeline.pipeline.fn(form, missed="all")
    assert state.is_failed()
    assert [record.getMessage() for record in caplog.records] == [state.message]
    assert part in state.message
    assert "\n" not in state.message
    assert " Fix: " in state.message


@pytest.mark.parametrize(
    ("deployed", "missed", "asked"),
    [
        (True, "newest", [flows.flow_runs.drop_others_due, "the run", flows.flow_runs.skip_due_meanwhile]),
        (True, "all", ["the run", flows.flow_runs.skip_due_meanwhile]),
        (False, "all", ["the run"]),
    ],
)
def test_runs_that_were_due_before_are_dropped_and_those_due_meanwhile_skipped(
    deployed: bool, missed: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the run itself; here it cannot even be prepared."""
    seen: list[Any] = []

    def prepare(root: Path, request: RunRequest) -> None:
        seen.append("the run")
        raise ConfigError("no such profile")

    monkeypatch.setattr(flows.pipeline, "prepare_flow_run", prepare)
    monkeypatch.setattr(flows.pipeline, "tell_server", lambda tell, what: seen.append(tell))
    monkeypatch.setattr(flows.pipeline, "under_worker", lambda: deployed)
    monkeypatch.setattr(flows.pipeline, "get_run_logger", lambda: logging.getLogger("here"))
    assert flows.pipeline.pipeline.fn(RunRequest(), missed=missed).is_failed()
    assert seen == asked


DVC_PRINTS = """\
Running stage 'first':
> python counting.py first
counting
> a line of the stage's own

step 3/3  loss/train 0.3

Updating lock file 'dvc.lock'

To track the changes with git, run:

\tgit add dvc.lock

To enable auto staging, run:

\tdvc config core.autostage true
Use `dvc push` to send your updates to remote storage.
"""


def test_a_log_holds_the_lines_of_the_stage_alone() -> None:
    seen: list[str] = []
    take = own_lines(seen.append)
    for line in DVC_PRINTS.splitlines():
        take(line)
    assert seen == ["counting", "> a line of the stage's own", "", "step 3/3  loss/train 0.3"]


def test_errors_of_dvc_stay_in_the_log() -> None:
    seen: list[str] = []
    own_lines(seen.append)("ERROR: failed to reproduce 'first': exited with 4")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("exit_code", "attempt", "stopped", "again"),
    [(7, 1, False, True), (7, 2, False, True), (7, 3, False, False), (7, 1, True, False)]
    + [(code, 1, False, False) for code in (1, 2, 3, 4, 5, 6)],
)
def test_only_a_fault_of_the_machine_is_tried_again(exit_code: int, attempt: int, stopped: bool, again: bool) -> None:
    stop = Stop()
    if stopped:
        stop.request("cancelled")
    stage = StageSummary(name="sft", status="failed", exit_code=exit_code)
    options = retrying(stage, 2, stop)
    run = SimpleNamespace(run_count=attempt)
    assert options["retry_condition_fn"](None, run, Failed()) is again
    assert options["retry_delay_seconds"] == RETRY_SECONDS == sorted(RETRY_SECONDS)


class Telling:
    """Fails as often as it is told to."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise httpx.ReadTimeout("busy")


@pytest.mark.parametrize(("failures", "calls", "lines"), [(0, 1, 0), (2, 3, 0), (99, 4, 1)])
def test_a_write_for_the_eye_is_tried_again_and_never_fails_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int, calls: int, lines: int
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(flows.flow_runs.time, "sleep", waited.append)
    monkeypatch.setattr(flows.flow_runs, "get_run_logger", lambda: logging.getLogger("here"))
    telling = Telling(failures)
    with caplog.at_level(logging.WARNING, "here"):
        tell_server(telling, "artifacts of sft")
    assert (telling.calls, len(caplog.records)) == (calls, lines)
    assert waited == sorted(waited)
    assert len(waited) == calls - 1


def test_a_bug_in_what_is_told_is_not_hidden() -> None:
    def wrong() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        tell_server(wrong, "x")


def test_a_table_of_samples_begins_with_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"after": "b", "before": "a", "id": 3, "prompt": "Where?", "scores": {"after": 0.5, "before": 0.25}}
    samples = tmp_path / "artifacts/sft/samples.json"
    samples.parent.mkdir(parents=True)
    samples.write_text(json.dumps([row]))
    tables: dict[str, list[dict[str, str]]] = {}
    monkeypatch.setattr(flows.artifacts, "create_table_artifact", lambda rows, key, **_: tables.update({key: rows}))
    monkeypatch.setattr(flows.artifacts, "create_markdown_artifact", lambda *_, **__: None)
    publish_stage(SimpleNamespace(root=tmp_path, recorder=None), StageSummary(name="sft"))  # type: ignore[arg-type]
    ((shown,),) = tables.values()
    assert list(shown.items()) == [
        ("prompt", "Where?"), ("before", "a"), ("after", "b"), ("id", "3"), ("scores.before", "0.25"),
        ("scores.after", "0.5"),
    ]  # fmt: skip


def test_a_summary_without_figures_is_a_page() -> None:
    page = summary_page(RunSummary(run="night", run_key="n", started=0.0, stages=[StageSummary(name="sft")]))
    assert page.startswith("# Run `night`")


REFUSED = "1 records were not taken: tags of align@ppo: '[/x_y]' <b> is not *active*. They are kept. Fix: rlhf sync"


def test_what_was_cut_or_not_recorded_stands_in_the_summary_letter_for_letter() -> None:
    sft = StageSummary(name="sft", metrics={"responses_cut": 2, "responses_encoded": 30})
    known = {"run": "night", "run_key": "n", "started": 0.0, "stages": [sft]}
    page = summary_page(RunSummary(**known, tracking=REFUSED, message="sft: [/x] is *gone*"))
    html = MarkdownIt().render(page)
    shown = unescape(re.sub(r"<[^>]*>", "", html))
    assert REFUSED in shown
    assert "sft: [/x] is *gone*" in shown
    assert "sft: 2 of 30 responses lost their end" in shown
    assert "<strong>Not recorded in MLflow</strong>" in html
    assert "Not recorded" not in summary_page(RunSummary(**known))


def test_the_terminal_says_it_letter_for_letter_too() -> None:
    stream = io.StringIO()
    print_result(RunSummary(run="night", run_key="n", started=0.0, stages=[], tracking=REFUSED), stream)
    assert " ".join(REFUSED.split()) in " ".join(stream.getvalue().split())


def test_a_run_with_nothing_to_do_sends_no_heartbeats() -> None:
    def every() -> int | None:
        return get_current_settings().flows.heartbeat_frequency

    usual = every()
    assert usual is not None
    with heartbeats(wanted=True):
        assert every() == usual
    with heartbeats(wanted=False):
        assert every() is None
    assert every() == usual


def test_whether_a_worker_runs_it_is_known_without_a_server() -> None:
    assert not under_worker()
    for deployment, expected in ((None, False), (uuid4(), True)):
        run = FlowRun(flow_id=uuid4(), deployment_id=deployment)
        context = FlowRunContext.model_construct(flow_run=run)
        with context:
            assert under_worker() is expected
