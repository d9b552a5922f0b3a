"""Best of n: of several samples, the one that a scorer likes best (Stiennon et al. 2020), or the best and the worst.

Shape suffixes: N = prompts, C = candidates of a prompt, K = those that are kept.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_core.errors import check_finite

Keep = Literal["best", "contrast"]


def num_candidates(kept: int, of: int, keep: Keep) -> int:
    """How many samples of a prompt `kept` responses are picked from: `of` for each, or for each best and worst."""
    return kept * of if keep == "best" else kept // 2 * of


def pick(scores_NC: Tensor, of: int, keep: Keep) -> Tensor:
    """Which candidates stay, kept_NK, from pools of `of` candidates that follow each other.

    `best` keeps the best of each pool, `contrast` the best and then the worst. Of equal scores the first counts as
    better, so best and worst of a pool are two candidates even where all are equal.

    Raises:
        Diverged: a score is no finite number: NaN would count as the best, since a maximum passes it on.
        ValueError: the candidates are not whole pools, or a pool is too small.
    """
    rows, candidates = scores_NC.shape
    smallest = 1 if keep == "best" else 2
    if of < smallest or candidates % of:
        raise ValueError(f"{candidates} candidates are no pools of {of}, or these smaller than {smallest}")
    check_finite(scores_NC.flatten().tolist(), "generate.best_of: the score of candidate")
    pools_NPO = scores_NC.view(rows, -1, of)
    first_P = torch.arange(0, candidates, of, device=scores_NC.device)
    best_NP = first_P + pools_NPO.argmax(-1)
    if keep == "best":
        return best_NP
    worst_NP = first_P + (of - 1 - pools_NPO.flip(-1).argmin(-1))
    return torch.stack([best_NP, worst_NP], -1).flatten(1)


def kl_bound(n: int) -> float:
    """Most nats by which the best of n moves from the policy that was sampled: log n - (n - 1) / n.

    Stiennon et al. 2020, appendix G.3, give it as the divergence; it is that where no two samples are equal, and a
    bound otherwise (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n
