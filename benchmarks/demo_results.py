"""The demo's bars, measured on seeds that nothing was tuned on: `python -m benchmarks.demo_results`.

For each seed it writes the demo world's data of that seed, runs every stage as its own process exactly as DVC would
(no Prefect, no MLflow, no cache), trains the plain scalar head beside the gated one, and writes the figures, the time
and the memory of every stage to docs/demo-results.md. About five minutes a seed on two idle cores.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.run.request import pipeline_stages
from rlhf_core.demo.write import write_demo_data
from rlhf_core.state.atomic import write_text
from tasks import paths
from tasks.params import resolve_params

ROOT = Path(__file__).parents[1]
COPIED = ("rlhf_core", "tasks", "dvc.yaml", "models/none")
PAGE = ROOT / "docs/demo-results.md"
GATES = ("min_spearman", "min_kendall", "max_ece")  # which the plain head does not pass

# (what it is called, the bar, where it stands in the measurements, whether larger is better)
BARS = (
    ("reward model: held-out pairwise accuracy, sampled pairs", 0.85, ("reward", "pairwise_accuracy"), True),
    ("reward model: Spearman against gold, pooled", 0.80, ("reward", "spearman"), True),
    ("reward model: Spearman against gold, within prompts", 0.80, ("reward", "spearman_within"), True),
    ("DPO: win rate over SFT, temperature 1", 0.69, ("dpo", "T=1", "win_rate"), True),
    ("DPO: p-value", 0.001, ("dpo", "T=1", "p_value"), False),
    ("DPO: win rate over SFT, temperature 0", 0.60, ("dpo", "T=0", "win_rate"), True),
    ("DPO: gain in truthfulness, mean share of true claims a reply", 0.10, ("dpo", "truthful_grade_gain"), True),
    ("PPO: win rate over SFT, temperature 1", 0.74, ("ppo", "T=1", "win_rate"), True),
    ("PPO: p-value", 0.001, ("ppo", "T=1", "p_value"), False),
    ("PPO: win rate over SFT, temperature 0", 0.5, ("ppo", "T=0", "win_rate"), True),
    ("PPO: gain in truthfulness, mean share of true claims a reply", 0.10, ("ppo", "truthful_grade_gain"), True),
    ("all stages: compute, seconds", 160.0, ("compute_s",), False),
    ("largest peak memory of a stage, MB", 2000.0, ("peak_memory_mb",), False),
)
BESIDE = (
    ("plain scalar head: pairwise accuracy", ("plain", "pairwise_accuracy")),
    ("plain scalar head: Spearman, pooled", ("plain", "spearman")),
    ("plain scalar head: Spearman, within prompts", ("plain", "spearman_within")),
    ("always longer: pairwise accuracy", ("reward", "longer_accuracy")),
    ("reward model: calibration error", ("reward", "ece")),
    ("held-out pairs", ("reward", "num_heldout_pairs")),
    ("DPO: gain in the share of replies with no untrue or unknown sentence", ("dpo", "truthful_share_gain")),
    ("DPO: KL to SFT, nats a response", ("dpo", "kl_to_sft")),
    ("PPO: gain in the share of replies with no untrue or unknown sentence", ("ppo", "truthful_share_gain")),
    ("PPO: KL to SFT, nats a response", ("ppo", "kl_to_sft")),
    ("held-out prompts of the A/B", ("num_prompts",)),
)


def make_project(folder: Path, seed: int, overrides: list[str]) -> None:
    """Copy the code and write the data of `seed` into a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    text = resolve_params(ROOT / paths.PARAMS, None, [f"seed={seed}", *overrides])
    (folder / paths.PARAMS).write_text(text)
    write_demo_data(seed, folder / paths.DATA)


def run_stage(folder: Path, stage: str) -> dict[str, Any]:
    """Run a stage and return its `done` event: compute seconds, peak memory, tokens."""
    print(f"  {stage} ...", end=" ", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "tasks", stage], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{stage} failed with exit code {done.returncode}:\n{done.stderr}")
    last = json.loads((folder / paths.progress_file(stage)).read_text().splitlines()[-1])
    print(f"{last['compute_s']:.1f} s, {last['peak_memory_mb']:.0f} MB", flush=True)
    return last


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    """Headline figures of a stage."""
    return json.loads((folder / paths.metrics_file(stage)).read_text())


def measure(seed: int, work: Path, overrides: list[str]) -> dict[str, Any]:
    """Run all stages for one seed and collect what the tables show."""
    print(f"seed {seed}")
    folder = work / f"seed-{seed}"
    make_project(folder, seed, overrides)
    events = {stage: run_stage(folder, stage) for stage in pipeline_stages(folder)}
    evaluated = metrics(folder, "evaluate")
    primary = evaluated["verdict"]["judge"]
    found: dict[str, Any] = {"seed": seed, "reward": metrics(folder, "reward"), "num_prompts": evaluated["num_prompts"]}
    for algorithm in ("ppo", "dpo"):
        found[algorithm] = evaluated[algorithm] | evaluated[algorithm]["judges"][primary]
        found[algorithm]["truthful_grade_gain"] = truthfulness(evaluated[algorithm]) - truthfulness(evaluated["sft"])
    found["seconds"] = {stage: event["compute_s"] for stage, event in events.items()}
    found["compute_s"] = sum(found["seconds"].values())
    found["peak_memory_mb"] = max(event["peak_memory_mb"] for event in events.values())
    ungated = ["reward.min_pairwise_accuracy=0.0", *(f"reward.{gate}=null" for gate in GATES)]
    plain = resolve_params(folder / paths.PARAMS, None, ["reward.head=last", *ungated])
    (folder / paths.PARAMS).write_text(plain)
    run_stage(folder, "reward")
    found["plain"] = metrics(folder, "reward")
    return found


def truthfulness(model: dict[str, Any]) -> float:
    """Mean share of true claims a reply at temperature 1; a sentence that the world does not know takes off 0.25."""
    return model["gold"]["T=1"]["truthful"]


def figure(found: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Follow `keys` into the measurements of one seed."""
    value: Any = found
    for key in keys:
        value = value[key]
    return value


def shown(value: Any) -> str:
    """A figure as the table shows it."""
    if value is None:
        return "undefined"
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def page(measurements: list[dict[str, Any]], overrides: list[str]) -> str:
    """The page of results as Markdown."""
    seeds = [found["seed"] for found in measurements]
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    rule = "|".join(["---"] * (len(seeds) + 3))
    lines = [
        "# What the demo reaches",
        "",
        "Made by `python -m benchmarks.demo_results`"
        + (f" with `--set {' '.join(overrides)}`" if overrides else "")
        + ".",
        "Everything here is simulated: the shop, the people who vote, and the gold scorer who grades.",
        "Tuning looked at seed 10 and at seed 0, whose data the repository holds; seeds",
        f"{', '.join(map(str, seeds))} were run for this page alone. Machine: {platform.machine()},",
        "torch with the thread count of `params.yaml`; seconds are the stages' own work.",
        "",
        f"| figure | bar | {heads} | met |",
        f"|{rule}|",
    ]
    for name, bar, keys, larger in BARS:
        values = [figure(found, keys) for found in measurements]
        met = all(value is not None and (value >= bar if larger else value <= bar) for value in values)
        sign = "≥" if larger else "≤"
        lines.append(
            f"| {name} | {sign} {shown(bar)} | {' | '.join(map(shown, values))} | {'yes' if met else '**no**'} |"
        )
    lines += ["", "Beside them:", "", f"| figure | {heads} |", f"|{'|'.join(['---'] * (len(seeds) + 1))}|"]
    for name, keys in BESIDE:
        lines.append(f"| {name} | {' | '.join(shown(figure(found, keys)) for found in measurements)} |")
    for stage in measurements[0]["seconds"]:
        values = " | ".join(f"{found['seconds'][stage]:.1f}" for found in measurements)
        lines.append(f"| seconds of `{stage}` | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the seeds asked for and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_results", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/demo-results", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    arguments = parser.parse_args()
    measurements = [measure(seed, arguments.work, arguments.overrides) for seed in arguments.seeds]
    write_text(arguments.work / "measurements.json", json.dumps(measurements, indent=1))
    text = page(measurements, arguments.overrides)
    write_text(arguments.out, text)
    print(text)


if __name__ == "__main__":
    main()
