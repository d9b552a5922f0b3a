"""A rollout: responses sampled and scored, and what the models believe of them before anything is learned.

Shape suffixes: B = rows of a part, R = response tokens, N = all responses of the rollout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf_core.config import PPOConfig
from rlhf_core.data.batches import SequenceBatch, collate
from rlhf_core.objectives.replay import token_importance_weights
from rlhf_core.rollout.sampler import sample_rows
from rlhf_core.state.sharding import lend_whole
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.ppo_forward import believe, last_values_of, reference_logprobs, values_of
from rlhf_core.trainers.replay import Written

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
    """Rows that go through a model together, with what was believed of them when the rollout was made.

    The old log-probabilities and values are computed on this very batch, with its padding, and not copied from the
    sampler: the first update then starts from a log-ratio of exactly 0, and any other number is a bug.

    Attributes:
        rows: their numbers in the rollout.
        last_values_B: of the states that the responses end in: 0 unless they were cut and `advantages.truncated` is
            `bootstrap`.
        scores_B: the reward model's.
        weights_BR: importance of each token, 1 for a response of this rollout (see `rlhf_core.trainers.replay`).
    """

    rows: list[int]
    batch: SequenceBatch
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    old_values_BR: Tensor
    last_values_B: Tensor
    entropy_BR: Tensor
    scores_B: Tensor
    weights_BR: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """All processes know the responses, each holds the parts that it computes.

    Attributes:
        responses: fresh ones first, replayed ones behind them, the responses to one prompt beside each other.
        num_fresh: how many are fresh.
        minibatches: this process's parts of each minibatch; fresh and replayed responses share none.
        tokens: response tokens of each minibatch, over all processes.
    """

    responses: list[Written]
    num_fresh: int
    minibatches: list[list[RolloutPart]]
    tokens: list[int]

    def parts(self) -> list[RolloutPart]:
        """This process's parts of all minibatches."""
        return [part for parts in self.minibatches for part in parts]

    def gather(self, numbers: Sequence[Tensor], world: World) -> Tensor:
        """Numbers of this process's rows, a tensor each of `parts()`, brought together: numbers_N, float64, on the CPU.

        Every process gets the same.
        """
        filled_N = torch.zeros(len(self.responses), dtype=torch.float64)
        for part, numbers_B in zip(self.parts(), numbers, strict=True):
            filled_N[part.rows] = numbers_B.double().cpu()
        return world.total(filled_N)


def write_responses(
    state: TrainState,
    prompts: Sequence[list[int]],
    chosen: Sequence[int],
    sampling: Sampling,
    temperature: float,
    generator: torch.Generator,
    world: World = ALONE,
) -> list[Written]:
    """Sample a response of the policy to `prompts[i]` for each i in `chosen`; each process writes its share."""
    uniform_NT = torch.rand(len(chosen), sampling.max_new_tokens, generator=generator)  # each row's own, whoever draws
    mine = world.share(range(len(chosen)))
    with lend_whole(state.modules["policy"]) as policy:
        samples = sample_rows(
            policy,
            [prompts[chosen[row]] for row in mine],
            uniform_NT[mine],
            temperature=temperature,
            eos_ids=sampling.eos_ids,
            pad_id=sampling.pad_id,
            batch_size=len(mine),
        )
    return world.collect(
        [
            Written(prompt=chosen[row], response_ids=ids, finished=finished)
            for row, ids, finished in zip(mine, samples.response_ids, samples.finished, strict=True)
        ]
    )


@torch.no_grad()
def collect_rollout(
    cfg: PPOConfig,
    state: TrainState,
    reference: nn.Module,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    fresh: Sequence[Written],
    replayed: Sequence[Written],
    pad_id: int,
    world: World = ALONE,
) -> Rollout:
    """Score fresh responses, and note what the models believe of fresh and replayed ones.

    Rows of similar length share a minibatch, which spares padding, and so do the responses to one prompt, which spares
    computing it again; each process takes its share of every minibatch, `cfg.microbatch` rows at a time.

    Args:
        state: with the modules `policy`, and `value` where the method has one.
        reference: frozen model; the policy itself where it carries adapters, which are then switched off.
        reward_fn: scores the fresh responses.
        prompts: all prompts; responses know theirs by number.
    """
    responses = [*fresh, *replayed]
    rollout = Rollout(responses=responses, num_fresh=len(fresh), minibatches=[], tokens=[])
    numbers = range(len(responses))
    for source, score in ((numbers[: len(fresh)], reward_fn), (numbers[len(fresh) :], None)):
        by_length = _by_length(responses, source, cfg.responses_per_prompt)
        for start in range(0, len(by_length), cfg.minibatch):
            rows = by_length[start : start + cfg.minibatch]
            mine = world.share(rows)
            size = cfg.microbatch or len(mine)
            pieces = [mine[first : first + size] for first in range(0, len(mine), size)]
            rollout.minibatches.append(
                [_part(cfg, state.modules, reference, score, prompts, responses, piece, pad_id) for piece in pieces]
            )
            rollout.tokens.append(sum(len(responses[row].response_ids) for row in rows))
    scores = rollout.gather([part.scores_B for part in rollout.parts()], world).tolist()
    scored = [replace(row, score=score) for row, score in zip(responses, scores, strict=True)]
    return replace(rollout, responses=scored)


def _by_length(responses: Sequence[Written], rows: Sequence[int], group_size: int) -> list[int]:
    """Row numbers with whole groups in the order of their longest responses."""
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    groups.sort(key=lambda group: max(len(responses[row].response_ids) for row in group))
    return [row for group in groups for row in group]


def with_logprobs(rollout: Rollout, world: World = ALONE) -> list[Written]:
    """The fresh responses with the log-probabilities of the policy that wrote them, the same in all processes."""
    known: dict[int, list[float]] = {}
    for part in rollout.parts():
        for row, logprobs in zip(part.rows, part.old_logprobs_BR.tolist(), strict=True):
            known[row] = logprobs[: len(rollout.responses[row].response_ids)]
    everywhere = {row: logprobs for other in world.collect([known]) for row, logprobs in other.items()}
    return [replace(rollout.responses[row], logprobs=everywhere[row]) for row in range(rollout.num_fresh)]


def _part(
    cfg: PPOConfig,
    modules: Mapping[str, nn.Module],
    reference: nn.Module,
    reward_fn: RewardFn | None,
    prompts: Sequence[list[int]],
    responses: Sequence[Written],
    rows: list[int],
    pad_id: int,
) -> RolloutPart:
    """`reward_fn` is None for replayed rows, which have their score."""
    policy, written = modules["policy"], [responses[row] for row in rows]
    batch = collate([prompts[row.prompt] for row in written], [row.response_ids for row in written], pad_id)
    batch = batch.to(policy.device)
    believed = believe(modules, batch, cfg.temperature, with_entropy=True)
    old_BR = believed.logprobs_BR
    known_B = torch.tensor([row.score for row in written], device=policy.device)
    return RolloutPart(
        rows=rows,
        batch=batch,
        old_logprobs_BR=old_BR,
        ref_logprobs_BR=reference_logprobs(policy, reference, batch, cfg.temperature),
        old_values_BR=values_of(modules, batch, believed) if "value" in modules else torch.zeros_like(old_BR),
        last_values_B=_last_values(cfg, modules, batch, written),
        entropy_BR=believed.entropy_BR,
        scores_B=known_B if reward_fn is None else reward_fn(batch),
        weights_BR=importance(old_BR, batch.response_mask_BR, written, cfg.replay.max_weight),
    )


def _last_values(
    cfg: PPOConfig, modules: Mapping[str, nn.Module], batch: SequenceBatch, written: Sequence[Written]
) -> Tensor:
    cut_B = torch.tensor([not row.finished for row in written], device=batch.ids_BS.device)
    if cfg.advantages.truncated == "terminal" or "value" not in modules:
        return torch.zeros(len(written), device=cut_B.device)
    return torch.where(cut_B, last_values_of(modules, batch), 0.0)


def importance(logprobs_BR: Tensor, mask_BR: Tensor, written: Sequence[Written], cap: float) -> Tensor:
    """Weight of each token: min(pi_now / pi_then, `cap`) times the response's own weight; 1 where it is fresh.

    Args:
        logprobs_BR: under the policy of now.
        mask_BR: 1 for response tokens.
        written: rows of which all or none know their log-probabilities of then.
    """
    if not written[0].logprobs:
        return torch.ones_like(logprobs_BR)
    width = logprobs_BR.shape[1]
    then_BR = logprobs_BR.new_tensor([row.logprobs + [0.0] * (width - len(row.logprobs)) for row in written])
    weights_B1 = logprobs_BR.new_tensor([row.weight for row in written])[:, None]
    return token_importance_weights(logprobs_BR, then_BR, mask_BR, cap) * weights_B1
