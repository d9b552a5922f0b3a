"""The PPO half of stage `align`: models, optimisers and prompts for `train_ppo`."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import PPOConfig
from rlhf_core.models.policy import eos_token_ids
from rlhf_core.models.reward import RewardModel
from rlhf_core.models.value import ValueModel
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo import Sampling, train_ppo
from tasks.align_prompts import training_prompts
from tasks.stage import Stage

ADAM_BETAS = (0.9, 0.95)


def run_ppo(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: RewardModel,
) -> TrainState:
    """Train `policy` by PPO, from the newest checkpoint where there is one; returns the state at the end.

    Raises:
        DataError: there is no training prompt.
        Diverged: training left the finite numbers.
    """
    cfg: PPOConfig = stage.params.align.ppo
    value = ValueModel.from_reward_model(reward_model).to(stage.device)
    optimizers = {
        "policy": make_optimizer(policy, cfg.learning_rate, 0.0, betas=ADAM_BETAS),
        "value": make_optimizer(value, cfg.value_learning_rate, 0.0, betas=ADAM_BETAS),
    }
    state = stage.restore(TrainState(modules={"policy": policy, "value": value}, optimizers=optimizers))
    sampling = Sampling(
        eos_ids=eos_token_ids(policy, tokenizer),
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=stage.params.model.max_response_tokens,
    )
    return train_ppo(
        cfg,
        state,
        reference,
        reward_model,
        [ids for _, ids in training_prompts(stage, tokenizer)],
        seed=stage.params.seed,
        sampling=sampling,
        log=stage.log,
        checkpoint=stage.checkpoint,
    )
