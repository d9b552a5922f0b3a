"""A run of three tiny models for the stage `evaluate`."""

import random
from pathlib import Path

import pytest

from rlhf_core.demo.world import draw_scenes
from rlhf_core.models.policy import build_policy, save_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import train_tokenizer
from tests.support.evaluate_stage import PARAMS, write_prompts


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose `ppo` is the SFT model itself and whose `dpo` is another one."""
    monkeypatch.chdir(tmp_path)
    prompts = [scene.prompt() for scene in draw_scenes(random.Random(0), 16, "heldout")]
    tokenizer = train_tokenizer(prompts, 300)
    models = [
        build_policy(PARAMS.model, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed)
        for seed in (0, 1)
    ]
    for folder, model in (("sft", models[0]), ("align/ppo", models[0]), ("align/dpo", models[1])):
        save_policy(model, tokenizer, tmp_path / "artifacts" / folder / "model")
    RewardModel.from_policy(models[0], "last", 0).save(tmp_path / "artifacts/reward/model", tokenizer)
    write_prompts(tmp_path, prompts)
    return tmp_path
