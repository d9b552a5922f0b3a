"""Matrix products as fast as the machine has them, and the pieces that tokens are cut into for them.

On a CPU, in float32, products go through oneDNN: it uses AVX-512 on every processor that has it, the library behind
`torch.mm` on Intel's alone (measured on an AMD machine, one thread: 220 against 104 GFLOP/s). It makes a program for
each shape it meets and keeps it, up to a megabyte each, so tokens are cut into pieces of a few fixed lengths; what a
layer computes of a piece then also stays in the cache between one operation and the next.
"""

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


def linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x W^T + b, [N, M]; both may be views of transposed tensors."""
    shortest = min(len(x_NK), len(weight_MK), x_NK.shape[1])
    if shortest >= PIECES[-1] and _through_onednn(x_NK):
        return torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    return F.linear(x_NK, weight_MK, bias_M)


def _through_onednn(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.backends.mkldnn.is_available()
