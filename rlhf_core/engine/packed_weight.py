"""Products of a few rows with a weight that stays as it is for many steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.engine.matmul import PIECES, pieces

FEW = 2**19
"""Multiplications below which calling oneDNN costs more than it spares (measured at 8 to 64 rows)."""

GRAIN = 8
"""Row counts are rounded up to a multiple of it: oneDNN makes and keeps a program for each count that it meets."""


class PackedWeight:
    """x W^T + b for one weight and many x, as fast as this machine can.

    On a CPU, in float32, the weight is packed once for oneDNN, which uses AVX-512 on every processor that has it; the
    library behind `linear` does so on Intel's only. Measured on an AMD machine at 64 rows: 200 against 95 GFLOP/s.

    Args:
        weight: [out, in].
        bias: [out], or none.
        dtype: what is multiplied; the result is in it too, unless it is added to something.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.to(dtype)
        packs = weight.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight) if packs else None
        self.fewest_rows = FEW // weight.numel() if packs else float("inf")
        self.weight = None if self.fewest_rows == 0 else weight
        self.bias, self.dtype = bias, dtype

    def __call__(self, x_ND: Tensor, plus: Tensor | None = None) -> Tensor:
        """[N, in] to [N, out], added to `plus` where it is given."""
        if len(x_ND) <= self.fewest_rows:
            product_ND = F.linear(x_ND.to(self.dtype), self.weight, self.bias)
            return product_ND if plus is None else plus + product_ND
        if len(x_ND) <= PIECES[-1]:
            return self._multiply(x_ND, plus)
        cuts = pieces(len(x_ND), x_ND)
        return torch.cat([self._multiply(x_ND[cut], None if plus is None else plus[cut]) for cut in cuts])

    def _multiply(self, x_ND: Tensor, plus: Tensor | None) -> Tensor:
        rows = len(x_ND)
        if rows > GRAIN and (missing := -rows % GRAIN):
            padded = F.pad(x_ND, (0, 0, 0, missing))
            return self._multiply(padded, None if plus is None else F.pad(plus, (0, 0, 0, missing)))[:rows]
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x_ND, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x_ND, plus, self.packed, self.bias, "add")
