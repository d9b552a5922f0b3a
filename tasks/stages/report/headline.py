"""The few figures of a whole run that people sort, filter and compare runs by: in DVC, in MLflow, in the report."""

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.catalogue import stage_row

POLICY_FIGURES = (
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "p_value",
    "kl_to_sft",
    "truthful_share_gain",
    "gold_gain",
)


def run_figures(stage: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a stage's metrics stands on the run as a whole; what is undefined is left out."""
    row, policy = stage_row(stage), stage.partition("@")[2]
    prefix = f"{policy}." if policy else ""
    found = {f"{prefix}{key}": find_figure(metrics, key) for key in (row.run_figures if row else ())}
    if row and row.name == "evaluate":
        found |= {
            f"{name}.{key}": figures[key]
            for name, figures in metrics.items()
            if isinstance(figures, Mapping) and "judges" in figures
            for key in POLICY_FIGURES
            if key in figures
        }
    return {key: value for key, value in found.items() if is_number(value)}


def headline_figures(metrics: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of all stages as one mapping, nested by policy: what `dvc metrics show` lists.

    Args:
        metrics: stages with what they wrote to `reports/metrics/`.
    """
    found: dict[str, Any] = {}
    for stage, figures in metrics:
        for key, value in run_figures(stage, figures).items():
            *parents, name = key.split(".")
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = value
    return found


def find_figure(metrics: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    value: Any = metrics
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def is_number(value: Any) -> bool:
    """Whether a figure can be compared: true and false cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)
