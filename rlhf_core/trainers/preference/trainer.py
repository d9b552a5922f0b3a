"""Learning from pairs without a reward model: DPO (Rafailov et al. 2023) and its relatives, one loop for all.

The loop does not know which loss it takes; `loss.py` does.
Shape suffixes: B = responses of a forward pass, A = responses of all groups, K = figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batching.pairs import PreferenceGroup, group_batches
from rlhf_core.errors import DataError
from rlhf_core.objectives.preference import PAIR_LOSSES
from rlhf_core.objectives.unpaired import kto_baseline
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import in_step
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.preference.loss import FIGURES, StepTotals, pair_loss, step_totals
from rlhf_core.trainers.preference.reference import (
    LogprobCache,
    forward_passes,
    group_logprob_sums,
    reference_logprobs,
    response_places,
)
from rlhf_core.trainers.schedule import learning_rate

__all__ = ["RunContext", "train_dpo"]  # what a program needs that calls the trainer alone


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceRows:
    """Groups with what the reference makes of their responses.

    Attributes:
        groups: in the order of the training groups.
        places: where each group's responses stand among all.
        logprobs_A: summed log-probabilities; zeros where the loss asks no reference.
    """

    groups: Sequence[PreferenceGroup]
    places: Sequence[Tensor]
    logprobs_A: Tensor

    def of(self, passing: Sequence[int]) -> tuple[list[PreferenceGroup], Tensor]:
        """The groups of a forward pass and the reference's log-probabilities of their responses, [B]."""
        return [self.groups[i] for i in passing], self.logprobs_A[torch.cat([self.places[i] for i in passing])]


def train_dpo(
    cfg: DPOConfig,
    state: TrainState,
    reference: PreTrainedModel | None,
    groups: Sequence[PreferenceGroup],
    run: RunContext,
    *,
    cache: LogprobCache | None = None,
) -> TrainState:
    """Learn from `state.step` over `cfg.epochs` passes of the prompt groups.

    `state` holds the module and the optimiser `policy`. Which groups share a step is fixed for the run and only
    their order changes from pass to pass: policy and reference then see the very same tensors, and the first DPO loss
    is ln 2 exactly. The reference is asked once, before the first step, and what it said travels with the
    checkpoints; `cache` keeps it for other runs too. A loss without need of a reference (`PairLoss.needs_reference`)
    leaves it alone; it may be None then.

    Raises:
        DataError: KTO has one prompt only and cannot mismatch prompts and responses; all pairs of a step weigh 0.
        Diverged: losses or gradients were not finite three times in a row.
    """
    policy = state.modules["policy"]
    batches = group_batches(groups, cfg.prompts_per_step, StepRng(run.seed, "dpo")("groups"))
    rows, mismatched = _reference_rows(cfg, state, reference, groups, batches, run, cache)
    total = cfg.epochs * len(batches)
    for epoch in range(state.step // len(batches), cfg.epochs):
        order = torch.randperm(len(batches), generator=StepRng(run.seed, "dpo", epoch)("order")).tolist()
        for place in order[state.step % len(batches) :]:
            # 1. This process's share of the step, and what the whole step divides by and compares with.
            members = batches[place]
            passes = forward_passes(members, cfg.prompts_per_forward, run.world)
            baseline = kl_baseline(policy, mismatched, passes, run) if mismatched else torch.zeros(())
            totals = step_totals(cfg, [groups[i] for i in members], baseline)

            # 2. The loss and its gradient, a forward pass at a time.
            figures = accumulate_gradients(cfg, policy, rows, passes, totals, run)
            figures |= {"policy/kl_baseline": baseline.item()} if mismatched else {}
            rate = learning_rate(
                state.step, total, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
            )
            set_learning_rate(state.optimizers["policy"], rate)
            norm = apply_gradients(state, "policy", figures["loss/train"], cfg.max_grad_norm, run.world)

            # 3. Count, report, save. Nothing below this line changes a weight.
            figures = reportable(figures | {"optim/learning_rate": rate, "optim/grad_norm": norm})
            seen = [one.groups[i] for one in (rows, mismatched) if one for i in members]
            state.extra["tokens"] = state.extra.get("tokens", 0) + sum(map(num_tokens, seen))
            state.step += 1
            state.record(figures)
            if state.step % cfg.save_every == 0 or state.step == total:
                run.checkpoint(state)
            run.log(state.step, total, figures, state.extra["tokens"])
    return state


def accumulate_gradients(
    cfg: DPOConfig,
    policy: PreTrainedModel,
    rows: ReferenceRows,
    passes: Sequence[Sequence[int]],
    totals: StepTotals,
    run: RunContext,
) -> dict[str, float]:
    """Lay the gradient of this process's part of the step's loss on the policy; return the whole step's figures.

    How the step is cut into forward passes and processes changes the order of sums and nothing else.
    """
    sums_K = torch.zeros(len(FIGURES), device=policy.device)
    for passing, weight in in_step(passes, policy, run.world):
        some, reference_B = rows.of(passing)
        loss, figures_K = pair_loss(cfg, policy, some, reference_B, totals, run.pad_id)
        (weight * loss).backward()
        sums_K = sums_K + weight * figures_K
    return dict(zip(FIGURES, run.world.total(sums_K).tolist(), strict=True))


def kl_baseline(
    policy: PreTrainedModel,
    mismatched: ReferenceRows,
    passes: Sequence[Sequence[int]],
    run: RunContext,
) -> Tensor:
    """KTO's reference point (`kto_baseline`) over a step's mismatched rows: a forward pass of its own, no gradient."""
    policy_parts, reference_parts = [torch.zeros(0, device=policy.device)], [torch.zeros(0, device=policy.device)]
    for passing, weight in in_step(passes, policy, run.world):
        some, reference_B = mismatched.of(passing)
        policy_B = group_logprob_sums(policy, some, run.pad_id)
        if weight:  # else it was gone through for the sake of the other processes
            policy_parts.append(policy_B)
            reference_parts.append(reference_B.to(policy.device))
    return kto_baseline(torch.cat(policy_parts), torch.cat(reference_parts), run.world.total)


def mismatch(groups: Sequence[PreferenceGroup], batches: Sequence[Sequence[int]]) -> list[PreferenceGroup]:
    """Each prompt with the responses to another one: those of the next group of the step.

    The last group of a step takes those of the first group of the next step, so that a step of one prompt has a
    mismatch too. Fixed for the run, like the batches.

    Raises:
        DataError: there is one prompt only.
    """
    if len(groups) < 2:
        raise DataError(
            "align.dpo.loss kto: one prompt only, so no response to another one. Fix: pairs on two or more prompts"
        )
    order = [i for members in batches for i in members]
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        PreferenceGroup(prompt=group.prompt, responses=groups[following[i]].responses, pairs=[])
        for i, group in enumerate(groups)
    ]


def num_tokens(group: PreferenceGroup) -> int:
    """Tokens of a group's rows, without padding."""
    return sum(len(group.prompt) + len(response) for response in group.responses)


def _reference_rows(
    cfg: DPOConfig,
    state: TrainState,
    reference: PreTrainedModel | None,
    groups: Sequence[PreferenceGroup],
    batches: Sequence[Sequence[int]],
    run: RunContext,
    cache: LogprobCache | None,
) -> tuple[ReferenceRows, ReferenceRows | None]:
    """The training rows and, for KTO, the mismatched ones; what a checkpoint brought along is not asked again."""
    loss = PAIR_LOSSES[cfg.loss]

    def rows(name: str, some: Sequence[PreferenceGroup]) -> ReferenceRows:
        places = response_places(some)
        if not loss.needs_reference:
            return ReferenceRows(groups=some, places=places, logprobs_A=torch.zeros(sum(map(len, places))))
        if name not in state.tensors:
            if reference is None:
                raise ValueError(f"loss {cfg.loss!r} needs a reference")
            state.tensors[name] = reference_logprobs(
                reference, some, batches, run, per_forward=cfg.prompts_per_forward, cache=cache
            )
        return ReferenceRows(groups=some, places=places, logprobs_A=state.tensors[name])

    trained = rows("reference_logprobs", groups)
    if not loss.needs_baseline:
        return trained, None
    return trained, rows("reference_logprobs_mismatched", mismatch(groups, batches))
