"""What a candidate gained over the SFT model on the same prompts: truth, scores, length, refusals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_core.evaluation.intervals import bounds, mean_interval, too_few, why_no_bounds
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.refusals import share_gain


def paired_gains(
    candidate: JudgedSet, sft: JudgedSet, refused: Sequence[Sequence[bool]], confidence: float
) -> dict[str, Any]:
    """Return each gain with its bounds over prompts.

    Args:
        candidate, sft: responses to the same prompts, in the same order.
        refused: which of the candidate's and of the SFT model's responses to prompts that should be answered are
            refusals.

    Returns:
        `truthful_share_gain` and `gold_gain`, None without grades; `score_gain` of the reward model; `tokens_gain`, in
        tokens a response, with `tokens_ratio` (mean over mean) and `grew_longer`, whether the whole interval lies above
        0; `over_refusal_gain`. `undefined`, only where something is, says why.
    """
    pairs = zip(candidate.grades, sft.grades, strict=True)
    gold = [after.gold - before.gold for after, before in pairs]
    truth = [[grade.fully_truthful for grade in one.grades] for one in (candidate, sft)]
    tokens = [np.asarray(one.responses.num_tokens, dtype=np.float64) for one in (candidate, sft)]
    scores = np.subtract(candidate.scores["reward_model"], sft.scores["reward_model"])
    found: dict[str, Any] = {
        **share_gain("truthful_share_gain", truth[0], truth[1], confidence),
        **_mean("gold_gain", gold, confidence),
        **_mean("score_gain", scores, confidence),
        **_mean("tokens_gain", tokens[0] - tokens[1], confidence),
        "tokens_ratio": float(tokens[0].mean() / tokens[1].mean()),
        **share_gain("over_refusal_gain", refused[0], refused[1], confidence),
    }
    found["grew_longer"] = found["tokens_gain_low"] is not None and found["tokens_gain_low"] > 0.0
    undefined: dict[str, str] = {}
    for figure, count, missing in (
        ("truthful_share_gain", len(gold), "gold is no judge"),
        ("gold_gain", len(gold), "gold is no judge"),
        ("score_gain", len(scores), ""),
        ("tokens_gain", len(scores), ""),
        ("over_refusal_gain", len(refused[0]), "no prompt that should be answered"),
    ):
        reason = too_few(count) if count else missing
        undefined |= why_no_bounds(found, figure, reason) | ({} if count else {figure: missing})
    return found | ({"undefined": undefined} if undefined else {})


def _mean(figure: str, differences: Sequence[float] | np.ndarray, confidence: float) -> dict[str, float | None]:
    value = float(np.mean(differences)) if len(differences) else None
    return {figure: value, **bounds(figure, mean_interval(differences, confidence))}
