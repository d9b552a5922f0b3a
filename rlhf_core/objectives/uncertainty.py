"""Losses of a reward model that knows how sure it is, that learns from an ensemble, or whose states must tell apart.

Shape suffixes: B = scored responses, N = pairs or anchors, M = negatives, D = hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_pair_losses(
    chosen_mean_N: Tensor, rejected_mean_N: Tensor, chosen_variance_N: Tensor, rejected_variance_N: Tensor
) -> Tensor:
    """Negative log-likelihood of each choice between two Gaussian scores, losses_N (Thurstone 1927, case III).

    P(chosen) = Phi((mean_c - mean_r) / sqrt(var_c + var_r)). Where a head is wrong, raising the variance is cheaper
    than staying sure: that is how it learns its own uncertainty. Only the quotient counts, so means and variances
    keep a common free scale; a floor under the variance (or a prior such as `level_losses`) sets it.
    The logarithm of Phi is exact in both tails (`log_ndtr`). Raises ValueError for a variance that is not positive.
    """
    return -torch.special.log_ndtr(
        (chosen_mean_N - rejected_mean_N) * _inverse_spread(chosen_variance_N + rejected_variance_N)
    )


def ensemble_preference(mean_delta_N: Tensor, variance_delta_N: Tensor) -> Tensor:
    """P(first preferred) under scores whose difference has this mean and variance, [N] (MacKay 1992, eq. 10).

    E[sigmoid(delta)] of a Gaussian delta is close to sigmoid(mean / sqrt(1 + pi variance / 8)): members that disagree
    pull the label toward 1/2.
    """
    return torch.sigmoid(mean_delta_N * (1.0 + math.pi / 8.0 * variance_delta_N).rsqrt())


def distilled_pair_losses(first_scores_N: Tensor, second_scores_N: Tensor, preference_N: Tensor) -> Tensor:
    """Cross-entropy of the student's Bradley-Terry probability against a teacher's soft label in [0, 1], losses_N."""
    wide = torch.promote_types(first_scores_N.dtype, torch.float32)
    delta_N = first_scores_N.to(wide) - second_scores_N.to(wide)
    return -preference_N * F.logsigmoid(delta_N) - (1.0 - preference_N) * F.logsigmoid(-delta_N)


def distilled_score_losses(scores_B: Tensor, teacher_mean_B: Tensor) -> Tensor:
    """Squared distance of a student's score to an ensemble's mean, losses_B."""
    return (scores_B - teacher_mean_B).square()


def contrastive_losses(
    anchors_ND: Tensor, positives_ND: Tensor, negatives_MD: Tensor, allowed_NM: Tensor, temperature: float
) -> Tensor:
    """InfoNCE with cosine similarity, losses_N (van den Oord et al. 2018, eq. 4; Chen et al. 2020, eq. 1).

    -log [exp(sim(a, p) / tau) / (exp(sim(a, p) / tau) + sum over allowed negatives exp(sim(a, n) / tau))]. `allowed_NM`
    is 1 where a negative stands against an anchor, for example where it answers the same prompt; an anchor without
    any pays 0. Chosen responses are positives, rejected ones negatives.
    """
    positive_N = F.cosine_similarity(anchors_ND, positives_ND, dim=-1) / temperature
    negative_NM = F.normalize(anchors_ND, dim=-1) @ F.normalize(negatives_MD, dim=-1).t() / temperature
    negative_NM = negative_NM.masked_fill(allowed_NM == 0, -math.inf)
    return torch.cat([positive_N[:, None], negative_NM], dim=1).logsumexp(1) - positive_N


def _inverse_spread(variance_N: Tensor) -> Tensor:
    if not bool((variance_N > 0).all()):
        raise ValueError(f"variances must be positive, the smallest sum of two is {variance_N.min().item()}")
    return variance_N.rsqrt()
