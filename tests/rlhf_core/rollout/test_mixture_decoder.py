"""Decoding from a mixture in batches whose rows leave and come several times: every member has to follow."""

import pytest
import torch
from torch import Tensor

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import collate
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.mixture_decoder import MixtureDecoder
from rlhf_core.rollout.sampler import Samples, Sampling, sample_responses

VOCABULARY, PAD, ENDS = 50, 0, (1, 2, 3, 4)
CONFIG = ModelConfig(hidden_size=32, heads=2, layers=2, intermediate_size=32, init_std=0.3)
PROMPTS = [[5 + row % 10, 6, 7][: 1 + row % 3] for row in range(40)]


def sample(mixture: PolicyMixture, batch_size: int) -> Samples:
    return sample_responses(
        mixture,
        PROMPTS,
        Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=24),
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        batch_size=batch_size,
    )


def test_rows_that_leave_and_prompts_that_are_read_once_move_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = PolicyMixture([build_policy(CONFIG, VOCABULARY, PAD, 1, seed) for seed in (1, 2)], (0.3, 0.7))
    one_by_one = sample(mixture, 1)
    chosen: list[int] = []
    select = MixtureDecoder.select

    def counted(self: MixtureDecoder, rows: Tensor) -> None:
        chosen.append(len(rows))
        select(self, rows)

    monkeypatch.setattr(MixtureDecoder, "select", counted)
    together = sample(mixture, 40)
    assert chosen[0] == 40, "prompts that come several times were read once"
    assert min(chosen) < 40, "rows that ended left the batch"
    assert together.response_ids == one_by_one.response_ids
    with torch.no_grad():
        scored_BR = response_logprobs(mixture, collate(PROMPTS, together.response_ids, PAD))
    for row, logprobs in enumerate(together.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), scored_BR[row, : len(logprobs)], atol=3e-5, rtol=0)
