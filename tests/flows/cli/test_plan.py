"""`rlhf plan` in a checkout: its table, its JSON, its exit code, and the line before a run."""

import json
from pathlib import Path

import pytest

from flows.cli import plan as command
from flows.cli.app import run_command
from flows.run.request import RunRequest, prepare_run
from rlhf_core.planning.shapes import ModelShape
from rlhf_core.planning.workload import Workload
from tasks.planning.plan import Known, Machine

ROOT = Path(__file__).parents[3]
SHAPE = ModelShape(
    hidden=576, layers=30, heads=9, kv_heads=3, head_size=64, feed_forward=1536, vocabulary=49152, tied=True
)
KNOWN = Known(
    shape=SHAPE,
    workload=Workload(
        demonstrations=900,
        kept=30,
        demonstration_lengths=[(200, 80), (100, 30)],
        pairs=500,
        groups=500,
        group_lengths=[[200, 80, 70]],
        prompts=500,
        heldout_prompts=50,
        prompt_lengths=[200, 150],
        sampled=2,
        counted={"demonstrations": "data/demonstrations.jsonl"},
    ),
)


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project itself, of which nothing but `params.yaml` and `dvc.yaml` is read."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "known_of", lambda *_, **__: KNOWN)
    monkeypatch.setattr("tasks.frame.changes.stage_changes", lambda _: {"sft": ("x",), "align@ppo": ("after sft",)})
    return ROOT


def of_size(monkeypatch: pytest.MonkeyPatch, memory_gb: float) -> None:
    found = Machine(processor="p", cores=2, free_memory_bytes=int(memory_gb * 2**30), free_disk_bytes=2**42)
    monkeypatch.setattr(command, "machine_of", lambda _: found)


def test_a_plan_names_what_is_cached_and_what_each_stage_takes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_size(monkeypatch, 500.0)
    assert run_command(["plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = {row["stage"]: row for row in found["stages"]}
    assert {name for name, row in stages.items() if not row["cached"]} == {"sft", "align@ppo"}
    assert stages["sft"]["parameters"] == SHAPE.parameters
    assert stages["sft"]["memory_bytes"] > 4 * 4 * SHAPE.parameters  # weights, two moments, and the best so far
    assert stages["sft"]["seconds"] is None, "nothing was measured"
    assert found["counted"] == {"demonstrations": "data/demonstrations.jsonl"}
    assert not found["problems"]
    assert run_command(["plan"]) == 0
    text = capsys.readouterr().out
    assert "cached" in text
    assert "plan: 2 stages, not measured" in text


def test_what_does_not_fit_has_an_exit_code_and_a_change_to_paste(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_size(monkeypatch, 7.0)
    assert run_command(["plan", "--until", "sft"]) == 0
    capsys.readouterr()
    assert run_command(["plan"]) == 7
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: align@ppo needs" in text
    assert "Fix: --set " in text


def test_before_a_run_a_line_says_what_is_known_and_warns(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_run(checkout, RunRequest())
    of_size(monkeypatch, 7.0)
    command.say_before(prepared, {"sft", "align@ppo"})
    said = capsys.readouterr().err
    assert said.startswith("plan: 2 stages, not measured; memory up to")
    assert "warning: does not fit: align@ppo" in said
    monkeypatch.setattr(command, "known_of", lambda *_, **__: None)
    command.say_before(prepared, {"sft"})
    assert capsys.readouterr().err == "plan: not made yet; rlhf plan says what a run takes\n"
