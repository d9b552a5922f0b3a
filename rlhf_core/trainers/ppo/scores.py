"""From the reward model's scores to what a response earns: normalised, with further terms, penalised, clipped.

What normalisation remembers of earlier rollouts lies in `TrainState.extra` as JSON, so that it travels with the
checkpoint. Shape suffixes: N = all responses of the rollout, K = new ones.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.objectives.advantages import penalise_scores
from rlhf_core.objectives.scaling import Moments, normalise_scores, scale_by_quantiles, score_quantiles, tell_apart
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.terms import RewardTerm, rate_responses

MOMENTS, WINDOW = "score_moments", "score_window"


def earned_scores(cfg: PPOConfig, extra: dict[str, Any], rows: Sequence[Written], new: Sequence[int]) -> Tensor:
    """What each response earns at its last token, scores_N float32.

    The score is normalised, the response's further terms are added, a missing end is penalised, and the sum is
    clipped. Only this one number a response is shifted, never the reward of each token, which would pay for length
    (Ziegler et al. 2019 scale rewards but do not shift them).

    Args:
        extra: takes in the scores of the rows `new`; replayed ones were taken in when they were fresh.
        rows: with their scores and terms.
        new: numbers of the rows that are fresh and were not set aside.
    """
    scores_N = torch.tensor([row.score for row in rows], dtype=torch.float64)
    normal_N = normalised(cfg, extra, scores_N, new)
    further_N = torch.tensor([row.further for row in rows], dtype=torch.float64)
    finished_N = torch.tensor([row.finished for row in rows])
    return penalise_scores((normal_N + further_N).float(), finished_N, cfg.score_clip, cfg.missing_end_penalty)


def normalised(cfg: PPOConfig, extra: dict[str, Any], scores_N: Tensor, new: Sequence[int]) -> Tensor:
    """The scores as `cfg.scores.normalise` wants them; takes those of the rows `new` into what `extra` remembers.

    What is not finite is not remembered: it must not spoil the rollouts that follow.
    """
    new_K = scores_N[list(new)]
    new_K = new_K[new_K.isfinite()]
    match cfg.scores.normalise:
        case "none":
            return scores_N
        case "running":
            moments = Moments(**extra.get(MOMENTS, {})).merged(Moments.of(new_K))
            extra[MOMENTS] = asdict(moments)
            return normalise_scores(scores_N, moments)
        case "quantile":
            extra[WINDOW] = (extra.get(WINDOW, []) + new_K.tolist())[-cfg.scores.window :]
            return _between_quantiles(scores_N, torch.tensor(extra[WINDOW], dtype=torch.float64), *cfg.scores.quantiles)


def _between_quantiles(scores_N: Tensor, recent_W: Tensor, low: float, high: float) -> Tensor:
    """Scores that are (nearly) all alike leave no scale, and become their distance from the lower quantile."""
    low_score, high_score = score_quantiles(recent_W, low, high) if len(recent_W) else (0.0, 0.0)
    if not tell_apart(low_score, high_score):
        return scores_N - low_score
    return scale_by_quantiles(scores_N, low_score, high_score)


def with_terms(
    terms: Sequence[RewardTerm], rows: Sequence[Written], world: World = ALONE
) -> tuple[list[Written], dict[str, float]]:
    """The responses with the sum of weight times number over all terms, and the mean of each term as a figure."""
    sums, figures = [0.0] * len(rows), {}
    for term in terms:
        rates = rate_responses(term, rows, world)
        sums = [total + term.weight * rate for total, rate in zip(sums, rates, strict=True)]
        figures[f"reward/term_{term.name}"] = fmean(rates)
    return [replace(row, further=further) for row, further in zip(rows, sums, strict=True)], figures
