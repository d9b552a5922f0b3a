"""A tiny policy and a tiny reward model in the registry of a checkout, for tests that load them as strangers would."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_core.config import ModelConfig
from rlhf_core.models.policy import build_policy, save_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import train_tokenizer
from support.tracking import STAGE
from tasks.tracking import Recorder

TEXTS = ["please say where the shop is", "the shop is in the north", "thank you for the kind answer"] * 5
CONFIG = ModelConfig(
    hidden_size=16, layers=1, heads=2, intermediate_size=16, max_prompt_tokens=12, max_response_tokens=8
)
ROWS = [{"prompt": text, "response": other} for text, other in pairwise(TEXTS)]


def register_two(checkout: Path) -> tuple[Path, Any, Any, Any]:
    """Record `rlhf-policy` and `rlhf-reward`; returns the checkout, the two models and their tokenizer."""
    (checkout / "params.yaml").write_text("model:\n  max_prompt_tokens: 12\n  max_response_tokens: 8\n")
    tokenizer = train_tokenizer(TEXTS, 300)
    policy = build_policy(CONFIG, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=3)
    reward = RewardModel.from_policy(policy, "mean", seed=4)
    save_policy(policy, tokenizer, checkout / "artifacts/align/ppo/model")
    reward.save(checkout / "artifacts/reward/model", tokenizer)
    (checkout / "artifacts/align/ppo/model/weights").unlink()
    (checkout / "artifacts/reward/model/weights").unlink()
    made = {}
    with Recorder(checkout, "run") as recorder:
        for stage, folder in ((STAGE, "artifacts/align/ppo/model"), ("reward", "artifacts/reward/model")):
            recorder.start_stage(stage)
            made[stage] = recorder.register(stage, Path(folder), {}, params={"seed": 1}, example=ROWS[0])
        recorder.set_candidates(made)
    assert str(recorder.delivery) == ""
    return checkout, policy, reward, tokenizer
