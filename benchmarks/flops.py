"""Operations that a training step needs, by formula, and the rate at which this machine multiplies matrices.

Counted are the matrix products whose results are used, two operations (multiply, add) a term, on tokens that are not
padding: a prompt that two responses share counts once, causal attention counts the half that is not masked, the last
layer's output and feed-forward parts and the output layer count where a response is predicted (or, for a reward
model, where it ends). The backward pass counts twice the forward pass. Norms, activations, softmax and the optimiser
count nothing.
"""

import time
from collections.abc import Sequence
from typing import Literal

import torch

from benchmarks.workload import Pair, Size

Reads = Literal["chosen", "both", "ends"]
"""`chosen`: one response, each of its tokens predicted; `both`: two of them; `ends`: two, read at their ends."""

TOKENS, TIMED_S = 1536, 0.5


def training_flop(size: Size, rows: Sequence[Pair], reads: Reads) -> float:
    """Operations of a forward and a backward pass over `rows`."""
    return 3.0 * sum(_forward(size, row, reads) for row in rows)


def data_tokens(rows: Sequence[Pair], reads: Reads) -> int:
    """Tokens of the rows as the benchmark counts them: a prompt once a response."""
    return sum(len(row.prompt) + len(response) for row in rows for response in _responses(row, reads))


def _responses(row: Pair, reads: Reads) -> list[list[int]]:
    return [row.chosen] if reads == "chosen" else [row.chosen, row.rejected]


def _forward(size: Size, row: Pair, reads: Reads) -> float:
    prompt, lengths = len(row.prompt), [len(response) for response in _responses(row, reads)]
    tokens, wanted = prompt + sum(lengths), len(lengths) if reads == "ends" else sum(lengths)
    hidden = size.hidden
    queries_keys_values = 6.0 * hidden**2
    rest_of_layer = 2.0 * hidden**2 + 6.0 * hidden * size.intermediate
    products = size.layers * queries_keys_values * tokens
    products += rest_of_layer * ((size.layers - 1) * tokens + wanted)
    seen = prompt**2 + sum((prompt + length) ** 2 - prompt**2 for length in lengths)  # twice the unmasked places
    attention = 2.0 * hidden * size.layers * seen
    output = 2.0 * hidden * (1 if reads == "ends" else size.vocabulary) * wanted
    return products + attention + output


def matmul_rate(size: Size, *, with_output: bool) -> float:
    """Operations a CPU-second of `torch.mm` in float32, in the shapes and proportions of a training step.

    Each product of a layer with its two gradients, at 1,536 tokens; the output layer at half of them.
    """
    hidden, intermediate = size.hidden, size.intermediate
    shapes = [(TOKENS, hidden, 3 * hidden), (TOKENS, hidden, hidden), (TOKENS, intermediate, hidden)]
    shapes = [*shapes, (TOKENS, hidden, 2 * intermediate)] * size.layers
    if with_output:
        shapes.append((TOKENS // 2, hidden, size.vocabulary))
    pieces = [(torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)) for n, k, m in set(shapes)]
    counts = [shapes.count((len(x), x.shape[1], len(weight))) for x, weight, _ in pieces]
    flop, spent = 0.0, 0.0
    while spent < TIMED_S:
        for (x, weight, grad), count in zip(pieces, counts, strict=True):
            start = time.process_time()
            for _ in range(count):
                torch.mm(x, weight.t())
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)
            spent += time.process_time() - start
            flop += count * 6.0 * x.numel() * len(weight)
    return flop / spent
