"""The few figures of each stage that a person wants to see first, as text."""

from flows.run.summary import StageSummary
from tasks.catalogue import stage_row
from tasks.stages.report.headline import find_figure, is_number

FALLBACK_FIGURES = 3


def headline(stage: StageSummary) -> str:
    """`held-out loss 1.234 · steps 550`: the stage's first figures, or what went wrong with it."""
    if stage.message and stage.status in ("failed", "interrupted"):
        return stage.message
    row = stage_row(stage.name)
    pairs = [(label, find_figure(stage.metrics, key)) for label, key in (row.shown if row else ())]
    shown = [f"{label} {number(value)}" for label, value in pairs if is_number(value)]
    if row is None:
        flat = [(key, value) for key, value in stage.metrics.items() if is_number(value)]
        shown = [f"{key} {number(value)}" for key, value in flat[:FALLBACK_FIGURES]]
    return " · ".join(shown)


def number(value: float) -> str:
    """A figure in at most four significant digits; counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def seconds(value: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `1 h 02 min`; a dash for None."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
