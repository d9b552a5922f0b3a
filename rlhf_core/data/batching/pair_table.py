"""The pairs of several prompt groups as tensors, and the rankings that they imply.

Shape suffixes: N = pairs, M = pairs by ranking, L = rankings of a pair, U = rankings, G = groups, K = responses of a
group. Responses are counted over all groups, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from rlhf_core.data.batching.pairs import PreferenceGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTable:
    """Pairs under one or several criteria.

    Attributes:
        chosen_N, rejected_N: places of the responses.
        group_N: number of the group.
        criterion_N: number of the criterion.
        agreement_N, margin_N: see `PairLabel`.
        tie_N: the pair has no preference.
        rankings_NL: numbers of the rankings that the pair comes from; -1 for none, and after the last.
    """

    chosen_N: Tensor
    rejected_N: Tensor
    group_N: Tensor
    criterion_N: Tensor
    agreement_N: Tensor
    margin_N: Tensor
    tie_N: Tensor
    rankings_NL: Tensor

    def __len__(self) -> int:
        return len(self.chosen_N)

    def rows(self, keep_N: Tensor) -> "PairTable":
        """The pairs where `keep_N` is true, or those at the places that it holds."""
        return PairTable(**{name: getattr(self, name)[keep_N] for name in self.__slots__})

    def to(self, device: torch.device | str) -> "PairTable":
        """The table on another device."""
        return PairTable(**{name: getattr(self, name).to(device) for name in self.__slots__})


def pair_table(groups: Sequence[PreferenceGroup], criteria: Sequence[str]) -> PairTable:
    """Every pair of the groups whose criterion is among `criteria`, group by group."""
    numbers = {name: number for number, name in enumerate(criteria)}
    starts = accumulate((len(group.responses) for group in groups), initial=0)
    rows = [
        (start + chosen, start + rejected, number, numbers[label.criterion], label)
        for number, (start, group) in enumerate(zip(starts, groups, strict=False))
        for (chosen, rejected), label in zip(group.pairs, group.labels, strict=True)
        if label.criterion in numbers
    ]

    def column(place: int) -> Tensor:
        return torch.tensor([row[place] for row in rows], dtype=torch.long)

    labels = [row[4] for row in rows]
    known = {name: number for number, name in enumerate(dict.fromkeys(one for la in labels for one in la.rankings))}
    most = max([1, *(len(label.rankings) for label in labels)])
    rankings = [[known[one] for one in label.rankings] + [-1] * (most - len(label.rankings)) for label in labels]
    return PairTable(
        chosen_N=column(0),
        rejected_N=column(1),
        group_N=column(2),
        criterion_N=column(3),
        agreement_N=torch.tensor([label.agreement for label in labels], dtype=torch.float32),
        margin_N=torch.tensor([label.margin for label in labels], dtype=torch.float32),
        tie_N=torch.tensor([label.tie for label in labels], dtype=torch.bool),
        rankings_NL=torch.tensor(rankings, dtype=torch.long).view(-1, most),
    )


def rankings_apart(pairs: PairTable) -> tuple[PairTable, Tensor]:
    """The pairs with every ranking of a group as a group of its own, and each one's share of its old group, share_U.

    A pair of several rankings stands in each of them. Pairs of a group that come from none are one more.
    """
    in_NL = pairs.rankings_NL >= 0
    in_NL[:, 0] |= ~in_NL.any(1)
    rows_M = in_NL.nonzero()[:, 0]
    named_M2 = torch.stack([pairs.group_N[rows_M], pairs.rankings_NL[in_NL]], 1)
    named_U2, number_M = named_M2.unique(dim=0, return_inverse=True)
    _, group_U, count_G = named_U2[:, 0].unique(return_inverse=True, return_counts=True)
    return replace(pairs.rows(rows_M), group_N=number_M), 1.0 / count_G[group_U]


def implied_ranking(pairs: Sequence[tuple[int, int]]) -> list[int] | None:
    """The one order, best first, that agrees with every (better, worse) pair; None where there is none or several.

    Pairs imply a full ranking exactly when they have no cycle and each response is compared with the next one: the
    order of a topological sort is unique if and only if every step of it has one candidate.
    """
    worse: dict[int, set[int]] = {item: set() for pair in pairs for item in pair}
    for better, other in pairs:
        worse[better].add(other)
    better_left = dict.fromkeys(worse, 0)
    for others in worse.values():
        for other in others:
            better_left[other] += 1
    ranking: list[int] = []
    candidates = [item for item, count in better_left.items() if not count]
    while len(candidates) == 1:
        best = candidates[0]
        ranking.append(best)
        candidates = []
        for other in sorted(worse[best]):
            better_left[other] -= 1
            if not better_left[other]:
                candidates.append(other)
    return ranking if len(ranking) == len(worse) > 1 else None
