"""Drawing the next token by inversion of the distribution asked for, with that distribution's own log-probability.

Shape suffixes: B = rows, V = vocabulary, C = candidates of a cut-off distribution, the likeliest first, N = blocks of
the vocabulary (in `_first_above`: any numbers), L = tokens of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.errors import Diverged

BLOCK = 64
"""Tokens summed together before a cumulative sum runs over the sums: two short sums instead of one long one."""

FIRST_CANDIDATES = 256
"""Likeliest tokens looked at first for top-p; where they do not reach p, the whole vocabulary is sorted."""


LARGEST_BELOW_1 = 1.0 - 2.0**-24


class TokenDraw(NamedTuple):
    """Tokens chosen, a row each.

    Attributes:
        tokens_B: token ids.
        logprobs_B: in the plain distribution at the row's temperature (1 where it is 0), which training computes too.
        behaviour_logprobs_B: in the distribution that was drawn from: cut off and renormalised; 0 where the
            temperature is 0, since nothing was drawn.
    """

    tokens_B: Tensor
    logprobs_B: Tensor
    behaviour_logprobs_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class CutOff:
    """Which tokens may be drawn.

    `top_k` keeps the k likeliest tokens (Fan et al. 2018), `top_p` the fewest likeliest ones whose probabilities
    reach p (nucleus sampling, Holtzman et al. 2020); with both, p is a share of what the k likeliest have. At
    least one token stays. The temperature comes before both.

    Raises:
        ValueError: a number that leaves no token.
    """

    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if (self.top_k is not None and self.top_k < 1) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_k {self.top_k} must be at least 1 or None, top_p {self.top_p} in (0, 1]")

    @property
    def is_open(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_k is None and self.top_p == 1.0


OPEN = CutOff()


def draw_tokens(logits_BV: Tensor, temperature: float | Tensor, uniform_B: Tensor, cut_off: CutOff = OPEN) -> TokenDraw:
    """Choose a token a row by inverting the cumulative distribution at `uniform_B`; 0 temperature takes the largest.

    Args:
        logits_BV: scores of the tokens; minus infinity forbids one.
        temperature: logits are divided by it; one number, or one a row (temperature_B).
        uniform_B: numbers in [0, 1), one a row: a row's token depends on its own logits and number alone.
        cut_off: which tokens may be drawn.

    Raises:
        Diverged: logits of a row are NaN or infinite, or all forbidden, so there is nothing to draw from. On a GPU,
            where looking would wait for it at each token, `checked_logprobs` is for whoever fetches the numbers.
    """
    chosen = _chosen_tokens(logits_BV.float(), temperature, uniform_B, cut_off)
    if logits_BV.device.type == "cpu":
        checked_logprobs(chosen.logprobs_B)
    return chosen


def checked_logprobs(logprobs: Tensor) -> None:
    """See to it that tokens were drawn from a distribution: of anything else the softmax, and so these, are NaN.

    Raises:
        Diverged: they were not.
    """
    bad = logprobs.isnan()
    if bool(bad.any()):
        raise Diverged(
            f"sampling: {int(bad.sum())} of {bad.numel()} tokens have logits that are NaN or infinite: there is no "
            "distribution to draw them from. Fix: look at the model's weights; after training, at its learning_rate"
        )


def _chosen_tokens(logits_BV: Tensor, temperature: float | Tensor, uniform_B: Tensor, cut_off: CutOff) -> TokenDraw:
    if isinstance(temperature, Tensor):
        greedy_B = temperature == 0.0
        drawn = _draw(logits_BV / torch.where(greedy_B, 1.0, temperature)[:, None], uniform_B, cut_off)
        taken = _take_likeliest(logits_BV)
        return TokenDraw(*(torch.where(greedy_B, one, other) for one, other in zip(taken, drawn, strict=True)))
    if temperature == 0.0:
        return _take_likeliest(logits_BV)
    return _draw(logits_BV if temperature == 1.0 else logits_BV / temperature, uniform_B, cut_off)


def _take_likeliest(logits_BV: Tensor) -> TokenDraw:
    tokens_B = logits_BV.argmax(-1)
    logprobs_B = _chosen(torch.softmax(logits_BV, -1), tokens_B).log()
    return TokenDraw(tokens_B, logprobs_B, torch.zeros_like(logprobs_B))


def _draw(logits_BV: Tensor, uniform_B: Tensor, cut_off: CutOff) -> TokenDraw:
    probs_BV = torch.softmax(logits_BV, -1)
    if cut_off.is_open:
        tokens_B = _invert(probs_BV, uniform_B)
        logprobs_B = _chosen(probs_BV, tokens_B).log()
        return TokenDraw(tokens_B, logprobs_B, logprobs_B)
    tokens_B, share_B = _invert_cut_off(probs_BV, uniform_B, cut_off)
    logprobs_B = _chosen(probs_BV, tokens_B).log()
    return TokenDraw(tokens_B, logprobs_B, logprobs_B - share_B.log())


def _invert(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `uniform_B`: first its block, then its place in there."""
    rows, size = probs_BV.shape
    padded = F.pad(probs_BV, (0, -size % BLOCK)) if size % BLOCK else probs_BV
    blocks_BNL = padded.view(rows, -1, BLOCK)
    sums_BN = blocks_BNL.sum(-1)
    cumulative_BN = sums_BN.cumsum(-1)
    # Rounding leaves the last sum a little off 1: the draw is scaled to it, so every draw finds a block.
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    block_B1 = _first_above(cumulative_BN, target_B1)
    sum_B1 = sums_BN.gather(1, block_B1)
    share_B1 = (target_B1 - cumulative_BN.gather(1, block_B1) + sum_B1) / sum_B1
    block_BL = blocks_BNL[torch.arange(rows, device=probs_BV.device), block_B1[:, 0]]
    inside_BL = block_BL.cumsum(-1)
    # What rounding put outside of [0, 1) belongs to the block's first or last possible token.
    place_B1 = _first_above(inside_BL, share_B1.clamp_(0.0, LARGEST_BELOW_1) * inside_BL[:, -1:])
    return (block_B1 * BLOCK + place_B1)[:, 0].clamp_max_(size - 1)


def _invert_cut_off(probs_BV: Tensor, uniform_B: Tensor, cut_off: CutOff) -> tuple[Tensor, Tensor]:
    """Tokens as `_invert` chooses them among those that stay, and the share of the probability that stays."""
    size = probs_BV.shape[1]
    count = min(cut_off.top_k or FIRST_CANDIDATES, size)
    probs_BC, ids_BC = probs_BV.topk(count)
    cumulative_BC = probs_BC.cumsum(-1)
    tokens_B, share_B = _invert_sorted(cumulative_BC, ids_BC, uniform_B, cut_off)
    if cut_off.top_k is None and count < size:
        short = (cumulative_BC[:, -1] < cut_off.top_p).nonzero()[:, 0]
        if len(short):
            probs_BC, ids_BC = probs_BV[short].sort(-1, descending=True)
            again = _invert_sorted(probs_BC.cumsum(-1), ids_BC, uniform_B[short], cut_off)
            tokens_B[short], share_B[short] = again
    return tokens_B, share_B


def _invert_sorted(cumulative_BC: Tensor, ids_BC: Tensor, uniform_B: Tensor, cut_off: CutOff) -> tuple[Tensor, Tensor]:
    whole_B1 = cumulative_BC[:, -1:] if cut_off.top_k is not None else 1.0
    # A token stays while those before it do not reach p; so the first always does.
    last_B1 = (cumulative_BC[:, :-1] < cut_off.top_p * whole_B1).sum(-1, keepdim=True)
    share_B1 = cumulative_BC.gather(1, last_B1)
    place_B1 = _first_above(cumulative_BC, uniform_B[:, None] * share_B1).minimum(last_B1)
    return ids_BC.gather(1, place_B1)[:, 0], share_B1[:, 0]


def _first_above(increasing_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first place whose number is larger than the target: one of probability 0 is never it."""
    return torch.searchsorted(increasing_BN, target_B1, right=True).clamp_max_(increasing_BN.shape[1] - 1)


def _chosen(probs_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return probs_BV.gather(1, tokens_B[:, None])[:, 0]
