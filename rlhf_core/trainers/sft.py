"""Supervised fine-tuning: the policy learns to write the demonstrations' responses, and nothing of their prompts.

Shape suffixes: B = rows of a micro-batch, R = response tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import SFTConfig
from rlhf_core.data.batching.epochs import balanced_rows, token_batches, within_budget
from rlhf_core.data.batching.examples import Example
from rlhf_core.engine.batches import by_length, collate, cut, length_buckets
from rlhf_core.errors import Diverged
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import in_step, part_like
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers import hard_examples
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.passes import CPU_PASS_TOKENS
from rlhf_core.trainers.schedule import learning_rate

__all__ = ["RunContext", "train_sft"]  # what a program needs that calls the trainer alone

BEST = "best/"
RUNNING_LOSSES = "running_losses"
LENGTH_STEP = 4  # responses this many tokens apart count as equally long, so that prompts can be of like length too


def train_sft(
    cfg: SFTConfig,
    state: TrainState,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    run: RunContext,
) -> TrainState:
    """Train from `state.step` to `cfg.max_steps`, or until the held-out loss has stopped falling.

    `state` holds the module and the optimiser `policy`. With held-out examples the policy ends with the weights of
    the lowest held-out loss; they travel with the checkpoints. The weights depend only on the configuration, the
    seed and the starting state, so a run that was stopped and resumed ends bit for bit where the unbroken run ends.

    Raises:
        Diverged: losses or gradients were not finite three times in a row, or a held-out loss was not.
    """
    policy, optimizer = state.modules["policy"], state.optimizers["policy"]
    extra = state.extra
    if cfg.hard_examples and RUNNING_LOSSES not in state.tensors:
        state.tensors[RUNNING_LOSSES] = hard_examples.unseen(len(examples))
    batches: list[list[int]] = []
    while state.step < cfg.max_steps and not extra.get("stopped_early", False):
        # 1. Which examples: a pass's batches are addressed by its number, so only the place in it is remembered.
        epoch, place = extra.get("epoch", 0), extra.get("place", 0)
        if place == 0 or not batches:
            batches = epoch_batches(cfg, examples, run.seed, epoch)
        members = batches[place]
        rows = [examples[row] for row in members]

        # 2. Learn from them.
        rate = learning_rate(
            state.step, cfg.max_steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "cosine"
        )
        set_learning_rate(optimizer, rate)
        figures = learn(cfg, state, members, rows, run) | {"optim/learning_rate": rate}
        extra["tokens"] = extra.get("tokens", 0) + sum(row.num_tokens for row in rows)
        extra["epoch"], extra["place"] = (epoch, place + 1) if place + 1 < len(batches) else (epoch + 1, 0)
        state.step += 1

        # 3. Look at what it has not learned from, now and then, and stop when that no longer gets better.
        if heldout and (state.step % cfg.eval_every == 0 or state.step == cfg.max_steps):
            figures["loss/heldout"] = heldout_loss(policy, heldout, cfg.batch_size, run)
            note_heldout_loss(state, figures["loss/heldout"], cfg.patience)

        # 4. Report, save. Nothing below this line changes a weight.
        figures = reportable(figures)
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == cfg.max_steps or extra.get("stopped_early", False):
            run.checkpoint(state)
        run.log(state.step, cfg.max_steps, figures, extra["tokens"])
    restore_best(state)
    return state


def epoch_batches(cfg: SFTConfig, examples: Sequence[Example], seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of the batches of one pass over the examples, rows of similar length together."""
    if cfg.batches.balance == "task":
        rows = balanced_rows([example.task for example in examples], seed, "sft", epoch)
    else:
        rows = list(range(len(examples)))
    lengths = _lengths([examples[row] for row in rows])
    generator = StepRng(seed, "sft", epoch)("batches")
    if cfg.batches.by == "tokens":
        cut = token_batches([examples[row].num_tokens for row in rows], lengths, cfg.batches.tokens, generator)
    else:
        cut = length_buckets(lengths, cfg.batch_size, generator)
    return [[rows[place] for place in batch] for batch in cut]


def learn(
    cfg: SFTConfig, state: TrainState, members: Sequence[int], rows: Sequence[Example], run: RunContext
) -> dict[str, float]:
    """Take one optimiser step on `rows`, whose places among all examples are `members`; returns its figures."""
    weights = None
    if cfg.hard_examples:
        weights = hard_examples.weights(state.tensors[RUNNING_LOSSES], members, cfg.hard_examples)
    loss, each = accumulate_gradients(state.modules["policy"], rows, cfg.accumulation, run, weights)
    norm = apply_gradients(state, "policy", loss, cfg.max_grad_norm, run.world, max_grad_value=cfg.max_grad_value)
    figures = {"loss/train": loss, "optim/grad_norm": math.nan if norm is None else norm}
    if cfg.hard_examples:
        each = run.world.collect(each)
        hard_examples.follow(state.tensors[RUNNING_LOSSES], members, each, cfg.hard_examples.memory)
        total = sum(one * row.num_targets for one, row in zip(each, rows, strict=True))
        figures["loss/unweighted"] = total / sum(row.num_targets for row in rows)
    return figures


def accumulate_gradients(
    policy: PreTrainedModel,
    rows: Sequence[Example],
    parts: int,
    run: RunContext,
    weights: Sequence[float] | None = None,
) -> tuple[float, list[float]]:
    """Add the gradient of the mean loss a target token over all `rows`, computed in at least `parts` micro-batches.

    The mean is over the target tokens of the whole step, in all processes: a micro-batch with few of them weighs
    little, so the gradient does not depend on how the rows are cut or shared out. With `weights` it is a weighted
    mean, each token with the weight of its row.

    Returns:
        The mean negative log-likelihood of a target token, in nats, over all processes; and with `weights` that of
        each row of this process's share, without weights.
    """
    heavy = list(weights) if weights is not None else [1.0] * len(rows)
    norm = sum(weight * row.num_targets for weight, row in zip(heavy, rows, strict=True))
    mine = run.world.share(list(zip(rows, heavy, strict=True)))
    size = max(1, math.ceil(len(mine) / parts))
    chunks = cut(mine, size)
    if policy.device.type == "cpu":
        chunks = [part for chunk in chunks for part in _passes(chunk)]
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    each: list[float] = []
    for chunk, counts in in_step(chunks, policy, run.world):
        some, factors = zip(*chunk, strict=True)
        logprobs_BR, mask_BR = target_logprobs(policy, some, run.pad_id)
        if weights is not None:
            if counts:
                each += (-logprobs_BR.detach().sum(1) / mask_BR.sum(1)).tolist()
            logprobs_BR = logprobs_BR * torch.tensor(factors, device=logprobs_BR.device)[:, None]
        loss = -logprobs_BR.sum() / norm * counts
        loss.backward()
        total += loss.detach()
    return run.world.total(total).item(), each


def _passes(rows: Sequence[tuple[Example, float]]) -> list[list[tuple[Example, float]]]:
    """Successive rows in groups that go through the model at once on a CPU."""
    cut = within_budget(range(len(rows)), [row.num_tokens for row, _ in rows], CPU_PASS_TOKENS)
    return [[rows[place] for place in places] for places in cut]


def target_logprobs(policy: PreTrainedModel, rows: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, logprobs_BR, 0 for all others; and mask_BR of the targets."""
    batch = collate([row.prompt for row in rows], [row.response for row in rows], pad_id).to(policy.device)
    logprobs_BR, mask_BR = response_logprobs(policy, batch), batch.response_mask_BR
    if any(row.mask is not None for row in rows):
        for place, row in enumerate(rows):
            if row.mask is not None:
                mask_BR[place, : len(row.mask)] = torch.tensor(row.mask, dtype=mask_BR.dtype)
        logprobs_BR = logprobs_BR * mask_BR
    return logprobs_BR, mask_BR


@torch.no_grad()
def heldout_loss(policy: PreTrainedModel, examples: Sequence[Example], batch_size: int, run: RunContext) -> float:
    """Mean negative log-likelihood of a target token over `examples`, in nats."""
    chunks = [[examples[place] for place in places] for places in by_length(_lengths(examples), batch_size)]
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for chunk, counts in in_step(run.world.share(chunks), policy, run.world):
        total -= target_logprobs(policy, chunk, run.pad_id)[0].sum() * counts
    summed = run.world.total(total).item()
    return summed / sum(example.num_targets for example in examples)


@torch.no_grad()
def example_losses(policy: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_id: int) -> list[float]:
    """Negative log-likelihood of all target tokens of each example, in nats, for a whole model in one process."""
    found = [0.0] * len(examples)
    for places in by_length(_lengths(examples), batch_size):
        logprobs_BR, _ = target_logprobs(policy, [examples[place] for place in places], pad_id)
        for place, logprob in zip(places, logprobs_BR.sum(1, dtype=torch.float64).tolist(), strict=True):
            found[place] = -logprob
    return found


def _lengths(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """What rows of one batch are alike in."""
    return [(len(example.response) // LENGTH_STEP, len(example.prompt)) for example in examples]


def note_heldout_loss(state: TrainState, loss: float, patience: int) -> None:
    """Keep the weights where `loss` is the lowest yet; else count, and order a stop at the `patience`-th in a row.

    Raises:
        Diverged: the loss is no finite number: of the weights that gave it nothing can be said.
    """
    extra = state.extra
    if not math.isfinite(loss):
        raise Diverged(
            f"sft: step {state.step}: the held-out loss is {loss}; the last good checkpoint is kept. "
            "Fix: lower sft.learning_rate, or look at the held-out demonstrations"
        )
    if loss < extra.get("best_heldout_loss", math.inf):
        extra |= {"best_heldout_loss": loss, "best_step": state.step, "evaluations_since_best": 0}
        for name, parameter in state.modules["policy"].named_parameters():
            if parameter.requires_grad:
                state.tensors[BEST + name] = parameter.detach().clone()
    else:
        extra["evaluations_since_best"] = extra.get("evaluations_since_best", 0) + 1
        extra["stopped_early"] = extra["evaluations_since_best"] >= patience


@torch.no_grad()
def restore_best(state: TrainState) -> None:
    """Give the policy the kept weights, where any were kept."""
    for name, parameter in state.modules["policy"].named_parameters():
        if BEST + name in state.tensors:
            parameter.copy_(part_like(state.tensors[BEST + name], parameter))
