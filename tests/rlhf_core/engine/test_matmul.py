"""Sums of outer products and products with a large weight, on both makes of processor, against torch's own."""

import pytest
import torch

from rlhf_core.engine import matmul


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("width", [96, 5000])
def test_sums_of_outer_products_equal_those_of_torch(intel: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large, on both makes of processor, to the rounding of a float32 sum of 130 products."""
    monkeypatch.setattr(matmul, "_is_intel", lambda: intel)
    generator = torch.Generator().manual_seed(0)
    x_NK, grad_NM = (torch.randn(130, size, generator=generator) for size in (80, width))
    total = None
    for part in (slice(0, 64), slice(64, 130)):
        total = matmul.add_outer(total, grad_NM[part], x_NK[part], torch.float32)
    torch.testing.assert_close(total, grad_NM.t() @ x_NK, atol=1e-4, rtol=0)


def test_gradients_through_a_weight_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    grad_NM, weight_MK = (torch.randn(*shape, generator=generator) for shape in ((100, 300), (300, 70)))
    for intel in (True, False):
        monkeypatch.setattr(matmul, "_is_intel", lambda intel=intel: intel)
        torch.testing.assert_close(matmul.back_through(grad_NM, weight_MK), grad_NM @ weight_MK, atol=1e-4, rtol=0)
