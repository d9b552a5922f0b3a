"""A run as it is watched: a live table on a terminal, plain lines elsewhere. Always on stderr."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from flows.cli.folding import Column, folding_table
from flows.run.headlines import headline, number, seconds
from flows.run.summary import StageSummary
from tasks import paths
from tasks.frame.runner import Event, ProgressFollower

PLAIN_SECONDS = 10.0
RATE_SECONDS = 15.0
BAR_WIDTH = 12
COLUMNS = (
    Column(title=""),
    Column(title="stage"),
    Column(title="status"),
    Column(title="step", folds=2, right=True),
    Column(title="tokens/s", folds=1, right=True),
    Column(title="left", folds=3, right=True),
    Column(title="time", folds=4, right=True),
    Column(title="figures"),
)
FIGURES_SHOWN = 2
MARKS = {"done": ("✓", "green"), "unchanged": ("=", "cyan"), "failed": ("✗", "red"), "interrupted": ("!", "yellow")}


@dataclass(slots=True)
class Row:
    """What is known of one stage while it runs."""

    name: str
    started: float | None = None
    step: int = 0
    total: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[tuple[float, int, int]] = field(default_factory=list)
    finished: StageSummary | None = None

    def take(self, event: Event) -> None:
        """Take in a `progress` event."""
        self.step, self.total, self.tokens = event["step"], event["total"], event["tokens"]
        self.metrics = event["metrics"]
        self.history.append((event["time"], self.step, self.tokens))
        while self.history[-1][0] - self.history[0][0] > RATE_SECONDS and len(self.history) > 2:
            self.history.pop(0)

    def rates(self) -> tuple[float | None, float | None]:
        """Tokens a second and seconds left, over the last steps; None where nothing can be said yet."""
        if len(self.history) < 2:
            return None, None
        (time_0, step_0, tokens_0), (time_1, step_1, tokens_1) = self.history[0], self.history[-1]
        took = time_1 - time_0
        if took <= 0 or step_1 <= step_0:
            return None, None
        rate = (tokens_1 - tokens_0) / took
        return rate or None, (self.total - step_1) * took / (step_1 - step_0)

    def figures(self) -> str:
        """The first figures of the last step."""
        shown = [(key, value) for key, value in self.metrics.items() if value == value][:FIGURES_SHOWN]
        return " ".join(f"{key} {number(value)}" for key, value in shown)


class LiveTable:
    """A table of all stages that is redrawn in place; a context manager and an `Observer`."""

    def __init__(self, stages: list[str], stream: IO[str], expected: Mapping[str, float] | None = None) -> None:
        self._rows = {name: Row(name) for name in stages}
        self._expected = expected or {}
        self._lock = threading.Lock()
        self._began = time.monotonic()
        console = Console(file=stream, markup=False)
        self._live = Live(self, console=console, refresh_per_second=4, redirect_stdout=False)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def stage_started(self, stage: str) -> None:
        """Start the stage's clock."""
        with self._lock:
            self._rows[stage].started = time.monotonic()

    def stage_event(self, stage: str, event: Event) -> None:
        """Move the stage's bar."""
        if event["event"] == "progress":
            with self._lock:
                self._rows[stage].take(event)

    def stage_finished(self, stage: StageSummary) -> None:
        """Show the stage's result."""
        with self._lock:
            self._rows[stage.name].finished = stage.model_copy()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as it stands now, in the width that there is."""
        with self._lock:
            rows = [_cells(row) for row in self._rows.values()]
            left = time_left(self._rows.values(), self._expected)
        table = folding_table(COLUMNS, rows, width=options.max_width, figures="figures")
        elapsed = seconds(time.monotonic() - self._began)
        yield Group(table, Text(f"{elapsed} so far, {left}", "dim"))


def time_left(rows: Iterable[Row], expected: Mapping[str, float]) -> str:
    """How long the run will still take, as far as it can be said, in words.

    Args:
        rows: all stages of the run.
        expected: seconds that a stage took when it last ran; 0 for one that has nothing to do.
    """
    total, unknown = 0.0, False
    for row in rows:
        if row.finished is not None:
            continue
        _, left = row.rates()
        if left is None and row.name in expected:
            gone = 0.0 if row.started is None else time.monotonic() - row.started
            left = max(0.0, expected[row.name] - gone)
        unknown |= left is None
        total += left or 0.0
    if not unknown:
        return f"about {seconds(total)} left"
    return f"at least {seconds(total)} left" if total else "time left not known yet"


def _cells(row: Row) -> dict[str, Text | str]:
    if row.finished is not None:
        mark, colour = MARKS.get(row.finished.status, ("?", "red"))
        done = row.finished
        return {
            "": Text(mark, colour),
            "stage": row.name,
            "status": done.status,
            "tokens/s": number(round(done.tokens_per_s)) if done.tokens_per_s else "",
            "time": seconds(done.wall_s),
            "figures": Text(headline(done)),
        }
    if row.started is None:
        return {"": Text("·", "dim"), "stage": Text(row.name, "dim")}
    rate, left = row.rates()
    return {
        "": Text("▶", "blue"),
        "stage": Text(row.name, "bold"),
        "status": Text(_bar(row.step, row.total), "blue"),
        "step": f"{row.step}/{row.total}" if row.total else "",
        "tokens/s": number(round(rate)) if rate else "",
        "left": seconds(left) if left is not None else "",
        "time": seconds(time.monotonic() - row.started),
        "figures": Text(row.figures()),
    }


def _bar(step: int, total: int) -> str:
    """`━━━━────` and how much of the work is done."""
    if not total:
        return "started"
    full = round(BAR_WIDTH * min(step, total) / total)
    return f"{'━' * full}{'─' * (BAR_WIDTH - full)} {step / total:4.0%}"


class PlainLines:
    """A line at the start and end of a stage and now and then between; a context manager and an `Observer`."""

    def __init__(self, stages: list[str], stream: IO[str]) -> None:
        self._rows = {name: Row(name) for name in stages}
        self._stream = stream
        self._said = 0.0

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held."""

    def stage_started(self, stage: str) -> None:
        """Start the stage's clock; the line comes with its first figures or its end."""
        self._rows[stage].started = self._said = time.monotonic()

    def stage_event(self, stage: str, event: Event) -> None:
        """Say where the stage is, at most every few seconds."""
        row = self._rows[stage]
        if event["event"] == "start":
            self._say(f"{stage}: started")
        if event["event"] != "progress":
            return
        row.take(event)
        if time.monotonic() - self._said >= PLAIN_SECONDS:
            rate, left = row.rates()
            parts = [f"{stage}: step {row.step}/{row.total}", row.figures()]
            parts += [f"{rate:,.0f} tokens/s"] if rate else []
            parts += [f"{seconds(left)} left"] if left is not None else []
            self._say("  ".join(parts))

    def stage_finished(self, stage: StageSummary) -> None:
        """Say how the stage ended."""
        self._say(f"{stage.name}: {stage.status}  {seconds(stage.wall_s)}  {headline(stage)}".rstrip())

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=self._stream, flush=True)


def watch(stages: list[str], stream: IO[str], expected: Mapping[str, float] | None = None) -> LiveTable | PlainLines:
    """The view that suits the stream; `expected` is for `time_left`."""
    return LiveTable(stages, stream, expected) if stream.isatty() else PlainLines(stages, stream)


def expected_seconds(root: Path, stages: Iterable[str], changed: Collection[str]) -> dict[str, float]:
    """Seconds that each stage will take: as long as when it last ran in this folder, nothing where nothing changed.

    A stage that never ran to its end here is left out.
    """
    expected = {}
    for stage in stages:
        if stage not in changed:
            expected[stage] = 0.0
            continue
        follower = ProgressFollower(root / paths.progress_file(stage))
        follower.read()
        follower.close()
        if done := follower.seen.get("done"):
            expected[stage] = float(done["compute_s"])
    return expected
