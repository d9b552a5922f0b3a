"""The DPO half of stage `align`: pairs, optimiser and kept reference log-probabilities for `train_dpo`."""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import DPOConfig
from rlhf_core.data.batching.pairs import PreferencePair, group_pairs
from rlhf_core.objectives.preference import PAIR_LOSSES
from rlhf_core.state.atomic import digest_of, file_digest, tree_digest
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.reference import LogprobCache
from rlhf_core.trainers.preference.trainer import train_dpo
from tasks import paths
from tasks.frame.stage import Stage, environment
from tasks.stages.keeper import Keeper, run_context
from tasks.stages.policy_pairs import policy_pairs
from tasks.stages.texts import no_pairs

CODE = ("data", "engine", "models", "objectives", "rollout", "state", "text", "trainers/preference/reference.py")
"""What of `rlhf_core` computes log-probabilities: other code may give other last bits."""


def run_dpo(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    cfg: DPOConfig,
    keeper: Keeper,
) -> TrainState:
    """Train `policy` by DPO or a relative, from the newest checkpoint of `keeper`; returns the state at the end.

    Args:
        reference: what divergence counts from; the policy itself where it carries adapters.
        cfg: settings.
        keeper: keeps the state and hears of the steps: the stage, or a link of a chain.

    Raises:
        DataError: there is no training pair.
        Diverged: training left the finite numbers.
    """
    pairs = _training_pairs(stage, tokenizer)
    cache = reference_cache(stage, reference) if PAIR_LOSSES[cfg.loss].needs_reference else None
    trained = stage.shard(policy)
    reference = trained if reference is policy else reference
    optimizer = make_optimizer(trained, cfg.learning_rate, 0.0)
    state = keeper.restore(TrainState(modules={"policy": trained}, optimizers={"policy": optimizer}))
    return train_dpo(
        cfg,
        state,
        reference if PAIR_LOSSES[cfg.loss].needs_reference else None,
        group_pairs(pairs),
        run_context(stage, keeper, tokenizer.pad_token_id),
        cache=cache,
    )


def reference_cache(stage: Stage, reference: PreTrainedModel) -> LogprobCache:
    """Where log-probabilities of `reference` are kept: with the main checkout, so that every run's worktree finds them.

    Outside DVC's outputs: no result depends on whether it is there.
    """
    identity = {
        "weights": weights_digest(reference),
        "tokenizer": _tokenizer_digest(stage),
        "model": stage.params.model.model_dump(mode="json"),
        "compute": stage.params.compute.model_dump(mode="json"),
        "environment": environment(str(stage.device), stage.threads, stage.world.size),
        "code": _code_digest(stage),
    }
    return LogprobCache(folder=paths.home(stage.root) / paths.REFERENCE_CACHE, identity=identity)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of everything in a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _training_pairs(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[PreferencePair]:
    path, kept = paths.PREFERENCES / "train.parquet", policy_pairs(stage, tokenizer, "train")
    if not kept:
        raise no_pairs(stage, path, "train pairs")
    return kept


def _tokenizer_digest(stage: Stage) -> str:
    folder = stage.root / paths.SFT / "model"
    names = ("token", "special", "chat", "vocab", "merges")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(names)]
    return digest_of({path.name: file_digest(path) for path in files})


def _code_digest(stage: Stage) -> str:
    digests: dict[str, Any] = {}
    for name in CODE:
        path = stage.root / "rlhf_core" / name
        found = tree_digest(path) if path.is_dir() else {"": file_digest(path)}
        digests[name] = {file: value for file, value in found.items() if "__pycache__" not in file}
    return digest_of(digests)
