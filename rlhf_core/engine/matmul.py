"""Matrix products as fast as the machine has them, and the pieces that tokens are cut into for them.

On a CPU, in float32, products go through oneDNN: it uses AVX-512 on every processor that has it, the library behind
`torch.mm` on Intel's alone (measured on an AMD machine, one thread: 220 against 104 GFLOP/s). It makes a program for
each shape it meets and keeps it, up to a megabyte each, so tokens are cut into pieces of a few fixed lengths; what a
layer computes of a piece then also stays in the cache between one operation and the next.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PIECES = (256, 64)
"""Lengths of the pieces, longest first; what is left after the shortest is a piece of its own."""


def pieces(count: int, like: Tensor, longest: int = PIECES[0]) -> list[slice]:
    """Cut `count` tokens into pieces no longer than `longest`; one piece where products do not go through oneDNN."""
    if not _through_onednn(like):
        return [slice(0, count)]
    found, start = [], 0
    for length in PIECES:
        while length <= longest and count - start >= length:
            found.append(slice(start, start + length))
            start += length
    if start < count or not found:
        found.append(slice(start, count))
    return found


LARGE = 2**18
"""Numbers of a weight from which on a sum of outer products goes through `addmm` where that is as fast as oneDNN."""


def linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x W^T + b, [N, M]; both may be views of transposed tensors."""
    shortest = min(len(x_NK), len(weight_MK), x_NK.shape[1])
    if shortest >= PIECES[-1] and _through_onednn(x_NK):
        return torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    return F.linear(x_NK, weight_MK, bias_M)


def add_outer(total_MK: Tensor | None, grad_NM: Tensor, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """total + grad^T x in `dtype`, in place where there is a total.

    On an Intel processor the sum of a large one is part of its product: `addmm` multiplies as fast as oneDNN there,
    which needs both factors turned round, and the product is neither written nor read again (measured with 49,152 by
    576 from 256 tokens, one thread: 153 against 81 GFLOP/s, without the time of adding).
    """
    if grad_NM.shape[1] * x_NK.shape[1] > LARGE and dtype == torch.float32 and _through_onednn(x_NK) and _is_intel():
        total_MK = x_NK.new_zeros(grad_NM.shape[1], x_NK.shape[1]) if total_MK is None else total_MK
        return total_MK.addmm_(grad_NM.t(), x_NK)
    product_MK = linear(grad_NM.t(), x_NK.t()).to(dtype)
    return product_MK if total_MK is None else total_MK.add_(product_MK)


def back_through(grad_NM: Tensor, weight_MK: Tensor) -> Tensor:
    """grad W, [N, K], for a weight that no cache holds: oneDNN would turn it round each time, `mm` on Intel not."""
    if _through_onednn(grad_NM) and not _is_intel():
        return linear(grad_NM, weight_MK.t())
    return torch.mm(grad_NM, weight_MK)


@cache
def _is_intel() -> bool:
    """Whether torch's own products use all that the processor has: MKL does on Intel's alone."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.is_file() and "GenuineIntel" in info.read_text()


def _through_onednn(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.backends.mkldnn.is_available()
