"""The DPO trainer: exact start, learning, resume to the bit."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.preference import EOS, PAD, toy_groups
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batching.pairs import PreferenceGroup, group_batches
from rlhf_core.engine.batches import collate
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.loss import FIGURES, pair_loss, step_totals
from rlhf_core.trainers.preference.reference import reference_logprobs
from rlhf_core.trainers.preference.trainer import train_dpo

RUN = RunContext(seed=0, pad_id=PAD)


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[], TrainState]:
    def make() -> TrainState:
        policy = tiny_policy()
        return TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})

    return make


def quiet(state: TrainState) -> None:
    return None


def test_n32_the_first_loss_is_exactly_ln_2(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    """Not nearly: policy and reference see the same tensors through the same code, so every margin is 0."""
    cfg = DPOConfig(prompts_per_step=16, learning_rate=1e-9, warmup_steps=0)
    train_dpo(cfg, make_state(), tiny_policy(), toy_groups(40), RunContext(seed=0, pad_id=PAD, log=sink))
    first = sink.rows[0][2]
    assert first["loss/preference"] == torch.tensor(2.0).log().item()
    assert first["loss/preference"] == pytest.approx(math.log(2.0), abs=1e-7)
    assert (first["implicit_reward/chosen"], first["implicit_reward/rejected"], first["implicit_reward/accuracy"]) == (
        0.0,
        0.0,
        0.5,
    )


def test_it_learns_to_prefer(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    cfg = DPOConfig(prompts_per_step=16, learning_rate=3e-3, epochs=3, nll_coef=0.1, warmup_steps=3)
    state, reference = make_state(), tiny_policy()
    train_dpo(cfg, state, reference, toy_groups(160), RunContext(seed=0, pad_id=PAD, log=sink))
    fresh = toy_groups(60, seed=9)
    with torch.no_grad():
        reference_B = reference_logprobs(reference, fresh, [range(len(fresh))], RUN)
        totals = step_totals(cfg, fresh, torch.zeros(()))
        _, figures_K = pair_loss(cfg, state.modules["policy"], fresh, reference_B, totals, PAD)
    figures = dict(zip(FIGURES, figures_K.tolist(), strict=True))
    assert figures["implicit_reward/accuracy"] > 0.9
    assert figures["implicit_reward/chosen"] > 0.0 > figures["implicit_reward/rejected"]
    assert figures["loss/preference"] < 0.5


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    make_state: Callable[[], TrainState],
    tiny_policy: Callable[[], PreTrainedModel],
    harness: Callable[..., Any],
    same_state: Callable[..., None],
    step: int,
) -> None:
    cfg = DPOConfig(prompts_per_step=8, epochs=2, nll_coef=0.3, warmup_steps=2, save_every=1 if step == 1 else 3)
    reference, groups = tiny_policy(), toy_groups(30)

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return train_dpo(cfg, state, reference, groups, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint))

    runs = harness(make_state, train)
    same_state(runs.resumed_after(step), runs.unbroken())


def test_the_reference_is_asked_once(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Once training has begun, its weights may even be ruined: neither going on nor resuming asks again."""
    cfg = DPOConfig(prompts_per_step=8, epochs=2, save_every=2)
    groups, reference, ruined = toy_groups(20), tiny_policy(), tiny_policy()
    torch.nn.init.constant_(ruined.get_input_embeddings().weight, float("nan"))
    checkpointer = Checkpointer(tmp_path, {"test": "reference"})

    def train(state: TrainState, model: PreTrainedModel, log: Any) -> TrainState:
        return train_dpo(
            cfg, state, model, groups, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpointer.save)
        )

    def ruin_and_stop(step: int, *_: object) -> None:
        torch.nn.init.constant_(going.get_input_embeddings().weight, float("nan"))
        if step == 3:
            raise KeyboardInterrupt

    whole = train(make_state(), reference, lambda *_: None)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    going = tiny_policy()
    with pytest.raises(KeyboardInterrupt):
        train(make_state(), going, ruin_and_stop)
    state = make_state()
    assert checkpointer.restore(state)
    assert state.step == 2
    assert train(state, ruined, lambda *_: None).history == whole.history


def test_reference_logprobs_belong_to_their_responses(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy, groups = tiny_policy(), toy_groups(20)
    batches = group_batches(groups, 8, torch.Generator().manual_seed(1))
    logprobs = iter(reference_logprobs(policy, groups, batches, RUN).tolist())
    for group in groups:
        for response in group.responses:
            batch = collate([group.prompt], [response], PAD)
            with torch.no_grad():
                alone = masked_sum(response_logprobs(policy, batch), batch.response_mask_BR).item()
            assert next(logprobs) == pytest.approx(alone, rel=1e-5)
    assert next(logprobs, None) is None


def test_the_loss_counts_a_response_once_a_pair(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    """Grouped, it equals the loss over the pairs one by one; the chosen likelihood is added with its coefficient."""
    policy, reference = tiny_policy(), tiny_policy()
    torch.nn.init.normal_(policy.get_input_embeddings().weight, std=0.1, generator=torch.Generator().manual_seed(7))
    groups = [
        PreferenceGroup(prompt=[7, 8], responses=[[9, EOS], [10, 11, 12, EOS], [13, EOS]], pairs=[(0, 1), (0, 2)]),
        PreferenceGroup(prompt=[14], responses=[[15, 16, EOS], [17, EOS]], pairs=[(1, 0)]),
    ]

    def summed(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
        return response_logprobs(model, collate([prompt], [response], PAD)).sum().item()

    margins, chosen = [], []
    for group in groups:
        for better, worse in group.pairs:
            one, two = group.responses[better], group.responses[worse]
            log_ratios = [summed(policy, group.prompt, x) - summed(reference, group.prompt, x) for x in (one, two)]
            margins.append(0.5 * (log_ratios[0] - log_ratios[1]))
            chosen.append((summed(policy, group.prompt, one), len(one)))
    dpo = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    nll = -sum(total for total, _ in chosen) / sum(length for _, length in chosen)

    cfg = DPOConfig(beta=0.5, nll_coef=0.7)
    reference_B = reference_logprobs(reference, groups, [[0, 1]], RUN)
    loss, figures_K = pair_loss(cfg, policy, groups, reference_B, step_totals(cfg, groups, torch.zeros(())), PAD)
    figures = dict(zip(FIGURES, figures_K.tolist(), strict=True))
    assert figures["loss/preference"] == pytest.approx(dpo, rel=1e-5)
    assert figures["loss/chosen_nll"] == pytest.approx(nll, rel=1e-5)
    assert loss.item() == pytest.approx(dpo + 0.7 * nll, rel=1e-5)
