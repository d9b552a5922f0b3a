"""The DPO trainer: exact start, learning, resume to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batches import collate
from rlhf_core.data.pairs import PreferencePair
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference import collate_pairs, pair_batches, pair_loss, reference_logprobs, train_dpo

PAD, EOS, GOOD, BAD = 0, 1, 5, 6


def toy_pairs(count: int, seed: int = 1) -> list[PreferencePair]:
    generator = torch.Generator().manual_seed(seed)

    def noise(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return torch.randint(7, 24, (length,), generator=generator).tolist()

    return [
        PreferencePair(prompt=noise(8), chosen=[*noise(5), GOOD, EOS], rejected=[*noise(6), BAD, EOS])
        for _ in range(count)
    ]


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[], TrainState]:
    def make() -> TrainState:
        policy = tiny_policy()
        return TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})

    return make


def quiet(state: TrainState) -> None:
    return None


def test_the_first_loss_is_exactly_ln_2(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    """Not nearly: policy and reference see the same tensors through the same code, so every margin is 0."""
    cfg = DPOConfig(batch_size=16, learning_rate=1e-9, warmup_steps=0)
    train_dpo(cfg, make_state(), tiny_policy(), toy_pairs(40), seed=0, pad_id=PAD, log=sink, checkpoint=quiet)
    first = sink.rows[0][2]
    assert first["loss/dpo"] == torch.tensor(2.0).log().item()
    assert first["loss/dpo"] == pytest.approx(math.log(2.0), abs=1e-7)
    assert (first["reward/chosen"], first["reward/rejected"], first["reward/accuracy"]) == (0.0, 0.0, 0.5)


def test_it_learns_to_prefer(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    cfg = DPOConfig(batch_size=16, learning_rate=3e-3, epochs=3, nll_coef=0.1, warmup_steps=3)
    state, reference = make_state(), tiny_policy()
    train_dpo(cfg, state, reference, toy_pairs(160), seed=0, pad_id=PAD, log=sink, checkpoint=quiet)
    fresh = toy_pairs(100, seed=9)
    with torch.no_grad():
        logprobs_2N = reference_logprobs(reference, fresh, [range(100)], PAD)
        _, figures = pair_loss(cfg, state.modules["policy"], collate_pairs(fresh, PAD), logprobs_2N)
    assert figures["reward/accuracy"] > 0.9
    assert figures["reward/chosen"] > 0.0 > figures["reward/rejected"]
    assert figures["loss/dpo"] < 0.5


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    make_state: Callable[[], TrainState],
    tiny_policy: Callable[[], PreTrainedModel],
    harness: Callable[..., Any],
    same_state: Callable[..., None],
    step: int,
) -> None:
    cfg = DPOConfig(batch_size=8, epochs=2, nll_coef=0.3, warmup_steps=2, save_every=1 if step == 1 else 3)
    reference, pairs = tiny_policy(), toy_pairs(30)

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return train_dpo(cfg, state, reference, pairs, seed=0, pad_id=PAD, log=log, checkpoint=checkpoint)

    runs = harness(make_state, train)
    same_state(runs.resumed_after(step), runs.unbroken())


def test_the_reference_is_asked_once(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    """Its weights may even be ruined once training has begun."""
    reference = tiny_policy()
    cfg = DPOConfig(batch_size=8, epochs=2)
    states = []
    for ruin in (False, True):

        def log(step: int, *rest: Any, ruin: bool = ruin) -> None:
            if ruin:
                torch.nn.init.constant_(reference.get_input_embeddings().weight, float("nan"))

        state = train_dpo(cfg, make_state(), reference, toy_pairs(20), seed=0, pad_id=PAD, log=log, checkpoint=quiet)
        states.append(state)
    assert states[0].history == states[1].history


def test_reference_logprobs_belong_to_their_pairs(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy, pairs = tiny_policy(), toy_pairs(20)
    logprobs_2N = reference_logprobs(policy, pairs, pair_batches(pairs, 8, seed=0), PAD)
    for index, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            batch = collate([pair.prompt], [response], PAD)
            with torch.no_grad():
                alone = masked_sum(response_logprobs(policy, batch), batch.response_mask_BR).item()
            assert logprobs_2N[side, index].item() == pytest.approx(alone, rel=1e-5)


def test_chosen_nll_is_added_with_its_coefficient(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy, pairs = tiny_policy(), toy_pairs(10)
    reference_2N = reference_logprobs(policy, pairs, [range(10)], PAD)
    figures = {}
    for coefficient in (0.0, 0.7):
        cfg = DPOConfig(nll_coef=coefficient)
        figures[coefficient] = pair_loss(cfg, policy, collate_pairs(pairs, PAD), reference_2N)[1]
    tokens = sum(len(pair.chosen) for pair in pairs)
    nll = -reference_2N[0].sum().item() / tokens
    assert figures[0.0]["loss/train"] == figures[0.0]["loss/dpo"]
    assert figures[0.7]["loss/chosen_nll"] == pytest.approx(nll, rel=1e-5)
    assert figures[0.7]["loss/train"] == pytest.approx(figures[0.7]["loss/dpo"] + 0.7 * nll, rel=1e-5)
