"""Direct preference optimisation (Rafailov et al. 2023): the policy learns from pairs without a reward model.

Shape suffixes: B = sequences of a step (its chosen responses, then its rejected ones), N = pairs, R = response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batches import SequenceBatch, collate, length_buckets
from rlhf_core.data.pairs import PreferencePair
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
    pairs: Sequence[PreferencePair],
    *,
    seed: int,
    pad_id: int,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
) -> TrainState:
    """Run DPO from `state.step` over `cfg.epochs` passes of the pairs.

    `state` holds the module and the optimiser `policy`. The reference is asked once, before the first step; what it
    said travels with the checkpoints. Which pairs share a batch is fixed for the run and only their order changes
    from pass to pass: policy and reference then see the very same tensors, and the first loss is ln 2 exactly.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    policy, optimizer = state.modules["policy"], state.optimizers["policy"]
    batches = pair_batches(pairs, cfg.batch_size, seed)
    if "reference_logprobs" not in state.tensors:
        state.tensors["reference_logprobs"] = reference_logprobs(reference, pairs, batches, pad_id)
    total = cfg.epochs * len(batches)
    for epoch in range(state.step // len(batches), cfg.epochs):
        order = torch.randperm(len(batches), generator=StepRng(seed, "dpo", epoch)("order")).tolist()
        for place in order[state.step % len(batches) :]:
            rows = batches[place]
            rate = learning_rate(
                state.step, total, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
            )
            set_learning_rate(optimizer, rate)
            batch = collate_pairs([pairs[i] for i in rows], pad_id).to(policy.device)
            loss, figures = pair_loss(cfg, policy, batch, state.tensors["reference_logprobs"][:, rows])
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
    cfg: DPOConfig, policy: PreTrainedModel, batch: SequenceBatch, reference_2N: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """DPO's loss on summed log-probabilities, plus `cfg.nll_coef` times the chosen responses' mean over tokens."""
    logprobs_BR, mask_BR = response_logprobs(policy, batch), batch.response_mask_BR
    chosen_N, rejected_N = masked_sum(logprobs_BR, mask_BR).chunk(2)
    reference_chosen_N, reference_rejected_N = reference_2N.to(logprobs_BR.device)
    dpo, stats = dpo_loss(chosen_N, rejected_N, reference_chosen_N, reference_rejected_N, cfg.beta)
    nll = chosen_nll(logprobs_BR[: len(chosen_N)], mask_BR[: len(chosen_N)])
    loss = dpo + cfg.nll_coef * nll
    figures = {"loss/train": loss, "loss/dpo": dpo, "loss/chosen_nll": nll, **stats}
    return loss, {key: value.item() for key, value in figures.items()}


def pair_batches(pairs: Sequence[PreferencePair], batch_size: int, seed: int) -> list[list[int]]:
    """Indexes of the pairs that share a step: similar lengths together, composed once for the whole run."""
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return length_buckets(lengths, batch_size, StepRng(seed, "dpo")("batches"))


def collate_pairs(pairs: Sequence[PreferencePair], pad_id: int) -> SequenceBatch:
    """One batch with the chosen responses first and the rejected ones after them, in the same order."""
    prompts = [pair.prompt for pair in pairs]
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(prompts + prompts, responses, pad_id)


@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, pairs: Sequence[PreferencePair], batches: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """Summed log-probabilities under the reference, [2, N]: of the chosen and of the rejected response of each pair."""
    logprobs_2N = torch.zeros(2, len(pairs))
    for rows in batches:
        batch = collate_pairs([pairs[i] for i in rows], pad_id).to(reference.device)
        sums_B = masked_sum(response_logprobs(reference, batch), batch.response_mask_BR)
        logprobs_2N[:, list(rows)] = sums_B.view(2, len(rows)).cpu()
    return logprobs_2N
