"""PPO against a frozen reward model (Ouyang et al. 2022), with the clipping of Schulman et al. 2017.

One step is one rollout: sample responses, score them, credit their tokens, then take a few epochs of minibatches.
REINFORCE, RLOO and GRPO run in the same loop and differ in the advantages alone (`rlhf_core.trainers.ppo_credit`).
The weights depend only on the configuration, the seed and the starting state: a run that was stopped and resumed at any
step ends bit for bit where the unbroken run ends.
Shape suffix: N = all responses of a rollout.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from rlhf_core.config import PPOConfig
from rlhf_core.errors import ConfigError
from rlhf_core.objectives.kl import adapt_kl_coef
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers import replay
from rlhf_core.trainers.curriculum import choose_prompts, note_scores
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.guard import STOPPED, Guard, Watch
from rlhf_core.trainers.ppo_credit import KL_COEF, assign_credit
from rlhf_core.trainers.ppo_figures import KL, rollout_figures
from rlhf_core.trainers.ppo_rollout import (
    RewardFn,
    Rollout,
    Sampling,
    collect_rollout,
    with_logprobs,
    write_responses,
)
from rlhf_core.trainers.ppo_scores import with_terms
from rlhf_core.trainers.ppo_update import run_epochs, set_learning_rates
from rlhf_core.trainers.reward_terms import RewardTerm

__all__ = ["RewardFn", "Sampling", "Watch", "train_ppo"]


def train_ppo(
    cfg: PPOConfig,
    state: TrainState,
    reference: nn.Module,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    *,
    seed: int,
    sampling: Sampling,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
    terms: Sequence[RewardTerm] = (),
    watch: Watch | None = None,
    world: World = ALONE,
) -> TrainState:
    """Run PPO from `state.step` to `cfg.steps`, or until the guard ends it; all of it addressed, so resume is exact.

    `state` has modules and optimisers `policy` and, for method gae, `value`: a `ValueModel`, or a `ValueHead` on the
    policy's states. `reference` is frozen, or the policy itself where it carries adapters, which are set aside for it.
    `terms` are rewards beside `reward_fn`; `watch` is what the guard reads, every `cfg.guard.every` rollouts.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
        DataError: a term or the guard's scorer did not give one finite number a response.
        ConfigError: a minibatch cannot be dealt evenly to the processes.
    """
    _check_shares(cfg, world)
    guard = Guard(cfg, watch, reference, reward_fn, seed, sampling, world)
    guard.at_start(state)
    while state.step < cfg.steps and STOPPED not in state.extra:
        rng = StepRng(seed, "ppo", state.step)

        # 1. Roll out: sample responses, score them, note what the models believe now.
        chosen = choose_prompts(cfg, state, len(prompts), seed)
        fresh = write_responses(state, prompts, chosen, sampling, cfg.temperature, rng("sample"), world)
        fresh, rated = with_terms(terms, fresh, world)
        again = replay.recall(cfg.replay, state.tensors, rng("replay"))
        rollout = collect_rollout(cfg, state, reference, reward_fn, prompts, fresh, again, sampling.pad_id, world)

        # 2. Credit: KL is charged on each token, the score lands on the last one, then advantages.
        minibatches, surprise_N = assign_credit(cfg, state.extra, rollout, world)

        # 3. Optimise: a few epochs of minibatches; stop once the policy has moved far enough.
        rate = set_learning_rates(cfg, state)
        learned = run_epochs(cfg, state, minibatches, rng("minibatches"), world)

        # 4. Remember: controllers and buffers take the rollout in; the guard looks at what has become of the policy.
        seen = rollout_figures(cfg, rollout, minibatches, world)
        kept = _remember(cfg, state, rollout, surprise_N, seen[KL], prompts, world)
        state.step += 1
        watched = guard.after_step(state, seen[KL])

        # 5. Report and save. Nothing below this line changes a weight.
        figures = reportable({**learned, **seen, **rated, **kept, **watched, "optim/learning_rate": rate})
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == cfg.steps or STOPPED in state.extra:
            checkpoint(state)
        log(state.step, cfg.steps, figures, state.extra["tokens"])
    return state


def _remember(
    cfg: PPOConfig,
    state: TrainState,
    rollout: Rollout,
    surprise_N: Tensor,
    kl: float,
    prompts: Sequence[list[int]],
    world: World,
) -> dict[str, float]:
    """Take a rollout into whatever is kept from step to step; return figures of it."""
    figures: dict[str, float] = {}
    fresh = rollout.responses[: rollout.num_fresh]
    if cfg.kl.controller == "adaptive":
        kl_coef = state.extra.get(KL_COEF, cfg.kl_coef)
        figures["reward/kl_coef"] = kl_coef
        state.extra[KL_COEF] = adapt_kl_coef(kl_coef, kl, cfg.kl.target, len(fresh), cfg.kl.horizon)
    if cfg.replay.rows:
        known = with_logprobs(rollout, world)
        priorities = surprise_N[: len(known)].tolist()
        figures |= replay.remember(cfg.replay, state.tensors, known, priorities, cfg.responses_per_prompt)
    if cfg.curriculum.start_share < 1.0:
        scores = [row.score + row.further for row in fresh]
        note_scores(state.tensors, len(prompts), [row.prompt for row in fresh], scores)
    tokens = sum(len(prompts[row.prompt]) + len(row.response_ids) for row in rollout.responses)
    state.extra["tokens"] = state.extra.get("tokens", 0) + tokens
    return figures


def _check_shares(cfg: PPOConfig, world: World) -> None:
    """Every process passes through the models equally often, which sharded ones need."""
    for name, rows in (("minibatch", cfg.minibatch), ("replay.rows", cfg.replay.rows)):
        if rows % world.size:
            raise ConfigError(
                f"params.yaml: align.ppo.{name}: {rows} responses cannot be dealt evenly to {world.size} processes. "
                "Fix: a multiple of compute.processes"
            )
