"""Agreement between annotators, corrected for chance: of nominal ratings, equal or not, and of ordered ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

Ratings = Sequence[Sequence[Hashable]]  # for each item, the ratings it got, in any order


def fleiss_kappa(items: Ratings) -> float | None:
    """Fleiss' kappa (Fleiss 1971), for any number of ratings an item (Gwet 2014, section 2.6).

    Agreement is observed on the items with at least two ratings. How often chance gives each rating is the mean of its
    shares of the ratings of an item, over all items. With equally many ratings an item both are Fleiss' own.

    Returns:
        1 for full agreement, 0 for what chance gives, below 0 for less; None where it is undefined: no item with
        two ratings, or every rating the same.
    """
    counted = [Counter(ratings) for ratings in items if ratings]
    agreeing = [
        sum(count * (count - 1) for count in counts.values()) / (counts.total() * (counts.total() - 1))
        for counts in counted
        if counts.total() > 1
    ]
    shares: Counter[Hashable] = Counter()
    for counts in counted:
        for rating, count in counts.items():
            shares[rating] += count / counts.total() / len(counted)  # type: ignore[assignment]
    if not agreeing or len(shares) < 2:
        return None
    observed, expected = sum(agreeing) / len(agreeing), sum(share**2 for share in shares.values())
    return (observed - expected) / (1 - expected)


def cohen_kappa(rated: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Cohen's kappa (Cohen 1960) of two raters, from the two ratings of each item.

    Returns:
        1 for full agreement, 0 for what chance gives; None where it is undefined: no item, or one rating only.
    """
    num = len(rated)
    ones, others = Counter(one for one, _ in rated), Counter(other for _, other in rated)
    if num == 0 or len(ones | others) < 2:
        return None
    observed = sum(one == other for one, other in rated) / num
    expected = sum(ones[rating] * others[rating] for rating in ones) / num**2
    return (observed - expected) / (1 - expected)


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
