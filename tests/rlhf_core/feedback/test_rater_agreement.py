"""Agreement of annotators: against published values, and where no order was shown, against a simulated truth."""

import gzip
import json
import random
from pathlib import Path

import pytest

from rlhf_core.evaluation.agreement_bounds import agreement_bounds
from rlhf_core.feedback.agreement import krippendorff_alpha
from rlhf_core.feedback.ballots import Ballot, Pair, Vote
from rlhf_core.feedback.labelling import aggregate, annotator_table, summary
from rlhf_core.feedback.rater_agreement import agreement_figures, cohen_table

REAL = Path(__file__).parents[4] / "shared/data"


def ballot(number: int, signed: list[int], *, shown: bool = True, names: str = "xyz") -> Ballot:
    pair = Pair(
        pair_id=str(number), prompt_id=f"p{number // 2}", prompt="?", task="", split="train",
        response_a=f"better {number}", response_b=f"worse {number}",
    )  # fmt: skip
    votes = tuple(Vote.from_signed(name, value) for name, value in zip(names, signed, strict=False))
    return Ballot(pair=pair, votes=votes, shown=shown)


@pytest.mark.skipif(not REAL.exists(), reason="the shared real data are not on this machine")
def test_pandalm_has_its_published_agreement() -> None:
    """Figures of the data's README: Cohen 0.852, 0.879, 0.862, Fleiss 0.8642; 879 unanimous, none split."""
    items = json.loads(gzip.decompress((REAL / "pandalm/testset-v1.json.gz").read_bytes()))
    signs = {0: 0, 1: 1, 2: -1}
    rated = [[signs[item[f"annotator{number}"]] for number in (1, 2, 3)] for item in items]
    ballots = [ballot(number, votes, names="123") for number, votes in enumerate(rated)]
    kappas = {tuple(row["annotators"]): row["cohen_kappa"] for row in cohen_table(ballots)}
    expected = {("1", "2"): 0.852, ("1", "3"): 0.879, ("2", "3"): 0.862}
    assert kappas == {names: pytest.approx(value, abs=5e-4) for names, value in expected.items()}
    figures = summary(ballots, [aggregate(one.votes) for one in ballots])
    assert figures["fleiss_kappa"] == pytest.approx(0.8642, abs=5e-5)
    assert figures["mean_cohen_kappa"] == pytest.approx(sum(expected.values()) / 3, abs=5e-4)
    assert sum(aggregate(one.votes).agreement == 1 for one in ballots) == 879


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_where_no_order_was_shown_agreement_is_that_of_pairs_shown_in_any_order(noise: float) -> None:
    """Comparisons name the chosen response first. Chance then is a half, and alpha 1 - 2 * share of disagreements."""
    rng = random.Random(0)
    rows = [[1, *(-1 if rng.random() < noise else 1 for _ in range(2))] for _ in range(4000)]
    found = agreement_figures([ballot(number, votes, shown=False) for number, votes in enumerate(rows)])
    disagreements = sum((a != b) + (a != c) + (b != c) for a, b, c in rows) / (3 * len(rows))
    for name in ("krippendorff_alpha", "fleiss_kappa", "mean_cohen_kappa"):
        assert found[name] == pytest.approx(1 - 2 * disagreements, abs=0.01), name
    if noise:
        assert krippendorff_alpha(rows) < 1 - 2 * disagreements - 0.1, "as it was, with the chosen one always first"


def test_the_order_that_stands_in_for_one_depends_on_the_texts_alone() -> None:
    def turned(one: Ballot) -> Ballot:
        pair = Pair(
            pair_id="x", prompt_id="p", prompt="?", task="", split="train",
            response_a=one.pair.response_b, response_b=one.pair.response_a,
        )  # fmt: skip
        votes = tuple(Vote.from_signed(vote.annotator, -vote.signed) for vote in one.votes)
        return Ballot(pair=pair, votes=votes, shown=False)

    ballots = [ballot(number, [1, (-1) ** number], shown=False) for number in range(9)]
    assert agreement_figures(ballots) == agreement_figures([turned(one) for one in ballots])


def test_nobody_is_first_where_no_order_was_shown() -> None:
    ballots = [ballot(1, [1, -1], shown=False), ballot(2, [1, 1], shown=False)]
    assert summary(ballots, [aggregate(one.votes) for one in ballots])["first_share"] is None
    assert annotator_table(ballots)["x"]["first_share"] is None
    assert annotator_table([ballot(1, [1, -1])])["y"]["first_share"] == 0.0


def test_the_unnamed_are_no_annotator_to_agree_with_and_a_second_vote_replaces_the_first() -> None:
    votes = [Vote.from_signed(name, value) for name, value in (("x", 1), ("file", 1), ("y", -1), ("x", -1))]
    one = ballot(1, [])
    rows = cohen_table([Ballot(pair=one.pair, votes=tuple(votes))])
    assert [(row["annotators"], row["num_pairs"], row["agreement"], row["cohen_kappa"]) for row in rows] == [
        (["x", "y"], 1, 1.0, None)
    ]
    assert agreement_figures([one, ballot(2, [1])])["num_pairs_voted_again"] == 0


@pytest.mark.parametrize("shown", [True, False])
def test_bounds_are_those_of_the_published_figures(shown: bool) -> None:
    """Comparisons name the better response first: bounds of the votes as they stand would be around chance."""
    rng = random.Random(4)
    ballots = [ballot(n, [-1 if rng.random() < 0.15 else 1 for _ in range(3)], shown=shown) for n in range(60)]
    figures, found = agreement_figures(ballots), agreement_bounds(ballots)
    assert figures["fleiss_kappa"] == pytest.approx(-0.0 if shown else 0.5, abs=0.2)
    for name in ("fleiss_kappa", "krippendorff_alpha", "strength_alpha"):
        assert found[f"{name}_low"] < figures[name] < found[f"{name}_high"], name
