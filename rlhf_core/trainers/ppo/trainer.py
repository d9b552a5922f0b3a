"""PPO against a frozen reward model (Ouyang et al. 2022), with the clipping of Schulman et al. 2017.

One step is one rollout: sample responses, score them, credit their tokens, then take a few epochs of minibatches.
REINFORCE, RLOO and GRPO run in the same loop and differ in the advantages alone (`rlhf_core.trainers.ppo.credit`).
The weights depend only on the configuration, the seed and the starting state: a run that was stopped and resumed at any
step ends bit for bit where the unbroken run ends.
Shape suffix: N = all responses of a rollout.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_core.config import PPOConfig
from rlhf_core.errors import ConfigError
from rlhf_core.objectives.kl import adapt_kl_coef
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import World
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.ppo import replay
from rlhf_core.trainers.ppo.aside import note_set_aside
from rlhf_core.trainers.ppo.credit import KL_COEF, assign_credit
from rlhf_core.trainers.ppo.curriculum import choose_prompts, note_scores
from rlhf_core.trainers.ppo.figures import KL, rollout_figures
from rlhf_core.trainers.ppo.guard import STOPPED, Guard, Watch
from rlhf_core.trainers.ppo.parts import Rollout
from rlhf_core.trainers.ppo.rollout import RewardFn, RolloutSetup, collect_rollout, with_logprobs, write_responses
from rlhf_core.trainers.ppo.scores import with_terms
from rlhf_core.trainers.ppo.terms import RewardTerm
from rlhf_core.trainers.ppo.update import run_epochs, set_learning_rates

__all__ = [
    "Rewards",
    "RunContext",
    "Sampling",
    "Watch",
    "train_ppo",
]  # what a program needs that calls the trainer alone


@dataclass(frozen=True, slots=True)
class Rewards:
    """What a response earns.

    Attributes:
        score: the reward model, or a rule in its place.
        terms: rewards beside it.
    """

    score: RewardFn
    terms: Sequence[RewardTerm] = ()


def train_ppo(
    cfg: PPOConfig,
    state: TrainState,
    reference: nn.Module,
    rewards: Rewards,
    prompts: Sequence[list[int]],
    run: RunContext,
    *,
    sampling: Sampling,
    watch: Watch | None = None,
) -> TrainState:
    """Run PPO from `state.step` to `cfg.steps`, or until the guard ends it; all of it addressed, so resume is exact.

    `state` has modules and optimisers `policy` and, for method gae, `value`: a `ValueModel`, or a `ValueHead` on the
    policy's states. `reference` is frozen, or the policy itself where it carries adapters, which are set aside for it.
    `watch` is what the guard reads, every `cfg.guard.every` rollouts.

    Raises:
        Diverged: in three rollouts in a row no response, or no loss and gradient, was finite; or the guard's reading.
        DataError: a term or the guard's scorer did not give one finite number a response.
        ConfigError: a minibatch cannot be dealt evenly to the processes.
    """
    _check_shares(cfg, run.world)
    setup = RolloutSetup(
        cfg=cfg,
        modules=state.modules,
        reference=reference,
        score=rewards.score,
        prompts=prompts,
        sampling=sampling,
        run=run,
    )
    guard = Guard(setup, watch)
    guard.at_start(state)
    while state.step < cfg.steps and STOPPED not in state.extra:
        rng = StepRng(run.seed, "ppo", state.step)

        # 1. Roll out: sample responses, score them, note what the models say now; what is no number is set aside.
        chosen = choose_prompts(cfg, state, len(prompts), run.seed)
        fresh = write_responses(setup, chosen, rng("sample"))
        fresh, rated = with_terms(rewards.terms, fresh, run.world)
        again = replay.recall(cfg.replay, state.tensors, rng("replay"))
        rollout = collect_rollout(setup, fresh, again, rng("deal"))
        note_set_aside(state, rollout, run.world)

        # 2. Learn from it, and remember it.
        learned = _learn(setup, state, rollout, rng("minibatches")) if rollout.counted_fresh else {}
        state.extra["tokens"] = state.extra.get("tokens", 0) + num_tokens(prompts, rollout)
        state.step += 1

        # 3. The guard looks at what has become of the policy.
        watched = guard.after_step(state, learned.get(KL))

        # 4. Report and save. Nothing below this line changes a weight.
        figures = reportable({**learned, **rated, **watched, "rollout/set_aside": len(rollout.aside)})
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == cfg.steps or STOPPED in state.extra:
            run.checkpoint(state)
        run.log(state.step, cfg.steps, figures, state.extra["tokens"])
    return state


def _learn(
    setup: RolloutSetup, state: TrainState, rollout: Rollout, generator: torch.Generator
) -> dict[str, float | None]:
    """Credit a rollout's tokens, take its gradient steps, remember it; return figures."""
    cfg, world = setup.cfg, setup.run.world

    # KL is charged on each token, the score lands on the last one, then advantages
    minibatches, surprise_N = assign_credit(cfg, state.extra, rollout, world)

    # a few epochs of minibatches, until the policy has moved far enough
    rate = set_learning_rates(cfg, state)
    learned = run_epochs(cfg, state, minibatches, generator, world)

    # controllers and buffers take the rollout in
    seen = rollout_figures(cfg, rollout, minibatches, world)
    kept = _remember(setup, state, rollout, surprise_N, seen[KL])
    return {**learned, **seen, **kept, "optim/learning_rate": rate}


def _remember(
    setup: RolloutSetup, state: TrainState, rollout: Rollout, surprise_N: Tensor, kl: float
) -> dict[str, float]:
    """Take a rollout into whatever is kept from step to step; return figures of it."""
    cfg = setup.cfg
    figures: dict[str, float] = {}
    counted = rollout.counted_fresh
    fresh = [rollout.responses[row] for row in counted]
    if cfg.kl.controller == "adaptive":
        kl_coef = state.extra.get(KL_COEF, cfg.kl_coef)
        figures["reward/kl_coef"] = kl_coef
        state.extra[KL_COEF] = adapt_kl_coef(kl_coef, kl, cfg.kl.target, len(fresh), cfg.kl.horizon)
    if cfg.replay.rows:
        rows = whole_groups(counted, cfg.responses_per_prompt)
        known, priorities = with_logprobs(rollout, rows, setup.run.world), surprise_N[rows].tolist()
        figures |= replay.remember(cfg.replay, state.tensors, known, priorities, cfg.responses_per_prompt)
    if cfg.curriculum.start_share < 1.0:
        scores = [row.score + row.further for row in fresh]
        note_scores(state.tensors, len(setup.prompts), [row.prompt for row in fresh], scores)
    return figures


def num_tokens(prompts: Sequence[list[int]], rollout: Rollout) -> int:
    """Tokens of a rollout's rows, without padding."""
    return sum(len(prompts[row.prompt]) + len(row.response_ids) for row in rollout.responses)


def whole_groups(rows: Sequence[int], group_size: int) -> list[int]:
    """Those of the rows whose groups of `group_size` are all there: a buffer keeps no part of one."""
    sizes = Counter(row // group_size for row in rows)
    return [row for row in rows if sizes[row // group_size] == group_size]


def _check_shares(cfg: PPOConfig, world: World) -> None:
    """Every process passes through the models equally often, which sharded ones need."""
    for name, rows in (("minibatch", cfg.minibatch), ("replay.rows", cfg.replay.rows)):
        if rows % world.size:
            raise ConfigError(
                f"params.yaml: align.ppo.{name}: {rows} responses cannot be dealt evenly to {world.size} processes. "
                "Fix: a multiple of compute.processes"
            )
