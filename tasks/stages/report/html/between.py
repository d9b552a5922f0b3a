"""Candidates against each other, and against the SFT model task by task."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_core.config import EvaluateConfig
from tasks.stages.report.html import words
from tasks.stages.report.html.comparisons import WinRate, forest_plot
from tasks.stages.report.html.svg import tag


def between_candidates(
    evaluation: Mapping[str, Any], settings: EvaluateConfig, colors: Mapping[str, str]
) -> Markup | None:
    """Return a forest plot of every two candidates; None where there is one candidate only."""
    groups: dict[str, list[WinRate]] = {}
    for pair, judges in evaluation.get("head_to_head", {}).items():
        a, _, b = pair.partition("_against_")
        name = f"{words.POLICIES[a]} against {words.POLICIES[b]}"
        for judge in settings.judges:
            for temperature in settings.temperatures:
                title = f"{words.JUDGES[judge]}, {words.sampling(temperature)}"
                figures = judges[judge][f"T={temperature:g}"]
                groups.setdefault(title, []).append(win_rate_row(name, colors[a], figures))
    return forest_plot(groups, "Win rates of candidates against each other") if groups else None


def task_table(evaluation: Mapping[str, Any], algorithms: Sequence[str]) -> Markup | None:
    """Return win rates against SFT by task, a row a task and candidate; None where prompts name no task."""
    titles = ("Task", "Policy", "Prompts", "Win rate and interval", "Wins / ties / losses", "p")
    rows = [
        tag(
            "tr",
            tag("th", words.visible(task), scope="row"),
            *(tag("td", cell, class_="num") for cell in _task_cells(name, evaluation[name]["tasks"][task])),
        )
        for task in sorted({task for name in algorithms for task in evaluation[name].get("tasks", {})})
        for name in algorithms
    ]
    if not rows:
        return None
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))
    return tag("table", head, tag("tbody", *rows))


def win_rate_row(name: str, color: str, figures: Mapping[str, Any]) -> WinRate:
    """A row of the forest plot from what `ab.summarise` returns."""
    return WinRate(
        name=name,
        color=color,
        win_rate=figures["win_rate"],
        low=figures["win_rate_low"],
        high=figures["win_rate_high"],
        counts=_counts(figures),
        p_value=words.p_text(figures["p_value"]),
    )


def _task_cells(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    few = " (too few for an interval)" if figures["win_rate_low"] is None else ""
    rate = words.interval_text(figures, "win_rate") + few
    prompts = f"{figures['num_prompts']:,}"
    return words.POLICIES[name], prompts, rate, _counts(figures), words.p_text(figures["p_value"])


def _counts(figures: Mapping[str, Any]) -> str:
    return f"{figures['wins']} / {figures['ties']} / {figures['losses']}"
