"""From votes to labels, hand-worked."""

import random

import pytest

from rlhf_core.feedback.ballots import Ballot, Pair, Vote
from rlhf_core.feedback.labelling import aggregate, annotator_table, make_pairs, pair_id, summary


def votes(*signed: int) -> tuple[Vote, ...]:
    return tuple(Vote.from_signed(f"n{number}", value) for number, value in enumerate(signed))


def ballot(*signed: int, split: str = "train") -> Ballot:
    pair = Pair(pair_id="x", prompt_id="p", prompt="?", task="t", split=split, response_a="yes", response_b="no")
    return Ballot(pair=pair, votes=votes(*signed))


def addressed(purpose: str) -> random.Random:
    return random.Random(purpose)


@pytest.mark.parametrize(
    ("signed", "label", "agreement", "margin"),
    [
        ((3, 2, 1), "a", 1.0, 2.0),
        ((-1, -1, 3), "b", 2 / 3, 0.0),  # more people for b, but more strongly for a: no margin
        ((-2, -1, 1), "b", 2 / 3, 2 / 3),
        ((1, -1), "tie", 0.0, 0.0),
        ((2, -1, 0), "tie", 1 / 3, 0.0),  # as many for a as for b, however strongly
        ((0, 0, 0), "tie", 1.0, 0.0),
        ((1, 0, 0), "tie", 2 / 3, 0.0),  # more say tie than a
        ((1, 1, 0, 0, -1), "a", 0.4, 0.2),  # a has more votes than b, and ties are not more
        ((-3,), "b", 1.0, 3.0),
    ],
)
def test_majority(signed: tuple[int, ...], label: str, agreement: float, margin: float) -> None:
    verdict = aggregate(votes(*signed))
    assert verdict.label == label
    assert verdict.agreement == pytest.approx(agreement)
    assert verdict.margin == pytest.approx(margin)


def test_showing_the_pair_the_other_way_round_turns_the_label() -> None:
    turned = {"a": "b", "b": "a", "tie": "tie"}
    rng = random.Random(0)
    for _ in range(300):
        signed = [rng.randint(-3, 3) for _ in range(rng.randint(1, 6))]
        one, other = aggregate(votes(*signed)), aggregate(votes(*(-value for value in signed)))
        assert turned[one.label] == other.label
        assert (one.agreement, one.margin) == (other.agreement, other.margin)


def test_no_vote_is_no_majority() -> None:
    with pytest.raises(ValueError, match="without votes"):
        aggregate([])


def test_a_vote_keeps_its_sign_and_strength() -> None:
    assert [Vote.from_signed("n", value).signed for value in (-5, -1, 0, 2)] == [-5, -1, 0, 2]
    assert Vote.from_signed("n", 0).strength == 1


def test_pairs_of_all_different_responses() -> None:
    pairs = make_pairs("p", "?", "t", "train", ["x", "y", "x", "z"], addressed)
    assert {frozenset((pair.response_a, pair.response_b)) for pair in pairs} == {
        frozenset("xy"), frozenset("xz"), frozenset("yz"),
    }  # fmt: skip
    assert len({pair.pair_id for pair in pairs}) == 3
    assert make_pairs("p", "?", "t", "train", ["x", "x"], addressed) == []


def test_the_order_shown_is_random_but_no_business_of_other_pairs() -> None:
    responses = [str(number) for number in range(40)]
    pairs = make_pairs("p", "?", "t", "train", responses, addressed)
    first = sum(int(pair.response_a) < int(pair.response_b) for pair in pairs) / len(pairs)
    assert 0.44 < first < 0.56  # 780 pairs: three standard errors are 0.054
    fewer = make_pairs("p", "?", "t", "train", list(reversed(responses[:20])), addressed)
    assert set(fewer) <= set(pairs)


def test_a_pair_has_one_id_in_either_order() -> None:
    assert pair_id("p", "x", "y") == pair_id("p", "y", "x")
    assert len({pair_id("p", "x", "y"), pair_id("q", "x", "y"), pair_id("p", "x", "z"), pair_id("p", "xy", "")}) == 4


def test_annotators_are_compared_with_the_others() -> None:
    table = annotator_table([ballot(1, 2, -1), ballot(-1, -1, 0), ballot(1, 1, 1)])
    assert list(table) == ["n0", "n1", "n2"]
    # n0's others: (2, -1) tie, (-1, 0) b, (1, 1) a
    assert table["n0"]["agreement"] == pytest.approx(2 / 3)
    # n2's others: a, b, a
    assert table["n2"] == {
        "num_votes": 3, "tie_share": 1 / 3, "first_share": 0.5, "agreement": 1 / 3, "mean_seconds": None,
    }  # fmt: skip


def test_one_annotator_alone_agrees_with_nobody() -> None:
    assert annotator_table([ballot(1)])["n0"]["agreement"] is None


def test_summary_of_a_round() -> None:
    ballots = [ballot(2, 2, 2), ballot(-1, -1, 1), ballot(0, 0, 0, split="heldout")]
    figures = summary(ballots, [aggregate(each.votes) for each in ballots])
    assert figures == {
        "num_labelled_pairs": 3,
        "num_labelled_heldout_pairs": 1,
        "num_votes": 9,
        "num_annotators": 3,
        "tie_share": 1 / 3,
        "mean_agreement": pytest.approx((1 + 2 / 3 + 1) / 3),
        "mean_vote_margin": pytest.approx((2 + 1 / 3) / 2),
        "first_share": 0.5,
        "num_pairs_voted_again": 3,
        # The first two always agree; of the third, chance with either of them 3/9: (2/3 - 1/3) / (2/3).
        "mean_cohen_kappa": pytest.approx((1 + 0.5 + 0.5) / 3),
        # Observed (1 + 1/3 + 1) / 3 = 7/9; of nine choices 4 a, 2 b, 3 tie: expected (16 + 4 + 9) / 81 = 29/81.
        "fleiss_kappa": pytest.approx((7 / 9 - 29 / 81) / (1 - 29 / 81)),
        "krippendorff_alpha": pytest.approx(1 - (2 / 9) / ((72 - (12 + 2 + 6)) / 72)),
        # Of -1 -1 0 0 0 1 2 2 2 the middles are 1, 3.5, 5.5, 7.5. Within: 2 (4.5)^2 / 2. By chance, over 8: of -1 with
        # the others 2 (3 2.5^2 + 4.5^2 + 3 6.5^2), of 0 with 1 and 2 3 (2^2 + 3 4^2), of 1 with 2 3 2^2; 499.5 in all.
        "strength_alpha": pytest.approx(1 - 20.25 / (499.5 / 8)),
    }
