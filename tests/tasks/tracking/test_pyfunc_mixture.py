"""A mixture of two policies behind MLflow's interface: loaded whole, with the tokenizer of its members."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from rlhf_core.config import ModelConfig
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import decode_response, encode_prompt, train_tokenizer
from tasks.tracking.pyfunc_policy import PolicyWriter

TEXTS = ["please say where the shop is", "the shop is in the north", "thank you for the kind answer"] * 5
CONFIG = ModelConfig(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=16,
    init_std=0.4,
    max_prompt_tokens=12,
    max_response_tokens=8,
)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_a_mixture_answers_as_it_does_in_the_library(tmp_path: Path, temperature: float) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    ids = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    mixture = PolicyMixture([build_policy(CONFIG, *ids, seed) for seed in (3, 4)], (0.4, 0.6))
    mixture.save(tokenizer, tmp_path)
    writer = PolicyWriter()
    limits = {"max_prompt_tokens": 12, "max_response_tokens": 8}
    writer.load_context(SimpleNamespace(model_config=limits, artifacts={"model": str(tmp_path)}))
    rows = [{"prompt": text} for text in TEXTS[:3]]
    written = writer.predict(None, pd.DataFrame(rows), {"temperature": temperature, "seed": 5})

    def answers(policy: torch.nn.Module) -> list[str]:
        samples = sample_responses(
            policy,
            [encode_prompt(tokenizer, row["prompt"], 12) for row in rows],
            Sampling.of(mixture, tokenizer, 8),
            temperature=temperature,
            generator=torch.Generator().manual_seed(5),
            batch_size=32,
        )
        return [decode_response(tokenizer, row) for row in samples.response_ids]

    assert written == answers(mixture)
    assert all(written != answers(member) for member in mixture.members)
