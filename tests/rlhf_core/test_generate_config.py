"""What `generate` in params.yaml may say."""

import pytest
from pydantic import ValidationError

from rlhf_core.config import GenerateConfig


def test_the_defaults_sample_from_the_whole_distribution_of_the_sft_model() -> None:
    cfg = GenerateConfig()
    assert (cfg.top_k, cfg.top_p, cfg.models, cfg.best_of.candidates) == (None, 1.0, (), 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"top_k": 0}, "greater than 0"),
        ({"models": ["artifacts/align/ppo/model"]}, "must lie under models/"),
        ({"models": ["models/../secret"]}, "must lie under models/"),
        ({"models": ["models"]}, "must lie under models/"),
        ({"models": ["models/a", "models/a"]}, "names a folder twice"),
        ({"best_of": {"keep": "contrast"}}, "candidates of at least 2"),
        ({"best_of": {"candidates": 4, "keep": "contrast"}, "responses_per_prompt": 3}, "must be even"),
        ({"best_of": {"candidates": 4, "scorer": "reward_model"}}, "needs `reward_model`"),
        ({"best_of": {"scorer": "reward_model", "reward_model": "elsewhere/rm"}}, "must lie under models/"),
        ({"best_of": {"candidate": 4}}, "Extra inputs"),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_the_cure(wrong: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GenerateConfig.model_validate(wrong)
