"""Products with packed weights: the numbers of a plain product, by few programs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_core.engine.packed_weight import PackedWeight

ROWS = (1, 2, 7, 8, 9, 31, 64, 65, 100, 700)


@pytest.mark.parametrize("size", [(64, 48), (1100, 512)], ids=["small", "packed alone"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_number_of_rows_gives_the_plain_product(size: tuple[int, int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(size, generator=generator), torch.randn(size[0], generator=generator)
    packed = PackedWeight(weight, bias if with_bias else None, torch.float32)
    with torch.inference_mode():
        for rows in ROWS:
            x, plus = torch.randn(rows, size[1], generator=generator), torch.randn(rows, size[0], generator=generator)
            expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0.0)
            torch.testing.assert_close(packed(x).double(), expected, atol=2e-4, rtol=0)
            torch.testing.assert_close(packed(x, plus).double(), expected + plus.double(), atol=2e-4, rtol=0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_few_row_counts_reach_onednn() -> None:
    """It makes a program for each and keeps it: up to a megabyte and a millisecond."""
    packed = PackedWeight(torch.ones(1100, 512), None, torch.float32)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for rows in range(9, 200):
            packed(torch.ones(rows, 512))
    counts = {event.input_shapes[0][0] for event in found.events() if event.name == "mkldnn::_linear_pointwise"}
    assert counts <= {*range(1, 9), 16, 24, 32, 40, 48, 56, 64, 128}
    assert 64 in counts


def test_in_bfloat16_the_product_is_rounded_and_the_sum_is_not() -> None:
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    packed = PackedWeight(weight, None, torch.bfloat16)
    product = packed(x)
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), x @ weight.t(), atol=0.15, rtol=0)
    plus = torch.full((4, 32), 1000.123)
    assert torch.equal(packed(x, plus), plus + product.float())
