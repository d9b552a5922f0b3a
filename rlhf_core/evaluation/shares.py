"""How much each of several policies should count: every candidate tried, and how near the best of them comes.

Shape suffixes: M = members, T = tokens.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise

from torch import Tensor

from rlhf_core.errors import check_finite
from rlhf_core.models.mixture import mixed_logprobs

SAME_VALUE_DIGITS = 9
"""Values that agree to so many decimals count as equal: what differs beyond is rounding, not a better policy."""


def part_lattice(num_members: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to deal `parts` equal parts to the members, one at least to each; most for the first member first.

    There are C(parts - 1, num_members - 1): for two members and four parts (3, 1), (2, 2), (1, 3).
    """
    cuts = combinations(range(1, parts), num_members - 1)
    return sorted((tuple(b - a for a, b in pairwise((0, *cut, parts))) for cut in cuts), reverse=True)


def best_parts(lattice: Sequence[tuple[int, ...]], values: Sequence[float]) -> int:
    """Place of the highest value; of equal ones the most even parts (least sum of squares), then the first.

    Raises:
        Diverged: a value is no finite number, so it is neither above nor below the others.
    """
    check_finite(values, "combine: the value of candidate")
    return max(
        range(len(lattice)),
        key=lambda place: (round(values[place], SAME_VALUE_DIGITS), -sum(part * part for part in lattice[place])),
    )


def mixture_likelihood(logprobs_MT: Tensor, shares: Sequence[float]) -> float:
    """Mean over tokens of log(sum of share * p): of a mixture, from what its members say of each token.

    Args:
        logprobs_MT: float64, each member's log-probability of each token, in nats.
        shares: of the members, 1 in sum; one of 0 leaves its member out.
    """
    counted = [(row_T, share) for row_T, share in zip(logprobs_MT, shares, strict=True) if share]
    return mixed_logprobs(*zip(*counted, strict=True)).mean().item()


def likelihood_to_gain(logprobs_MT: Tensor, shares: Sequence[float]) -> float:
    """By how much other shares could raise `mixture_likelihood` at most, in nats a token; 0 at its maximum.

    It is concave in the shares w, and its slope along w_m is the mean over tokens of p_m / p. So no other shares lie
    above the tangent plane, whose highest corner is max over m of that mean, less 1 (Lindsay 1983, The geometry of
    mixture likelihoods).
    """
    mixed_T = mixed_logprobs(list(logprobs_MT), shares)
    return (logprobs_MT - mixed_T).exp().mean(1).max().item() - 1.0
