"""Every setting of the reward trainer: it learns, resumes to the bit, and two processes take the steps of one."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, get_args

import pytest
import torch
from support.reward import EOS, PAD, settings, toy_groups, train
from transformers import PreTrainedModel

from rlhf_core.config.reward import RewardConfig, RewardEnsembleConfig, RewardLossConfig
from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup, collate_groups
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.reward.plan import epoch_batches, phases
from rlhf_core.trainers.reward.step import distilled_step
from rlhf_core.trainers.reward.teacher import Aggregation, ensemble_of, fit_aggregation
from rlhf_core.trainers.reward.trainer import TEACHER, standardise, train_reward

MakeState: TypeAlias = Callable[[RewardConfig], TrainState]
NAMES = get_args(RewardLossConfig.model_fields["name"].annotation)
AGGREGATES = get_args(RewardEnsembleConfig.model_fields["aggregate"].annotation)


def accuracy(model: RewardModel | RewardEnsemble, groups: Sequence[PreferenceGroup]) -> float:
    batch, chosen_N, rejected_N = collate_groups(groups, PAD)
    with torch.no_grad():
        scores_B = model(batch)
    return (scores_B[chosen_N] > scores_B[rejected_N]).float().mean().item()


LEARNING: dict[str, dict[str, Any]] = {
    **{name: {"loss": {"name": name}} for name in NAMES if name != "plackett_luce"},
    "plackett_luce": {"loss": {"name": "plackett_luce", "average": "prompt"}},
    "by prompt": {"loss": {"average": "prompt"}},
    "llama margin": {"loss": {"name": "margin", "margin": 0.5, "margin_from": "strength"}},
    "agreement": {"loss": {"weights": "agreement"}},
    "strength": {"loss": {"weights": "strength"}},
    "difficulty": {"loss": {"weights": "difficulty"}},
    "centred pairs": {"loss": {"center": "pairs"}, "centering": 0.01},
    "easy first": {"order": "easy_first"},
    "contrastive": {"auxiliary": {"contrastive_coef": 0.1}},
    "joint": {"auxiliary": {"sft_coef": 0.1}, "head": "mean"},
}


@pytest.mark.parametrize("name", LEARNING)
def test_it_learns_with_every_setting(make_reward_state: MakeState, name: str) -> None:
    cfg = settings(**LEARNING[name])
    state = train(cfg, make_reward_state(cfg), toy_groups(120, seed=1))
    assert accuracy(state.modules["reward"], toy_groups(60, seed=2)) > 0.9
    assert state.history[-1]["loss/train"] < state.history[0]["loss/train"]


@pytest.mark.parametrize("ties", ["half", "rao_kupper"])
def test_ties_draw_scores_together(make_reward_state: MakeState, ties: str) -> None:
    """FAIR is as good as BAD where pairs say so, and better where they say that."""
    cfg = settings(loss={"ties": ties})
    gaps = []
    for tied in (True, False):
        state = train(cfg, make_reward_state(cfg), toy_groups(120, seed=1, tied=tied))
        batch, chosen_N, rejected_N = collate_groups(toy_groups(40, seed=2), PAD)
        with torch.no_grad():
            margins = (state.modules["reward"](batch)[chosen_N] - state.modules["reward"](batch)[rejected_N]).view(
                -1, 3
            )
        gaps.append(margins.mean(0))
    assert gaps[0][2].abs() < 0.3 * gaps[0][0]
    assert gaps[1][2] > 2 * gaps[0][2].abs()


def test_criteria_learn_orders_of_their_own(make_reward_state: MakeState) -> None:
    cfg = settings(criteria={"overall": 1.0, "contrary": 0.25})
    state = train(cfg, make_reward_state(cfg), toy_groups(120, seed=1, criteria=("overall", "contrary")))
    model, heldout = state.modules["reward"], toy_groups(60, seed=2)
    batch, chosen_N, rejected_N = collate_groups(heldout, PAD)
    with torch.no_grad():
        scores_BC = model.read(batch).scores_BC
        right = (scores_BC[chosen_N] > scores_BC[rejected_N]).float().mean(0)
        torch.testing.assert_close(model(batch), scores_BC @ torch.tensor([1.0, 0.25]))
    assert right[0] > 0.9
    assert right[1] < 0.1
    assert accuracy(model, heldout) > 0.9


def test_joint_training_keeps_the_language_model(make_reward_state: MakeState) -> None:
    """Chosen responses end likelier under the body than they began, and likelier than without the term."""
    groups, found = toy_groups(60, seed=1), []
    batch, chosen_N, _ = collate_groups(groups, PAD)
    for coefficient in (1.0, 0.0):
        cfg = settings(auxiliary={"sft_coef": coefficient, "contrastive_coef": 0.01})
        state = make_reward_state(cfg)
        train(cfg, state, groups)
        with torch.no_grad():
            found.append(state.modules["reward"].read(batch, ["logprobs"]).logprobs_B[chosen_N].mean().item())
        if coefficient:
            history = [row["loss/sft"] for row in state.history]
            assert history[-1] < 0.8 * history[0]
    assert found[0] > found[1] + 1.0


def test_the_joint_loss_is_the_negative_log_likelihood_of_a_chosen_token(
    make_reward_state: MakeState, tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    cfg = settings(auxiliary={"sft_coef": 1.0}, prompts_per_step=100)
    groups = toy_groups(5, seed=3)
    state = train(cfg, make_reward_state(cfg), groups)
    batch, chosen_N, _ = collate_groups(groups, PAD)
    with torch.no_grad():
        logprobs_BR = response_logprobs(tiny_policy(), batch)
    expected = -logprobs_BR[chosen_N].sum() / batch.response_mask_BR[chosen_N].sum()
    assert state.history[0]["loss/sft"] == pytest.approx(expected.item(), rel=1e-5)


def test_easy_pairs_come_first_in_the_first_pass_only() -> None:
    groups = toy_groups(20, seed=1)
    for place, group in enumerate(groups):
        group.labels[:] = [PairLabel(margin=float(place % 7))] * 3
    cfg = settings(order="easy_first", prompts_per_step=6)
    phase = phases(cfg, len(groups), seed=0)[0]
    first = epoch_batches(cfg, groups, phase, 0, 0)
    assert [len(batch) for batch in first] == [6, 6, 6, 2]
    order = [place % 7 for batch in first for place in batch]
    assert order == sorted(order, reverse=True)
    assert first == epoch_batches(cfg, groups, phase, 0, 0) != epoch_batches(cfg, groups, phase, 1, 0)
    second = epoch_batches(cfg, groups, phase, 0, 1)
    assert sorted(itertools.chain(*second)) == list(range(20))
    assert second == epoch_batches(settings(prompts_per_step=6), groups, phase, 0, 1)


def test_members_draw_prompts_with_replacement_and_train_in_turn() -> None:
    cfg = settings(ensemble={"members": 3, "distill": "scores"})
    plan = phases(cfg, 50, seed=0)
    assert [phase.name for phase in plan] == ["member-0", "member-1", "member-2", "reward"]
    assert [(phase.start, phase.end) for phase in plan] == [(0, 14), (14, 28), (28, 42), (42, 56)]
    drawn = [phase.drawn for phase in plan]
    assert drawn[3] == tuple(range(50))
    assert all(len(one) == 50 and 0.5 < len(set(one)) / 50 < 0.8 for one in drawn[:3]), "1 - 1/e of the prompts"
    assert len(set(drawn)) == 4
    every = phases(settings(ensemble={"members": 2, "resample": "none"}), 50, seed=0)
    assert [phase.drawn for phase in every] == [tuple(range(50))] * 2
    assert len({phase.address for phase in every}) == 2


def test_members_start_from_heads_of_their_own_on_one_body(
    make_reward_state: MakeState,
) -> None:
    state = make_reward_state(settings(ensemble={"members": 3, "distill": "scores"}))
    models = list(state.modules.values())
    assert len({tuple(model.head.scalar.weight.flatten().tolist()) for model in models}) == 4
    for model in models[1:]:
        for one, other in zip(model.body.parameters(), models[0].body.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one is not other


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_ensemble_learns_and_knows_itself(make_reward_state: MakeState, aggregate: str) -> None:
    cfg = settings(ensemble={"members": 3, "aggregate": aggregate}, epochs=1)
    groups = toy_groups(60, seed=1)
    trained = train_reward(cfg, make_reward_state(cfg), groups, RunContext(seed=0, pad_id=PAD))
    assert trained.aggregation is not None
    ensemble = ensemble_of(cfg, trained.state.modules, trained.aggregation)
    assert all(share is not None and share > 0.7 for share in trained.aggregation.left_out)
    batch, _, _ = collate_groups(groups, PAD)
    with torch.no_grad():
        standardise(ensemble, ensemble(batch).tolist())
    assert accuracy(ensemble, toy_groups(60, seed=2)) > 0.85
    with torch.no_grad():
        members_MB = ensemble.member_scores(batch)
    assert not torch.equal(members_MB[0], members_MB[1])
    if aggregate == "accuracy":
        assert ensemble.weights_M.sum().item() == pytest.approx(1.0)
        assert len(set(ensemble.weights_M.tolist())) > 1
    if aggregate == "vote":
        assert ensemble.reference_MQ[:, 0].tolist() == members_MB.min(1).values.tolist()
        assert ensemble.reference_MQ[:, -1].tolist() == members_MB.max(1).values.tolist()


def test_one_uncertain_model_may_be_pessimistic(make_reward_state: MakeState) -> None:
    cfg = settings(loss={"name": "thurstone"}, ensemble={"aggregate": "pessimistic", "pessimism": 0.5})
    groups = toy_groups(60, seed=1)
    state = train(cfg, make_reward_state(cfg), groups)
    batch, _, _ = collate_groups(groups, PAD)
    with torch.no_grad():
        reading, scores_B = state.modules["reward"].read(batch), state.modules["reward"](batch)
    expected = reading.scores_BC[:, 0] - 0.5 * (0.5 * reading.log_variances_BC[:, 0]).exp()
    torch.testing.assert_close(scores_B, expected)


@pytest.mark.parametrize("distill", ["scores", "preferences"])
def test_a_student_says_what_its_teachers_say(make_reward_state: MakeState, distill: str) -> None:
    cfg = settings(ensemble={"members": 2, "distill": distill})
    groups = toy_groups(80, seed=1)
    state = train(cfg, make_reward_state(cfg), groups)
    heldout = toy_groups(40, seed=2)
    batch, chosen_N, rejected_N = collate_groups(heldout, PAD)
    with torch.no_grad():
        student_B, teacher_B = state.modules["reward"](batch), ensemble_of(cfg, state.modules)(batch)
    deltas = [scores_B[chosen_N] - scores_B[rejected_N] for scores_B in (student_B, teacher_B)]
    assert torch.corrcoef(torch.stack(deltas))[0, 1] > 0.8
    assert accuracy(state.modules["reward"], heldout) > 0.9
    rows = [row for row in state.history if row["optim/model"] == 2]
    assert len(rows) == 20
    rates = [
        [row["optim/learning_rate"] for row in state.history if row["optim/model"] == number] for number in range(3)
    ]
    assert rates[0] == rates[1] == rates[2], "each model has a schedule of its own"
    assert rows[-1]["loss/distillation"] < 0.5 * rows[0]["loss/distillation"] or distill == "preferences"
    assert not any(state.optimizers[f"member-{number}"].state for number in range(2)), "moments are let go"


def test_what_a_student_learns_by_hand(make_reward_state: MakeState) -> None:
    """Squared distance to scores; cross-entropy with sigmoid(delta / sqrt(1 + pi var / 8)), var over members."""
    model = make_reward_state(settings(head="mean")).modules["reward"]
    group = PreferenceGroup(prompt=[7], responses=[[8, EOS], [9, EOS]], pairs=[(0, 1)])
    teacher_MB = torch.tensor(
        [[2.0, 0.5], [3.0, 0.0], [1.0, 1.0]]
    )  # differences 1.5 of 3 and 0, whose variance over two members is (1.5² + 1.5²) / (2 - 1)
    with torch.no_grad():
        one, other = model(collate_groups([group], PAD)[0]).tolist()
    found = {}
    for distill in ("scores", "preferences"):
        cfg = settings(ensemble={"members": 2, "distill": distill}, centering=0.5)
        figures = distilled_step(cfg, model, [group], teacher_MB, RunContext(seed=0, pad_id=PAD))
        found[distill] = figures["loss/train"]
    assert found["scores"] == pytest.approx(((one - 2.0) ** 2 + (other - 0.5) ** 2) / 2, rel=1e-5)
    sure = 1 / (1 + math.exp(-1.5 / math.sqrt(1 + math.pi * 4.5 / 8)))
    delta = one - other
    entropy = sure * math.log1p(math.exp(-delta)) + (1 - sure) * math.log1p(math.exp(delta))
    assert found["preferences"] == pytest.approx(entropy + 0.5 * (one**2 + other**2) / 2, rel=1e-5)
    gap = abs((one - other) / 2 - 0.75)
    assert figures["reward/teacher_gap"] == pytest.approx(gap, rel=1e-4)


RESUMED: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
    "ensemble": ({"ensemble": {"members": 2}}, (4, 8, 11)),
    "distilled": (
        {"ensemble": {"members": 2, "distill": "preferences", "aggregate": "vote"}, "loss": {"name": "thurstone"}},
        (8, 13, 17, 19),
    ),
    "joint": (
        {"head": "attention", "order": "easy_first", "auxiliary": {"sft_coef": 0.1, "contrastive_coef": 0.1}},
        (4, 7),
    ),
}


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, (_, steps) in RESUMED.items() for step in steps])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    make_reward_state: MakeState,
    harness: Callable[..., Any],
    same_state: Callable[..., None],
    name: str,
    step: int,
) -> None:
    """Eight steps a model: breaks lie within the first, at the seams, and in the student's own part."""
    cfg = settings(**RESUMED[name][0])
    groups, trained = toy_groups(32, seed=4), []

    def run(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        edges = RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint)
        trained.append(train_reward(cfg, state, groups, edges))
        return trained[-1].state

    runs = harness(lambda: make_reward_state(cfg), run)
    resumed, unbroken = runs.resumed_after(step), runs.unbroken()
    same_state(resumed, unbroken)
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    if TEACHER in unbroken.tensors:
        assert torch.equal(resumed.tensors[TEACHER], unbroken.tensors[TEACHER])
    one, other = (found.aggregation for found in trained)
    assert (one is None) == (other is None) == (name == "joint")
    if one is not None:
        assert one.left_out == other.left_out
        assert one.reference_MQ is None or torch.equal(one.reference_MQ, other.reference_MQ)


@pytest.mark.parametrize("distill", ["none", "scores"])
def test_how_members_become_one_score_is_fitted_once_and_stays_with_the_members(
    make_reward_state: MakeState, monkeypatch: pytest.MonkeyPatch, distill: str
) -> None:
    """Before the student learns or after the last member has; the student changes nothing of it."""
    cfg = settings(ensemble={"members": 2, "aggregate": "vote", "distill": distill}, epochs=1)
    groups, state, steps = toy_groups(20, seed=4), make_reward_state(cfg), []

    def counted(*given: Any) -> Aggregation:
        steps.append(state.step)
        return fit_aggregation(*given)

    monkeypatch.setattr("rlhf_core.trainers.reward.trainer.fit_aggregation", counted)
    found = train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD)).aggregation
    plan = phases(cfg, len(groups), 0)
    assert steps == [plan[1].end]
    again = fit_aggregation(ensemble_of(cfg, state.modules), groups, plan, ["overall"], PAD)
    assert found is not None
    assert found.left_out == again.left_out
    assert torch.equal(found.reference_MQ, again.reference_MQ)
    assert ensemble_of(cfg, state.modules, found).reference_MQ is found.reference_MQ


def test_n24_scores_of_training_responses_have_mean_0(make_reward_state: MakeState) -> None:
    """The responses of the pairs are samples of the SFT policy: their mean stands for that of demonstrations."""
    cfg = settings(ensemble={"members": 2, "aggregate": "pessimistic"}, epochs=1)
    groups = toy_groups(40, seed=1)
    state = train(cfg, make_reward_state(cfg), groups)
    ensemble = ensemble_of(cfg, state.modules)
    batch, _, _ = collate_groups(groups, PAD)
    with torch.no_grad():
        standardise(ensemble, ensemble(batch).tolist())
        scores_B = ensemble(batch)
    assert scores_B.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores_B.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
