"""The PPO half of stage `align`: models, optimisers, prompts, rewards and the guard for `train_ppo`."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import PPOConfig
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.quantise import quantise
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueHead, ValueModel
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.identity import prompt_id
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.aside import SET_ASIDE
from rlhf_core.trainers.ppo.guard import STOPPED
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo
from tasks.frame.stage import Stage
from tasks.stages.align.prompts import training_prompts
from tasks.stages.align.rewards import foreign_reward, further_terms, held_out_watch
from tasks.stages.keeper import Keeper, run_context
from tasks.stages.texts import warn_of_texts

ADAM_BETAS = (0.9, 0.95)


def run_ppo(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: RewardModel | RewardEnsemble,
    cfg: PPOConfig,
    keeper: Keeper,
    key: str = "align.ppo",
) -> TrainState:
    """Train `policy` by PPO, from the newest checkpoint of `keeper`; returns the state at the end.

    Args:
        reward_model: the run's own; what a value model starts from also where `cfg.reward_model` names another.
        reference: what divergence counts from; the policy itself where it carries adapters.
        cfg: settings.
        keeper: keeps the state and hears of the steps: the stage, or a link of a chain.
        key: where `params.yaml` has them, for messages.

    Raises:
        ConfigError: a function or folder that the settings name cannot be used, or models do not go together.
        DataError: there is no training prompt, or no held-out prompt for the guard.
        Diverged: training left the finite numbers.
    """
    prompts = training_prompts(stage, tokenizer)
    terms = further_terms(stage, cfg, key, prompts, tokenizer)
    watch = held_out_watch(stage, cfg, key, tokenizer)
    score = foreign_reward(stage, cfg, key, tokenizer) if cfg.reward_model else reward_model
    warn_of_texts(stage)
    trained = stage.shard(policy)
    reference = trained if reference is policy else reference
    modules: dict[str, nn.Module] = {"policy": trained}
    if cfg.has_value_model:
        modules["value"] = value_model(stage, cfg, policy, reward_model)
    rates = {"policy": cfg.learning_rate, "value": cfg.value_learning_rate}
    optimizers = {
        name: make_optimizer(module, rates[name], 0.0, betas=ADAM_BETAS, eps=cfg.adam_eps)
        for name, module in modules.items()
    }
    state = keeper.restore(TrainState(modules=modules, optimizers=optimizers))
    train_ppo(
        cfg,
        state,
        reference,
        Rewards(score, terms),
        [ids for _, ids in prompts],
        run_context(stage, keeper, tokenizer.pad_token_id),
        sampling=Sampling.of(policy, tokenizer, stage.params.model.max_response_tokens),
        watch=watch,
    )
    _tell_of_the_guard(stage, state)
    return state


def value_model(
    stage: Stage, cfg: PPOConfig, policy: PreTrainedModel, reward_model: RewardModel | RewardEnsemble
) -> nn.Module:
    """A value model from the reward model, with adapters of its own where the policy has some; or a shared head."""
    if cfg.value.model == "shared":
        return ValueHead(policy.get_output_embeddings().in_features).to(stage.device)
    value = ValueModel.from_reward_model(reward_model)
    quantise(value.body, stage.params.model, "align")
    value.to(stage.device)
    add_adapters(value.body, stage.params.model.lora_at("align"), stage.rng().integer("value adapters"))
    return stage.shard(value)


def guard_figures(state: TrainState) -> dict[str, Any]:
    """What `reports/metrics` says of a run that the guard watched: empty where it did not end it."""
    stopped = state.extra.get(STOPPED)
    if stopped is None:
        return {}
    return {
        "stopped_by_guard": True,
        "guard_stopped_at": stopped["step"],
        "guard_best_step": stopped["best_step"],
        "guard_reason": stopped["reason"],
    }


def set_aside_figures(stage: Stage, tokenizer: PreTrainedTokenizerBase, state: TrainState) -> dict[str, Any]:
    """How many responses PPO set aside, and the first of them by name; empty where there were none."""
    known = state.extra.get(SET_ASIDE)
    if known is None:
        return {}
    texts = [text for text, _ in training_prompts(stage, tokenizer)]
    named = [
        one | {"prompt": texts[one["prompt"]], "prompt_id": prompt_id(texts[one["prompt"]])} for one in known["named"]
    ]
    return {"responses_set_aside": known["responses"], "rollouts_with_set_aside": known["rollouts"], "set_aside": named}


def _tell_of_the_guard(stage: Stage, state: TrainState) -> None:
    stopped = state.extra.get(STOPPED)
    if stopped is not None and stage.place.rank == 0:
        print(
            f"the guard ended training at step {stopped['step']}: {stopped['reason']}; "
            f"back to the policy of step {stopped['best_step']}",
            flush=True,
        )
        stage.log.event("stopped_by_guard", **stopped)
