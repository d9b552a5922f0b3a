"""Agreement between annotators, corrected for chance: of nominal ratings, equal or not, and of ordered ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

Ratings = Sequence[Sequence[Hashable]]  # for each item, the ratings it got, in any order


def fleiss_kappa(items: Ratings) -> float | None:
    """Fleiss' kappa (Fleiss 1971), which needs the same number of ratings, at least two, for every item.

    Returns:
        1 for full agreement, 0 for what chance gives, below 0 for less; None where it is undefined: no items,
        unequal or single ratings, or every rating the same.
    """
    raters = {len(ratings) for ratings in items}
    if len(raters) != 1 or min(raters) < 2:
        return None
    num = raters.pop()
    totals: Counter[Hashable] = Counter()
    agreeing = 0.0
    for ratings in items:
        counts = Counter(ratings)
        totals.update(counts)
        agreeing += sum(count * (count - 1) for count in counts.values()) / (num * (num - 1))
    observed = agreeing / len(items)
    expected = sum((total / (num * len(items))) ** 2 for total in totals.values())
    return None if len(totals) == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(items: Ratings) -> float | None:
    """Krippendorff's alpha for nominal data (Krippendorff 2011), for any number of ratings an item.

    Items with fewer than two ratings say nothing about agreement and are left out.

    Returns:
        1 for full agreement, 0 for what chance gives, below 0 for less; None where it is undefined: no item with
        two ratings, or every rating the same.
    """
    pairable = [Counter(ratings) for ratings in items if len(ratings) >= 2]
    totals: Counter[Hashable] = Counter()
    for counts in pairable:
        totals.update(counts)
    if len(totals) < 2:
        return None
    num = totals.total()
    agreeing = sum(sum(count * (count - 1) for count in counts.values()) / (counts.total() - 1) for counts in pairable)
    expected = sum(total * (total - 1) for total in totals.values()) / (num - 1)
    return 1 - (num - agreeing) / (num - expected)


def ordinal_alpha(items: Sequence[Sequence[int]]) -> float | None:
    """Krippendorff's alpha for ordered ratings (Krippendorff 2011, ordinal metric), as `krippendorff_alpha` otherwise.

    Two ratings are as far apart as there are ratings between them, half of each end counted: to differ by one step of
    a scale is no full disagreement, and how large the steps are does not matter.
    """
    pairable = [Counter(ratings) for ratings in items if len(ratings) >= 2]
    totals = sum(pairable, Counter[int]())
    if len(totals) < 2:
        return None
    place, below = {}, 0.0
    for rating in sorted(totals):
        place[rating] = below + totals[rating] / 2
        below += totals[rating]

    def disagreement(counts: Counter[int]) -> float:
        pairs = combinations(counts.items(), 2)
        return sum(m * n * (place[a] - place[b]) ** 2 for (a, m), (b, n) in pairs) / (counts.total() - 1)

    return 1 - sum(map(disagreement, pairable)) / disagreement(totals)
