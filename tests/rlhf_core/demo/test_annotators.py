"""The simulated annotators' biases can be seen in their votes, and their majority is mostly right."""

import random
from dataclasses import replace

import pytest

from rlhf_core.demo.annotators import (
    ANNOTATORS,
    SimulatedAnnotator,
    gold_agreement,
    simulated_ballots,
)
from rlhf_core.demo.gold import Grade
from rlhf_core.demo.world import draw_reply, draw_scenes
from rlhf_core.feedback.ballots import Ballot, Majority, Pair
from rlhf_core.feedback.labelling import aggregate, annotator_table, make_pairs, summary

PLAIN = Grade(
    helpful=0.5, truthful=0.5, harmless=0.5, concise=0.5, gold=0.5,
    words=10, polite=0, rude=0, unknown=0, wellformed=True,
)  # fmt: skip
EXACT = SimulatedAnnotator(name="exact")
BY_NAME = {annotator.name: annotator for annotator in ANNOTATORS}


def addressed(purpose: str) -> random.Random:
    return random.Random(purpose)


def first_wins(annotator: SimulatedAnnotator, grade_a: Grade, grade_b: Grade) -> float:
    """Share of 2,000 votes for the response shown first, a tie counting half."""
    rng = random.Random(0)
    choices = [annotator.vote(rng, grade_a, grade_b).choice for _ in range(2000)]
    return (choices.count("a") + 0.5 * choices.count("tie")) / len(choices)


@pytest.fixture(scope="module")
def ballots() -> list[Ballot]:
    """Every annotator on the pairs that 800 scenes' demonstrations make."""
    rng = random.Random(0)
    pairs = []
    for scene in draw_scenes(rng, 800, "train"):
        replies = [draw_reply(rng, scene) for _ in range(3)]
        pairs += make_pairs(scene.prompt(), scene.prompt(), scene.task, "train", replies, addressed)
    return list(simulated_ballots(pairs, addressed))


@pytest.mark.parametrize(
    ("difference", "signed"),
    [(0.0, 0), (0.029, 0), (0.031, 1), (0.119, 1), (0.121, 2), (0.299, 2), (0.301, 3), (-0.031, -1), (-0.4, -3)],
)
def test_a_clearer_difference_gives_a_stronger_vote(difference: float, signed: int) -> None:
    better = replace(PLAIN, truthful=0.5 + difference / 0.35)
    assert EXACT.vote(random.Random(0), better, PLAIN).signed == signed


def test_worth_without_bias_is_the_weighted_gold() -> None:
    good = replace(PLAIN, helpful=1.0, harmless=0.0)
    assert EXACT.worth(good) == pytest.approx(0.30 + 0.35 * 0.5 + 0.15 * 0.5)


def test_taste_length_and_flattery_add_to_worth() -> None:
    biased = SimulatedAnnotator(name="x", taste={"truthful": 2.0}, length_bias=0.1, flattery_bias=0.05)
    assert biased.worth(PLAIN) == pytest.approx(0.5 + 0.35 * 0.5 + 0.1 * 10 / 40)
    assert biased.worth(replace(PLAIN, polite=9)) - biased.worth(PLAIN) == pytest.approx(9 * 0.05)
    longest, longer_still = replace(PLAIN, words=60), replace(PLAIN, words=600)
    assert biased.worth(longest) == biased.worth(longer_still) > biased.worth(PLAIN)


def test_biases_show_in_the_votes() -> None:
    fair, dana, emil = BY_NAME["sim-alma"], BY_NAME["sim-dana"], BY_NAME["sim-emil"]
    long, flattering = replace(PLAIN, words=45), replace(PLAIN, polite=3)
    assert first_wins(fair, PLAIN, PLAIN) == pytest.approx(0.5, abs=0.04)
    assert first_wins(emil, PLAIN, PLAIN) > 0.58  # shown first
    assert first_wins(fair, long, PLAIN) == pytest.approx(0.5, abs=0.04)
    assert first_wins(dana, long, PLAIN) > first_wins(dana, PLAIN, PLAIN) + 0.15
    assert first_wins(dana, flattering, PLAIN) > 0.9


def test_careless_votes_do_not_read() -> None:
    careless = replace(EXACT, careless=1.0)
    clear = (replace(PLAIN, truthful=1.0), replace(PLAIN, truthful=0.0))
    assert first_wins(careless, *clear) == pytest.approx(0.5, abs=0.04)
    assert careless.vote(random.Random(0), *clear).seconds < 3 < EXACT.vote(random.Random(0), *clear).seconds


def test_the_majority_is_mostly_right_and_seldom_tied(ballots: list[Ballot]) -> None:
    verdicts = [aggregate(ballot.votes) for ballot in ballots]
    right = gold_agreement(ballots, verdicts)
    assert right is not None
    assert 0.955 < right < 0.99  # the design's figure is 0.968
    ties = summary(ballots, verdicts)["tie_share"]
    assert ties is not None
    assert 0.03 < ties < 0.11


def test_the_careless_one_agrees_least(ballots: list[Ballot]) -> None:
    table = annotator_table(ballots)
    assert set(table) == set(BY_NAME)
    by_agreement = sorted(table, key=lambda name: table[name]["agreement"])
    assert by_agreement[0] == "sim-emil"
    assert table["sim-emil"]["agreement"] < table["sim-alma"]["agreement"] - 0.1


def test_a_vote_depends_on_its_pair_alone(ballots: list[Ballot]) -> None:
    some = ballots[100:110]
    again = list(simulated_ballots([ballot.pair for ballot in reversed(some)], addressed))
    assert list(reversed(again)) == some


def test_gold_agreement_leaves_out_ties_and_equals() -> None:
    prompt = "Notes: The lamp: aisle F, price 35, stock 6.\nCustomer: How much is the lamp?\nAssistant:"
    right, wrong = "The lamp sells for 35 dollars.", "The lamp sells for 40 dollars."

    def ballot(response_a: str, response_b: str) -> Ballot:
        pair = Pair(
            pair_id="x", prompt_id="p", prompt=prompt, task="price", split="train",
            response_a=response_a, response_b=response_b,
        )  # fmt: skip
        return Ballot(pair=pair, votes=())

    def verdict(label: str) -> Majority:
        return Majority(label=label, agreement=1.0, margin=1.0)

    same = "The price of the lamp is 35 dollars."
    ballots = [ballot(right, wrong), ballot(wrong, right), ballot(right, wrong), ballot(right, same)]
    labels = [verdict("a"), verdict("a"), verdict("tie"), verdict("b")]
    assert gold_agreement(ballots, labels) == 0.5
    assert gold_agreement(ballots[3:], labels[3:]) is None
