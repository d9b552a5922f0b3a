"""From judged responses to the figures of `reports/metrics/evaluate.json`.

One entry a model: how it writes, how far it drifted, and for candidates how it fares against the SFT model, at the
top level by the first judge at the first temperature, and under `judges` by every judge at every temperature
(`judges.<judge>.T=<temperature>`), and under `tasks` on the prompts of each task. `head_to_head` holds every two
candidates against each other. Every interval of a win rate is one of as many as there are candidates, which hold
all at once (`ab.summarise`); so `verdict`, which names the candidate with the highest win rate, may pick.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from statistics import fmean
from typing import Any

from rlhf_core.config import EvaluateConfig
from rlhf_core.demo.gold import CRITERIA, Grade
from rlhf_core.evaluation.ab import summarise
from rlhf_core.evaluation.gains import paired_gains
from rlhf_core.evaluation.head_to_head import by_task, head_to_head
from rlhf_core.evaluation.judge_registry import JUDGES, Compared
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.refusals import refusal_figures, refusal_test
from rlhf_core.evaluation.text import length_figures, variety_figures

SFT = "sft"
VERDICT_FIGURES = (
    "win_rate", "win_rate_low", "win_rate_high", "p_value", "wins", "ties", "losses", "num_prompts", "kl_to_sft",
)  # fmt: skip


def evaluation_metrics(
    settings: EvaluateConfig,
    algorithms: Sequence[str],
    judged: Mapping[tuple[str, float], JudgedSet],
    compared: Compared,
    drift: Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str],
) -> dict[str, Any]:
    """Return the figures of the whole stage.

    Args:
        settings: the section `evaluate`.
        algorithms: the candidates, in the order of the parameters.
        judged: response sets by model and temperature.
        compared: verdicts on each candidate against SFT, and on every two candidates.
        drift: `drift.drift_figures` by model.
        tasks: of the prompts, in their order; `settings.refuse_tasks` says which should be refused.
    """
    first = settings.temperatures[0]
    answerable = [task not in settings.refuse_tasks for task in tasks]
    refuses = refusal_test(settings.refusals)
    models: dict[str, Any] = {}
    for name in (SFT, *algorithms):
        sets = [judged[name, temperature] for temperature in settings.temperatures]
        models[name] = dict(drift[name]) | _descriptions(sets)
        models[name]["refusals"] = {
            temperature_label(one.responses.temperature): refusal_figures(
                [refuses(text) for text in one.responses.texts], answerable, settings.confidence
            )
            for one in sets
        }
    for name in algorithms:
        judges = _comparisons(settings, name, compared, len(algorithms))
        headline = dict(judges[settings.judges[0]][temperature_label(first)])
        del headline["order_consistency"]
        refused = [
            [refuses(text) for text in compress(judged[one, first].responses.texts, answerable)] for one in (name, SFT)
        ]
        gains = paired_gains(judged[name, first], judged[SFT, first], refused, settings.confidence)
        outcomes = compared[name, SFT, first, settings.judges[0]].outcomes
        models[name]["tasks"] = by_task(outcomes, tasks, settings.confidence, len(algorithms))
        undefined = {**headline.get("undefined", {}), **gains.get("undefined", {})}
        headline["num_candidates"] = len(algorithms)
        models[name] |= headline | {"judges": judges} | gains | ({"undefined": undefined} if undefined else {})
    best = max(algorithms, key=lambda name: models[name]["win_rate"])  # the first of equals
    verdict = {key: models[best][key] for key in VERDICT_FIGURES} | {
        "judge": settings.judges[0],
        "num_candidates": len(algorithms),
        "simulated": bool(JUDGES[settings.judges[0]].row.simulated),
        "temperature": first,
        "best": best,
        "confidence": settings.confidence,
    }
    between = head_to_head(settings, algorithms, compared)
    models |= {"head_to_head": between} if between else {}
    return models | {"verdict": verdict, "num_prompts": len(judged[SFT, first].responses.texts)}


def temperature_label(temperature: float) -> str:
    """Return the key of a temperature: `T=1`, `T=0`, `T=0.7`."""
    return f"T={temperature:g}"


def _comparisons(settings: EvaluateConfig, name: str, compared: Compared, candidates: int) -> dict[str, dict[str, Any]]:
    judges: dict[str, dict[str, Any]] = {judge: {} for judge in settings.judges}
    for judge, figures in judges.items():
        for temperature in settings.temperatures:
            verdicts = compared[name, SFT, temperature, judge]
            summary = summarise(verdicts.outcomes, settings.confidence, candidates)
            figures[temperature_label(temperature)] = summary | {"order_consistency": verdicts.consistency}
    return judges


def _descriptions(sets: Sequence[JudgedSet]) -> dict[str, Any]:
    """Lengths, variety and mean scores by temperature."""
    lengths, scores, gold = {}, {}, {}
    for one in sets:
        responses, label = one.responses, temperature_label(one.responses.temperature)
        lengths[label] = length_figures(responses.num_tokens, responses.texts, responses.finished)
        lengths[label] |= variety_figures(responses.texts)
        scores[label] = fmean(one.scores["reward_model"])
        if one.grades:
            gold[label] = gold_means(one.grades)
    return {"lengths": lengths, "reward_model_score": scores, "gold": gold or None}


def gold_means(grades: Sequence[Grade]) -> dict[str, float]:
    """Return the mean of each criterion and of the gold score, and the shares of truthful and well-formed replies.

    `truthful` is the mean grade; `truthful_share` counts replies in which nothing is untrue or unknown.
    """
    means = {name: fmean(getattr(grade, name) for grade in grades) for name in ("gold", *CRITERIA)}
    return means | {
        "truthful_share": fmean(float(grade.fully_truthful) for grade in grades),
        "wellformed_share": fmean(float(grade.wellformed) for grade in grades),
    }
