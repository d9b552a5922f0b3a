"""The gradient steps of a rollout: clipped policy loss, entropy bonus, clipped value loss, early stop on divergence.

Shape suffixes: B = rows of a part, R = response tokens.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.objectives.policy_gradient import entropy_losses, ppo_policy_losses, value_losses
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.figures import numbers
from rlhf_core.trainers.optimisation import note_refusal, set_learning_rate, take_step
from rlhf_core.trainers.ppo.credit import CreditedPart, Minibatch
from rlhf_core.trainers.ppo.forward import PolicyOutputs, policy_outputs, shares_trunk, values_of
from rlhf_core.trainers.schedule import learning_rate

MOVED, LARGEST = "policy/approx_kl", "policy/ratio_max"
POLICY_LOSS, VALUE_LOSS = "loss/policy", "loss/value"
VALUE_FIGURES = (VALUE_LOSS, "loss/value_clip_fraction")


def run_epochs(
    cfg: PPOConfig,
    state: TrainState,
    minibatches: Sequence[Minibatch],
    generator: torch.Generator,
    world: World = ALONE,
) -> dict[str, float | None]:
    """Go over the minibatches `cfg.epochs` times, in an order of its own each time; return mean figures.

    A minibatch on which the policy already stands further than `cfg.target_kl` from where it sampled is not
    learned from, and ends the rollout's epochs. A figure is None where no step had it.

    Raises:
        Diverged: in three rollouts in a row no step of a model could be taken, losses or gradients being not finite.
    """
    minibatches = [one for one in minibatches if one.tokens]  # else all of its responses were set aside
    updates: list[dict[str, float | None]] = []
    stopped = False
    orders = [torch.randperm(len(minibatches), generator=generator) for _ in range(cfg.epochs)]
    for index in torch.cat(orders).tolist():
        figures, stopped = update(cfg, state, minibatches[index], world)
        updates.append(figures)
        if stopped:
            break
    _note_refusals(state, updates)
    keys = dict.fromkeys(key for row in updates for key in row)
    known = {key: [value for row in updates if (value := row.get(key)) is not None] for key in keys}
    means = {key: fmean(values) if values else None for key, values in known.items()}
    return means | {"policy/updates": len(updates) - stopped, "policy/stopped_early": float(stopped)}


def update(
    cfg: PPOConfig, state: TrainState, minibatch: Minibatch, world: World = ALONE
) -> tuple[dict[str, float | None], bool]:
    """Take one gradient step of policy and value model; return figures, and whether the policy had moved too far.

    A loss is the sum over the minibatch's tokens, of all parts and processes, over the mean number of tokens of the
    rollout's minibatches: how rows are dealt to parts and processes changes nothing but the order of sums, and a token
    counts the same in a minibatch of short responses and in one of long ones.
    """
    learns_value = minibatch.fresh and "value" in state.modules
    sums: dict[str, float] = {}
    ratios: list[float] = []
    for credited in minibatch.parts:
        outputs = policy_outputs(state.modules, credited.part.batch, cfg.temperature, with_entropy=cfg.entropy_coef > 0)
        loss, figures = policy_term(cfg, credited, outputs, minibatch)
        ratios.append(figures.pop(LARGEST))
        _add(sums, figures)
        # Divergence only grows from part to part: once it is too far, the rest is looked at and not learned from.
        if world.size == 1 and sums[MOVED] > cfg.target_kl:
            continue
        if learns_value:
            _add(sums, backward_both(cfg, state, credited, outputs, loss, minibatch))
        else:
            loss.backward()
    totals = _over_all(sums, world) | {LARGEST: largest_of(world.collect(ratios))}
    if totals[MOVED] > cfg.target_kl:
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return {key: value for key, value in totals.items() if key not in VALUE_FIGURES}, True
    norms: dict[str, float | None] = {}
    for name, key in (("policy", POLICY_LOSS), ("value", VALUE_LOSS)):
        if key in totals:
            norms[grad_norm_key(name)] = take_step(state, name, totals[key], cfg.max_grad_norm, world)
    return {**totals, **norms}, False


def policy_term(
    cfg: PPOConfig, credited: CreditedPart, outputs: PolicyOutputs, minibatch: Minibatch
) -> tuple[Tensor, dict[str, float]]:
    """A part's share of the policy loss, the entropy bonus taken off, and of its figures."""
    mask_BR = credited.part.mask_BR
    losses_BR, stats = ppo_policy_losses(
        outputs.logprobs_BR,
        credited.part.old_logprobs_BR,
        credited.advantages_BR,
        mask_BR,
        cfg.clip_eps,
        cfg.kl.k3_cap,
    )
    if cfg.entropy_coef:
        losses_BR = losses_BR + cfg.entropy_coef * entropy_losses(outputs.entropy_BR, mask_BR)
    loss, largest = losses_BR.sum() / minibatch.divisor, stats.pop("policy/ratio").max()
    sums = {key: value_BR.sum() / minibatch.tokens for key, value_BR in stats.items()}
    return loss, numbers({POLICY_LOSS: loss, LARGEST: largest, **sums})


def backward_both(
    cfg: PPOConfig,
    state: TrainState,
    credited: CreditedPart,
    outputs: PolicyOutputs,
    loss: Tensor,
    minibatch: Minibatch,
) -> dict[str, float]:
    """Add the gradients of policy and value loss, in one pass where they share a body; return the value's figures.

    With two bodies the policy's graph is gone before the value's is built.
    """
    part, shared = credited.part, shares_trunk(state.modules)
    if not shared:
        loss.backward()
    values_BR = values_of(state.modules, part.batch, outputs)
    losses_BR, stats = value_losses(
        values_BR, part.old_values_BR, credited.returns_BR, part.mask_BR, cfg.value_clip_eps
    )
    critic_loss, tokens = losses_BR.sum() / minibatch.divisor, minibatch.tokens
    (loss + cfg.value.coef * critic_loss if shared else critic_loss).backward()
    return numbers({VALUE_LOSS: critic_loss, **{key: value_BR.sum() / tokens for key, value_BR in stats.items()}})


def grad_norm_key(name: str) -> str:
    """The figure that a step has of the model's gradient."""
    return f"optim/grad_norm_{name}"


def largest_of(numbers: Sequence[float]) -> float:
    """The largest; NaN where any is, which `max` may pass over."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _note_refusals(state: TrainState, updates: Sequence[dict[str, float | None]]) -> None:
    """A rollout counts as refused where no step of it was taken: one bad response may spoil several, in each pass."""
    for name in state.optimizers:
        tried = [row for row in updates if grad_norm_key(name) in row]
        if tried:
            taken = any(row[grad_norm_key(name)] is not None for row in tried)
            note_refusal(
                state, name, taken, f"losses {[row.get(f'loss/{name}') for row in tried]} of its rollout's steps"
            )


def set_learning_rates(cfg: PPOConfig, state: TrainState) -> float:
    """Set both rates for the rollout at hand and return the policy's.

    The value model's stays constant: it has to follow a policy that moves at its fastest right after the warm-up.
    """
    rate = learning_rate(
        state.step, cfg.steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
    )
    set_learning_rate(state.optimizers["policy"], rate)
    if "value" in state.optimizers:
        set_learning_rate(state.optimizers["value"], cfg.value_learning_rate)
    return rate


def _add(sums: dict[str, float], figures: dict[str, float]) -> None:
    for key, value in figures.items():
        sums[key] = sums.get(key, 0.0) + value


def _over_all(sums: dict[str, float], world: World) -> dict[str, float]:
    """Each figure summed over all processes, which hold the same keys."""
    keys = sorted(sums)
    return dict(
        zip(keys, world.total(torch.tensor([sums[key] for key in keys], dtype=torch.float64)).tolist(), strict=True)
    )
