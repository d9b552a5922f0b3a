"""Which prompts a rollout answers: all in turn, or the easy ones first.

Every choice is addressed by seed and step; only the mean scores that tell easy from hard are state, and lie in the
checkpoint.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import TrainState

COUNTS, MEANS = "curriculum/counts", "curriculum/means"


def choose_prompts(cfg: PPOConfig, state: TrainState, num_prompts: int, seed: int) -> list[int]:
    """Indexes of the prompts of rollout `state.step`, each `cfg.responses_per_prompt` times in a row."""
    count = cfg.rollout_batch // cfg.responses_per_prompt
    share = share_of_prompts(state.step, cfg.curriculum.start_share, cfg.curriculum.steps)
    if share < 1.0:
        counts_P, means_P = mean_scores(state.tensors, num_prompts)
        chosen = draw_easy_prompts(means_P, counts_P, share, count, state.step, seed)
    else:
        chosen = draw_prompts(num_prompts, count, state.step, seed)
    return [index for index in chosen for _ in range(cfg.responses_per_prompt)]


def draw_prompts(num_prompts: int, count: int, step: int, seed: int) -> list[int]:
    """Indexes of a rollout's prompts: every prompt once before any comes again, each pass in an order of its own.

    Addressed by position and not consumed: draw number k stands at place k mod n of pass k div n.
    """
    drawn: list[int] = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, num_prompts)
        if index == 0 or not drawn:
            order = torch.randperm(num_prompts, generator=StepRng(seed, "ppo", epoch)("prompts")).tolist()
        drawn.append(order[index])
    return drawn


def draw_easy_prompts(means_P: Tensor, counts_P: Tensor, share: float, count: int, step: int, seed: int) -> list[int]:
    """Indexes of a rollout's prompts among the `share` of them with the highest mean scores.

    A prompt that was never answered counts as average, so it comes before those that proved hard. Prompts do not come
    twice in a rollout unless it is larger than that share.

    Args:
        means_P: mean score of each prompt (float64).
        counts_P: how many scores that is the mean of.
        share: of all prompts, above 0.
    """
    generator = StepRng(seed, "ppo", step)("curriculum")
    seen_P = counts_P > 0
    average = means_P[seen_P].mean() if bool(seen_P.any()) else means_P.new_zeros(())
    ease_P = torch.where(seen_P, means_P, average)
    shuffled_P = torch.randperm(len(ease_P), generator=generator)  # else equals would stand in the file's order
    easiest_P = shuffled_P[ease_P[shuffled_P].argsort(descending=True, stable=True)]
    pool = easiest_P[: max(1, round(share * len(easiest_P)))]
    drawn: list[int] = []
    while len(drawn) < count:
        order = torch.randperm(len(pool), generator=generator)
        drawn += pool[order][: count - len(drawn)].tolist()
    return drawn


def share_of_prompts(step: int, start_share: float, steps: int) -> float:
    """The share of the prompts that takes part in rollout `step`: a line from `start_share` to 1 at `steps`."""
    return min(1.0, start_share + (1.0 - start_share) * step / steps)


def note_scores(tensors: dict[str, Tensor], num_prompts: int, prompts: Sequence[int], scores: Sequence[float]) -> None:
    """Take scores of answered prompts into the running means in `tensors`; what is not finite says nothing."""
    counts_P, means_P = mean_scores(tensors, num_prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        if math.isfinite(score):
            counts_P[prompt] += 1
            means_P[prompt] += (score - means_P[prompt]) / counts_P[prompt]
    tensors[COUNTS], tensors[MEANS] = counts_P, means_P


def mean_scores(tensors: dict[str, Tensor], num_prompts: int) -> tuple[Tensor, Tensor]:
    """(counts, means) of all prompts; zeros before the first score."""
    if COUNTS in tensors:
        return tensors[COUNTS], tensors[MEANS]
    return torch.zeros(num_prompts, dtype=torch.int64), torch.zeros(num_prompts, dtype=torch.float64)
