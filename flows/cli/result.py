"""The table that a run ends with."""

from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console

from flows.cli.folding import Column, folding_table
from flows.run.headlines import headline, seconds
from flows.run.summary import RunSummary, StageSummary, Verdict
from tasks.stages.text_lines import texts_line

NEXT_COMMANDS = (
    ("rlhf ui", "flow runs, logs, curves and models in the browser"),
    ("rlhf report", "the whole run on one page"),
    ("rlhf models compare rlhf-policy@candidate rlhf-sft@candidate", "what differs between two versions"),
)
PLAIN_WIDTH = 120
COLUMNS = (
    Column(title="stage"),
    Column(title="status"),
    Column(title="figures"),
    Column(title="time", folds=3, right=True),
    Column(title="overhead", folds=1, right=True),
    Column(title="peak memory", folds=2, right=True),
    Column(title="model", folds=4),
)


def print_result(summary: RunSummary, stream: IO[str]) -> None:
    """Print stages, times, versions, verdict, and what to do next."""
    console = Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else PLAIN_WIDTH)
    rows = [_cells(stage) for stage in summary.stages]
    title = f"run {summary.run}"
    table = folding_table(COLUMNS, rows, width=console.width, figures="figures", box=SIMPLE_HEAD, title=title)
    console.print(table)
    console.print(_times(summary))
    if summary.verdict:
        console.print(verdict_line(summary.verdict))
    for stage in summary.stages:
        if lost := texts_line(stage.metrics):
            console.print(f"warning: {stage.name}: {lost}")
    if summary.tracking:
        console.print(f"tracking: {summary.tracking}")
    if summary.status == "done":
        console.print("\nnext:")
        wide = max(len(command) for command, _ in NEXT_COMMANDS)
        beside = all(len(meaning) + wide + 4 <= console.width for _, meaning in NEXT_COMMANDS)
        for command, meaning in NEXT_COMMANDS:
            console.print(f"  {command:<{wide}}  {meaning}" if beside else f"  {command}\n      {meaning}")


def _cells(stage: StageSummary) -> dict[str, str]:
    waiting = "waits to be sent" if stage.outputs_hash and not stage.model_version else ""
    return {
        "stage": stage.name,
        "status": stage.status,
        "figures": headline(stage),
        "time": "" if stage.wall_s is None else seconds(stage.wall_s),
        "overhead": "" if stage.overhead_s is None else seconds(stage.overhead_s),
        "peak memory": f"{stage.peak_memory_mb:,.0f} MB" if stage.peak_memory_mb is not None else "",
        "model": stage.model_version or waiting,
    }


def verdict_line(verdict: Verdict) -> str:
    """`A/B: ppo against SFT …: win rate 0.75 [0.71, 0.79], p = 1e-20: better`."""
    judge = f"{verdict.judge} (simulated)" if verdict.simulated else verdict.judge
    conclusion = "better than SFT" if verdict.better_than_sft else "not shown to be better"
    drift = "" if verdict.kl_to_sft is None else f", KL to SFT {verdict.kl_to_sft:.2f} nats"
    return (
        f"A/B: {verdict.best} against SFT by {judge} at temperature {verdict.temperature:g}: "
        f"win rate {verdict.win_rate:.3f} "
        f"({verdict.confidence:.0%} interval {verdict.win_rate_low:.3f} to {verdict.win_rate_high:.3f}), "
        f"p = {verdict.p_value:.2g}{drift}: {conclusion}"
    )


def _times(summary: RunSummary) -> str:
    total = f"total {seconds(summary.wall_s)}"
    if summary.overhead_per_stage_s is None:
        return f"{total}: nothing had changed" if summary.status == "done" else total
    beside = (summary.compute_s or 0.0) - (summary.busy_s or 0.0)
    saved = f" ({seconds(beside)} of it side by side)" if beside >= 0.1 else ""
    return (
        f"{total}: {seconds(summary.compute_s)} of computing{saved}, {seconds(summary.overhead_s)} around it "
        f"({seconds(summary.overhead_per_stage_s)} a stage)"
    )
