"""The preference family, pair by pair: closed forms, extremes, directions, and what each variant is for."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.preference import (
    PAIR_LOSSES,
    PairLogprobs,
    PairOptions,
    nll_losses,
    pair_losses,
)

KINDS = tuple(PAIR_LOSSES)
OPTIONS = {
    "conservative": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"target_margin": 0.5},
    "kto": {"desirable_weight": 1.5},
}
LN_2 = math.log(2.0)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: float = 0.0,
    reference_rejected: float = 0.0,
    tokens: tuple[float, float] = (1.0, 1.0),
) -> PairLogprobs:
    return PairLogprobs(
        policy_chosen_N=chosen,
        policy_rejected_N=rejected,
        reference_chosen_N=torch.full_like(chosen, reference_chosen),
        reference_rejected_N=torch.full_like(rejected, reference_rejected),
        chosen_tokens_N=torch.full_like(chosen, tokens[0]),
        rejected_tokens_N=torch.full_like(rejected, tokens[1]),
    )


def one(kind: str, chosen: float, rejected: float, beta: float = 0.5, **more: float) -> float:
    names = {name for row in OPTIONS.values() for name in row}
    options = PairOptions(beta=beta, **{name: more.pop(name) for name in names if name in more})
    lengths = (more.pop("chosen_tokens", 1.0), more.pop("rejected_tokens", 1.0))
    losses, _ = pair_losses(kind, pairs(vector(chosen), vector(rejected), **more, tokens=lengths), options)
    return losses.item()


def test_n32_policy_equal_to_its_reference_pays_exactly_ln_2() -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = -100 * torch.rand(2, 64, generator=generator)
    same = PairLogprobs(
        policy_chosen_N=chosen,
        policy_rejected_N=rejected,
        reference_chosen_N=chosen,
        reference_rejected_N=rejected,
        chosen_tokens_N=torch.ones(64),
        rejected_tokens_N=torch.ones(64),
    )
    losses, stats = pair_losses("sigmoid", same, PairOptions(beta=0.1))
    assert losses.tolist() == [torch.tensor(LN_2).item()] * 64
    assert stats["implicit_reward/accuracy"].tolist() == [0.5] * 64
    assert stats["implicit_reward/margin"].abs().max().item() == 0.0


def test_sigmoid_worked_by_hand() -> None:
    """beta .5: implicit rewards .5 * (-3 + 5) = 1 and .5 * (-5 + 4) = -.5, margin 1.5."""
    case = pairs(vector(-3.0), vector(-5.0), reference_chosen=-5.0, reference_rejected=-4.0)
    losses, stats = pair_losses("sigmoid", case, PairOptions(beta=0.5))
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    assert {name: value.tolist() for name, value in stats.items()} == {
        "implicit_reward/chosen": [1.0],
        "implicit_reward/rejected": [-0.5],
        "implicit_reward/margin": [1.5],
        "implicit_reward/accuracy": [1.0],
    }


def test_n36_conservative_and_robust_worked_by_hand() -> None:
    """margin 1: l = log(1 + 1/e), l of the flipped label log(1 + e) = l + 1; eps .25."""
    straight = math.log1p(math.exp(-1.0))
    conservative = one("conservative", 2.0, 0.0, label_smoothing=0.25)
    robust = one("robust", 2.0, 0.0, label_smoothing=0.25)
    assert conservative == pytest.approx(0.75 * straight + 0.25 * (straight + 1.0), abs=1e-12)
    assert robust == pytest.approx((0.75 * straight - 0.25 * (straight + 1.0)) / 0.5, abs=1e-12)


def test_robust_loss_undoes_flipped_labels_in_expectation() -> None:
    """(1 - eps) l_robust(x) + eps l_robust(-x) is the plain loss of the true label, whatever x."""
    for margin in (-3.0, 0.2, 5.0):
        right = one("robust", margin, 0.0, beta=1.0, label_smoothing=0.3)
        flipped = one("robust", -margin, 0.0, beta=1.0, label_smoothing=0.3)
        assert 0.7 * right + 0.3 * flipped == pytest.approx(one("sigmoid", margin, 0.0, beta=1.0), abs=1e-12)


def test_conservative_loss_is_lowest_where_the_label_is_believed_that_far() -> None:
    """sigmoid(margin) = .9 at margin ln 9."""
    margin = torch.tensor([math.log(9.0)], dtype=torch.float64, requires_grad=True)
    options = PairOptions(beta=1.0, label_smoothing=0.1)
    pair_losses("conservative", pairs(margin, torch.zeros_like(margin)), options)[0].sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.5, 0.7, -0.1])
def test_labels_that_say_nothing_are_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        one("robust", 1.0, 0.0, label_smoothing=smoothing)


def test_n33_ipo_reads_means_over_tokens_and_ipo_sum_does_not() -> None:
    """log-ratios 6 over 3 tokens and -4 over 2: means 2 and -2, gap 4; sums 10. beta .25 sets the target to 2."""
    lengths = {"chosen_tokens": 3.0, "rejected_tokens": 2.0}
    assert one("ipo", 6.0, -4.0, beta=0.25, **lengths) == pytest.approx((4.0 - 2.0) ** 2)
    assert one("ipo_sum", 6.0, -4.0, beta=0.25, **lengths) == pytest.approx((10.0 - 2.0) ** 2)
    assert one("sigmoid", 6.0, -4.0, beta=0.25, **lengths) == one("sigmoid", 6.0, -4.0, beta=0.25)


def test_n33_orpo_and_simpo_read_means_over_tokens_too() -> None:
    doubled = {"chosen_tokens": 2.0, "rejected_tokens": 2.0}
    assert one("orpo", -2.0, -4.0, **doubled) == one("orpo", -1.0, -2.0)
    assert one("simpo", -2.0, -4.0, **doubled) == one("simpo", -1.0, -2.0)


def test_ipo_pulls_a_pair_back_that_has_gone_past_the_target() -> None:
    chosen = vector(5.0).requires_grad_()
    pair_losses("ipo", pairs(chosen, vector(0.0)), PairOptions(beta=0.25))[0].sum().backward()
    assert chosen.grad.item() == pytest.approx(2 * (5.0 - 2.0))


def test_hinge_asks_nothing_of_a_pair_beyond_its_margin() -> None:
    assert one("hinge", 1.0, 0.0, beta=0.5) == 0.5
    assert one("hinge", 3.0, 0.0, beta=0.5) == 0.0


def test_simpo_worked_by_hand() -> None:
    """beta 2 on means -1 and -2 is 2, less gamma .5."""
    assert one("simpo", -2.0, -6.0, beta=2.0, chosen_tokens=2.0, rejected_tokens=3.0, target_margin=0.5) == (
        pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    )


def test_orpo_worked_by_hand() -> None:
    """Probabilities .8 and .5 a token: odds 4 and 1, log-odds ratio ln 4, sigmoid 4/5; beta is the term's weight."""
    assert one("orpo", math.log(0.8), math.log(0.5), beta=0.1) == pytest.approx(-0.1 * math.log(0.8), abs=1e-15)


@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-3, -0.6931, -0.6932, -80.0])
def test_orpo_is_finite_from_certainty_to_impossibility(chosen: float) -> None:
    for dtype in (torch.float32, torch.float64):
        logprob = torch.tensor([chosen], dtype=dtype, requires_grad=True)
        losses, _ = pair_losses("orpo", pairs(logprob, torch.tensor([-1.0], dtype=dtype)), PairOptions(beta=1.0))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert logprob.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [-3000.0, 3000.0])
def test_n38_extreme_margins_stay_finite(kind: str, margin: float) -> None:
    """log(sigmoid(x)) is -inf from -104 on in float32, and log(1 + exp(x)) is inf from 89 on."""
    chosen = torch.tensor([min(margin, 0.0)], requires_grad=True)
    rejected = torch.tensor([min(-margin, 0.0)], requires_grad=True)
    losses, stats = pair_losses(kind, pairs(chosen, rejected), PairOptions(beta=1.0, **OPTIONS.get(kind, {})))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    assert all(value.isfinite().all() for value in stats.values())
    if kind == "sigmoid":
        assert losses.item() == max(0.0, -margin)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_raises_the_chosen_and_lowers_the_rejected(kind: str) -> None:
    chosen, rejected = vector(-3.0).requires_grad_(), vector(-3.0).requires_grad_()
    case = pairs(chosen, rejected, reference_chosen=-3.0, reference_rejected=-3.0, tokens=(4.0, 4.0))
    pair_losses(kind, case, PairOptions(beta=0.2, **OPTIONS.get(kind, {})))[0].sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_pays_for_itself_alone(kind: str) -> None:
    """One loss a pair: others in the batch change neither its loss nor its gradient, so weights act pair by pair."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (-5 * torch.rand(2, 6, generator=generator, dtype=torch.float64)).unbind()
    together, stats = pair_losses(
        kind, pairs(chosen, rejected, -2.0, -2.5, (3.0, 5.0)), PairOptions(beta=0.3, **OPTIONS.get(kind, {}))
    )
    assert together.shape == (6,)
    assert all(value.shape == (6,) and not value.requires_grad for value in stats.values())
    for i in range(6):
        alone, _ = pair_losses(
            kind,
            pairs(chosen[i : i + 1], rejected[i : i + 1], -2.0, -2.5, (3.0, 5.0)),
            PairOptions(beta=0.3, **OPTIONS.get(kind, {})),
        )
        assert alone.item() == together[i].item()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_reference_free_kinds_ignore_the_reference(kind: str) -> None:
    with_reference = one(kind, -1.0, -2.0, reference_chosen=-1.5, reference_rejected=-1.7, **OPTIONS.get(kind, {}))
    without = one(kind, -1.0, -2.0, **OPTIONS.get(kind, {}))
    assert (with_reference == without) == (not PAIR_LOSSES[kind].needs_reference)


def test_dpo_pulls_harder_with_a_larger_beta() -> None:
    assert one("sigmoid", -2.0, -4.0, beta=1.0) < one("sigmoid", -2.0, -4.0, beta=0.1)


def test_nll_is_one_a_token() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-6.0, 50.0]])
    assert nll_losses(logprobs, torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == [[1.0, 2.0], [6.0, 0.0]]
