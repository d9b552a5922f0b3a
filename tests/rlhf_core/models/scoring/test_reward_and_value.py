"""Reward heads and value positions, against numbers worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.policy import build_policy, save_policy
from rlhf_core.models.scoring.heads import HeadSpec
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import train_tokenizer

HEADS = ["last", "mean", "attention", "mixed", "sum", "gated"]
# A response of three tokens and one of a single token, after prompts of two and one.
BATCH = collate([[11, 12], [13]], [[2, 3, 5], [7]], pad_id=0)


class EchoBody(nn.Module):
    """A body whose hidden state at a token is the token's id: what a head reads, and where, can be seen."""

    class config:  # noqa: N801
        hidden_size = 1

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        class Output:
            last_hidden_state = input_ids[..., None].float()

        return Output


def echo_reward(head: str) -> RewardModel:
    model = RewardModel(EchoBody(), HeadSpec(kind=head))
    with torch.no_grad():
        model.head.scalar.weight.fill_(10.0)
        model.head.scalar.bias.fill_(1.0)
    return model


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("last", [51.0, 71.0]),  # 10 * 5 + 1; 10 * 7 + 1
        ("sum", [103.0, 71.0]),  # 21 + 31 + 51
        ("mean", [103.0 / 3, 71.0]),
    ],
)
def test_three_tokens_by_hand(head: str, expected: list[float]) -> None:
    torch.testing.assert_close(echo_reward(head)(BATCH), torch.tensor(expected))


@pytest.mark.parametrize(("head", "raw"), [("last", [51.0, 71.0]), ("sum", [103.0, 71.0])])
def test_standardised_scores_are_shifted_then_scaled(head: str, raw: list[float]) -> None:
    model = echo_reward(head)
    model.standardise(61.0, 5.0)
    torch.testing.assert_close(model(BATCH), (torch.tensor(raw) - 61.0) / 5.0)
    with pytest.raises(ValueError, match="scores everything alike"):
        model.standardise(0.0, 0.0)


def policy(*, tied: bool = True) -> PreTrainedModel:
    if tied:
        cfg = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=16, init_std=0.5)
        return build_policy(cfg, 270, 0, 1, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=270, tie_word_embeddings=False, initializer_range=0.5, **sizes)
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_gated_head_is_a_plus_b_times_clamped_logprob_plus_one(tied: bool) -> None:
    language_model = policy(tied=tied)
    model = RewardModel.from_policy(language_model, "gated", seed=0)
    with torch.no_grad():
        model.head.scalar.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.head.scalar.bias.copy_(torch.tensor([0.3, -0.7]))
        logprobs = response_logprobs(language_model, BATCH)
        hidden = model.body(
            BATCH.ids_BS, attention_mask=BATCH.mask_BS, position_ids=BATCH.position_ids_BS
        ).last_hidden_state
        outputs = hidden[:, 2:] @ model.head.scalar.weight.t() + model.head.scalar.bias
        values = outputs[..., 0] + outputs[..., 1] * (torch.maximum(logprobs, torch.tensor(-8.0)) + 1.0)
        assert (logprobs[BATCH.response_mask_BR == 1] < -8).any(), "the clamp is not tested"
        assert (logprobs[BATCH.response_mask_BR == 1] > -8).any(), "the log-probability is not tested"
        torch.testing.assert_close(model(BATCH), (values * BATCH.response_mask_BR).sum(1), atol=1e-5, rtol=1e-5)


def test_an_untied_output_layer_is_kept_frozen() -> None:
    language_model = policy(tied=False)
    model = RewardModel.from_policy(language_model, "gated", seed=0)
    assert torch.equal(model.output_weight, language_model.lm_head.weight)
    assert "output_weight" not in dict(model.named_parameters())
    assert RewardModel.from_policy(policy(), "gated", seed=0).output_weight is None
    assert RewardModel.from_policy(language_model, "last", seed=0).output_weight is None


@pytest.mark.parametrize("head", HEADS)
def test_the_body_is_a_copy_and_learns(head: str) -> None:
    language_model = policy()
    before = {key: value.clone() for key, value in language_model.state_dict().items()}
    model = RewardModel.from_policy(language_model, head, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a gated head starts at zero: its body learns from the second step on
        model(BATCH)[0].backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in language_model.state_dict().items())
    assert not torch.equal(model.body.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_how_heads_start() -> None:
    for head in ("last", "mean", "attention", "mixed", "sum"):
        model = RewardModel.from_policy(policy(), head, seed=0)
        assert model.head.scalar.bias.tolist() == [0.0]
        assert torch.equal(model.head.scalar.weight, RewardModel.from_policy(policy(), head, seed=0).head.scalar.weight)
        assert not torch.equal(
            model.head.scalar.weight, RewardModel.from_policy(policy(), head, seed=1).head.scalar.weight
        )
        assert 0.5 < model.head.scalar.weight.std() * 17**0.5 < 1.6
    assert not RewardModel.from_policy(policy(), "gated", seed=0).head.scalar.weight.any()


@pytest.mark.parametrize("head", HEADS)
def test_scores_do_not_depend_on_padding_or_company(head: str) -> None:
    """1e-5 is the bound in float32 for scores of size 1 to 10."""
    model = RewardModel.from_policy(policy(), head, seed=0)
    with torch.no_grad():
        model.head.scalar.weight.normal_(generator=torch.Generator().manual_seed(1))
        together = model(collate([[11, 12], [13], [14] * 9], [[2, 3, 5], [7], [8] * 9], pad_id=33))
        alone = torch.cat([model(collate([[11, 12]], [[2, 3, 5]], 0)), model(collate([[13]], [[7]], 0))])
    torch.testing.assert_close(together[:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_save_and_load_give_the_same_scores_and_bytes(tmp_path: Path, head: str, tied: bool) -> None:
    tokenizer = train_tokenizer(["some words"], 270)
    model = RewardModel.from_policy(policy(tied=tied), head, seed=0)
    with torch.no_grad():
        model.head.scalar.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.standardise(0.25, 1.5)
    model.save(tmp_path / "one", tokenizer)
    loaded = RewardModel.load(tmp_path / "one")
    assert torch.equal(loaded(BATCH), model(BATCH))
    loaded.save(tmp_path / "two", tokenizer)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert not [path for path in (tmp_path / "one").iterdir() if path.suffix not in (".json", ".safetensors")]


def test_a_folder_without_a_known_head_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words"], 270)
    save_policy(policy(), tokenizer, tmp_path / "policy")
    with pytest.raises(EnvironmentProblem, match=r"missing reward_head.json, reward_head.safetensors"):
        RewardModel.load(tmp_path / "policy")
    RewardModel.from_policy(policy(), "last", seed=0).save(tmp_path / "reward", tokenizer)
    (tmp_path / "reward" / "reward_head.json").write_text('{"head": "best"}')
    with pytest.raises(ConfigError, match=r"head: 'best' is none. Fix: one of last, mean, attention, mixed"):
        RewardModel.load(tmp_path / "reward")


def test_values_are_read_where_each_token_is_predicted() -> None:
    model = ValueModel(EchoBody())
    with torch.no_grad():
        model.scalar.weight.fill_(1.0)
    # Before 2 stands 12, before 3 stands 2, before 5 stands 3; before 7 stands 13.
    assert model(BATCH).tolist() == [[12.0, 2.0, 3.0], [13.0, 0.0, 0.0]]


def test_a_value_does_not_know_the_token_it_is_read_before() -> None:
    model = ValueModel.from_reward_model(RewardModel.from_policy(policy(), "last", seed=0))
    assert not model(BATCH).any()
    with torch.no_grad():
        model.scalar.weight.normal_(generator=torch.Generator().manual_seed(1))
    other: SequenceBatch = collate([[11, 12], [13]], [[2, 3, 99], [7]], pad_id=0)
    assert torch.equal(model(BATCH), model(other))


def test_a_value_model_starts_from_a_copy_of_the_reward_model() -> None:
    reward_model = RewardModel.from_policy(policy(), "gated", seed=0)
    model = ValueModel.from_reward_model(reward_model)
    for one, two in zip(model.body.parameters(), reward_model.body.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one is not two
