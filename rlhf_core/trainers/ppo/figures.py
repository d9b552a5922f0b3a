"""What a rollout showed before anything was learned from it.

Shape suffixes: N = all responses of the rollout.
"""

from collections.abc import Sequence

import torch

from rlhf_core.config import PPOConfig
from rlhf_core.objectives.advantages import explained_variance
from rlhf_core.objectives.kl import kl_to_reference
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.ppo.credit import Minibatch, flat
from rlhf_core.trainers.ppo.rollout import Rollout

KL = "rollout/kl_to_reference"


def rollout_figures(
    cfg: PPOConfig, rollout: Rollout, minibatches: Sequence[Minibatch], world: World = ALONE
) -> dict[str, float]:
    """Figures of the fresh responses that count; the same in all processes.

    `reward/score` is the reward model's own number, `reward/total` what PPO maximises (further terms, penalty and KL
    counted in), `rollout/kl_to_reference` nats a response, `rollout/distinct_share` the share of different responses:
    near 1 / rows, the policy writes one thing whatever it is asked. `rollout/explained_variance` needs a value model.
    """
    counted = rollout.counted_fresh
    fresh = [rollout.responses[row] for row in counted]
    credited = [one for minibatch in minibatches for one in minibatch.parts]
    masks = [part.batch.response_mask_BR for part in rollout.parts()]

    def mean(per_part: list[torch.Tensor]) -> float:
        return rollout.gather(per_part, world)[counted].mean().item()

    scores_N = torch.tensor([row.score for row in fresh], dtype=torch.float64)
    tokens = sum(len(row.response_ids) for row in fresh)
    entropies = [masked_sum(part.entropy_BR, mask) for part, mask in zip(rollout.parts(), masks, strict=True)]
    figures = {
        "reward/score": scores_N.mean().item(),
        "reward/score_std": scores_N.std(correction=0).item(),
        "reward/total": mean([masked_sum(one.rewards_BR, mask) for one, mask in zip(credited, masks, strict=True)]),
        "policy/entropy": mean(entropies) * len(fresh) / tokens,
        KL: mean(
            [
                kl_to_reference(part.old_logprobs_BR, part.ref_logprobs_BR, mask)
                for part, mask in zip(rollout.parts(), masks, strict=True)
            ]
        ),
        "rollout/response_tokens": tokens / len(fresh),
        "rollout/finished_share": sum(row.finished for row in fresh) / len(fresh),
        "rollout/distinct_share": len({tuple(row.response_ids) for row in fresh}) / len(fresh),
    }
    if cfg.has_value_model:
        own = [one for minibatch in minibatches if minibatch.fresh for one in minibatch.parts]
        columns = [(one.part.old_values_BR, one.returns_BR, one.part.mask_BR) for one in own]
        values_T, returns_T, mask_T = map(flat, zip(*columns, strict=True))
        figures["rollout/explained_variance"] = explained_variance(values_T, returns_T, mask_T, world.total).item()
    return figures
