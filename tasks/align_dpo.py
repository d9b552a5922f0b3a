"""The DPO half of stage `align`: pairs and optimiser for `train_dpo`."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import DPOConfig
from rlhf_core.data.pairs import encode_pairs, group_pairs
from rlhf_core.errors import DataError
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference import train_dpo
from tasks import paths
from tasks.stage import Stage
from tasks.tables import read_table


def run_dpo(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, reference: PreTrainedModel
) -> TrainState:
    """Train `policy` by DPO, from the newest checkpoint where there is one; returns the state at the end.

    Raises:
        DataError: there is no training pair.
        Diverged: training left the finite numbers.
    """
    cfg: DPOConfig = stage.params.align.dpo
    path = paths.PREFERENCES / "train.parquet"
    limits = stage.params.model
    pairs = encode_pairs(
        tokenizer,
        read_table(stage.root / path),
        max_prompt_tokens=limits.max_prompt_tokens,
        max_response_tokens=limits.max_response_tokens,
    )
    if not pairs:
        raise DataError(f"{path}: no pair to learn from. Fix: more labelled pairs, or a looser `preferences` section")
    optimizer = make_optimizer(policy, cfg.learning_rate, 0.0)
    state = stage.restore(TrainState(modules={"policy": policy}, optimizers={"policy": optimizer}))
    return train_dpo(
        cfg,
        state,
        reference,
        group_pairs(pairs),
        seed=stage.params.seed,
        pad_id=tokenizer.pad_token_id,
        log=stage.log,
        checkpoint=stage.checkpoint,
    )
