"""A run as it is watched: a live table on a terminal, plain lines elsewhere. Always on stderr."""

import threading
import time
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.headlines import headline, number, seconds
from flows.summary import StageSummary
from tasks.runner import Event

PLAIN_SECONDS = 10.0
RATE_SECONDS = 15.0
BAR_WIDTH = 24
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

    def __init__(self, stages: list[str], stream: IO[str]) -> None:
        self._rows = {name: Row(name) for name in stages}
        self._lock = threading.Lock()
        self._live = Live(
            console=Console(file=stream), get_renderable=self._draw, refresh_per_second=4, redirect_stdout=False
        )

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

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("", "stage", "", "step", "tokens/s", "left", "time"):
            table.add_column(title, justify="right" if title in ("step", "tokens/s", "left", "time") else "left")
        table.add_column("figures", no_wrap=True, overflow="ellipsis", ratio=1)
        with self._lock:
            for row in self._rows.values():
                table.add_row(*_cells(row))
        return Group(table)


def _cells(row: Row) -> list[RenderableType]:
    if row.finished is not None:
        mark, colour = MARKS.get(row.finished.status, ("?", "red"))
        done = row.finished
        speed = number(round(done.tokens_per_s)) if done.tokens_per_s else ""
        return [Text(mark, colour), row.name, done.status, "", speed, "", seconds(done.wall_s), Text(headline(done))]
    if row.started is None:
        return [Text("·", "dim"), Text(row.name, "dim"), *[""] * 6]
    rate, left = row.rates()
    elapsed = seconds(time.monotonic() - row.started)
    bar = ProgressBar(total=row.total or None, completed=row.step, width=BAR_WIDTH, pulse=row.total == 0)
    steps = f"{row.step}/{row.total}" if row.total else ""
    speed = number(round(rate)) if rate else ""
    remaining = seconds(left) if left is not None else ""
    return [Text("▶", "blue"), Text(row.name, "bold"), bar, steps, speed, remaining, elapsed, Text(row.figures())]


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


def watch(stages: list[str], stream: IO[str]) -> LiveTable | PlainLines:
    """The view that suits the stream."""
    return LiveTable(stages, stream) if stream.isatty() else PlainLines(stages, stream)
