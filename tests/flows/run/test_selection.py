"""Part of a pipeline, and what would run."""

import json
from pathlib import Path

import pytest
from support.tracking import git

from flows.cli.app import run_command
from flows.run.execution import PipelineRun
from flows.run.plan import Plan
from flows.run.request import RunRequest, pipeline_stages, prepare_run
from flows.run.selection import chosen_stages
from flows.run.summary import StageSummary, read_summary, write_live
from rlhf_core.errors import ConfigError
from tasks.frame.runner import Stop

ROOT = Path(__file__).parents[3]
# of the real dvc.yaml, worked out by hand from docs/architecture.md
BEFORE_REWARD = {"validate", "sft", "generate", "label", "preferences", "reward"}
AFTER_REWARD = {"reward", "align@ppo", "align@dpo", "evaluate", "regressions", "report"}


def chosen(first: str | None, last: str | None, changed: frozenset[str] = frozenset()) -> frozenset[str]:
    return chosen_stages(ROOT, pipeline_stages(ROOT), first=first, last=last, changed=changed)


def test_until_takes_what_a_stage_is_made_from_and_from_what_is_made_of_it() -> None:
    assert chosen(None, "reward") == BEFORE_REWARD
    assert chosen("reward", None) == AFTER_REWARD
    assert chosen("reward", "align@dpo") == {"reward", "align@dpo"}
    assert chosen("align", "align") == {"align@ppo", "align@dpo"}
    assert chosen(None, "generate") == {"validate", "sft", "generate"}, "label is no input of it"
    assert chosen(None, None) == set(pipeline_stages(ROOT))


@pytest.mark.parametrize(
    ("first", "last", "changed", "part"),
    [
        ("nope", None, (), "--from nope: no such stage. Fix: one of validate, sft"),
        (None, "align@grpo", (), "--until align@grpo: no such stage"),
        ("evaluate", "sft", (), "nothing lies between"),
        (
            "reward",
            None,
            ("label", "sft"),
            "--from reward: sft, which it is made from, is not up to date. Fix: --from sft",
        ),
    ],
)
def test_a_part_that_cannot_be_is_refused(first: str, last: str, changed: tuple[str, ...], part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(first, last, frozenset(changed))
    assert part in str(refused.value)


def test_stages_that_follow_may_be_stale() -> None:
    assert chosen("reward", "reward", frozenset({"reward", "evaluate"})) == {"reward"}


def test_a_run_in_part_leaves_the_rest_as_it_was_recorded(counting_project: Path) -> None:
    before = PipelineRun(prepare_run(counting_project, RunRequest()), (), stop=Stop()).summary
    before.stages[1] = StageSummary(name="second@ppo", recorded=True, model_version="rlhf-policy/3", outputs_hash="ab")
    before.status = "done"
    write_live(counting_project, before)
    prepared = prepare_run(counting_project, RunRequest(until_stage="first"))
    run = PipelineRun(prepared, {"first", "second@ppo", "second@dpo"}, stop=Stop())
    assert [(stage.name, stage.status) for stage in run.summary.stages] == [
        ("first", "waiting"), ("second@ppo", "left out"), ("second@dpo", "left out"),
    ]  # fmt: skip
    assert run.changed == {"first"}
    assert run.summary.stage("second@ppo").model_version == "rlhf-policy/3"
    assert run.summary.stage("second@ppo").recorded
    assert list(Plan.of(run).startable(())) == ["first"]


def test_a_dry_run_says_what_would_run_and_why_and_touches_nothing(
    counting_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(counting_project)
    assert run_command(["run", "--dry-run", "--json"]) == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert {row["would"] for row in stages.values()} == {"run"}
    assert "after first" in stages["second@ppo"]["since"]
    assert run_command(["run", "--dry-run", "--until", "first", "--name", "trial"]) == 0
    text = capsys.readouterr().out
    assert "be left out" in text
    assert not (counting_project / "runs/trial").exists()
    assert "runs/trial" not in git(counting_project, "worktree", "list")
    assert not (counting_project / ".rlhf/servers.json").exists()
    assert read_summary(counting_project / ".rlhf/run.json") is None


@pytest.mark.parametrize("arguments", [["--from", "nope"], ["--until", "First"], ["--name", "UP"], ["--set", "x"]])
def test_mistakes_are_told_in_words_before_a_server_starts(
    counting_project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.chdir(counting_project)
    assert run_command(["run", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Fix: " in said
    assert "pattern" not in said
    assert "^" not in said
    assert not (counting_project / ".rlhf/servers.json").exists()
