"""What a combined policy gained over the best of its members, on held-out pairs that had no say in choosing either."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from rlhf_core.data.batching.pairs import PreferencePair
from rlhf_core.evaluation.intervals import bounds, group_index, mean_interval, too_few, why_no_bounds
from rlhf_core.evaluation.policy_measurement import Policy, response_logprob_sums

Values: TypeAlias = tuple[np.ndarray, np.ndarray]  # of each prompt: what is gained in sum, and by how much it weighs
PerPrompt: TypeAlias = Callable[[Policy], Values]


def halves(pairs: Sequence[PreferencePair], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Deal pairs to those that choose and those that measure, prompt by prompt, as the prompts come up in `order`.

    Returns:
        Rows of `pairs` in that order. Of a single prompt all choose.
    """
    prompts = list(dict.fromkeys(tuple(pairs[row].prompt) for row in order))
    measuring = set(prompts[1::2])
    choose = [row for row in order if tuple(pairs[row].prompt) not in measuring]
    return choose, [row for row in order if tuple(pairs[row].prompt) in measuring]


def by_likelihood(pairs: Sequence[PreferencePair], pad_id: int) -> PerPrompt:
    """Log-probability of the chosen responses, weighed by their tokens."""
    prompts, responses = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    index = group_index([tuple(prompt) for prompt in prompts])
    tokens = np.bincount(index, weights=[len(response) for response in responses])

    def of(policy: Policy) -> Values:
        sums = response_logprob_sums(policy, prompts, responses, pad_id=pad_id)
        return np.bincount(index, weights=sums), tokens

    return of


def gain_figures(per_prompt: PerPrompt | None, combined: Policy, best: Policy, num_pairs: int) -> dict[str, Any]:
    """`gain_over_best_member` with its bounds over prompts, and the pairs that it was measured on.

    The gain is a ratio of sums over prompts; the interval is that of the mean of its linearised values, one a prompt.
    """
    figure = "gain_over_best_member"
    found: dict[str, Any] = {figure: None, **bounds(figure, None), "num_gain_pairs": num_pairs}
    if per_prompt is None:
        reason = "all held-out pairs are of one prompt, which chose"
        return found | {"undefined": {figure: reason, **why_no_bounds(found, figure, reason)}}
    (ours, weights), (theirs, _) = per_prompt(combined), per_prompt(best)
    gain = float((ours - theirs).sum() / weights.sum())
    linear = gain + (ours - theirs - gain * weights) / weights.mean()
    found |= {figure: gain, **bounds(figure, mean_interval(linear))}
    return found | {"undefined": why_no_bounds(found, figure, too_few(len(weights)))}
