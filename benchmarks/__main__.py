"""Ours beside a peer, in one go: `python -m benchmarks trl --size S`, on a GPU `... --size L XL --device cuda`.

Each side of each task runs in a process of its own, ours and the peer's in turn, with the same rows, model, thread
count and number of steps; warm-up is left out. The table has the ratio of each pair's figures, and their median. Where
the peer is not installed ours is measured alone, and that is said.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.table import page, rate
from benchmarks.worker import TASKS, Setting
from benchmarks.workload import SIZES, save_json, subject_of

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "runs/benchmarks"
ROWS = {"cpu": 16, "cuda": 128}
"""Examples a step, where nothing else is asked for."""


class WorkerFailed(Exception):
    """A measured process came to no end, or to a bad one."""


def run_worker(setting: Setting, limit_s: float | None = None) -> dict[str, Any]:
    """Measure one side in a fresh process; its figures.

    Raises:
        WorkerFailed: it failed, or took longer than `limit_s` seconds.
    """
    threads = str(setting.threads)
    what = f"{setting.task} ({setting.side})"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(setting))],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(f"{what} took more than {limit_s:.0f} seconds") from error
    if done.returncode:
        raise WorkerFailed(f"{what} failed with exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(task: str, size: str, options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Figures of both sides, pair by pair; which side goes first changes from pair to pair."""
    steps, warmup = TASKS[task].rounds or (options.steps, options.warmup)
    if TASKS[task].rounds and options.rollouts:
        steps, warmup = options.rollouts
    reason, pairs = TASKS[task].no_peer(), []
    if reason:
        print(f"{task}: ours alone, {reason}", file=sys.stderr)
    for number in range(options.pairs):
        found: dict[str, dict[str, Any]] = {}
        both = ("trl", "ours") if number % 2 else ("ours", "trl")
        for side in ("ours",) if reason else both:
            setting = Setting(
                task=task,
                side=side,
                size=size,
                steps=steps,
                warmup=warmup,
                rows=options.rows,
                threads=options.threads,
                seed=number,
                cache=str(options.cache),
                responses=options.responses,
                device=options.device,
            )
            try:
                found[side] = run_worker(setting, options.peer_limit if side == "trl" else None)
            except WorkerFailed as error:
                if side == "ours" or options.peer_limit is None:
                    raise SystemExit(str(error)) from error
                print(f"{error}\n{task}: ours alone", file=sys.stderr)
                continue
            unit = "CPU-second" if options.device == "cpu" else "second"
            tokens = rate(found[side], options.device)
            print(f"{task} {size} pair {number + 1} {side}: {tokens:,.0f} tokens a {unit}", file=sys.stderr)
        pairs.append(found)
    return pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, write the figures as JSON and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("peer", choices=["trl"])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), help="random models; S where nothing else is asked")
    parser.add_argument("--model", nargs="+", type=Path, help="folders of pretrained Llamas", default=[])
    parser.add_argument("--device", choices=list(ROWS), default="cpu", help="cpu: float32; cuda: bfloat16")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="all that suit the model")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rows", type=int, help="examples a step; 16, on a GPU 128")
    parser.add_argument("--responses", type=int, default=64, help="of a rollout")
    parser.add_argument("--rollouts", type=int, nargs=2, metavar=("COUNTED", "WARMUP"), help="of sampling and PPO")
    parser.add_argument(
        "--peer-limit", type=float, metavar="SECONDS", help="a peer that takes longer, or fails, is left out"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for models and results")
    options = parser.parse_args(arguments)
    options.rows = options.rows or ROWS[options.device]
    machine = None if options.device == "cpu" else _gpu()
    sizes = options.size or ([] if options.model else ["S"])
    for size in [*sizes, *(str(folder.resolve()) for folder in options.model)]:
        found = {task: compare(task, size, options) for task in _tasks(size, options.tasks)}
        keys = ("rows", "responses", "steps", "threads", "device")
        setting = {key: getattr(options, key) for key in keys} | {"size": title(size, options.cache)}
        short = size if size in SIZES else Path(size).name
        name = f"trl-{short}" if machine is None else f"trl-{short}-{options.device}"
        save_json(options.cache / f"{name}.json", {"setting": setting, "machine": machine, "tasks": found})
        text = page(setting, found, machine)
        (options.cache / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)


def title(size: str, kept: Path) -> str:
    """What the table calls a model: its size, or the name of its folder and its numbers."""
    if size in SIZES:
        return size
    numbers = asdict(subject_of(size, kept).size)
    return f"{Path(size).name} ({', '.join(f'{key} {value:,}' for key, value in numbers.items())})"


def _tasks(size: str, asked: Sequence[str] | None) -> list[str]:
    """Tasks that can be measured on a model.

    Raises:
        SystemExit: a task was asked for that would change a pretrained model.
    """
    fits = [name for name, task in TASKS.items() if size in SIZES or not task.ends]
    wrong = sorted(set(asked or ()) - set(fits))
    if wrong:
        raise SystemExit(f"--tasks {' '.join(wrong)}: only with --size, whose models are changed so that they end")
    return list(asked or fits)


def _gpu() -> str:
    """Name of the GPU and version of torch.

    Raises:
        SystemExit: torch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU. Fix: a build of torch for this GPU, or --device cpu")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
