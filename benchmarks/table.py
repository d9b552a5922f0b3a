"""The table that a benchmark run ends with, in Markdown."""

import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worker import TASKS, Task

Figures = dict[str, Any]

HEADS = (
    "task", "tokens/{unit} ours", "peer", "ratio (each pair)", "bar", "wall ratio",
    "peak MB ours", "peer", "ratio", "share of {rate} rate, or of the bound by memory bandwidth",
)  # fmt: skip
UTILISATION = ("model-FLOP utilisation ours", "peer")
"""Two more columns on a GPU."""


def page(setting: dict[str, Any], found: dict[str, list[dict[str, Figures]]], machine: str | None = None) -> str:
    """The machine (this processor, where none is named), the setting and a row a task."""
    cpu = setting["device"] == "cpu"
    heads = [head.format(unit="CPU-s" if cpu else "s", rate="matmul" if cpu else "bfloat16 matmul") for head in HEADS]
    heads += [] if cpu else UTILISATION
    lines = [
        f"Size {setting['size']}, {setting['rows']} examples a step, {setting['steps']} steps a run, "
        f"rollouts of {setting['responses']} responses, {setting['threads']} thread(s). "
        f"Machine: {machine or processor()}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    lines += [_row(TASKS[task], setting, pairs) for task, pairs in found.items()]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Processor and number of cores; no names of hosts or people."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def rate(figures: Figures, device: str = "cpu") -> float:
    """Tokens that are not padding a CPU-second, or on a GPU a second."""
    return figures["tokens"] / figures["cpu_s" if device == "cpu" else "wall_s"]


def wall_rate(figures: Figures) -> float:
    """Tokens that are not padding a second."""
    return figures["tokens"] / figures["wall_s"]


def _row(task: Task, setting: dict[str, Any], pairs: list[dict[str, Figures]]) -> str:
    size, device = setting["size"], setting["device"]
    ours = [pair["ours"] for pair in pairs]
    peer = [pair["trl"] for pair in pairs if "trl" in pair]
    memory = f"{median(one['peak_mb'] for one in ours):,.0f}"
    cells = [task.title, f"{median(rate(one, device) for one in ours):,.0f}"]
    if peer:
        ratios = [rate(one, device) / rate(two, device) for one, two in zip(ours, peer, strict=True)]
        walls = [wall_rate(one) / wall_rate(two) for one, two in zip(ours, peer, strict=True)]
        shares = [one["peak_mb"] / two["peak_mb"] for one, two in zip(ours, peer, strict=True)]
        bar = task.bars.get(size)
        cells += [
            f"{median(rate(two, device) for two in peer):,.0f}",
            f"**{median(ratios):.2f}** ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            "" if bar is None else f"{bar} {_met(median(ratios) >= bar)}",
            f"{median(walls):.2f}",
            memory,
            f"{median(two['peak_mb'] for two in peer):,.0f}",
            f"{median(shares):.2f} (bar {task.memory_bar} {_met(median(shares) <= task.memory_bar)})",
        ]
    else:
        cells += [f"not measured: {task.no_peer() or 'it failed'}", "", "", "", memory, "", ""]
    cells.append(_share(task, setting, ours))
    if device != "cpu":
        cells += [_utilisation(ours, ours), _utilisation(peer, ours)]
    return f"| {' | '.join(cells)} |"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _share(task: Task, setting: dict[str, Any], ours: list[Figures]) -> str:
    """What the task needs, by formula, against what plain products or copies do in the same process."""
    if "bytes_per_s" in ours[0]:
        share = median(wall_rate(run) * run["bytes_per_token"] / run["bytes_per_s"] for run in ours)
        return f"{share:.0%} of {median(run['bytes_per_s'] for run in ours) / 1e9:,.0f} GB/s"
    if "flop_per_token" not in ours[0]:
        return ""
    device, bar = setting["device"], task.matmul_bars.get(setting["size"])
    share = median(rate(run, device) * run["flop_per_token"] / run["matmul_flop_per_s"] for run in ours)
    gflop = median(run["matmul_flop_per_s"] for run in ours) / 1e9
    judged = "" if bar is None else f" (bar {bar:.0%} {_met(share >= bar)})"
    return f"{share:.0%} of {gflop:,.0f} GFLOP/s{judged}"


def _utilisation(runs: list[Figures], ours: list[Figures]) -> str:
    """Operations by the common formula against the rate of products measured beside ours."""
    if not runs or "model_flop_per_token" not in ours[0]:
        return ""
    pairs = zip(runs, ours, strict=True)
    return f"{median(wall_rate(run) * o['model_flop_per_token'] / o['matmul_flop_per_s'] for run, o in pairs):.0%}"
