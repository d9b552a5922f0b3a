"""A stage in several processes: killed, ended, resumed, started by hand; which of them speaks, and what it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_project
from safetensors.torch import load_file
from support.project import change_sections
from support.timing import patience
from support.warm_processes import run_stage, stage_environment
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from rlhf_core.config import ComputeConfig, Params
from rlhf_core.state.atomic import file_digest, tree_digest
from tasks import paths
from tasks.frame.definition import StageDefinition
from tasks.frame.place import Place
from tasks.frame.process import GRACE_SECONDS
from tasks.frame.several import only_watches, root_cause, wants_processes
from tasks.frame.stage import Progress, Stage

SLOW = 20.0  # seconds for what takes two or three on an idle machine
HELD = "train.step@3#1:sleep"  # the second process stops for an hour, the first waits for it inside a library


def in_two_processes(project: Path) -> Path:
    """Set `compute.processes: 2` in a project."""
    change_sections(project, compute={"processes": 2})
    return project


def results(project: Path, stage: str) -> dict[str, str]:
    digests = tree_digest(project / paths.stage_output(stage))
    return digests | {str(file): file_digest(project / file) for file in written_beside(stage)}


def written_beside(stage: str) -> tuple[Path, Path]:
    return paths.metrics_file(stage), paths.plots_file(stage)


def remove_results(project: Path, stage: str) -> None:
    shutil.rmtree(project / paths.stage_output(stage), ignore_errors=True)
    for file in written_beside(stage):
        (project / file).unlink(missing_ok=True)


def events(project: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (project / paths.progress_file(stage)).read_text().splitlines()]


def processes_in(project: Path) -> list[int]:
    """Living processes that work in the project's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and Path(os.readlink(entry / "cwd")) == project.resolve():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_empty(project: Path, seconds: float) -> None:
    seconds = patience(seconds)
    end = time.monotonic() + seconds
    while processes_in(project) and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes_in(project), f"processes are left after {seconds:.1f} s"


def wait_for_step(project: Path, process: subprocess.Popen[str], step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None
        file = project / paths.progress_file("sft")
        if file.exists() and any(event.get("step") == step for event in events(project, "sft")):
            time.sleep(0.5)  # on to where the first process waits for the second
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in two minutes")


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with stage sft done in two processes."""
    project = make_project(tmp_path_factory.mktemp("two") / "project")
    assert run_stage(project, "validate").returncode == 0
    done = run_stage(in_two_processes(project), "sft")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 24/24") == 1, "one process speaks"
    return project


@pytest.fixture
def project(trained_project: Path, tmp_path: Path) -> Path:
    """A copy without the results of sft."""
    copied = Path(shutil.copytree(trained_project, tmp_path / "project"))
    remove_results(copied, "sft")
    return copied


@pytest.mark.integration
def test_sft_killed_in_one_process_goes_on_by_hand_to_the_same_bytes(trained_project: Path, project: Path) -> None:
    started = time.monotonic()
    killed = run_stage(project, "sft", RLHF_FAULT="train.step@10#1:kill")
    assert killed.returncode == 7
    assert killed.stderr.splitlines() == [
        "sft: process 1 of 2 was killed by SIGKILL, perhaps for want of memory; the others were ended. "
        "Fix: free memory, then `rlhf resume`"
    ]
    last = events(project, "sft")[-1]
    assert (last["event"], last["exit_code"]) == ("failed", 7)
    assert last["time"] - events(project, "sft")[-3]["time"] < patience(SLOW), "seconds from the last step to the end"
    assert time.monotonic() - started < patience(120)
    wait_until_empty(project, 2.0)
    assert not (project / paths.stage_output("sft")).exists()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tasks", "sft"]
    environment = stage_environment()
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed at step 6") == 1
    assert results(project, "sft") == results(trained_project, "sft")
    assert not list((project / paths.STAGING).iterdir())
    assert not (project / paths.CHECKPOINTS / "sft").exists()


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_processes_end_with_the_one_that_started_them(project: Path, number: signal.Signals, code: int) -> None:
    """Also while one of them waits inside a library, where no handler of Python's runs."""
    (project / paths.progress_file("sft")).unlink()
    command = [sys.executable, "-m", "tasks", "sft"]
    environment = stage_environment(RLHF_FAULT=HELD)
    with subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_step(project, process, 3)
            assert len(processes_in(project)) == 3
            process.send_signal(number)
            _, errors = process.communicate(timeout=patience(SLOW))
        finally:
            process.kill()  # the others follow
    assert process.returncode == code
    wait_until_empty(project, GRACE_SECONDS + 2.0)
    if number == signal.SIGTERM:
        assert errors.splitlines() == ["sft: terminated; `rlhf resume` goes on from the last checkpoint"]


@pytest.mark.integration
def test_a_stage_divides_weights_among_processes_and_publishes_them_whole(trained_project: Path, project: Path) -> None:
    """`sharding: fsdp` ends where two processes end that hold all weights, but for rounding."""
    change_sections(project, compute={"processes": 2, "sharding": "fsdp"})
    done = run_stage(project, "sft")
    assert done.returncode == 0, done.stderr
    model = paths.stage_output("sft") / "model/model.safetensors"
    divided, whole = load_file(project / model), load_file(trained_project / model)
    assert divided.keys() == whole.keys()
    assert max((divided[name] - tensor).abs().max().item() for name, tensor in whole.items()) < 1e-5
    figures = [json.loads((folder / paths.metrics_file("sft")).read_text()) for folder in (project, trained_project)]
    assert [one.pop("undefined") for one in figures] == [{}, {}]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert results(project, "sft") != results(trained_project, "sft"), "the same bits: nothing was divided"


@pytest.mark.integration
def test_ppo_killed_in_the_first_process_resumes_to_the_same_bytes(finished_project: Path, tmp_path: Path) -> None:
    project = in_two_processes(Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True)))
    stage = "align@ppo"
    alone = json.loads((project / paths.metrics_file(stage)).read_text())
    remove_results(project, stage)
    done = run_stage(project, stage)
    assert done.returncode == 0, done.stderr
    unbroken = results(project, stage)
    together = json.loads((project / paths.metrics_file(stage)).read_text())
    assert together["steps"] == alone["steps"]
    assert together["train_score"] == pytest.approx(alone["train_score"], abs=0.2), (
        "the same training, but for the order of sums"
    )
    remove_results(project, stage)
    killed = run_stage(project, stage, RLHF_FAULT="train.step@4#0:kill")
    assert killed.returncode == 7
    assert "process 0 of 2 was killed by SIGKILL" in killed.stderr
    done = run_stage(project, stage)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert results(project, stage) == unbroken


@pytest.mark.integration
def test_a_chain_goes_on_from_weights_that_were_divided(finished_project: Path, tmp_path: Path) -> None:
    """Each link takes up whole weights, divides them anew and measures the policy: the numbers of one process.

    It is killed in the second link, after the first has been gathered, and resumes.
    """
    project, stage = Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True)), "align@chain"
    dpo, switch = {"epochs": 1, "prompts_per_step": 5, "save_every": 2}, {"every": 3, "prompts": 8, "max_kl": 100.0}
    ppo = {"steps": 2, "rollout_batch": 8, "minibatch": 4, "save_every": 1}
    chain = {"links": ["ppo", "dpo"], "ppo": ppo, "dpo": dpo, "reference": "previous", "switch": switch}
    change_sections(project, align={"algorithms": ["ppo", "dpo", "chain"], "chain": chain})
    model, told = paths.stage_output(stage) / "model/model.safetensors", []
    for compute, fault in (({"processes": 1}, ""), ({"processes": 2, "sharding": "fsdp"}, "train.step@5#0:kill")):
        change_sections(project, compute=compute)
        if fault:
            assert run_stage(project, stage, RLHF_FAULT=fault).returncode == 7
        done = run_stage(project, stage)
        assert done.returncode == 0, done.stderr
        told.append((load_file(project / model), json.loads((project / paths.metrics_file(stage)).read_text())))
    assert "link 2 resumed at step 2" in done.stdout
    (alone, figures), (divided, others) = told
    assert max((divided[name] - tensor).abs().max().item() for name, tensor in alone.items()) < 1e-5
    for link, other in zip(figures["links"], others["links"], strict=True):
        assert other == pytest.approx(link, abs=1e-4)
    rows = (project / paths.plots_file(stage)).read_text().splitlines()
    margin = rows[0].split(",").index("implicit_reward/margin")
    assert float(rows[1 + ppo["steps"]].split(",")[margin]) == 0.0, "the second link is its own reference at first"


@pytest.mark.integration
def test_a_failure_of_all_is_told_once(project: Path) -> None:
    file = project / paths.PARAMS
    file.write_text(file.read_text().replace("device: cpu", "device: cuda"))
    done = run_stage(project, "sft", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 7
    assert done.stderr.splitlines() == [
        "sft: compute.device: cuda: 2 GPUs wanted, torch sees none. "
        "Fix: set compute.device to cpu, or compute.processes to as many as there are"
    ]


def failure(exit_code: int, tmp_path: Path, **word: object) -> ProcessFailure:
    file = tmp_path / f"{exit_code}-{word.get('message')}"
    if word:
        about = {"timestamp": "5", "exit_code": exit_code, "kind": word["kind"]}
        file.write_text(json.dumps({"message": {"message": word["message"], "extraInfo": about}}))
    return ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file=str(file))


def test_the_root_cause_is_named_and_not_what_followed_from_it(tmp_path: Path) -> None:
    killed = failure(-9, tmp_path)
    ended = failure(-15, tmp_path)
    refused = failure(4, tmp_path, kind="DataError", message="no row")
    bug = failure(1, tmp_path, kind="KeyError", message="KeyError: 'x'")
    lost = failure(7, tmp_path, kind="LostProcess", message="processes: gone")
    silent = failure(3, tmp_path)

    def seen(**failures: ProcessFailure) -> tuple[int, str, bool]:
        cause = root_cause({int(rank.removeprefix("r")): one for rank, one in failures.items()}, 4)
        return cause.code, cause.message, cause.reported

    message = "process 2 of 4 was killed by SIGKILL, perhaps for want of memory; the others were ended. "
    assert seen(r0=lost, r1=bug, r2=killed, r3=refused) == (7, message + "Fix: free memory, then `rlhf resume`", False)
    assert seen(r0=lost, r1=bug, r3=refused) == (4, "no row", False)
    assert seen(r0=refused, r3=refused) == (4, "no row", True)
    assert seen(r0=lost, r1=bug, r2=ended) == (1, "KeyError: 'x'", False)
    assert seen(r0=lost, r1=ended)[:1] == (7,)
    assert seen(r0=lost)[2] is False
    assert seen(r1=silent, r0=ended) == (3, "process 1 of 4 ended with exit code 3", False)
    assert seen(r0=ended)[0] == 143


def test_a_process_knows_its_place_from_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Place.of(said) == Place(rank=3, size=4, local_rank=1, local_size=2)
    assert Place.of({"RANK": "3", "PATH": "/bin"}) == Place()
    two = Params(compute=ComputeConfig(processes=2))
    assert wants_processes("align@dpo", two)
    assert not wants_processes("generate", two)
    assert not wants_processes("sft", Params())
    assert not only_watches("validate")
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert not wants_processes("sft", two), "it is one of them"
    assert only_watches("validate")
    assert not only_watches("sft")


@pytest.mark.parametrize(("threads", "size", "each"), [(2, 1, 2), (2, 2, 1), (8, 3, 2), (1, 4, 1)])
def test_processes_share_the_threads_of_a_stage(tmp_path: Path, threads: int, size: int, each: int) -> None:
    definition = StageDefinition(name="sft", deps=(), params=(), outs=())
    params = Params(compute=ComputeConfig(threads=threads, processes=size))
    log = Progress(tmp_path / "progress.jsonl", lines=False)
    stage = Stage(definition, params, tmp_path, tmp_path, log, Place(size=size, local_size=size))
    log.close()
    assert stage.threads == each


INSIST = """
import ctypes, signal, sys, threading, time
from tasks.frame.watchdog import insist_on_sigterm
def handler(number, frame): raise SystemExit(9)
signal.signal(signal.SIGTERM, handler)
insist_on_sigterm(10.0 if sys.argv[1] == "python" else 0.3)
library, mutex, stuck = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Event()
library.pthread_mutex_lock(mutex)
def tell():
    stuck.wait()
    print("ready", flush=True)
threading.Thread(target=tell, daemon=True).start()
sys.setswitchinterval(60)  # from here on the other thread has its turn only where this one waits
stuck.set()
if sys.argv[1] == "python":
    time.sleep(60)
library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("where", "code"), [("python", 9), ("library", 143)])
def test_a_process_that_cannot_follow_sigterm_is_ended(where: str, code: int) -> None:
    """A lock that is taken twice never comes back from the C library: a handler of Python's gets no turn."""
    process = subprocess.Popen(
        [sys.executable, "-c", INSIST, where], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=patience(SLOW)) == code
