"""Supervised fine-tuning: the policy learns to write the demonstrations' responses, and nothing of their prompts.

Shape suffixes: B = rows of a micro-batch, R = response tokens.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf_core.config import SFTConfig
from rlhf_core.data.batches import collate, length_buckets
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState
from rlhf_core.trainers.optimisation import apply_gradients, finite, set_learning_rate
from rlhf_core.trainers.schedule import learning_rate

Example = tuple[list[int], list[int]]
"""Tokens of a prompt and of its response, the end token included."""

BEST = "best/"
LENGTH_STEP = 4  # responses this many tokens apart count as equally long, so that prompts can be of like length too


def train_sft(
    cfg: SFTConfig,
    state: TrainState,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    *,
    seed: int,
    pad_id: int,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
) -> TrainState:
    """Train from `state.step` to `cfg.max_steps`, or until the held-out loss has stopped falling.

    `state` holds the module and the optimiser `policy`. With held-out examples the policy ends with the weights of
    the lowest held-out loss; they travel with the checkpoints. The weights depend only on the configuration, the
    seed and the starting state, so a run that was stopped and resumed ends bit for bit where the unbroken run ends.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    policy, optimizer = state.modules["policy"], state.optimizers["policy"]
    extra = state.extra
    num_batches = math.ceil(len(examples) / cfg.batch_size)
    batches: list[list[int]] = []
    while state.step < cfg.max_steps and not extra.get("stopped_early", False):
        # 1. Which examples: a pass's batches are addressed by its number, so none has to be remembered.
        epoch, place = divmod(state.step, num_batches)
        if place == 0 or not batches:
            batches = epoch_batches(examples, cfg.batch_size, seed, epoch)
        rows = [examples[row] for row in batches[place]]

        # 2. Learn from them.
        rate = learning_rate(
            state.step, cfg.max_steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "cosine"
        )
        set_learning_rate(optimizer, rate)
        loss = accumulate_gradients(policy, rows, cfg.accumulation, pad_id)
        norm = apply_gradients(state, "policy", loss, cfg.max_grad_norm)
        figures = {
            "loss/train": loss,
            "optim/learning_rate": rate,
            "optim/grad_norm": math.nan if norm is None else norm,
        }
        extra["tokens"] = extra.get("tokens", 0) + sum(len(prompt) + len(response) for prompt, response in rows)
        state.step += 1

        # 3. Look at what it has not learned from, now and then, and stop when that no longer gets better.
        if heldout and (state.step % cfg.eval_every == 0 or state.step == cfg.max_steps):
            figures["loss/heldout"] = heldout_loss(policy, heldout, cfg.batch_size, pad_id)
            note_heldout_loss(state, figures["loss/heldout"], cfg.patience)

        # 4. Report, save. Nothing below this line changes a weight.
        figures = finite(figures)
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == cfg.max_steps or extra.get("stopped_early", False):
            checkpoint(state)
        log(state.step, cfg.max_steps, figures, extra["tokens"])
    restore_best(state)
    return state


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of the batches of one pass over the examples, rows of similar length together."""
    lengths = [(len(response) // LENGTH_STEP, len(prompt)) for prompt, response in examples]
    return length_buckets(lengths, batch_size, StepRng(seed, "sft", epoch)("batches"))


def accumulate_gradients(policy: PreTrainedModel, rows: Sequence[Example], parts: int, pad_id: int) -> float:
    """Add the gradient of the mean loss a response token over all `rows`, computed in `parts` micro-batches.

    The mean is over the tokens of the whole step: a micro-batch with few tokens weighs little, so the gradient does
    not depend on how the rows are cut.

    Returns:
        The mean negative log-likelihood of a response token, in nats.
    """
    num_tokens = sum(len(response) for _, response in rows)
    size = math.ceil(len(rows) / parts)
    total = 0.0
    for start in range(0, len(rows), size):
        prompts, responses = zip(*rows[start : start + size], strict=True)
        batch = collate(prompts, responses, pad_id).to(policy.device)
        loss = -response_logprobs(policy, batch).sum() / num_tokens
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def heldout_loss(policy: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_id: int) -> float:
    """Mean negative log-likelihood of a response token over `examples`, in nats."""
    ordered = sorted(examples, key=lambda example: (len(example[1]) // LENGTH_STEP, len(example[0])))
    total, num_tokens = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        prompts, responses = zip(*ordered[start : start + batch_size], strict=True)
        batch = collate(prompts, responses, pad_id).to(policy.device)
        total -= response_logprobs(policy, batch).sum().item()
        num_tokens += sum(map(len, responses))
    return total / num_tokens


def note_heldout_loss(state: TrainState, loss: float, patience: int) -> None:
    """Keep the weights where `loss` is the lowest yet; else count, and order a stop at the `patience`-th in a row.

    A loss that is not a number is lower than none.
    """
    extra = state.extra
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
            parameter.copy_(state.tensors[BEST + name])
