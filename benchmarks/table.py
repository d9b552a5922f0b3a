"""The table that a benchmark run ends with, in Markdown."""

import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worker import TASKS, Task

HEADS = (
    "task", "tokens/CPU-s ours", "peer", "ratio (each pair)", "bar", "wall ratio",
    "peak MB ours", "peer", "ratio", "share of matmul rate",
)  # fmt: skip


def page(setting: dict[str, Any], found: dict[str, list[dict[str, dict[str, Any]]]]) -> str:
    """The machine, the setting and a row a task."""
    lines = [
        f"Size {setting['size']}, {setting['rows']} examples a step, {setting['steps']} steps a run, "
        f"{setting['threads']} thread(s). Machine: {machine()}.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    lines += [_row(task, setting["size"], pairs) for task, pairs in found.items()]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Processor and number of cores; no names of hosts or people."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def rate(figures: dict[str, Any]) -> float:
    """Tokens that are not padding a CPU-second."""
    return figures["tokens"] / figures["cpu_s"]


def wall_rate(figures: dict[str, Any]) -> float:
    """Tokens that are not padding a second."""
    return figures["tokens"] / figures["wall_s"]


def _row(name: str, size: str, pairs: list[dict[str, dict[str, Any]]]) -> str:
    task = TASKS[name]
    ours, peer = [pair["ours"] for pair in pairs], [pair["trl"] for pair in pairs]
    ratios = [rate(one) / rate(two) for one, two in zip(ours, peer, strict=True)]
    walls = [wall_rate(one) / wall_rate(two) for one, two in zip(ours, peer, strict=True)]
    memory = [one["peak_mb"] / two["peak_mb"] for one, two in zip(ours, peer, strict=True)]
    bar = task.bars[size]
    cells = (
        task.title,
        f"{median(map(rate, ours)):,.0f}",
        f"{median(map(rate, peer)):,.0f}",
        f"**{median(ratios):.2f}** ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        f"{bar} {'met' if median(ratios) >= bar else '**missed**'}",
        f"{median(walls):.2f}",
        f"{median(one['peak_mb'] for one in ours):,.0f}",
        f"{median(two['peak_mb'] for two in peer):,.0f}",
        f"{median(memory):.2f} (bar {task.memory_bar} {'met' if median(memory) <= task.memory_bar else '**missed**'})",
        _matmul_share(task, size, ours),
    )
    return f"| {' | '.join(cells)} |"


def _matmul_share(task: Task, size: str, ours: list[dict[str, Any]]) -> str:
    """Operations that the step needs, by formula, against those that plain products do in the same process."""
    if size not in task.matmul_bars:
        return ""
    shares = [rate(run) * run["flop_per_token"] / run["matmul_flop_per_s"] for run in ours]
    bar, share = task.matmul_bars[size], median(shares)
    gflop = median(run["matmul_flop_per_s"] for run in ours) / 1e9
    return f"{share:.0%} of {gflop:.0f} GFLOP/s (bar {bar:.0%} {'met' if share >= bar else '**missed**'})"
