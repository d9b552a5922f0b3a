"""A rollout: responses sampled and scored, and what the models say of them before anything is learned.

Shape suffixes: B = rows of a part, R = response tokens, N = all responses of the rollout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf_core.config import PPOConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.engine.packed import can_pack
from rlhf_core.objectives.replay import token_importance_weights
from rlhf_core.rollout.sampler import Sampling, sample_rows
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import is_sharded, lend_whole
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.ppo.aside import left_alone, not_finite, with_stand_ins
from rlhf_core.trainers.ppo.batches import mixed_minibatches, passes
from rlhf_core.trainers.ppo.forward import last_values_of, policy_outputs, reference_token_logprobs, values_of
from rlhf_core.trainers.ppo.parts import Rollout, RolloutPart
from rlhf_core.trainers.ppo.replay import Written

RewardFn = Callable[[SequenceBatch], Tensor]
"""Scores a batch of responses: one number a row. A `RewardModel` is one; a test may pass any rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSetup:
    """What every rollout of a run is made with: the settings, the models that are asked, the prompts.

    Attributes:
        cfg: settings of the whole trainer.
        modules: those that learn: `policy`, and `value` where the method has one.
        reference: frozen model; the policy itself where it carries adapters, which are then switched off.
        score: scores the fresh responses.
        prompts: all prompts; responses know theirs by number.
        sampling: where responses end, and how long they may become.
        run: the edges of the run.
    """

    cfg: PPOConfig
    modules: Mapping[str, nn.Module]
    reference: nn.Module
    score: RewardFn
    prompts: Sequence[list[int]]
    sampling: Sampling
    run: RunContext


def write_responses(setup: RolloutSetup, chosen: Sequence[int], generator: torch.Generator) -> list[Written]:
    """Sample a response of the policy to `setup.prompts[i]` for each i in `chosen`; each process writes its share."""
    # each row has random numbers of its own, whichever process draws the response
    uniform_NT = torch.rand(len(chosen), setup.sampling.max_new_tokens, generator=generator)
    mine = setup.run.world.share(range(len(chosen)))
    with lend_whole(setup.modules["policy"]) as policy:
        samples = sample_rows(
            policy,
            [setup.prompts[chosen[row]] for row in mine],
            uniform_NT[mine],
            setup.sampling,
            temperature=setup.cfg.temperature,
            batch_size=len(mine),
        )
    return setup.run.world.collect(
        [
            Written(prompt=chosen[row], response_ids=ids, finished=finished)
            for row, ids, finished in zip(mine, samples.response_ids, samples.finished, strict=True)
        ]
    )


@torch.no_grad()
def collect_rollout(
    setup: RolloutSetup, fresh: Sequence[Written], replayed: Sequence[Written], generator: torch.Generator
) -> Rollout:
    """Score fresh responses, and note what the models say of fresh and replayed ones.

    Minibatches are dealt at random, the responses to one prompt in one, which spares computing it again; each process
    takes its share of every minibatch and cuts it into passes by length, of `cfg.microbatch` rows at most. Responses of
    which something is not a finite number are set aside (`rlhf_core.trainers.ppo.aside`), and the others asked again.

    `generator` deals the minibatches.
    """
    cfg, world = setup.cfg, setup.run.world
    responses = [*fresh, *replayed]
    dealt = [
        rows
        for source in (range(len(fresh)), range(len(fresh), len(responses)))
        for rows in mixed_minibatches(source, cfg.responses_per_prompt, cfg.minibatch, generator)
    ]
    rollout, aside = _collected(setup, responses, len(fresh), {}, dealt), dict[int, str]()
    known = rollout.responses
    while bad := not_finite(rollout, world):
        aside |= bad
        aside |= left_alone(cfg, len(known), aside)
        kept = with_stand_ins(known, len(fresh), aside)
        if not kept:
            return replace(rollout, responses=known, minibatches=[], tokens=[], aside=aside)
        rollout = _collected(setup, kept, len(fresh), aside, dealt)
    if not aside:
        return rollout
    asked = enumerate(rollout.responses)
    return replace(rollout, responses=[known[row] if row in aside else written for row, written in asked])


def _collected(
    setup: RolloutSetup,
    responses: Sequence[Written],
    num_fresh: int,
    aside: Mapping[int, str],
    dealt: Sequence[Sequence[int]],
) -> Rollout:
    """A rollout of these responses, in the minibatches `dealt`; those in `aside` count for nothing."""
    cfg, policy, world = setup.cfg, setup.modules["policy"], setup.run.world
    lengths = [len(row.response_ids) for row in responses]
    # divided weights are gathered in every pass, so all processes need as many of them
    padded = not is_sharded(policy) and not can_pack(policy.get_decoder())
    rollout = Rollout(responses=list(responses), num_fresh=num_fresh, minibatches=[], tokens=[], aside=aside)
    for rows in (rows for rows in dealt if rows[0] < len(responses)):
        pieces = passes(world.share(rows), lengths, cfg.responses_per_prompt, cfg.microbatch, padded=padded)
        parts = [_part(setup, responses, piece, aside, scored=rows[0] < num_fresh) for piece in pieces]
        rollout.minibatches.append(parts)
        rollout.tokens.append(sum(lengths[row] for row in rows if row not in aside))
    scores = rollout.gather([part.scores_B for part in rollout.parts()], world).tolist()
    scored = [replace(row, score=score) for row, score in zip(responses, scores, strict=True)]
    return replace(rollout, responses=scored)


def with_logprobs(rollout: Rollout, rows: Sequence[int], world: World = ALONE) -> list[Written]:
    """Fresh responses with the log-probabilities of the policy that wrote them, the same in all processes."""
    known: dict[int, list[float]] = {}
    for part in rollout.parts():
        for row, logprobs in zip(part.rows, part.old_logprobs_BR.tolist(), strict=True):
            known[row] = logprobs[: len(rollout.responses[row].response_ids)]
    everywhere = {row: logprobs for other in world.collect([known]) for row, logprobs in other.items()}
    return [replace(rollout.responses[row], logprobs=everywhere[row]) for row in rows]


def _part(
    setup: RolloutSetup, responses: Sequence[Written], rows: list[int], aside: Mapping[int, str], *, scored: bool
) -> RolloutPart:
    """What the models say of `rows`, in one pass; `scored`: by the reward model too, else they have their score."""
    cfg, modules, policy = setup.cfg, setup.modules, setup.modules["policy"]
    written = [responses[row] for row in rows]
    prompts = [setup.prompts[row.prompt] for row in written]
    batch = collate(prompts, [row.response_ids for row in written], setup.run.pad_id).to(policy.device)
    outputs = policy_outputs(modules, batch, cfg.temperature, with_entropy=True)
    old_BR = outputs.logprobs_BR
    known_B = torch.tensor([row.score for row in written], device=policy.device)
    return RolloutPart(
        rows=rows,
        batch=batch,
        old_logprobs_BR=old_BR,
        ref_logprobs_BR=reference_token_logprobs(policy, setup.reference, batch, cfg.temperature),
        old_values_BR=values_of(modules, batch, outputs) if "value" in modules else torch.zeros_like(old_BR),
        last_values_B=_last_values(cfg, modules, batch, written),
        entropy_BR=outputs.entropy_BR,
        scores_B=setup.score(batch) if scored else known_B,
        weights_BR=importance(old_BR, batch.response_mask_BR, written, cfg.replay.max_weight),
        counts_B=torch.tensor([float(row not in aside) for row in rows], device=policy.device),
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
