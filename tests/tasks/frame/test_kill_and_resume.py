"""A stage that is killed, at whatever moment, ends with the same bytes as the unbroken one when it is run again."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from support.warm_processes import run_stage

from rlhf_core.state.atomic import file_digest, tree_digest
from tasks import paths

STAGES = ("sft", "reward", "align@ppo", "align@dpo")
# In this order, each in a process of its own that resumes where the one before was killed; PPO has six steps.
MOMENTS = (
    "train.step@2:kill",  # early
    "train.step@3:kill",  # some steps after a resume
    "checkpoint.before_rename@1:kill",  # while one is being written
    "train.step@1:kill",  # right after a resume
    "checkpoint.after_rename@1:kill",  # written, the older ones not yet pruned
    "stage.during_publish:kill",  # outputs renamed, metrics not yet written
)


def results(project: Path, stage: str) -> dict[str, str]:
    """Digest of everything that a stage publishes."""
    digests = tree_digest(project / paths.stage_output(stage))
    for file in (paths.metrics_file(stage), paths.plots_file(stage)):
        digests[str(file)] = file_digest(project / file)
    return digests


@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Path:
    """A copy of the finished project."""
    return Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True))


def remove_results(project: Path, stage: str) -> None:
    shutil.rmtree(project / paths.stage_output(stage))
    paths_written = (project / paths.metrics_file(stage), project / paths.plots_file(stage))
    for path in paths_written:
        path.unlink()


@pytest.mark.integration
@pytest.mark.parametrize("stage", STAGES)
def test_killed_stages_end_with_the_same_bytes(project: Path, stage: str) -> None:
    unbroken = results(project, stage)
    remove_results(project, stage)
    for moment in MOMENTS:
        killed = run_stage(project, stage, RLHF_FAULT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stdout}\n{killed.stderr}"
        if "publish" not in moment:
            assert not (project / paths.stage_output(stage)).exists(), "nothing partial under a final name"
    done = run_stage(project, stage)
    assert done.returncode == 0, done.stderr
    assert results(project, stage) == unbroken
    assert not list((project / paths.STAGING).iterdir())
    assert not (project / paths.CHECKPOINTS / paths.slug(stage)).exists(), "a finished stage needs no checkpoints"


@pytest.mark.integration
def test_a_resumed_stage_says_so_and_does_not_start_over(project: Path) -> None:
    remove_results(project, "sft")
    killed = run_stage(project, "sft", RLHF_FAULT="train.step@20:kill")
    assert killed.returncode == -signal.SIGKILL
    done = run_stage(project, "sft")
    assert "resumed at step 18" in done.stdout
    events = [json.loads(line) for line in (project / paths.progress_file("sft")).read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "progress"]
    assert steps[0] == 19


@pytest.mark.integration
def test_changed_parameters_do_not_take_up_an_old_checkpoint(project: Path) -> None:
    remove_results(project, "sft")
    run_stage(project, "sft", RLHF_FAULT="train.step@20:kill")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.002"))
    done = run_stage(project, "sft")
    assert done.returncode == 0
    assert "resumed" not in done.stdout
