"""The PPO trainer: exact first update, credit by hand, learning, early stop, resume to the bit."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.config import PPOConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.errors import Diverged
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.objectives.policy_gradient import ppo_policy_losses
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.credit import CreditedPart, Minibatch, assign_credit
from rlhf_core.trainers.ppo.curriculum import draw_prompts
from rlhf_core.trainers.ppo.figures import rollout_figures
from rlhf_core.trainers.ppo.parts import Rollout, RolloutPart
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.rollout import RolloutSetup, collect_rollout, write_responses
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo
from rlhf_core.trainers.ppo.update import run_epochs, set_learning_rates, update

PAD, EOS, GOOD = 0, 1, 5
SAMPLING = Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8)
CFG = PPOConfig(steps=6, rollout_batch=16, minibatch=8, epochs=2, warmup_steps=2, save_every=2, target_kl=10.0)
PROMPTS = [[7 + i % 17, 7 + i % 5][: 1 + i % 2] for i in range(23)]


def share_of_good(batch: SequenceBatch) -> Tensor:
    """A rule in the place of a reward model: how much of the response is GOOD."""
    hits_BR = (batch.response_ids_BR == GOOD).float() * batch.response_mask_BR
    return hits_BR.sum(1) / batch.response_mask_BR.sum(1)


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[], TrainState]:
    def make() -> TrainState:
        policy = tiny_policy()
        value = ValueModel.from_reward_model(RewardModel.from_policy(tiny_policy(), "last", seed=2))
        modules = {"policy": policy, "value": value}
        optimizers = {name: make_optimizer(module, 1e-3, betas=(0.9, 0.95)) for name, module in modules.items()}
        return TrainState(modules=modules, optimizers=optimizers)

    return make


def quiet(*_: object) -> None:
    return None


def roll(cfg: PPOConfig, state: TrainState, reference: PreTrainedModel, seed: int = 3) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    setup = RolloutSetup(
        cfg=cfg,
        modules=state.modules,
        reference=reference,
        score=share_of_good,
        prompts=PROMPTS,
        sampling=SAMPLING,
        run=RunContext(seed=0, pad_id=PAD),
    )
    return collect_rollout(setup, write_responses(setup, range(cfg.rollout_batch), generator), [], generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_n04_the_first_update_starts_from_a_log_ratio_of_exactly_zero(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], temperature: float
) -> None:
    cfg = CFG.model_copy(update={"temperature": temperature})
    state = make_state()
    for part in roll(cfg, state, tiny_policy()).parts():
        logprobs_BR = response_logprobs(state.modules["policy"], part.batch, temperature)
        assert torch.equal(logprobs_BR.detach(), part.old_logprobs_BR)
        assert torch.equal(part.old_logprobs_BR, part.ref_logprobs_BR)
        _, stats = ppo_policy_losses(
            logprobs_BR, part.old_logprobs_BR, torch.ones_like(logprobs_BR), part.batch.response_mask_BR, 0.2
        )
        assert not bool(stats["policy/approx_kl"].any())
        assert torch.equal(stats["policy/ratio"], part.batch.response_mask_BR)
    figures, stopped = update(cfg, state, assign_credit(cfg, {}, roll(cfg, state, tiny_policy()))[0][0])
    assert (figures["policy/approx_kl"], figures["policy/ratio_max"], stopped) == (0.0, 1.0, False)


def test_a_rollout_holds_every_row_once(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    rollout = roll(CFG, make_state(), tiny_policy())
    parts = rollout.parts()
    assert [len(part.scores_B) for part in parts] == [8, 8]
    assert sorted(row for part in parts for row in part.rows) == list(range(16))
    prompts = [
        row[mask.bool()].tolist()
        for part in parts
        for row, mask in zip(
            part.batch.ids_BS[:, : part.batch.prompt_width],
            part.batch.mask_BS[:, : part.batch.prompt_width],
            strict=True,
        )
    ]
    assert sorted(prompts) == sorted(PROMPTS[:16])
    for part in parts:
        ended_B = (part.batch.response_ids_BR == EOS).logical_and(part.batch.response_mask_BR == 1).any(1)
        assert [rollout.responses[row].finished for row in part.rows] == ended_B.tolist()
        assert [rollout.responses[row].score for row in part.rows] == part.scores_B.tolist()


def handmade(*rows: tuple[float, list[float], list[float], bool]) -> Rollout:
    """Rows of three tokens, each a minibatch of its own: score, KL of the tokens, values, whether it is finished."""
    minibatches = []
    for number, (score, kl, values, _) in enumerate(rows):
        part = RolloutPart(
            rows=[number],
            batch=collate([[7]], [[8, 9, EOS]], PAD),
            old_logprobs_BR=torch.tensor([kl]),
            ref_logprobs_BR=torch.zeros(1, 3),
            old_values_BR=torch.tensor([values]),
            last_values_B=torch.zeros(1),
            entropy_BR=torch.ones(1, 3),
            scores_B=torch.tensor([score]),
            weights_BR=torch.ones(1, 3),
            counts_B=torch.ones(1),
        )
        minibatches.append([part])
    responses = [Written(prompt=0, response_ids=[8, 9, EOS], finished=row[3], score=row[0]) for row in rows]
    return Rollout(responses=responses, num_fresh=len(rows), minibatches=minibatches, tokens=[3] * len(rows))


def test_n14_n15_n17_n19_n21_credit_worked_by_hand() -> None:
    """kl_coef .5, gamma 1, lambda .5, penalty 1, clip 2.

    First row, finished, score 9 -> 2: rewards (-.5, 0, 2), values (1, 0, 1).
        delta = 2 - 1 = 1; 0 + 1 - 0 = 1; -.5 + 0 - 1 = -1.5. A = 1; 1 + .5 = 1.5; -1.5 + .75 = -.75.
        Returns 2, 1.5, .25.
    Second row, cut off, score 1 -> 0: rewards (0, 0, 0), values (0, 2, 2).
        delta = -2; 0 + 2 - 2 = 0; 0 + 2 - 0 = 2. A = -2; -1; 1.5. Returns 0, 1, 1.5.
    """
    cfg = PPOConfig(kl_coef=0.5, gamma=1.0, gae_lambda=0.5, score_clip=2.0, missing_end_penalty=1.0)
    rollout = handmade((9.0, [1.0, 0.0, 0.0], [1.0, 0.0, 1.0], True), (1.0, [0.0, 0.0, 0.0], [0.0, 2.0, 2.0], False))
    minibatches, surprise_N = assign_credit(cfg, {}, rollout)
    first, second = (minibatch.parts[0] for minibatch in minibatches)
    assert surprise_N.tolist() == pytest.approx([(0.75 + 1.5 + 1.0) / 3, (1.5 + 1.0 + 2.0) / 3])
    assert first.rewards_BR.tolist() == [[-0.5, 0.0, 2.0]]
    assert first.returns_BR.tolist() == [[0.25, 1.5, 2.0]]
    assert second.rewards_BR.tolist() == [[0.0, 0.0, 0.0]]
    assert second.returns_BR.tolist() == [[1.5, 1.0, 0.0]]
    raw = torch.tensor([-0.75, 1.5, 1.0, 1.5, -1.0, -2.0])
    whitened = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(torch.cat([first.advantages_BR[0], second.advantages_BR[0]]), whitened)
    # What the values left of the returns is `raw`: its variance over that of the returns is not explained.
    unexplained = statistics.pvariance(raw.tolist()) / statistics.pvariance([0.25, 1.5, 2.0, 1.5, 1.0, 0.0])
    figures = rollout_figures(cfg, rollout, minibatches)
    assert figures["rollout/explained_variance"] == pytest.approx(1.0 - unexplained, rel=1e-6)


def test_n07_n08_figures_of_a_rollout_worked_by_hand() -> None:
    cfg = PPOConfig(kl_coef=0.5, score_clip=2.0, missing_end_penalty=1.0)
    rollout = handmade((9.0, [1.0, 1.0, 0.0], [1.0, 0.0, 1.0], True), (1.0, [0.0, 0.0, -1.0], [0.0, 2.0, 2.0], False))
    figures = rollout_figures(cfg, rollout, assign_credit(cfg, {}, rollout)[0])
    assert figures["reward/score"] == 5.0
    assert figures["reward/score_std"] == 4.0
    assert figures["reward/total"] == pytest.approx(((2.0 - 1.0) + (0.0 + 0.5)) / 2)
    assert figures["rollout/kl_to_reference"] == pytest.approx(0.5)
    assert figures["rollout/response_tokens"] == 3.0
    assert figures["rollout/finished_share"] == 0.5
    assert figures["rollout/distinct_share"] == 0.5
    assert figures["policy/entropy"] == 1.0


def test_prompts_come_once_before_any_comes_again() -> None:
    drawn = [index for step in range(9) for index in draw_prompts(10, 4, step, seed=1)]
    assert [sorted(drawn[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn[:10] != drawn[10:20]
    assert draw_prompts(10, 4, 5, seed=1) == drawn[20:24]
    assert sorted(draw_prompts(2, 5, 0, seed=1)[:4]) == [0, 0, 1, 1], "more rows than prompts"


def test_reward_rises(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    cfg = PPOConfig(
        steps=30, rollout_batch=64, minibatch=32, learning_rate=5e-3, value_learning_rate=5e-3, kl_coef=0.02,
        warmup_steps=2, missing_end_penalty=0.0, target_kl=1.0,
    )  # fmt: skip
    state = train_ppo(
        cfg,
        make_state(),
        tiny_policy(),
        Rewards(share_of_good),
        PROMPTS,
        RunContext(seed=0, pad_id=PAD, log=sink),
        sampling=SAMPLING,
    )
    scores = [row["reward/score"] for row in state.history]
    assert scores[0] < 0.15
    assert scores[-1] > 0.6
    assert state.history[-1]["rollout/kl_to_reference"] > 0.5 > state.history[0]["rollout/kl_to_reference"] == 0.0
    assert state.history[-1]["rollout/explained_variance"] > state.history[0]["rollout/explained_variance"]
    assert [row[0] for row in sink.rows] == list(range(1, 31))
    assert all(row["policy/updates"] == 4 for row in state.history if not row["policy/stopped_early"])


def test_a_high_price_of_divergence_keeps_the_policy_near(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    drift = []
    for kl_coef in (0.0, 5.0):
        cfg = CFG.model_copy(update={"steps": 15, "kl_coef": kl_coef, "learning_rate": 3e-3, "rollout_batch": 32})
        state = train_ppo(
            cfg,
            make_state(),
            tiny_policy(),
            Rewards(share_of_good),
            PROMPTS,
            RunContext(seed=0, pad_id=PAD, log=sink),
            sampling=SAMPLING,
        )
        drift.append(state.history[-1]["rollout/kl_to_reference"])
    assert drift[1] < 0.5 * drift[0]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    make_state: Callable[[], TrainState],
    tiny_policy: Callable[[], PreTrainedModel],
    harness: Callable[..., Any],
    same_state: Callable[..., None],
    step: int,
) -> None:
    cfg = CFG.model_copy(update={"save_every": 1 if step == 1 else 2})
    reference = tiny_policy()

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return train_ppo(
            cfg,
            state,
            reference,
            Rewards(share_of_good),
            PROMPTS,
            RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint),
            sampling=SAMPLING,
        )

    runs = harness(make_state, train)
    same_state(runs.resumed_after(step), runs.unbroken())


def credited_rollout(cfg: PPOConfig, state: TrainState, reference: PreTrainedModel) -> list[Minibatch]:
    set_learning_rates(cfg, state)
    return assign_credit(cfg, {}, roll(cfg, state, reference))[0]


def test_the_epochs_stop_when_the_policy_has_moved_far(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """The minibatch that shows it is not learned from: weights after it are those after the update before it."""
    far = CFG.model_copy(update={"learning_rate": 0.05, "warmup_steps": 0, "target_kl": 1e-4})
    state = make_state()
    figures = run_epochs(far, state, credited_rollout(far, state, tiny_policy()), torch.Generator().manual_seed(1))
    assert figures["policy/stopped_early"] == 1.0
    assert figures["policy/updates"] == 1
    free = make_state()
    minibatches = credited_rollout(far, free, tiny_policy())
    first = int(torch.randperm(2, generator=torch.Generator().manual_seed(1))[0])
    once = far.model_copy(update={"epochs": 1})
    run_epochs(once, free, [minibatches[first]], torch.Generator())
    for stopped, single in zip(state.modules["policy"].parameters(), free.modules["policy"].parameters(), strict=True):
        assert torch.equal(stopped, single)


def test_n26_all_epochs_run_when_the_policy_stays_near(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    state = make_state()
    figures = run_epochs(CFG, state, credited_rollout(CFG, state, tiny_policy()), torch.Generator().manual_seed(1))
    assert (figures["policy/updates"], figures["policy/stopped_early"]) == (4, 0.0)
    steps = {name: next(iter(opt.state.values()))["step"].item() for name, opt in state.optimizers.items()}
    assert steps == {"policy": 4.0, "value": 4.0}


def with_rubbish(credited: CreditedPart, rubbish: float) -> CreditedPart:
    """The same part with `rubbish` under its padding."""
    padding_BR = rubbish * (credited.part.batch.response_mask_BR == 0)
    assert padding_BR.numel() > padding_BR.count_nonzero()
    return CreditedPart(
        part=replace(
            credited.part,
            old_logprobs_BR=credited.part.old_logprobs_BR + padding_BR,
            old_values_BR=credited.part.old_values_BR + padding_BR,
        ),
        rewards_BR=credited.rewards_BR,
        advantages_BR=credited.advantages_BR + padding_BR,
        returns_BR=credited.returns_BR + padding_BR,
    )


def test_padding_does_not_move_the_update(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """What stands in the padding of old log-probabilities, advantages, returns and values changes no bit."""
    weights = []
    for rubbish in (0.0, 1e6):
        state = make_state()
        minibatches = [
            replace(one, parts=[with_rubbish(credited, rubbish) for credited in one.parts])
            for one in credited_rollout(CFG, state, tiny_policy())
        ]
        run_epochs(CFG, state, minibatches, torch.Generator().manual_seed(1))
        weights.append([p.detach() for module in state.modules.values() for p in module.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_n18_what_stands_in_the_padding_of_a_rollout_gives_no_token_any_credit(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    rollout = roll(CFG, make_state(), tiny_policy())
    clean, _ = assign_credit(CFG, {}, rollout)
    spoiled = [
        [
            replace(part, **{
                name: getattr(part, name) + 1e6 * (part.batch.response_mask_BR == 0)
                for name in ("old_logprobs_BR", "ref_logprobs_BR", "old_values_BR", "entropy_BR")
            })
            for part in parts
        ]
        for parts in rollout.minibatches
    ]  # fmt: skip
    dirty, _ = assign_credit(CFG, {}, replace(rollout, minibatches=spoiled))
    for one, two in zip(clean, dirty, strict=True):
        for name in ("rewards_BR", "advantages_BR", "returns_BR"):
            first, second = getattr(one.parts[0], name), getattr(two.parts[0], name)
            assert torch.equal(first, second)
            assert not bool(first[one.parts[0].part.batch.response_mask_BR == 0].any())
    figures = rollout_figures(CFG, replace(rollout, minibatches=spoiled), dirty)
    assert figures == rollout_figures(CFG, rollout, clean)


def test_n22_a_value_that_ran_past_the_clip_learns_no_more(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """New values at 3, old at 0, clip 0.4, returns 9: the clipped error is the larger, and gives no gradient."""
    state = make_state()
    one = credited_rollout(CFG, state, tiny_policy())[0]
    part = replace(one.parts[0], returns_BR=torch.full_like(one.parts[0].returns_BR, 9.0))
    torch.nn.init.constant_(state.modules["value"].scalar.bias, 3.0)
    figures, _ = update(CFG, state, replace(one, parts=[part]))
    assert figures["loss/value_clip_fraction"] == pytest.approx(1.0)
    share = one.tokens / one.divisor  # of the rollout's tokens, in units of a minibatch of mean size
    assert figures["loss/value"] == pytest.approx(share * 0.5 * (9 - 0.4) ** 2, rel=1e-5)
    assert figures["optim/grad_norm_value"] == 0.0


def test_n27_policy_and_value_gradients_are_clipped_apart_and_their_norms_reported(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """Huge returns make a huge value gradient, which must not shrink the policy's step."""
    weights = []
    for scale in (1.0, 1e6):
        state = make_state()
        minibatches = [
            replace(one, parts=[replace(part, returns_BR=part.returns_BR * scale) for part in one.parts])
            for one in credited_rollout(CFG, state, tiny_policy())
        ]
        figures = run_epochs(CFG, state, minibatches, torch.Generator().manual_seed(1))
        weights.append([p.detach() for p in state.modules["policy"].parameters()])
    assert figures["optim/grad_norm_value"] > 1e3
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_scores_that_are_not_numbers_end_the_run(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    def broken(batch: SequenceBatch) -> Tensor:
        return share_of_good(batch) * float("nan")

    state = make_state()
    before = [p.detach().clone() for p in state.modules["policy"].parameters()]
    with pytest.raises(Diverged):
        train_ppo(
            CFG,
            state,
            tiny_policy(),
            Rewards(broken),
            PROMPTS,
            RunContext(seed=0, pad_id=PAD, log=sink),
            sampling=SAMPLING,
        )
    assert all(torch.equal(one, two) for one, two in zip(before, state.modules["policy"].parameters(), strict=True))


def test_rates_of_policy_and_value(make_state: Callable[[], TrainState]) -> None:
    cfg = PPOConfig(steps=10, learning_rate=1.0, value_learning_rate=2.0, warmup_steps=2, min_learning_rate_share=0.3)
    state = make_state()
    rates = []
    for state.step in range(10):
        rates.append(set_learning_rates(cfg, state))
        assert {group["lr"] for group in state.optimizers["policy"].param_groups} == {rates[-1]}
        assert {group["lr"] for group in state.optimizers["value"].param_groups} == {2.0}
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_frozen_models_stay_frozen(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    reference = tiny_policy()
    reward_model = RewardModel.from_policy(tiny_policy(), "sum", seed=5)

    def copied(module: nn.Module) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in module.state_dict().values()]

    before = copied(reference), copied(reward_model)
    train_ppo(
        CFG,
        make_state(),
        reference,
        Rewards(reward_model),
        PROMPTS,
        RunContext(seed=0, pad_id=PAD, log=sink),
        sampling=SAMPLING,
    )
    for kept, module in zip(before, (reference, reward_model), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(kept, copied(module), strict=True))
        assert all(parameter.grad is None for parameter in module.parameters())
