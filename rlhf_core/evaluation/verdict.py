"""From judged responses to the figures of `reports/metrics/evaluate.json`.

One entry a model: how it writes, how far it drifted, and for candidates how it fares against the SFT model, at the
top level by the first judge at the first temperature, and under `judges` by every judge at every temperature
(`judges.<judge>.T=<temperature>`). `verdict` names the candidate with the highest win rate; it is a description of
this run, chosen after the fact, and its interval is not corrected for having picked the best.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_core.config import EvaluateConfig
from rlhf_core.data.demo.gold import CRITERIA, Grade
from rlhf_core.evaluation.ab import Verdicts, summarise
from rlhf_core.evaluation.response_set import JudgedSet
from rlhf_core.evaluation.text import length_figures, variety_figures

SFT = "sft"
SIMULATED_JUDGES = frozenset({"gold"})
VERDICT_FIGURES = (
    "win_rate", "win_rate_low", "win_rate_high", "p_value", "wins", "ties", "losses", "num_prompts", "kl_to_sft",
)  # fmt: skip


def evaluation_metrics(
    settings: EvaluateConfig,
    algorithms: Sequence[str],
    judged: Mapping[tuple[str, float], JudgedSet],
    compared: Mapping[tuple[str, float, str], Verdicts],
    drift: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the figures of the whole stage.

    Args:
        settings: the section `evaluate`.
        algorithms: the candidates, in the order of the parameters.
        judged: response sets by model and temperature.
        compared: verdicts on a candidate against SFT by candidate, temperature and judge.
        drift: `drift.drift_figures` by model.
    """
    first = settings.temperatures[0]
    models: dict[str, Any] = {
        name: dict(drift[name]) | _descriptions([judged[name, temperature] for temperature in settings.temperatures])
        for name in (SFT, *algorithms)
    }
    for name in algorithms:
        judges = _comparisons(settings, name, compared)
        headline = dict(judges[settings.judges[0]][temperature_label(first)])
        del headline["order_consistency"]
        models[name] |= headline | {"judges": judges} | _gains(judged[name, first], judged[SFT, first])
    best = max(algorithms, key=lambda name: models[name]["win_rate"])  # the first of equals
    verdict = {key: models[best][key] for key in VERDICT_FIGURES} | {
        "judge": settings.judges[0],
        "simulated": settings.judges[0] in SIMULATED_JUDGES,
        "temperature": first,
        "best": best,
        "confidence": settings.confidence,
    }
    return models | {"verdict": verdict, "num_prompts": len(judged[SFT, first].responses.texts)}


def temperature_label(temperature: float) -> str:
    """Return the key of a temperature: `T=1`, `T=0`, `T=0.7`."""
    return f"T={temperature:g}"


def _comparisons(
    settings: EvaluateConfig, name: str, compared: Mapping[tuple[str, float, str], Verdicts]
) -> dict[str, dict[str, Any]]:
    judges: dict[str, dict[str, Any]] = {judge: {} for judge in settings.judges}
    for judge, figures in judges.items():
        for temperature in settings.temperatures:
            verdicts = compared[name, temperature, judge]
            figures[temperature_label(temperature)] = summarise(verdicts.outcomes, settings.confidence) | {
                "order_consistency": verdicts.consistency
            }
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


def _gains(candidate: JudgedSet, sft: JudgedSet) -> dict[str, float | None]:
    """What the share of wholly truthful replies and the mean gold score gained over the SFT model."""
    if not candidate.grades:
        return {"truthful_share_gain": None, "gold_gain": None}
    after, before = gold_means(candidate.grades), gold_means(sft.grades)
    return {
        "truthful_share_gain": after["truthful_share"] - before["truthful_share"],
        "gold_gain": after["gold"] - before["gold"],
    }
