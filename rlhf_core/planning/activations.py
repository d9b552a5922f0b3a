"""Bytes of a pass through a decoder: what it keeps for the backward pass, and what comes and goes.

The formulas follow `rlhf_core.engine` line by line for the packed way (Llama and its relatives), with adapters or not:
an adapter's product is made anew for each pass and keeps nothing. Other architectures run by transformers' own
forward, which keeps normed inputs and hidden values too, and under adapters their narrow products.
Letters as there: T packed tokens, N tokens whose state is wanted, D hidden size, F feed-forward width, A width of the
queries, J of queries, keys and values joined, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from rlhf_core.planning.shapes import PACKED, ModelShape

FLOAT = 4
KEPT_LOGITS, LOGITS_AT_ONCE, PIECES, FEW = 2**25, 2**20, (256, 64), 2**19
"""Those of `rlhf_core.engine`: `output_layer`, `matmul` and `packed_weight` import torch. A test holds them equal."""
PADDED = 1.08
"""Places over tokens where attention runs over padded rows of like length (`layout.LEAST_FILLED` bounds it at 1.18)."""
DRAWN_COPIES = 4
"""Tensors of logits' size while a token is drawn: logits, probabilities, their padded copy, sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSettings:
    """How a pass is computed.

    Attributes:
        rank: of the adapters on the layers; 0: none, every weight learns.
        checkpointing: layers keep their input alone and are computed again.
        half: products in bfloat16, whose inputs and results are kept in it.
        cpu: products go through oneDNN in pieces.
        compact: freed tensors leave no holes (`rlhf_core.state.host_memory`).
    """

    rank: int = 0
    checkpointing: bool = False
    half: bool = False
    cpu: bool = True
    compact: bool = False

    @property
    def item(self) -> int:
        """Bytes of a number that a product reads or makes."""
        return 2 if self.half else FLOAT


class Reading(NamedTuple):
    """What goes through a model together.

    Attributes:
        tokens: packed, a prompt that rows share once.
        wanted: of those, whose last state is read.
        responses: tokens whose log-probability is asked for; 0 where a head reads the states.
    """

    tokens: int
    wanted: int
    responses: int


def attention_kept(shape: ModelShape, settings: PassSettings) -> float:
    """Bytes a token that the attention half of a layer keeps.

    Its input D (float32); queries, keys and values in padded rows J, and what they attend to A, with a float a head.
    A plain forward also keeps the normed input D and the gathered result A, and adapters four products of their rank.
    """
    wide, item = shape.hidden * FLOAT, settings.item
    kept = wide + PADDED * (shape.joined_width + shape.attention_width) * item + shape.heads * FLOAT
    if _as_it_is(shape, settings):
        kept += (shape.hidden + shape.attention_width) * item + 4 * settings.rank * item
    return kept


def feed_forward_kept(shape: ModelShape, settings: PassSettings) -> float:
    """Bytes a token that the other half keeps: its input D, gate and up 2F; in a plain forward also the normed
    input D, the hidden values F, and of adapters three products of their rank."""
    kept = shape.hidden * FLOAT + 2 * shape.feed_forward * settings.item
    if _as_it_is(shape, settings):
        kept += (shape.hidden + shape.feed_forward + 3 * settings.rank) * settings.item
    return kept


def kept_bytes(shape: ModelShape, reading: Reading, settings: PassSettings) -> int:
    """Bytes that a pass with gradients holds when its forward half is over.

    Every layer keeps its two halves, the last its second half at the wanted tokens alone. With checkpointing a layer
    keeps its input, and one is whole while it is computed again. Then the states that are read, and the logits.
    """
    attention, other = attention_kept(shape, settings), feed_forward_kept(shape, settings)
    one, last = reading.tokens * (attention + other), reading.tokens * attention + reading.wanted * other
    if settings.checkpointing:
        layers = shape.layers * reading.tokens * shape.hidden * FLOAT + max(one, last)
    else:
        layers = (shape.layers - 1) * one + last
    states = 2 * reading.wanted * shape.hidden * FLOAT
    return int(layers + states + logit_bytes(shape, reading.responses, learns=True, cpu=settings.cpu))


def passing_bytes(shape: ModelShape, reading: Reading, settings: PassSettings) -> int:
    """Bytes that come and go in one layer, forward without gradients: the larger of its two halves.

    Attention: the stream before and after 2D, joined 1 J, padded J, attended A, gathered A. Feed-forward: the stream
    before and after 2D, gate and up of all pieces 2F; in a plain forward also normed D, the two joined 2F, hidden F and
    its product's F.
    """
    hidden, item = shape.hidden, settings.item
    attention = 2 * hidden * FLOAT + ((1 + PADDED) * shape.joined_width + 2 * shape.attention_width) * item
    other = 2 * hidden * FLOAT + 2 * shape.feed_forward * item
    if _as_it_is(shape, settings):
        attention += (hidden + shape.joined_width) * item
        other += (hidden + 3 * shape.feed_forward) * item
    layer = reading.tokens * max(attention, other)
    return int(layer + logit_bytes(shape, reading.responses, learns=False, cpu=settings.cpu))


def logit_bytes(shape: ModelShape, responses: int, *, learns: bool, cpu: bool) -> int:
    """Bytes of logits: of a piece while it is worked on, and for gradients of all where these are few."""
    if not responses:
        return 0
    shortest, numbers = (PIECES[-1], LOGITS_AT_ONCE) if cpu else (PIECES[0], KEPT_LOGITS)
    longest = max(shortest, numbers // shape.vocabulary)
    piece = 2 * min(responses, longest) * shape.vocabulary * FLOAT
    all_of_them = responses * shape.vocabulary
    return piece + (all_of_them * FLOAT if learns and all_of_them <= KEPT_LOGITS else 0)


def output_gradient_bytes(shape: ModelShape, reading: Reading, settings: PassSettings) -> int:
    """Bytes of gradients of the embedding and the output layer beside the ones that are kept on them.

    The output layer adds up products of pieces: the sum and one product. The embedding's gradient is as large, and
    where the two are tied the first waits for the second. Frozen under adapters, they have none.
    """
    if settings.rank:
        return 0
    embedding = shape.embedding_parameters * FLOAT
    return 2 * embedding if reading.responses else embedding


def sampler_bytes(shape: ModelShape, rows: int, prompt: int, new: int, settings: PassSettings) -> int:
    """Bytes of a decoder and its cache: packed copies of all products' weights, keys and values of all places, and
    the larger of what reading the prompts and what drawing a token needs; or, before there is a cache, one more copy
    of the output layer while it is packed.

    A batch reads its prompts in rows as wide as the longest: joined J, attended 2A, the stream 2D.
    """
    item = settings.item
    cache = 2 * shape.layers * rows * shape.kv_heads * shape.head_size * (prompt + new) * item
    read = rows * prompt * ((shape.joined_width + 2 * shape.attention_width) * item + 2 * shape.hidden * FLOAT)
    draw = DRAWN_COPIES * rows * shape.vocabulary * FLOAT
    return int(_packed_bytes(shape, settings) + max(cache + max(read, draw), shape.embedding_parameters * item))


def _packed_bytes(shape: ModelShape, settings: PassSettings) -> int:
    """Weights as a decoder holds them; small ones twice on a CPU, packed and plain (`engine.packed_weight.FEW`)."""
    hidden, forward = shape.hidden, shape.feed_forward
    layer = (hidden * shape.joined_width, hidden * shape.attention_width, 2 * hidden * forward, hidden * forward)
    twice = settings.cpu and not settings.half
    sizes = [size * (1 + (twice and size <= FEW)) for size in (*layer, shape.embedding_parameters)]
    return (shape.layers * sum(sizes[:-1]) + sizes[-1]) * settings.item


def _as_it_is(shape: ModelShape, settings: PassSettings) -> bool:
    """Whether layers run by transformers' own forward, part by part, each keeping its input."""
    return shape.kind not in PACKED
