"""A registered version without a registry: a small policy in a folder, with a lineage and held-out prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.config import ModelConfig
from rlhf_core.models.policy import build_policy, load_policy, save_policy
from rlhf_core.models.scoring.heads import Head
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import file_digest
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer
from support.tokenizer import CHATML, byte_level
from tasks.exporting.subject import GateFound, Subject

TEXTS = ["please say where the shop is", "the shop is in the north", "thank you for the kind answer"] * 5
PROMPTS = [f"say {number} where the shop number {number * 7} is" for number in range(12)]
SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48}
LIMITS = {"max_prompt_tokens": 120, "max_response_tokens": 8}
HELDOUT = "artifacts/validate/heldout_prompts.parquet"
PAIRS = "artifacts/preferences/heldout.parquet"


def make_policy(folder: Path, *, chat: bool = False, family: str = "llama", seed: int = 3) -> None:
    """A policy of random weights whose next tokens differ clearly, so that what is likeliest is no matter of chance."""
    tokenizer = byte_level(CHATML) if chat else train_tokenizer(TEXTS, 300)
    config = ModelConfig(family=family, init_std=0.3, **SHAPE, **{**LIMITS, "max_prompt_tokens": 200})
    save_policy(
        build_policy(config, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed), tokenizer, folder
    )


def make_subject(home: Path, *, params: str = "", metrics: dict[str, Any] | None = None, **model: Any) -> Subject:
    """A version `rlhf-policy/3` whose held-out prompts lie in `home`, a checkout."""
    folder = home / "artifacts/align/ppo/model"
    make_policy(folder, **model)
    (home / HELDOUT).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": PROMPTS}), home / HELDOUT)
    return Subject(
        reference="rlhf-policy/3",
        kind="policy",
        stage="align@ppo",
        content="c" * 64,
        folder=folder,
        home=home,
        manifest=lineage(home, params),
        metrics=metrics or {"win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "kl_to_sft": None},
        gates=(GateFound(passed=False, text="max_kl_to_sft: upper bound is undefined, must be <= 6"),),
    )


def make_reward(home: Path, head: Head, *, chat: bool = False) -> Subject:
    """A version `rlhf-reward/3` with a head of this kind, and its held-out pairs."""
    policy = make_subject(home, chat=chat)
    folder, tokenizer = home / "artifacts/reward/model", load_tokenizer(policy.folder)
    model = RewardModel.from_policy(load_policy(policy.folder), head, seed=4)
    model.head.scalar.bias.data.fill_(0.3)
    model.standardise(0.7, 1.9)
    model.save(folder, tokenizer)
    pairs = {"prompt": PROMPTS, "chosen": TEXTS[:12], "rejected": [f"{number} shops" for number in range(12)]}
    (home / PAIRS).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(pairs), home / PAIRS)
    manifest = {**policy.manifest, "outputs": {"preferences": {PAIRS: file_digest(home / PAIRS)}}}
    return replace(
        policy, reference="rlhf-reward/3", kind="reward", stage="reward", folder=folder, manifest=manifest,
        metrics={"pairwise_accuracy": 0.64, "pairwise_accuracy_low": 0.6, "pairwise_accuracy_high": 0.68},
    )  # fmt: skip


def lineage(home: Path, params: str) -> dict[str, Any]:
    """A manifest as `build_manifest` makes it, with the keys that an export reads."""
    kinds = {"demonstrations": {"rows_in": 30, "rows_kept": 28, "rows_bad": 2}}
    return {
        "git": {"commit": "a" * 40, "files": {}, "digest": "clean"},
        "params": f"model: {{max_prompt_tokens: 120, max_response_tokens: 8}}\n{params}",
        "params_hash": "b" * 64,
        "dvc_lock": "schema: '2.0'\n",
        "data_hash": "d" * 32,
        "environment": {"torch": "2"},
        "outputs": {"validate": {HELDOUT: file_digest(home / HELDOUT)}},
        "metrics": {"validate": {"kinds": kinds}},
        "model_folders": {},
        "data_files": {},
    }
