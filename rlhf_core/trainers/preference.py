"""Direct preference optimisation (Rafailov et al. 2023): the policy learns from pairs without a reward model.

Shape suffixes: B = responses of a step, N = pairs of a step, R = response tokens, A = responses of all groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batches import SequenceBatch
from rlhf_core.data.pairs import PreferenceGroup, collate_groups, group_batches
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.objectives.preference import chosen_nll, dpo_loss
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.schedule import learning_rate


def train_dpo(
    cfg: DPOConfig,
    state: TrainState,
    reference: PreTrainedModel,
    groups: Sequence[PreferenceGroup],
    *,
    seed: int,
    pad_id: int,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
) -> TrainState:
    """Run DPO from `state.step` over `cfg.epochs` passes of the prompt groups.

    `state` holds the module and the optimiser `policy`. The reference is asked once, before the first step; what it
    said travels with the checkpoints. Which groups share a step is fixed for the run and only their order changes
    from pass to pass: policy and reference then see the very same tensors, and the first loss is ln 2 exactly.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    policy, optimizer = state.modules["policy"], state.optimizers["policy"]
    batches = group_batches(groups, cfg.prompts_per_step, StepRng(seed, "dpo")("groups"))
    if "reference_logprobs" not in state.tensors:
        state.tensors["reference_logprobs"] = reference_logprobs(reference, groups, batches, pad_id)
    places = response_places(groups)
    total = cfg.epochs * len(batches)
    for epoch in range(state.step // len(batches), cfg.epochs):
        order = torch.randperm(len(batches), generator=StepRng(seed, "dpo", epoch)("order")).tolist()
        for place in order[state.step % len(batches) :]:
            members = batches[place]
            rate = learning_rate(
                state.step, total, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
            )
            set_learning_rate(optimizer, rate)
            batch, chosen_N, rejected_N = collate_groups([groups[i] for i in members], pad_id)
            reference_B = state.tensors["reference_logprobs"][torch.cat([places[i] for i in members])]
            loss, figures = pair_loss(cfg, policy, batch.to(policy.device), reference_B, chosen_N, rejected_N)
            loss.backward()
            norm = apply_gradients(state, "policy", loss.item(), cfg.max_grad_norm)
            figures = reportable(figures | {"optim/learning_rate": rate, "optim/grad_norm": norm})

            state.extra["tokens"] = state.extra.get("tokens", 0) + batch.num_tokens
            state.step += 1
            state.record(figures)
            if state.step % cfg.save_every == 0 or state.step == total:
                checkpoint(state)
            log(state.step, total, figures, state.extra["tokens"])
    return state


def pair_loss(
    cfg: DPOConfig,
    policy: PreTrainedModel,
    batch: SequenceBatch,
    reference_B: Tensor,
    chosen_N: Tensor,
    rejected_N: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """DPO's loss over the pairs, plus `cfg.nll_coef` times the chosen responses' mean over tokens.

    Both weigh a response by the pairs it stands in. `reference_B` are summed log-probabilities, `chosen_N` and
    `rejected_N` rows of the batch; all three may lie on the CPU.
    """
    device = batch.ids_BS.device
    chosen_N, rejected_N, reference_B = chosen_N.to(device), rejected_N.to(device), reference_B.to(device)
    logprobs_BR, mask_BR = response_logprobs(policy, batch), batch.response_mask_BR
    policy_B = masked_sum(logprobs_BR, mask_BR)
    dpo, stats = dpo_loss(
        policy_B[chosen_N], policy_B[rejected_N], reference_B[chosen_N], reference_B[rejected_N], cfg.beta
    )
    nll = chosen_nll(logprobs_BR[chosen_N], mask_BR[chosen_N])
    loss = dpo + cfg.nll_coef * nll
    figures = {"loss/train": loss, "loss/dpo": dpo, "loss/chosen_nll": nll, **stats}
    return loss, {key: value.item() for key, value in figures.items()}


def response_places(groups: Sequence[PreferenceGroup]) -> list[Tensor]:
    """Where each group's responses stand when those of all groups are written one after the other."""
    sizes = [len(group.responses) for group in groups]
    return list(torch.arange(sum(sizes)).split(sizes))


@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, groups: Sequence[PreferenceGroup], batches: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """Summed log-probability of every response under the reference, [A], each from the batch that trains on it."""
    places = response_places(groups)
    logprobs_A = torch.zeros(sum(map(len, places)))
    for members in batches:
        batch, _, _ = collate_groups([groups[i] for i in members], pad_id)
        batch = batch.to(reference.device)
        sums_B = masked_sum(response_logprobs(reference, batch), batch.response_mask_BR)
        logprobs_A[torch.cat([places[i] for i in members])] = sums_B.cpu()
    return logprobs_A
