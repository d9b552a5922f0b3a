"""KL estimators against the exact divergence of two distributions."""

import math

import pytest
import torch

from rlhf_core.objectives.kl import adapt_kl_coef, kl_estimate, kl_k1, kl_k2, kl_k3, kl_to_reference

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
OTHER = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_n05_the_expectation_is_the_exact_divergence(estimator: object) -> None:
    """Each outcome stands once, weighted by its probability: an expectation and not a sample."""
    assert callable(estimator)
    tokens = estimator(POLICY.log()[None], OTHER.log()[None], torch.ones(1, 3, dtype=torch.float64))
    exact = (POLICY * (POLICY / OTHER).log()).sum()
    torch.testing.assert_close((tokens * POLICY).sum(), exact, rtol=0, atol=1e-12)


def test_k3_is_never_negative_and_k1_may_be() -> None:
    logprobs, others = POLICY.log()[None], OTHER.log()[None]
    mask = torch.ones(1, 3, dtype=torch.float64)
    assert kl_k3(logprobs, others, mask).min().item() >= 0.0
    assert kl_k1(logprobs, others, mask).min().item() < 0.0


def test_k3_keeps_its_digits_near_zero() -> None:
    """x^2 / 2 in float32 at x = 1e-4, where 1 - 1 would leave noise."""
    difference = torch.tensor([[1e-4]])
    assert kl_k3(difference, torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(5e-9, rel=0.05)


def test_n05_k3_is_unbiased_where_the_policies_are_far_apart_and_a_cap_takes_that_away() -> None:
    """KL((.99, .01) || (.5, .5)) = .637 nats, carried by a token of 1 in 100 whose k3 is 45; held to 10 it is .286."""
    policy, other = torch.tensor([0.99, 0.01], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = (policy * (policy / other).log()).sum().item()
    logs = policy.log()[None], other.log()[None], torch.ones(1, 2, dtype=torch.float64)
    assert exact == pytest.approx(0.637, abs=5e-4)
    assert (kl_k3(*logs) * policy).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (kl_estimate("k3", *logs) * policy).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (kl_k3(*logs, cap=10.0) * policy).sum().item() == pytest.approx(0.286, abs=5e-4)
    assert kl_estimate("k3", *logs, k3_cap=10.0).max().item() == 10.0


def test_n06_k3_of_an_enormous_log_ratio_is_finite() -> None:
    assert kl_k3(torch.tensor([[-1e4]]), torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(4.85165e8)


def test_n08_kl_to_reference_is_the_sum_of_each_response() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, 77.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -2.5, 0.0], [-1.0, -1.0, -4.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert kl_to_reference(logprobs, reference, mask).tolist() == [1.0, 3.0]


def test_n05_k2_is_half_the_squared_log_ratio_and_biased() -> None:
    tokens = kl_k2(POLICY.log()[None], OTHER.log()[None], torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(tokens[0], 0.5 * (POLICY / OTHER).log().square(), rtol=0, atol=1e-15)
    exact = (POLICY * (POLICY / OTHER).log()).sum()
    assert (tokens * POLICY).sum().item() != pytest.approx(exact.item(), rel=0.01)


def test_n05_only_k2_as_a_loss_has_the_gradient_of_the_divergence() -> None:
    """Samples come from the policy and carry no gradient: expectation over outcomes of d estimate / d logits."""

    def gradient(estimator: str) -> torch.Tensor:
        logits = POLICY.log().clone().requires_grad_()
        logprobs = torch.log_softmax(logits, 0)
        ones = torch.ones(1, 3, dtype=torch.float64)
        tokens = kl_estimate(estimator, logprobs[None], OTHER.log()[None], ones)
        (tokens[0] * POLICY).sum().backward()
        return logits.grad

    logits = POLICY.log().clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    (logprobs.exp() * (logprobs - OTHER.log())).sum().backward()
    torch.testing.assert_close(gradient("k2"), logits.grad, rtol=0, atol=1e-12)
    assert gradient("k1").abs().max().item() < 1e-12
    # k3's is that of KL(other || policy), policy - other
    torch.testing.assert_close(gradient("k3"), POLICY - OTHER, rtol=0, atol=1e-12)
    assert (gradient("k3") - logits.grad).abs().max().item() > 0.01


def test_the_estimator_is_chosen_by_name() -> None:
    first, second, mask = torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.ones(1, 1)
    for name, function in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        assert kl_estimate(name, first, second, mask).item() == function(first, second, mask).item() != 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_n07_padding_pays_nothing(estimator: str) -> None:
    mask = torch.tensor([[1.0, 0.0]])
    tokens = kl_estimate(estimator, torch.tensor([[-1.0, 5.0]]), torch.tensor([[-2.0, -9.0]]), mask)
    assert tokens[0, 0].item() > 0.0
    assert tokens[0, 1].item() == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.05), (6.6, 0.05 * 1.0064), (60.0, 0.05 * 1.0128), (0.0, 0.05 * 0.9872), (5.4, 0.05 * 0.9936)],
)
def test_n31_adaptive_coefficient_worked_by_hand(kl: float, expected: float) -> None:
    """Target 6 nats, 640 responses, horizon 10,000: an error of 10 % moves it by .0064, more than 20 % by .0128."""
    assert adapt_kl_coef(0.05, kl, 6.0, 640, 10_000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_responses", [500, 1000, 100_000])
def test_n31_adaptive_coefficient_finds_back_from_a_rollout_of_many_horizons(num_responses: int) -> None:
    """The published factor is 0 at five horizons and below 0 beyond: either would switch the penalty off for good."""
    low = adapt_kl_coef(0.05, 0.0, 6.0, num_responses, 100)
    assert low == pytest.approx(0.005)
    assert adapt_kl_coef(low, 60.0, 6.0, num_responses, 100) > low


def test_n31_adaptive_coefficient_keeps_what_it_is_where_the_divergence_is_no_number() -> None:
    assert adapt_kl_coef(0.05, math.nan, 6.0, 640, 10_000) == 0.05
    assert adapt_kl_coef(0.05, math.inf, 6.0, 640, 10_000) == pytest.approx(0.05 * 1.0128)


@pytest.mark.parametrize("kl", [0.0, 1e9])
def test_n31_adaptive_coefficient_comes_back_after_a_thousand_rollouts_in_one_direction(kl: float) -> None:
    coefficient = 0.05
    for _ in range(2000):
        coefficient = adapt_kl_coef(coefficient, kl, 6.0, 1000, 100)
    assert 0.0 < coefficient < math.inf
    back = adapt_kl_coef(coefficient, 12.0 if kl == 0.0 else 0.0, 6.0, 1000, 100)
    assert back > coefficient if kl == 0.0 else back < coefficient
