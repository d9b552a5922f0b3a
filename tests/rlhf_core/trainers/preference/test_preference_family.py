"""Every loss of the preference trainer: numbers, learning, resume, weights, forward passes, processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.preference import BAD, EOS, GOOD, PAD, in_processes, toy_groups
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.config.preference import PreferenceOptions
from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup, group_batches
from rlhf_core.engine.batches import collate
from rlhf_core.errors import DataError
from rlhf_core.objectives.preference import PAIR_LOSSES
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.loss import FIGURES, pair_loss, step_totals
from rlhf_core.trainers.preference.reference import reference_logprobs
from rlhf_core.trainers.preference.trainer import mismatch, train_dpo

RUN = RunContext(seed=0, pad_id=PAD)

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"beta": 0.5},
    "ipo_sum": {},
    "conservative": {"options": {"label_smoothing": 0.2}},
    "robust": {"options": {"label_smoothing": 0.2}},
    "hinge": {},
    "kto": {"options": {"desirable_weight": 1.2}},
    "orpo": {"nll_coef": 1.0},
    "simpo": {"beta": 2.0},
}
ZERO = torch.zeros(())


def config(loss: str, **more: Any) -> DPOConfig:
    return DPOConfig.model_validate({"loss": loss, **LOSSES[loss], **more})


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[], TrainState]:
    def make() -> TrainState:
        policy = tiny_policy()
        return TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})

    return make


@pytest.fixture
def moved(tiny_policy: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A policy that is no longer its reference."""
    policy = tiny_policy()
    torch.nn.init.normal_(policy.get_input_embeddings().weight, std=0.1, generator=torch.Generator().manual_seed(7))
    return policy


def train(
    cfg: DPOConfig,
    state: TrainState,
    reference: PreTrainedModel | None,
    groups: list[PreferenceGroup],
    log: Any = lambda *_: None,
    checkpoint: Any = lambda _: None,
    world: World = ALONE,
) -> TrainState:
    return train_dpo(
        cfg, state, reference, groups, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint, world=world)
    )


def logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        return response_logprobs(model, collate([prompt], [response], PAD))[0].double()


def figures_of(
    cfg: DPOConfig, policy: PreTrainedModel, reference: PreTrainedModel, groups: list[PreferenceGroup], baseline: Tensor
) -> dict[str, float]:
    reference_B = reference_logprobs(reference, groups, [range(len(groups))], RUN)
    _, figures_K = pair_loss(cfg, policy, groups, reference_B, step_totals(cfg, groups, baseline), PAD)
    return dict(zip(FIGURES, figures_K.tolist(), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_to_prefer(
    loss: str, make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """The likelihood of the token that tells a good end from a bad one is turned over, on prompts never seen."""
    cfg = config(loss, prompts_per_step=16, learning_rate=3e-3, epochs=3, warmup_steps=3)
    state, reference = make_state(), tiny_policy()
    train(cfg, state, reference if PAIR_LOSSES[cfg.loss].needs_reference else None, toy_groups(160))
    gains = []
    for group in toy_groups(40, seed=9):
        good, bad = ([*group.responses[0][:-2], end, EOS] for end in (GOOD, BAD))
        before, after = (
            (logprobs(model, group.prompt, good) - logprobs(model, group.prompt, bad)).sum()
            for model in (reference, state.modules["policy"])
        )
        gains.append((after - before).item())
    assert sum(gain > 0.5 for gain in gains) >= 36


@pytest.mark.parametrize("loss", LOSSES)
def test_n41_broken_off_and_resumed_it_ends_with_the_same_bits(
    loss: str,
    make_state: Callable[[], TrainState],
    tiny_policy: Callable[[], PreTrainedModel],
    harness: Callable[..., Any],
    same_state: Callable[..., None],
) -> None:
    cfg = config(loss, prompts_per_step=8, prompts_per_forward=5, epochs=2, warmup_steps=2, save_every=3)
    groups, reference = toy_groups(20, labels=LABELS), tiny_policy()
    runs = harness(make_state, lambda state, log, checkpoint: train(cfg, state, reference, groups, log, checkpoint))
    same_state(runs.resumed_after(5), runs.unbroken())


def pairs_by_hand(
    policy: PreTrainedModel, reference: PreTrainedModel, groups: list[PreferenceGroup]
) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Token log-probabilities of each pair: ((policy, reference) of the chosen, the same of the rejected)."""
    models = (policy, reference)
    return [
        tuple(tuple(logprobs(model, group.prompt, group.responses[place]) for model in models) for place in pair)
        for group in groups
        for pair in group.pairs
    ]


def expected(cfg: DPOConfig, pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], baseline: float) -> float:
    """A pair's loss written out in Python's own arithmetic, from the papers."""
    (chosen, chosen_ref), (rejected, rejected_ref) = pair
    ratios = [(chosen - chosen_ref).sum().item(), (rejected - rejected_ref).sum().item()]
    means = [(chosen - chosen_ref).mean().item(), (rejected - rejected_ref).mean().item()]
    policy_means = [chosen.mean().item(), rejected.mean().item()]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    margin, eps = cfg.beta * (ratios[0] - ratios[1]), 0.2
    match cfg.loss:
        case "sigmoid":
            return -math.log(sigmoid(margin))
        case "ipo":
            return (means[0] - means[1] - 1 / (2 * cfg.beta)) ** 2
        case "ipo_sum":
            return (ratios[0] - ratios[1] - 1 / (2 * cfg.beta)) ** 2
        case "conservative":
            return -(1 - eps) * math.log(sigmoid(margin)) - eps * math.log(sigmoid(-margin))
        case "robust":
            return (-(1 - eps) * math.log(sigmoid(margin)) + eps * math.log(sigmoid(-margin))) / (1 - 2 * eps)
        case "hinge":
            return max(0.0, 1 - margin)
        case "kto":
            liked = 1.2 * (1 - sigmoid(cfg.beta * (ratios[0] - baseline)))
            return (liked + (1 - sigmoid(cfg.beta * (baseline - ratios[1])))) / 2
        case "orpo":
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in policy_means]
            return -cfg.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
        case "simpo":
            return -math.log(sigmoid(cfg.beta * (policy_means[0] - policy_means[1]) - 0.5 * cfg.beta))


LABELS = (
    PairLabel(agreement=1.0, margin=2.0),
    PairLabel(agreement=0.6, margin=0.5),
    PairLabel(agreement=0.8, margin=1),
)


@pytest.mark.parametrize("loss", LOSSES)
def test_n33_each_loss_reads_sums_or_means_of_response_tokens_as_its_paper_says(
    loss: str, moved: PreTrainedModel, tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    cfg, groups = config(loss), toy_groups(3)
    baseline = torch.tensor(0.3)
    values = [expected(cfg, pair, 0.3) for pair in pairs_by_hand(moved, tiny_policy(), groups)]
    figures = figures_of(cfg, moved, tiny_policy(), groups, baseline)
    assert figures["loss/preference"] == pytest.approx(sum(values) / 12, rel=2e-5)


def test_n36_label_smoothing_reaches_the_two_losses_that_read_it(
    moved: PreTrainedModel, tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    groups = toy_groups(3)

    def loss(name: str, smoothing: float) -> float:
        cfg = DPOConfig(loss=name, options=PreferenceOptions(label_smoothing=smoothing))
        return figures_of(cfg, moved, tiny_policy(), groups, ZERO)["loss/preference"]

    right = figures_of(DPOConfig(), moved, tiny_policy(), groups, ZERO)["loss/preference"]
    turned = [
        PreferenceGroup(prompt=g.prompt, responses=g.responses, pairs=[(two, one) for one, two in g.pairs])
        for g in groups
    ]
    wrong = figures_of(DPOConfig(), moved, tiny_policy(), turned, ZERO)["loss/preference"]
    for eps in (0.1, 0.3):
        assert loss("conservative", eps) == pytest.approx((1 - eps) * right + eps * wrong, rel=1e-5)
        assert loss("robust", eps) == pytest.approx(((1 - eps) * right - eps * wrong) / (1 - 2 * eps), rel=1e-5)


@pytest.mark.parametrize(("choice", "weights"), [("agreement", (1.0, 0.6, 0.8)), ("strength", (2.0, 0.5, 1.0))])
def test_a_pair_counts_by_what_people_said_of_it(
    choice: str, weights: tuple[float, ...], moved: PreTrainedModel, tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """Weighted means with the step's own total below, the likelihood term too; figures stay plain means."""
    groups = toy_groups(3, labels=LABELS)
    cfg = DPOConfig(beta=0.5, nll_coef=0.7, pair_weights=choice)
    pairs = pairs_by_hand(moved, tiny_policy(), groups)
    each = [weights[number % 3] for number in range(12)]
    dpo = sum(w * expected(cfg, pair, 0.0) for w, pair in zip(each, pairs, strict=True)) / sum(each)
    chosen = [pair[0][0] for pair in pairs]
    nll = -sum(w * one.sum().item() for w, one in zip(each, chosen, strict=True))
    nll /= sum(w * len(one) for w, one in zip(each, chosen, strict=True))
    figures = figures_of(cfg, moved, tiny_policy(), groups, ZERO)
    assert figures["loss/preference"] == pytest.approx(dpo, rel=2e-5)
    assert figures["loss/chosen_nll"] == pytest.approx(nll, rel=2e-5)
    assert figures["loss/train"] == pytest.approx(dpo + 0.7 * nll, rel=2e-5)
    margins = [(p[0][0] - p[0][1]).sum().item() - (p[1][0] - p[1][1]).sum().item() for p in pairs]
    assert figures["implicit_reward/margin"] == pytest.approx(0.5 * sum(margins) / 12, rel=1e-4)


def test_a_step_in_which_nothing_counts_is_refused() -> None:
    groups = toy_groups(2, labels=(PairLabel(margin=0.0),))
    with pytest.raises(DataError, match=r"all pairs of a step weigh 0\. Fix: "):
        step_totals(DPOConfig(pair_weights="strength"), groups, torch.zeros(()))


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_a_reference_free_loss_asks_no_reference(loss: str, make_state: Callable[[], TrainState]) -> None:
    state = train(config(loss, prompts_per_step=8), make_state(), None, toy_groups(8))
    assert not state.tensors
    with pytest.raises(ValueError, match="'sigmoid' needs a reference"):
        train(config("sigmoid"), make_state(), None, toy_groups(8))


def test_kto_starts_at_half_of_its_weights(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel], sink: Any
) -> None:
    cfg = config("kto", prompts_per_step=4, learning_rate=1e-9, warmup_steps=0)
    train(cfg, make_state(), tiny_policy(), toy_groups(4), sink)
    first = sink.rows[0][2]
    assert first["policy/kl_baseline"] == 0.0
    assert first["loss/preference"] == pytest.approx((1.2 + 1.0) / 4, abs=1e-7)


def test_ktos_baseline_is_measured_on_responses_to_other_prompts(
    tiny_policy: Callable[[], PreTrainedModel], moved: PreTrainedModel, sink: Any
) -> None:
    groups, cfg = toy_groups(6), config("kto", prompts_per_step=6, warmup_steps=0)
    others = mismatch(groups, group_batches(groups, 6, StepRng(0, "dpo")("groups")))
    ratios = [
        (logprobs(moved, other.prompt, one) - logprobs(tiny_policy(), other.prompt, one)).sum().item()
        for other in others
        for one in other.responses
    ]
    mean = sum(ratios) / len(ratios)
    for policy, reference in ((moved, tiny_policy()), (tiny_policy(), moved)):
        state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-9)})
        train(cfg, state, reference, groups, sink)
    both = [row[2]["policy/kl_baseline"] for row in sink.rows]
    assert sorted(both) == [0.0, pytest.approx(abs(mean), rel=1e-4)]
    assert abs(mean) > 0.1


def test_ktos_mismatch_gives_every_prompt_the_responses_to_the_next() -> None:
    groups = toy_groups(4)
    others = mismatch(groups, [[2, 0], [3, 1]])
    assert [others[i].responses for i in (2, 0, 3, 1)] == [groups[i].responses for i in (0, 3, 1, 2)]
    assert [other.prompt for other in others] == [group.prompt for group in groups]
    with pytest.raises(DataError, match="one prompt only"):
        mismatch(groups[:1], [[0]])


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "orpo"])
def test_n25_forward_passes_of_any_size_take_the_same_step(
    loss: str, make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """12 prompts in passes of 12, of 5 and 5 and 2, and of 1: weights within float32 noise of each other."""
    groups = toy_groups(24, labels=LABELS)
    ends = []
    for size in (None, 5, 1):
        cfg = config(
            loss, prompts_per_step=12, prompts_per_forward=size, pair_weights="strength", epochs=2, nll_coef=0.3
        )
        ends.append(train(cfg, make_state(), tiny_policy(), groups))
    for other in ends[1:]:
        assert_close(ends[0], other)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_n25_two_processes_take_the_step_of_one(
    loss: str, make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """An uneven share too: 9 prompts, the last step has one and leaves a process without any."""
    groups = toy_groups(9, labels=LABELS)
    cfg = config(loss, prompts_per_step=4, pair_weights="agreement", epochs=2, nll_coef=0.3)
    alone = train(cfg, make_state(), tiny_policy(), groups)
    both = in_processes(2, lambda world: train(cfg, make_state(), tiny_policy(), groups, world=world))
    assert both[0].history == both[1].history
    assert both[0].extra == both[1].extra == alone.extra
    for state in both:
        assert_close(alone, state)


def test_n32_two_processes_start_at_exactly_ln_2(
    make_state: Callable[[], TrainState], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """Each process asks the reference about the very rows that it trains on."""
    cfg = DPOConfig(prompts_per_step=8, prompts_per_forward=3, learning_rate=1e-9, warmup_steps=0)
    both = in_processes(2, lambda world: train(cfg, make_state(), tiny_policy(), toy_groups(16), world=world))
    assert [state.history[0]["implicit_reward/margin"] for state in both] == [0.0, 0.0]
    assert both[0].history[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-7)


def assert_close(one: TrainState, two: TrainState) -> None:
    for row, other in zip(one.history, two.history, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=2e-5)
    pairs = zip(one.modules["policy"].parameters(), two.modules["policy"].parameters(), strict=True)
    # Adam divides by a root of a mean square: where a gradient is near 0, float32 noise in it is a part of a step
    assert max((a - b).abs().max().item() for a, b in pairs) < 2e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"label_smoothing": 0.1}}, "label_smoothing is read by loss conservative and robust only"),
        ({"loss": "robust", "options": {"simpo_margin": 1.0}}, "simpo_margin is read by loss simpo only"),
        ({"loss": "simpo", "options": {"desirable_weight": 1.0}}, "desirable_weight is read by loss kto only"),
        ({"loss": "orpo"}, "set nll_coef, 1.0 in the paper"),
        ({"loss": "robust", "options": {"label_smoothing": 0.5}}, "less than 0.5"),
        ({"loss": "dpo"}, "'sigmoid'"),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DPOConfig.model_validate(given)
