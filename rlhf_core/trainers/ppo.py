"""PPO against a frozen reward model (Ouyang et al. 2022), with the clipping of Schulman et al. 2017.

One step is one rollout: sample responses, score them, credit their tokens, then take a few epochs of minibatches.
Shape suffixes: B = rows of a minibatch, R = response tokens, T = counted tokens of the whole rollout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import PPOConfig
from rlhf_core.data.batches import SequenceBatch, collate
from rlhf_core.objectives.advantages import explained_variance, gae, penalise_scores, shape_rewards
from rlhf_core.objectives.kl import kl_k1, kl_to_reference
from rlhf_core.objectives.masked import masked_mean, masked_sum, masked_whiten
from rlhf_core.objectives.policy_gradient import ppo_policy_loss, value_loss
from rlhf_core.rollout.logprobs import response_logprobs, response_logprobs_and_entropy
from rlhf_core.rollout.sampler import sample_responses
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.schedule import learning_rate

RewardFn = Callable[[SequenceBatch], Tensor]
"""Scores a batch of responses: one number a row. A `RewardModel` is one; a test may pass any rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn: the tokens that end and pad them, and how long they may become."""

    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPart:
    """Rows of a rollout that will share a minibatch, with what the models believed when they were sampled.

    The old log-probabilities and values are computed on this very batch, with its padding, and not copied from the
    sampler: the first update then starts from a log-ratio of exactly 0, and any other number is a bug.
    """

    batch: SequenceBatch
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    old_values_BR: Tensor
    entropy_BR: Tensor
    scores_B: Tensor
    finished_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """A part of a rollout with its credit: advantages are whitened over the whole rollout, returns are not."""

    part: RolloutPart
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


def train_ppo(
    cfg: PPOConfig,
    state: TrainState,
    reference: PreTrainedModel,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    *,
    seed: int,
    sampling: Sampling,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
) -> TrainState:
    """Run PPO from `state.step` to `cfg.steps`.

    `state` holds the modules and optimisers `policy` and `value`; `reference` and `reward_fn` stay as they are.
    The weights depend only on the configuration, the seed and the starting state, so a run that was stopped and
    resumed at any step ends bit for bit where the unbroken run ends.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    policy, value = state.modules["policy"], state.modules["value"]
    while state.step < cfg.steps:
        rng = StepRng(seed, "ppo", state.step)

        # 1. Roll out: sample responses, score them, note what the models believe now.
        chosen = draw_prompts(len(prompts), cfg.rollout_batch, state.step, seed)
        rollout = collect_rollout(
            cfg, policy, value, reference, reward_fn, [prompts[i] for i in chosen], sampling, rng("sample")
        )

        # 2. Credit: KL is charged on each token, the score lands on the last one, then GAE.
        minibatches = assign_credit(cfg, rollout)

        # 3. Optimise: a few epochs of minibatches; stop once the policy has moved far enough.
        rate = set_learning_rates(cfg, state)
        figures = run_epochs(cfg, state, minibatches, rng("minibatches"))

        # 4. Report, count, save. Nothing below this line changes a weight.
        figures = reportable(figures | rollout_figures(minibatches) | {"optim/learning_rate": rate})
        state.extra["tokens"] = state.extra.get("tokens", 0) + sum(m.part.batch.num_tokens for m in minibatches)
        state.step += 1
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == cfg.steps:
            checkpoint(state)
        log(state.step, cfg.steps, figures, state.extra["tokens"])
    return state


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


@torch.no_grad()
def collect_rollout(
    cfg: PPOConfig,
    policy: PreTrainedModel,
    value: torch.nn.Module,
    reference: PreTrainedModel,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[RolloutPart]:
    """Sample a response to every prompt and note log-probabilities, values and scores.

    Rows of similar length share a minibatch, which spares padding.
    """
    samples = sample_responses(
        policy,
        list(prompts),
        max_new_tokens=sampling.max_new_tokens,
        temperature=cfg.temperature,
        generator=generator,
        eos_ids=sampling.eos_ids,
        pad_id=sampling.pad_id,
        batch_size=cfg.rollout_batch,
    )
    device = policy.device
    by_length = sorted(range(len(prompts)), key=lambda row: len(samples.response_ids[row]))
    rollout = []
    for start in range(0, len(by_length), cfg.minibatch):
        rows = by_length[start : start + cfg.minibatch]
        batch = collate([prompts[i] for i in rows], [samples.response_ids[i] for i in rows], sampling.pad_id).to(device)
        logprobs_BR, entropy_BR = response_logprobs_and_entropy(policy, batch, cfg.temperature)
        rollout.append(
            RolloutPart(
                batch=batch,
                old_logprobs_BR=logprobs_BR,
                ref_logprobs_BR=response_logprobs(reference, batch, cfg.temperature),
                old_values_BR=value(batch),
                entropy_BR=entropy_BR,
                scores_B=reward_fn(batch),
                finished_B=torch.tensor([samples.finished[i] for i in rows], device=device),
            )
        )
    return rollout


def assign_credit(cfg: PPOConfig, rollout: Sequence[RolloutPart]) -> list[Minibatch]:
    """Rewards, returns, and advantages that have mean 0 and variance 1 over the rollout's tokens."""
    minibatches = []
    for part in rollout:
        mask_BR = part.batch.response_mask_BR
        scores_B = penalise_scores(part.scores_B, part.finished_B, cfg.score_clip, cfg.missing_end_penalty)
        kl_BR = kl_k1(part.old_logprobs_BR, part.ref_logprobs_BR, mask_BR)
        rewards_BR = shape_rewards(scores_B, kl_BR, mask_BR, cfg.kl_coef)
        advantages_BR, returns_BR = gae(rewards_BR, part.old_values_BR, mask_BR, cfg.gamma, cfg.gae_lambda)
        minibatches.append(
            Minibatch(part=part, rewards_BR=rewards_BR, advantages_BR=advantages_BR, returns_BR=returns_BR)
        )
    whitened_T = masked_whiten(
        torch.cat([m.advantages_BR.flatten() for m in minibatches]),
        torch.cat([m.part.batch.response_mask_BR.flatten() for m in minibatches]),
    )
    pieces = whitened_T.split([m.advantages_BR.numel() for m in minibatches])
    return [
        replace(m, advantages_BR=piece.view_as(m.advantages_BR)) for m, piece in zip(minibatches, pieces, strict=True)
    ]


def run_epochs(
    cfg: PPOConfig, state: TrainState, minibatches: Sequence[Minibatch], generator: torch.Generator
) -> dict[str, float]:
    """Go over the minibatches `cfg.epochs` times, in an order of its own each time; return mean figures.

    A minibatch on which the policy already stands further than `cfg.target_kl` from where it sampled is not
    learned from, and ends the rollout's epochs.
    """
    updates: list[dict[str, float]] = []
    stopped = False
    orders = [torch.randperm(len(minibatches), generator=generator) for _ in range(cfg.epochs)]
    for index in torch.cat(orders).tolist():
        figures, stopped = update(cfg, state, minibatches[index])
        updates.append(figures)
        if stopped:
            break
    means = {key: fmean(row[key] for row in updates if key in row) for key in updates[0]}
    return means | {"policy/updates": len(updates) - stopped, "policy/stopped_early": float(stopped)}


def update(cfg: PPOConfig, state: TrainState, minibatch: Minibatch) -> tuple[dict[str, float], bool]:
    """Take one gradient step of policy and value model; return figures, and whether the policy had moved too far."""
    part, mask_BR = minibatch.part, minibatch.part.batch.response_mask_BR
    logprobs_BR = response_logprobs(state.modules["policy"], part.batch, cfg.temperature)
    policy_loss, stats = ppo_policy_loss(
        logprobs_BR, part.old_logprobs_BR, minibatch.advantages_BR, mask_BR, cfg.clip_eps
    )
    figures = {"loss/policy": policy_loss.item()} | {key: value.item() for key, value in stats.items()}
    if figures["policy/approx_kl"] > cfg.target_kl:
        return figures, True
    values_BR = state.modules["value"](part.batch)
    critic_loss, stats = value_loss(values_BR, part.old_values_BR, minibatch.returns_BR, mask_BR, cfg.value_clip_eps)
    figures |= {"loss/value": critic_loss.item()} | {key: value.item() for key, value in stats.items()}
    for name, loss in (("policy", policy_loss), ("value", critic_loss)):
        loss.backward()
        norm = apply_gradients(state, name, loss.item(), cfg.max_grad_norm)
        figures[f"optim/grad_norm_{name}"] = norm
    return figures, False


def set_learning_rates(cfg: PPOConfig, state: TrainState) -> float:
    """Set both rates for the rollout at hand and return the policy's.

    The value model's stays constant: it has to follow a policy that moves at its fastest right after the warm-up.
    """
    rate = learning_rate(
        state.step, cfg.steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
    )
    set_learning_rate(state.optimizers["policy"], rate)
    set_learning_rate(state.optimizers["value"], cfg.value_learning_rate)
    return rate


def rollout_figures(minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """What the rollout showed before anything was learned from it.

    `reward/score` is the reward model's own number, `reward/total` what PPO maximises (penalty and KL taken off),
    `rollout/kl_to_reference` nats a response, `rollout/distinct_share` the share of different responses: near
    1 / rows, the policy writes one thing whatever it is asked.
    """
    parts = [minibatch.part for minibatch in minibatches]
    scores_B = torch.cat([part.scores_B for part in parts])
    masks = [part.batch.response_mask_BR for part in parts]
    mask_T = torch.cat([mask_BR.flatten() for mask_BR in masks])
    values_T = torch.cat([part.old_values_BR.flatten() for part in parts])
    returns_T = torch.cat([minibatch.returns_BR.flatten() for minibatch in minibatches])
    entropy_T = torch.cat([part.entropy_BR.flatten() for part in parts])
    kl_B = torch.cat(
        [kl_to_reference(part.old_logprobs_BR, part.ref_logprobs_BR, part.batch.response_mask_BR) for part in parts]
    )
    totals_B = torch.cat([masked_sum(m.rewards_BR, mask_BR) for m, mask_BR in zip(minibatches, masks, strict=True)])
    responses = [tuple(ids) for part in parts for ids in part.batch.response_ids_BR.tolist()]
    return {
        "reward/score": scores_B.mean().item(),
        "reward/score_std": scores_B.std(correction=0).item(),
        "reward/total": totals_B.mean().item(),
        "policy/entropy": masked_mean(entropy_T, mask_T).item(),
        "rollout/kl_to_reference": kl_B.mean().item(),
        "rollout/response_tokens": mask_T.sum().item() / len(scores_B),
        "rollout/finished_share": torch.cat([part.finished_B for part in parts]).float().mean().item(),
        "rollout/distinct_share": len(set(responses)) / len(responses),
        "rollout/explained_variance": explained_variance(values_T, returns_T, mask_T).item(),
    }
