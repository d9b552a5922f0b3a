"""What wants a GPU, part by part, each in a process of its own with a time limit; `benchmarks/gpu.sh` starts it.

A part prints its figures as a line of JSON. After each one the table and the figures are written, so whatever fails,
hangs or is killed, what was found until then is there. This file imports nothing but Python's own library.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET_S = 480.0
LEAST_S = 5.0
"""A part is not begun with less."""

PATIENCE = {"cuda": 1.0, "cpu": 4.0}
"""Factor of the limits: cores that only pretend may be busy with other things."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A row of the table.

    Attributes:
        name: of its figures in the JSON.
        title: what it is called in the table.
        command: arguments of python.
        limit_s: seconds after which it is ended.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a part: `done`, `failed`, `timed out` or `not run`; its figures, or the end of what it printed."""

    title: str
    state: str = "not run"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def check(name: str, device: str, size: str, title: str, limit_s: float) -> Part:
    """A part of `benchmarks.gpu_parts`."""
    command = ("-m", "benchmarks.gpu_parts", name, "--device", device, "--size", size)
    return Part(name=f"{name} {size}", title=f"{title}, {size}", command=command, limit_s=limit_s * PATIENCE[device])


def compared(task: str, device: str, size: str, cache: Path, limit_s: float) -> Part:
    """A task of `benchmarks trl`, in one pair; its figures come from the file that it writes."""
    sizes = ("--size", size, "--device", device, "--tasks", task, "--cache", str(cache), "--peer-limit", "25")
    amount = ("--pairs", "1", "--steps", "5", "--warmup", "2") if device == "cuda" else PRETEND
    return Part(
        name=f"{task} {size}",
        title=f"beside TRL: {task}, {size}",
        command=("-m", "benchmarks", "trl", *sizes, *amount),
        limit_s=limit_s * PATIENCE[device],
    )


PRETEND = ("--pairs", "1", "--steps", "1", "--warmup", "1", "--rows", "4", "--responses", "4", "--rollouts", "1", "1")


def parts(cache: Path, *, pretend: bool) -> list[Part]:
    """All parts, what nobody else could tell first."""
    device = "cpu" if pretend else "cuda"
    small, large, huge = ("tiny", "tiny", "tiny") if pretend else ("S", "L", "XL")
    tasks = [(task, large) for task in ("sft", "sft-lora", "reward", "dpo", "sampling", "ppo-shared")]
    tasks += [] if pretend else [(task, huge) for task in ("sft", "dpo", "sampling")]
    found = [
        check("machine", device, small, "machine", 30),
        check("exact", device, small, "first DPO loss ln 2, first PPO log-ratio 0", 60),
        check("resume", device, small, "killed and resumed: the same bytes", 75),
        check("decode", device, large, "decoding without and with CUDA graphs", 60),
        check("ppo", device, huge, "a whole PPO iteration, all weights", 75),
        check("ppo_lora", device, huge, "a whole PPO iteration, LoRA", 60),
        check("tests", device, small, "tests marked gpu", 120),
        *(compared(task, device, size, cache, 60) for task, size in tasks),
    ]  # fmt: skip
    return found if pretend else [*found, check("decode", device, huge, "decoding without and with CUDA graphs", 60)]


def run_part(part: Part, left_s: float, log: Path) -> Outcome:
    """Run a part for as long as it may; everything it started is ended with it."""
    outcome, limit = Outcome(title=part.title), min(part.limit_s, left_s)
    if left_s < LEAST_S:
        outcome.said = "the time was used up"
        return outcome
    start, out = time.monotonic(), log.with_suffix(".part")
    with out.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - start
    text = out.read_text(errors="replace")
    with log.open("a") as whole:
        whole.write(f"\n==== {part.name}: exit code {code}, {outcome.seconds:.0f} s\n{text}")
    out.unlink()
    outcome.state = "timed out" if code is None else "failed" if code else "done"
    outcome.figures = _figures(part, text)
    outcome.said = "" if code == 0 else _end_of(text)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _end_of(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _figures(part: Part, text: str) -> dict[str, Any]:
    """The last line that is JSON, or what `benchmarks trl` has written."""
    if "--cache" in part.command:
        size, device = (part.command[part.command.index(key) + 1] for key in ("--size", "--device"))
        cache = Path(part.command[part.command.index("--cache") + 1])
        path = cache / (f"trl-{size}.json" if device == "cpu" else f"trl-{size}-{device}.json")
        if not path.is_file():
            return {}
        found = json.loads(path.read_text())["tasks"]
        table = path.with_suffix(".md").read_text().splitlines()
        path.unlink()
        return {"row": table[-1], "heads": table[2], "runs": found}
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return {}


def page(outcomes: Sequence[Outcome], spent_s: float) -> str:
    """The table of all parts, and what `benchmarks trl` has measured."""
    lines = ["| part | came to | seconds | found |", "|---|---|---|---|"]
    for one in outcomes:
        found = one.figures.get("text") or ("see below" if "row" in one.figures else "")
        lines.append(
            f"| {one.title} | {one.state} | {one.seconds:.0f} | {_cell(' · '.join(filter(None, (found, one.said))))} |"
        )
    rows = [one for one in outcomes if "row" in one.figures]
    if rows:
        heads = rows[0].figures["heads"]
        lines += ["", heads, "|---" * (heads.count("|") - 1) + "|", *(one.figures["row"] for one in rows)]
    return "\n".join([*lines, "", f"{spent_s:.0f} seconds."]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; 0 where every one came to its end."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--pretend", action="store_true", help="on a CPU, tiny: whether the script runs")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    options = parser.parse_args(arguments)
    start, out = time.monotonic(), Path(os.environ.get("OUT") or ROOT / "runs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-pretend" if options.pretend else "gpu"
    log, cache = out / f"{name}.log", ROOT / "runs/benchmarks/gpu-models"
    log.write_text("")
    chosen = [part for part in parts(cache, pretend=options.pretend) if _chosen(part, options.only)]
    outcomes = [Outcome(title=part.title) for part in chosen]
    for number, part in enumerate(chosen):
        outcomes[number] = run_part(part, options.budget - (time.monotonic() - start), log)
        spent = time.monotonic() - start
        found = {part.name: asdict(one) for part, one in zip(chosen, outcomes, strict=True)}
        (out / f"{name}.json").write_text(json.dumps({"seconds": spent, "parts": found}, indent=1) + "\n")
        (out / f"{name}.md").write_text(page(outcomes, spent))
        print(f"{part.name}: {outcomes[number].state}, {outcomes[number].seconds:.0f} s", flush=True)
    print(f"\n{(out / f'{name}.md').read_text()}\n{out / name}.md, .json, .log")
    return 0 if all(one.state == "done" for one in outcomes) else 1


def _chosen(part: Part, only: Sequence[str] | None) -> bool:
    return not only or any(part.name.startswith(name) for name in only)


if __name__ == "__main__":
    sys.exit(main())
