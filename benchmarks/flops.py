"""By formula: operations that a training step needs, and bytes that decoding must read.

Counted are the matrix products whose results are used, two operations (multiply, add) a term, on tokens that are not
padding: a prompt that two responses share counts once, causal attention counts the half that is not masked, the last
layer's output and feed-forward parts and the output layer count where a response is predicted (or, for a reward
model, where it ends). The backward pass counts twice the forward pass. Norms, activations, softmax and the optimiser
count nothing. `model_flop` is the common measure beside it, blind to such savings.
"""

from collections.abc import Sequence
from typing import Literal

from benchmarks.workload import Pair, Size

Reads = Literal["chosen", "both", "ends"]
"""`chosen`: one response, each of its tokens predicted; `both`: two of them; `ends`: two, read at their ends."""


def training_flop(size: Size, rows: Sequence[Pair], reads: Reads, *, frozen: bool = False) -> float:
    """Operations of a forward and a backward pass over `rows`; `frozen`: weights have no gradients."""
    return (2.0 if frozen else 3.0) * sum(_forward(size, row, reads) for row in rows)


def data_tokens(rows: Sequence[Pair], reads: Reads) -> int:
    """Tokens of the rows as the benchmark counts them: a prompt once a response."""
    return sum(len(row.prompt) + len(response) for row in rows for response in _responses(row, reads))


def _responses(row: Pair, reads: Reads) -> list[list[int]]:
    return [row.chosen] if reads == "chosen" else [row.chosen, row.rejected]


def _forward(size: Size, row: Pair, reads: Reads) -> float:
    prompt, lengths = len(row.prompt), [len(response) for response in _responses(row, reads)]
    tokens, wanted = prompt + sum(lengths), len(lengths) if reads == "ends" else sum(lengths)
    hidden = size.hidden
    queries_keys_values = 2.0 * hidden * (hidden + 2 * size.kv_width)
    rest_of_layer = 2.0 * hidden**2 + 6.0 * hidden * size.intermediate
    products = size.layers * queries_keys_values * tokens
    products += rest_of_layer * ((size.layers - 1) * tokens + wanted)
    seen = prompt**2 + sum((prompt + length) ** 2 - prompt**2 for length in lengths)  # twice the unmasked places
    attention = 2.0 * hidden * size.layers * seen
    output = 2.0 * hidden * (1 if reads == "ends" else size.vocabulary) * wanted
    return products + attention + output


def num_weights(size: Size) -> int:
    """Weights that products read: all but the norms and the input embedding."""
    attention = 2 * size.hidden * (size.hidden + size.kv_width)
    return size.layers * (attention + 3 * size.hidden * size.intermediate) + size.hidden * size.vocabulary


def model_flop(size: Size, rows: Sequence[Pair], reads: Reads, *, frozen: bool = False) -> float:
    """Operations by which model-FLOP utilisation is counted (Chowdhery et al. 2022, appendix B).

    6 a weight and token (4 where weights are frozen), and 12 * layers * hidden * length a token for attention, of every
    response with a prompt of its own; without the output layer where nothing reads it.
    """
    weights = num_weights(size) - (size.hidden * size.vocabulary if reads == "ends" else 0)
    lengths = [len(row.prompt) + len(response) for row in rows for response in _responses(row, reads)]
    each = 4.0 if frozen else 6.0
    return sum(each * weights * length + 12.0 * size.layers * size.hidden * length**2 for length in lengths)


def decode_bytes(size: Size, prompts: Sequence[int], new_tokens: int, at_once: int, width: int) -> float:
    """Bytes that writing `new_tokens` tokens after prompts of these lengths must read, `width` bytes a number.

    The first token comes with the reading of the prompt, which counts nothing. Every later one reads all weights once
    for the rows decoded together, and the keys and values of all tokens before it and of its own place.
    """
    groups, steps = -(-len(prompts) // at_once), range(1, new_tokens)
    places = sum(length + step for length in prompts for step in steps)
    return float(width) * (groups * len(steps) * num_weights(size) + 2 * size.layers * size.kv_width * places)
