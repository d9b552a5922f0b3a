"""Ours beside a peer, in one go: `python -m benchmarks trl --size S`.

Each side of each task runs in a process of its own, ours and the peer's in turn, with the same rows, model, thread
count and number of steps; warm-up is left out. The table has the ratio of each pair's figures, and their median.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.table import page
from benchmarks.worker import TASKS, Setting
from benchmarks.workload import SIZES, save_json

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "runs/benchmarks"


def run_worker(setting: Setting) -> dict[str, Any]:
    """Measure one side in a fresh process; its figures."""
    threads = str(setting.threads)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(setting))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{setting.task} ({setting.side}) failed with exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(task: str, options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Figures of both sides, pair by pair; which side goes first changes from pair to pair."""
    pairs = []
    steps, warmup = TASKS[task].rounds or (options.steps, options.warmup)
    for number in range(options.pairs):
        found: dict[str, dict[str, Any]] = {}
        for side in ("ours", "trl") if number % 2 else ("trl", "ours"):
            setting = Setting(
                task=task,
                side=side,
                size=options.size,
                steps=steps,
                warmup=warmup,
                rows=options.rows,
                threads=options.threads,
                seed=number,
                cache=str(options.cache),
            )
            found[side] = run_worker(setting)
            rate = found[side]["tokens"] / found[side]["cpu_s"]
            print(f"{task} {options.size} pair {number + 1} {side}: {rate:,.0f} tokens a CPU-second", file=sys.stderr)
        pairs.append(found)
    return pairs


def main() -> None:
    """Measure what was asked for, write the figures as JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("peer", choices=["trl"])
    parser.add_argument("--size", choices=sorted(SIZES), default="S")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rows", type=int, default=16, help="examples a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for models and results")
    options = parser.parse_args()
    left_out = [task for task in options.tasks if (needs := TASKS[task].needs) and needs not in os.environ]
    for task in left_out:
        print(f"{task} left out: {TASKS[task].needs} does not say where TRL 1.12 lies", file=sys.stderr)
    found = {task: compare(task, options) for task in options.tasks if task not in left_out}
    setting = {"size": options.size, "rows": options.rows, "steps": options.steps, "threads": options.threads}
    save_json(options.cache / f"trl-{options.size}.json", {"setting": setting, "tasks": found})
    text = page(setting, found)
    (options.cache / f"trl-{options.size}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
