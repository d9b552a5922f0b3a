"""`python -m benchmarks.plan`: what `rlhf plan` says beside what the stages then take, configuration by configuration.

Each stage is run as it is, with short settings, in a process of its own (`--stage`), and the plan is asked for the same
settings. Memory is the peak of the process as its progress file has it; time is its CPU time without imports, since
cores are shared with whoever else is at work.

    python -m benchmarks.plan [--model FOLDER] [--comparisons FILE] [--only NAME ...] [--folder SCRATCH]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import save_json
from rlhf_core.config import Params
from tasks import paths
from tasks.params import load_params, resolve_params

ROOT = Path(__file__).parents[1]
CODE = ("rlhf_core", "tasks", "flows", "models")
MEMORY_BAR, TIME_BAR = 0.10, 0.25
LORA = ("model.lora.rank=16",)
SHORT = ("sft.max_steps=40", "sft.eval_every=20", "align.ppo.steps=3", "align.dpo.epochs=1", "reward.epochs=1")
SMALL = (
    "machine.compact_memory=true",
    "model.max_prompt_tokens=160",
    "model.max_response_tokens=64",
    "sft.max_steps=2",
    "sft.batch_size=8",
    "sft.eval_every=2",
    "reward.prompts_per_step=8",
    "align.algorithms=[ppo, dpo]",
    "align.dpo.prompts_per_step=4",
    "align.ppo.steps=1",
    "align.ppo.minibatch=4",
    "align.ppo.rollout_batch=8",
    "align.ppo.epochs=1",
    "evaluate.num_prompts=8",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A stage with settings, run in a project.

    Attributes:
        project: `demo`, or `smollm2` where a folder of that model is named.
        settings: beside the project's.
    """

    name: str
    project: str
    stage: str
    settings: tuple[str, ...] = ()


CASES = (
    Case(name="demo: SFT", project="demo", stage="sft"),
    Case(name="demo: generate", project="demo", stage="generate"),
    Case(name="demo: reward, gated head", project="demo", stage="reward"),
    Case(name="demo: DPO", project="demo", stage="align@dpo"),
    Case(name="demo: PPO", project="demo", stage="align@ppo"),
    Case(name="demo: evaluate", project="demo", stage="evaluate", settings=("machine.at_once=1",)),
    Case(
        name="S, width 256, 6 layers: SFT",
        project="demo",
        stage="sft",
        settings=("model.hidden_size=256", "model.layers=6", "model.intermediate_size=1024", "sft.max_steps=12"),
    ),
    Case(name="SmolLM2: SFT, all weights", project="smollm2", stage="sft"),
    Case(name="SmolLM2: SFT, LoRA", project="smollm2", stage="sft", settings=LORA),
    Case(name="SmolLM2: reward, LoRA", project="smollm2", stage="reward", settings=(*LORA, "reward.epochs=1")),
    Case(name="SmolLM2: DPO, LoRA", project="smollm2", stage="align@dpo", settings=LORA),
    Case(name="SmolLM2: PPO, LoRA", project="smollm2", stage="align@ppo", settings=LORA),
    Case(
        name="SmolLM2: generate",
        project="smollm2",
        stage="generate",
        settings=("generate.num_prompts=16", "generate.num_heldout_prompts=0"),
    ),
    Case(name="SmolLM2: evaluate", project="smollm2", stage="evaluate", settings=(*LORA, "machine.at_once=1")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """What a stage took."""

    memory_mb: float
    cpu_s: float


def make_project(folder: Path, name: str, model: Path | None, comparisons: Path | None) -> None:
    """A project with the artifacts of every stage, which later cases read: run once, with short settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (*CODE, "dvc.yaml", "profiles", "data" if name == "demo" else "pyproject.toml"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    settings: tuple[str, ...] = SHORT
    profile = None
    if name != "demo":
        if model is None or comparisons is None:
            raise SystemExit(f"{name}: needs --model and --comparisons")
        profile = ROOT / "profiles/local-model.yaml"
        settings = (
            *SMALL,
            f"model.path={model}",
            f"data.comparisons={comparisons}",
            "data.demonstrations=null",
            "compute.device=cpu",
            *LORA,
        )
    (folder / "base.yaml").write_text(resolve_params(ROOT / "params.yaml", profile, settings))
    done = folder / "done"
    if done.exists():
        return
    (folder / paths.PARAMS).write_text((folder / "base.yaml").read_text())
    for stage in ("validate", "sft", "generate", "label", "preferences", "reward", "align@dpo", "align@ppo"):
        print(f"{name}: {stage}", file=sys.stderr, flush=True)
        _run_stage(folder, stage)
    done.touch()


def measured(folder: Path, case: Case) -> tuple[Took, float, float]:
    """What the stage took, and what the plan said: bytes in MB and seconds."""
    base = folder / "base.yaml"
    (folder / paths.PARAMS).write_text(resolve_params(base, None, case.settings))
    params = load_params(folder / paths.PARAMS)
    memory_mb, seconds = _planned(folder, params, case.stage)
    return _run_stage(folder, case.stage), memory_mb, seconds


def _planned(folder: Path, params: Params, stage: str) -> tuple[float, float]:
    from tasks.planning.plan import known_of, stage_plans

    stale = ["sft"] if stage == "sft" else []
    known = known_of(folder, params, stale)
    assert known is not None
    (plan,) = stage_plans(known, params, [stage], ())
    return plan.memory_bytes / 2**20, plan.seconds or 0.0


def _run_stage(folder: Path, stage: str) -> Took:
    command = [sys.executable, "-m", "benchmarks.plan", "--stage", stage]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    return Took(**json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    import os

    from tasks.libraries import SETTINGS

    return {**SETTINGS, **os.environ, "PYTHONPATH": str(ROOT)}


def run_here(stage: str) -> int:
    """Run a stage in this process and folder as `python -m tasks` does, and print what it took."""
    import importlib
    import time

    from tasks.frame.process import run_stage

    params = load_params(Path(paths.PARAMS))
    body = importlib.import_module(f"tasks.stages.{stage.partition('@')[0]}.run").run
    begun = time.process_time()
    code = run_stage(stage, body, params, Path.cwd())
    cpu_s = time.process_time() - begun
    if code:
        return code
    *_, last = Path(paths.progress_file(stage)).read_text().splitlines()
    print(json.dumps({"memory_mb": json.loads(last)["peak_memory_mb"], "cpu_s": cpu_s}), flush=True)
    return 0


def main(arguments: list[str]) -> int:
    """Measure the cases and print a table in Markdown; the figures go to `plan.json` beside the scratch folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--comparisons", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage")
    given = parser.parse_args(arguments)
    if given.stage:
        return run_here(given.stage)
    scratch = given.folder or Path(tempfile.mkdtemp(prefix="plan-"))
    rows = []
    print("| configuration | memory, plan | taken | off | CPU-seconds, plan | taken | off |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        if (given.only and not any(word in case.name for word in given.only)) or (
            case.project != "demo" and not given.model
        ):
            continue
        folder = scratch / case.project
        make_project(folder, case.project, given.model, given.comparisons)
        took, memory_mb, seconds = measured(folder, case)
        off = memory_mb / took.memory_mb - 1, seconds / took.cpu_s - 1
        marks = ["" if abs(one) <= bar else " ✗" for one, bar in zip(off, (MEMORY_BAR, TIME_BAR), strict=True)]
        print(
            f"| {case.name} | {memory_mb:,.0f} MB | {took.memory_mb:,.0f} MB | {off[0]:+.0%}{marks[0]} | "
            f"{seconds:.1f} | {took.cpu_s:.1f} | {off[1]:+.0%}{marks[1]} |",
            flush=True,
        )
        rows.append(
            {
                "case": case.name,
                "plan_mb": memory_mb,
                "taken_mb": took.memory_mb,
                "plan_s": seconds,
                "taken_s": took.cpu_s,
            }
        )
        save_json(scratch / "plan.json", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
