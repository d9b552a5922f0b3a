"""Linear layers that read the same input, as one product: their joined weight, and the gradients of its parts.

A layer that carries a low-rank adapter multiplies with W + scale * B A (Hu et al. 2021, eq. 3), made for one pass:
r T (K + N) multiplications become r K N, and training and sampling multiply with the same numbers. Gradients reach A
and B through the r columns between them, never through a gradient of W, which nobody wants where W is frozen.
Shape suffixes: T = packed tokens, K = inputs, N = outputs of one layer, J = joined outputs, R = rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.engine.effective import low_rank_of
from rlhf_core.engine.matmul import add_outer, linear


class Product(NamedTuple):
    """How a joined product is computed.

    Attributes:
        dtype: what is multiplied.
        scales: of each layer's adapter; what stands where a layer has none is not read.
    """

    dtype: torch.dtype
    scales: tuple[float, ...]


class Projection(NamedTuple):
    """Tensors of layers that read the same input: weights, then biases, then A, then B, each one a layer or None."""

    tensors: tuple[Tensor | None, ...]
    scales: tuple[float, ...]


def projection_of(*layers: nn.Module) -> Projection | None:
    """What the layers multiply with; None where one of them is more than a weight, a bias and one low-rank adapter."""
    found = [low_rank_of(layer) for layer in layers]
    if any(one is None for one in found):
        return None
    weights, biases, downs, ups, scales = zip(*(one for one in found if one is not None), strict=True)
    return Projection((*weights, *biases, *downs, *ups), scales)


def interleaved(tensor: Tensor, head_size: int, dim: int = 0) -> Tensor:
    """Places a, b, c, ..., A, B, C, ... of each head become a, A, b, B, c, C, ...; head size 0 leaves them as they are.

    A rotation then rotates pairs that stand side by side, as `kernels.rotate` wants them.
    """
    if not head_size:
        return tensor
    return tensor.unflatten(dim, (-1, 2, head_size // 2)).transpose(dim + 1, dim + 2).reshape(tensor.shape)


def separated(tensor: Tensor, head_size: int) -> Tensor:
    """Undo `interleaved` along the first dimension."""
    if not head_size:
        return tensor
    return tensor.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def join(tensors: Sequence[Any], head_sizes: Sequence[int], product: Product) -> tuple[Tensor, Tensor | None]:
    """One weight [J, K] and one bias [J] of several layers; making them costs little beside the product they serve.

    Args:
        tensors: see `Projection`.
        head_sizes: see `interleaved`, one a layer.
        product: see `Product`.
    """
    weights, biases, downs, ups = _by_kind(tensors)
    whole = [
        weight if down is None else torch.addmm(weight, up, down, alpha=scale)
        for weight, down, up, scale in zip(weights, downs, ups, product.scales, strict=True)
    ]
    parts = [interleaved(weight, size) for weight, size in zip(whole, head_sizes, strict=True)]
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(product.dtype)
    if biases[0] is None:
        return joined, None
    return joined, torch.cat([interleaved(one, size) for one, size in zip(biases, head_sizes, strict=True)]).to(
        product.dtype
    )


class ProductGradients:
    """Gradients of the layers of a product, added up over pieces of tokens; None for what nobody wants.

    Args:
        tensors: see `Projection`.
        head_sizes: see `interleaved`.
        product: see `Product`.
        wanted: for each of `tensors`, whether its gradient is wanted.
    """

    def __init__(
        self, tensors: Sequence[Any], head_sizes: Sequence[int], product: Product, wanted: Sequence[bool]
    ) -> None:
        self.head_sizes, self.product = head_sizes, product
        weights, biases, self.downs, self.ups = _by_kind(tensors)
        count = len(weights)
        self.lengths, self.type = [len(weight) for weight in weights], weights[0].dtype
        self.wants_weights, self.wants_biases = any(wanted[:count]), any(wanted[count : 2 * count])
        self.has_bias, self.adapted = biases[0] is not None, any(wanted[2 * count :])
        self.narrow_ups = [
            None if up is None else interleaved(up, size).to(product.dtype)
            for up, size in zip(self.ups, head_sizes, strict=True)
        ]
        carried = [down for down in self.downs if down is not None]
        self.joined_down = torch.cat(carried).to(product.dtype) if self.adapted else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.down: Tensor | None = None
        self.up: list[Tensor | None] = [None] * count

    def add(self, grad_TJ: Tensor, input_TK: Tensor) -> None:
        """A piece of the product's output gradient and of its input."""
        if self.wants_weights:
            self.weight = add_outer(self.weight, grad_TJ, input_TK, self.type)
        if self.has_bias and (self.wants_biases or self.wants_weights):
            self.bias = _plus(self.bias, grad_TJ.sum(0, dtype=self.type))
        if self.joined_down is not None:
            self._add_adapters(grad_TJ, input_TK, self.joined_down)

    def _add_adapters(self, grad_TJ: Tensor, input_TK: Tensor, down_RK: Tensor) -> None:
        """dB = scale g^T (x A^T), dA = scale (g B)^T x; the A of all layers read x in one product."""
        reduced_TR, back, first = linear(input_TK, down_RK), [], 0
        for place, grad_TN in enumerate(grad_TJ.split(self.lengths, 1)):
            up_NR = self.narrow_ups[place]
            if up_NR is None:
                continue
            rank = up_NR.shape[1]
            own_TR, first = reduced_TR[:, first : first + rank], first + rank
            self.up[place] = _plus(self.up[place], linear(grad_TN.t(), own_TR.t()).to(self.type))
            back.append(linear(grad_TN, up_NR.t()))
        self.down = _plus(self.down, linear(torch.cat(back, 1).t(), input_TK.t()).to(self.type))

    def gradients(self) -> list[Tensor | None]:
        """One for each of the tensors."""
        count = len(self.lengths)
        found: list[Tensor | None] = []
        for joined in (self.weight, self.bias):
            parts = [None] * count if joined is None else joined.split(self.lengths)
            found += [
                None if part is None else separated(part, size)
                for part, size in zip(parts, self.head_sizes, strict=True)
            ]
        return found + self._of_adapters()

    def _of_adapters(self) -> list[Tensor | None]:
        if self.down is None:
            return [None] * 2 * len(self.lengths)
        ranks = [0 if down is None else len(down) for down in self.downs]
        downs = self.down.split(ranks)
        scaled = [
            (down * scale, separated(up, size) * scale) if up is not None else (None, None)
            for down, up, size, scale in zip(downs, self.up, self.head_sizes, self.product.scales, strict=True)
        ]
        return [down for down, _ in scaled] + [up for _, up in scaled]


def _by_kind(tensors: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    count = len(tensors) // 4
    return tuple(tensors[kind * count : (kind + 1) * count] for kind in range(4))


def _plus(total: Tensor | None, piece: Tensor) -> Tensor:
    return piece if total is None else total.add_(piece)
