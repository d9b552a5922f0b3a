"""The registry's reward scorer takes a folder of several models as it takes one."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import collate
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompt, encode_response, train_tokenizer
from tasks.tracking.pyfunc_reward import RewardScorer

TEXTS = ["please say where the shop is", "the shop is in the north"]


def test_an_ensemble_scores_rows(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 5, 300)
    cfg = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=16)
    policy = build_policy(cfg, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=3)
    members = [RewardModel.from_policy(policy, "mean", seed) for seed in (4, 5)]
    ensemble = RewardEnsemble(members, "pessimistic", pessimism=0.5).eval()
    ensemble.standardise(0.1, 0.5)
    ensemble.save(tmp_path, tokenizer)
    scorer = RewardScorer()
    limits = {"max_prompt_tokens": 12, "max_response_tokens": 8}
    scorer.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}, model_config=limits))
    rows = [{"prompt": one, "response": other} for one, other in (TEXTS, reversed(TEXTS))]
    batch = collate(
        [encode_prompt(tokenizer, row["prompt"], 12) for row in rows],
        [encode_response(tokenizer, row["response"], 8) for row in rows],
        tokenizer.pad_token_id,
    )
    with torch.no_grad():
        expected = ensemble(batch).tolist()
    assert scorer.predict(None, pd.DataFrame(rows)) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != expected[1]
