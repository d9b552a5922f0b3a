"""Chance-corrected agreement, on the examples of its authors and against statsmodels."""

import random
from collections import Counter

import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import fleiss_kappa as oracle

from rlhf_core.feedback.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, ordinal_alpha

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers rate twelve units.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")

# Fleiss (1971): ten subjects, fourteen raters, counts in five categories; kappa 0.210.
FLEISS = (
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip


def test_alpha_of_the_published_example() -> None:
    units = [[rating for rating in unit if rating != "."] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_ordinal_alpha_of_the_published_example() -> None:
    """The same paper, section D: .815 for ordered ratings; it reads the order alone, so any rising numbers do."""
    units = [[int(rating) for rating in unit if rating != "."] for unit in zip(*OBSERVERS, strict=True)]
    assert ordinal_alpha(units) == pytest.approx(0.815, abs=5e-4)
    stretched = [[(-7, -2, 0, 4, 100)[rating - 1] for rating in unit] for unit in units]
    assert ordinal_alpha(stretched) == pytest.approx(ordinal_alpha(units), abs=1e-12)


def test_ordinal_alpha_of_two_ratings_is_the_nominal_one() -> None:
    items = [[0, 0, 1], [1, 1], [0, 1, 1, 1], [0, 0]]
    assert ordinal_alpha(items) == pytest.approx(krippendorff_alpha(items))
    assert ordinal_alpha([[1, 1], [1]]) is None


def test_kappa_of_the_published_example() -> None:
    items = [[category for category, count in enumerate(row) for _ in range(count)] for row in FLEISS]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_equals_statsmodels(seed: int) -> None:
    rng = random.Random(seed)
    items = [[rng.choice("aab") if rng.random() < 0.8 else "c" for _ in range(4)] for _ in range(50)]
    counts = [[Counter(ratings)[category] for category in "abc"] for ratings in items]
    assert fleiss_kappa(items) == pytest.approx(float(oracle(counts)), abs=1e-12)


def test_alpha_and_kappa_agree_where_there_are_many_items() -> None:
    """Alpha corrects kappa for the small sample only (Krippendorff 2011), by 1 / (number of ratings)."""
    rng = random.Random(0)
    items = [[rng.choice("ab"), rng.choice("abb"), "a"] for _ in range(3000)]
    kappa = fleiss_kappa(items)
    assert kappa is not None
    assert krippendorff_alpha(items) == pytest.approx(kappa + (1 - kappa) / 9000, abs=1e-9)


def test_full_agreement_is_one() -> None:
    items = [["a", "a"], ["b", "b"], ["a", "a"]]
    assert fleiss_kappa(items) == 1.0
    assert krippendorff_alpha(items) == 1.0


def test_one_missing_rating_changes_kappa_by_little() -> None:
    rng = random.Random(1)
    items = [[choice if rng.random() < 0.9 else rng.choice("ab") for _ in range(3)] for choice in "abbab" * 40]
    whole, part = fleiss_kappa(items), fleiss_kappa([items[0][:2], *items[1:]])
    assert whole is not None
    assert part == pytest.approx(whole, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_cohens_kappa_equals_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    rated = [(one, one if rng.random() < 0.7 else rng.choice("abc")) for one in rng.choices("aabc", k=60)]
    assert cohen_kappa(rated) == pytest.approx(cohen_kappa_score(*zip(*rated, strict=True)), abs=1e-12)


def test_cohens_kappa_by_hand_and_where_it_is_undefined() -> None:
    # Cohen (1960), table 1, in proportions of 200: .44 .07 .09 / .05 .20 .05 / .01 .03 .06 gives .492.
    table = {"11": 88, "12": 14, "13": 18, "21": 10, "22": 40, "23": 10, "31": 2, "32": 6, "33": 12}
    rated = [(cell[0], cell[1]) for cell, count in table.items() for _ in range(count)]
    assert cohen_kappa(rated) == pytest.approx(0.492, abs=5e-4)
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")] * 3) is None
    assert cohen_kappa([("a", "b")] * 3) == 0.0


@pytest.mark.parametrize("items", [[], [["a"], ["b"]], [["a", "a"], ["a", "a"]]])
def test_undefined_is_none(items: list[list[str]]) -> None:
    assert fleiss_kappa(items) is None
    assert krippendorff_alpha(items) is None


def test_unequal_numbers_of_ratings() -> None:
    items = [["a", "a", "b"], ["b", "b"], ["a"]]
    # Observed on two items (1/3 + 1) / 2 = 2/3; shares of a (2/3 + 0 + 1) / 3 = 5/9, of b 4/9: by chance 41/81.
    # irrCAC 0.4.4, CAC(...).fleiss() on the same table: 0.325.
    assert fleiss_kappa(items) == pytest.approx((2 / 3 - 41 / 81) / (1 - 41 / 81))
    assert fleiss_kappa(items) == pytest.approx(0.325)
    # The single rating is left out. Coincidences: aa 1, ab 2 (both orders), bb 2; n = 5, a 2, b 3.
    assert krippendorff_alpha(items) == pytest.approx(1 - 4 * 2 / (2 * 2 * 3))
