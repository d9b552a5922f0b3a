"""KL estimators against the exact divergence of two distributions."""

import pytest
import torch

from rlhf_core.objectives.kl import MAX_K3, kl_k1, kl_k3, kl_to_reference

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
OTHER = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_the_expectation_is_the_exact_divergence(estimator: object) -> None:
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


def test_k3_is_bounded() -> None:
    assert kl_k3(torch.tensor([[-1e4]]), torch.zeros(1, 1), torch.ones(1, 1)).item() == MAX_K3


def test_kl_to_reference_is_the_sum_of_each_response() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, 77.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -2.5, 0.0], [-1.0, -1.0, -4.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert kl_to_reference(logprobs, reference, mask).tolist() == [1.0, 3.0]
