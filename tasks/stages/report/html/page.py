"""The page itself: what each section shows, and the template that lays it out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_core.config import EvaluateConfig, Params
from rlhf_core.config.data import SOURCE_ROWS
from rlhf_core.config.evaluation import JUDGE_ROWS
from tasks.catalogue import stage_title
from tasks.stages.report.html import words
from tasks.stages.report.html.between import between_candidates, task_table, win_rate_row
from tasks.stages.report.html.comparisons import WinRate, dot_plot, forest_plot, share_bar
from tasks.stages.report.html.distributions import Series, calibration_plot, grade_plot, histogram, line_chart
from tasks.stages.report.html.lineage import lineage, parameter_rows
from tasks.stages.report.html.sources import RunFiles
from tasks.stages.text_lines import texts_line

FOLDER = Path(__file__).parent
COLORS = {name: f"c-{name}" for name in words.POLICIES}
CRITERIA = ("gold", "truthful_share", "helpful", "truthful", "harmless", "concise")
# Curves that tell whether training went well; the rest of them are a click away.
OPEN_NAMESPACES = ("loss", "reward", "implicit_reward", "rollout", "eval")
OPEN_CURVES = ("policy/entropy",)
FOLDED_ENDINGS = ("clip_fraction", "score_std", "explained_variance", "loss/ranking", "loss/policy")
DRIFT, SCORE = "rollout/kl_to_reference", "reward/score"


def render(run: RunFiles, params: Params, root: Path) -> str:
    """Return the whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": words.visible, "figure": words.figure_text, "percent": words.percent_text}
    evaluation = run.metrics.get("evaluate")
    algorithms = params.candidates
    return environment.get_template("template.html.j2").render(
        simulated=simulated_parts(params),
        verdict=words.verdict_sentence(evaluation["verdict"]) if evaluation else None,
        verdict_terms=words.verdict_terms(evaluation["verdict"]) if evaluation else None,
        warnings=[(stage_title(name), line) for name, figures in run.metrics.items() if (line := texts_line(figures))],
        tiles=list(_tiles(run, algorithms)),
        changes=list(words.changes(evaluation, algorithms)) if evaluation else [],
        between=between_candidates(evaluation, params.evaluate, COLORS) if evaluation else None,
        by_task=task_table(evaluation, algorithms) if evaluation else None,
        forest=_forest(evaluation, params.evaluate, algorithms) if evaluation else None,
        criteria=list(_criteria(evaluation, params.evaluate, algorithms)) if evaluation else [],
        writing=list(_writing(evaluation, params.evaluate, algorithms)) if evaluation else [],
        funnel=_funnel(run),
        ppo="align@ppo" in run.curves,
        annotators=(run.annotators or {}).get("annotators", {}),
        label_figures=run.metrics.get("label", {}),
        reward=run.metrics.get("reward"),
        reward_figures=list(_reward_figures(run)),
        curves=[(stage_title(stage), *_curves(rows)) for stage, rows in run.curves.items()],
        samples=run.samples,
        models=("sft", *algorithms),
        names=words.POLICIES,
        judges=words.JUDGES,
        simulated_labels=bool(SOURCE_ROWS[params.label.source].simulated),
        lineage=lineage(root, algorithms),
        parameters=parameter_rows(params),
        metrics=[(stage_title(stage), words.flattened(figures)) for stage, figures in run.metrics.items()],
    )


def simulated_parts(params: Params) -> list[str]:
    """Return, in words, what on this page no person said; the page states it wherever it matters."""
    judges = [row.simulated for name, row in JUDGE_ROWS.items() if name in params.evaluate.judges]
    return [part for part in (SOURCE_ROWS[params.label.source].simulated, *judges) if part]


def _tiles(run: RunFiles, algorithms: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (label, figure, what to read it against)."""
    evaluation, reward = run.metrics.get("evaluate"), run.metrics.get("reward")
    compared = {name: evaluation[name] for name in algorithms} if evaluation else {}
    for name, figures in compared.items():
        note = f"{words.bounds_text(figures, 'win_rate')}, p = {words.p_text(figures['p_value'])}".replace("= <", "< ")
        yield f"{words.POLICIES[name]} win rate against SFT", f"{figures['win_rate']:.1%}", note
    if reward and reward.get("pairwise_accuracy") is not None:
        note = f"{words.bounds_text(reward, 'pairwise_accuracy')}; always longer {reward['longer_accuracy']:.1%}"
        yield "Reward model, held-out pairs right", f"{reward['pairwise_accuracy']:.1%}", note
    if reward and reward.get("spearman") is not None:
        within = reward.get("spearman_within")
        note = "undefined within prompts" if within is None else f"within prompts {within:.3f}"
        yield "Reward model, Spearman with grades", f"{reward['spearman']:.3f}", note
    for name, figures in compared.items():
        gain = figures.get("truthful_share_gain")
        kl = f"KL to SFT {figures['kl_to_sft']:.2f} nats a response"
        if gain is not None:
            yield f"{words.POLICIES[name]} truthful replies", f"{100 * gain:+.1f} points", kl
        else:
            yield f"{words.POLICIES[name]} drift", f"{figures['kl_to_sft']:.2f} nats", "KL to SFT a response"


def _forest(evaluation: Mapping[str, Any], settings: EvaluateConfig, algorithms: Sequence[str]) -> Markup:
    groups: dict[str, list[WinRate]] = {}
    for judge in settings.judges:
        for temperature in settings.temperatures:
            label = f"T={temperature:g}"
            rows = [
                win_rate_row(words.POLICIES[name], COLORS[name], evaluation[name]["judges"][judge][label])
                for name in algorithms
            ]
            groups[f"{words.JUDGES[judge]}, {words.sampling(temperature)}"] = rows
    return forest_plot(groups)


def _criteria(evaluation: Mapping[str, Any], settings: EvaluateConfig, algorithms: Sequence[str]) -> Iterator[Markup]:
    models = ("sft", *algorithms)
    for temperature in settings.temperatures if evaluation["sft"]["gold"] else ():
        label = f"T={temperature:g}"
        rows = {
            criterion.replace("_share", " replies").replace("gold", "gold score"): {
                words.POLICIES[name]: evaluation[name]["gold"][label][criterion] for name in models
            }
            for criterion in CRITERIA
        }
        colors = {words.POLICIES[name]: COLORS[name] for name in models}
        yield dot_plot(f"Gold scorer (simulated), {words.sampling(temperature)}", rows, colors)


def _writing(
    evaluation: Mapping[str, Any], settings: EvaluateConfig, algorithms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for temperature in settings.temperatures:
        for name in ("sft", *algorithms):
            label = f"T={temperature:g}"
            score = evaluation[name]["reward_model_score"][label]
            row = {"model": words.POLICIES[name], "sampling": words.sampling(temperature), "score": score}
            yield row | evaluation[name]["lengths"][label]


def _funnel(run: RunFiles) -> list[dict[str, Any]]:
    """Return a row a step: what is left, as a bar too, what it took out and why; the split stands at the end."""
    if not run.funnel:
        return []
    first = run.funnel[0]["pairs_in"]
    rows = [{"step": "labelled pairs", "left": first, "out": 0, "reason": ""}]
    for step in run.funnel:
        name = step["step"].replace("_", " ")
        rows.append({"step": name, "left": step["pairs_out"], "out": step["removed"], "reason": step["reason"]})
    split = run.metrics.get("preferences", {})
    for side in ("train", "heldout"):
        if f"pairs_{side}" in split:
            prompts = f"on {split[f'prompts_{side}']:,} prompts"
            rows.append({"step": f"→ {side}", "left": split[f"pairs_{side}"], "out": 0, "reason": prompts})
    for name, count in split.get("criteria", {}).items():
        reason = f"pairs on the criterion {name}, beside those above"
        rows.append({"step": "→ train", "left": count, "out": 0, "reason": reason})
    return [row | {"bar": share_bar(min(1.0, row["left"] / max(1, first)))} for row in rows]


def _reward_figures(run: RunFiles) -> Iterator[Markup]:
    scores = run.heldout_scores
    if scores:
        groups = {"chosen": ("c-chosen", scores["chosen_score"]), "rejected": ("c-rejected", scores["rejected_score"])}
        yield histogram("Scores of held-out pairs", groups)
        yield histogram("Margins (chosen - rejected)", {"margin": ("c-main", scores["margin"])})
    if run.calibration and run.calibration["bins"]:
        yield calibration_plot(run.calibration["bins"], run.calibration["ece"])
    if run.graded_scores:
        yield grade_plot(run.graded_scores["score"], run.graded_scores["model_score"])


def _curves(rows: Sequence[Mapping[str, float]]) -> tuple[list[Markup], list[Markup]]:
    """Return the panels that stand open and those behind a click; train and held-out share a panel."""
    columns = sorted({key for row in rows for key in row} - {"step"})
    shown: list[Markup] = []
    folded: list[Markup] = []
    for column in columns:
        namespace, _, name = column.partition("/")
        partner = f"{namespace}/heldout"
        if name == "heldout" and f"{namespace}/train" in columns:
            continue
        series = [Series("train" if name == "train" else name, "c-main", _points(rows, column))]
        if name == "train" and partner in columns:
            series.append(Series("held-out", "c-alt", _points(rows, partner)))
        title = namespace if name == "train" else column
        opened = (namespace in OPEN_NAMESPACES or column in OPEN_CURVES) and not column.endswith(FOLDED_ENDINGS)
        (shown if opened else folded).append(line_chart(title, series))
    path = [(row[DRIFT], row[SCORE]) for row in rows if DRIFT in row and SCORE in row]
    if path:
        shown.append(
            line_chart("score bought with drift", [Series("score", "c-main", path)], along="KL to the reference, nats")
        )
    return shown, folded


def _points(rows: Sequence[Mapping[str, float]], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in rows if column in row]
