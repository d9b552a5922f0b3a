"""Near duplicates against brute force over all pairs, and what must never count as one."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.duplicates import (
    MISS_PROBABILITY,
    NUM_PERMUTATIONS,
    NearDuplicates,
    bands,
    leaking_prompts,
    shingles,
    similarity,
    without_exact,
    without_near,
)
from rlhf_core.data.identity import prompt_group
from rlhf_core.data.labelled import Preference
from rlhf_core.data.rankings import ranking_source

LONG = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))


def preference(prompt="Where is it?", chosen="Here.", rejected="There.", pair_id="p", margin=1.0):
    return Preference(
        pair_id=pair_id,
        prompt_id="id",
        prompt=prompt,
        group=prompt_group(prompt),
        task="",
        chosen=chosen,
        rejected=rejected,
        num_votes=3,
        agreement=1.0,
        margin=margin,
        source="file",
    )


def edited(text, rng, edits):
    words = text.split()
    for _ in range(edits):
        words[rng.randrange(len(words))] = rng.choice(["alpha", "beta", "gamma"])
    return " ".join(words)


def test_similarity_worked_by_hand():
    one, other = shingles("a b c d e"), shingles("a b c d f")
    assert one.runs == {"a b c", "b c d", "c d e"}
    assert similarity(one, other) == 2 / 4
    assert similarity(one, shingles("A  b, c d e!")) == 1.0
    assert similarity(shingles("?!"), shingles("?!")) == 1.0
    assert similarity(shingles("?!"), shingles("!!")) == 0.0


def test_other_numbers_are_never_near_duplicates():
    one, other = shingles(LONG + " costs 15 dollars"), shingles(LONG + " costs 45 dollars")
    assert len(one.runs & other.runs) / len(one.runs | other.runs) > 0.9
    assert similarity(one, other) == 0.0
    pairs = [preference(chosen=f"{LONG} costs {price} dollars", pair_id=str(price)) for price in (15, 45)]
    assert len(without_near(pairs, 0.5)) == 2


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 0.95, 1.0])
def test_bands_fit_and_miss_almost_nothing_at_the_threshold(threshold):
    count, rows = bands(threshold)
    assert count * rows <= NUM_PERMUTATIONS
    assert (1 - threshold**rows) ** count <= MISS_PROBABILITY


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_the_index_finds_what_brute_force_finds(threshold):
    rng = random.Random(3)
    bases = [edited(LONG, rng, 60) for _ in range(6)]
    texts = sorted({edited(rng.choice(bases), rng, rng.randrange(6)) for _ in range(150)})
    cut = [shingles(text) for text in texts]
    expected = {
        (i, j) for i, j in itertools.combinations(range(len(texts)), 2) if similarity(cut[i], cut[j]) >= threshold
    }
    index: NearDuplicates[int] = NearDuplicates(threshold)
    found = set()
    for position, text in enumerate(texts):
        found |= {(other, position) for other in index.find((text,))}
        index.add(position, (text,))
    assert len(expected) > 20
    assert found <= expected, "something below the threshold was called a near duplicate"
    assert len(expected - found) <= 0.001 * len(expected)


def test_an_item_is_alike_only_in_all_its_texts():
    index: NearDuplicates[str] = NearDuplicates(0.9)
    index.add("x", (LONG, LONG + " end"))
    assert index.find((LONG, LONG + " end")) == ["x"]
    assert index.find((LONG, "something else entirely")) == []
    assert index.find((LONG + " end", LONG)) == ["x"]


def test_near_duplicates_need_prompt_and_both_responses_and_the_surest_stays():
    base = preference(prompt=LONG, chosen=LONG + " yes", rejected=LONG + " no", pair_id="a", margin=1.0)
    near = dataclasses.replace(base, prompt=LONG + " please", group="g", pair_id="b", margin=3.0)
    other = dataclasses.replace(base, rejected="a wholly different reply", pair_id="c")
    swapped = dataclasses.replace(base, chosen=other.rejected, rejected=LONG + " yes", pair_id="d")
    kept = without_near([base, near, other, swapped], 0.9)
    assert {pair.pair_id for pair in kept} == {"b", "c", "d"}


def test_pairs_that_were_ranked_together_are_no_near_duplicates_of_each_other():
    ranked = [
        preference(chosen=LONG, rejected=f"{LONG} {ending}", pair_id=ending) for ending in ("one", "two", "three")
    ]
    ranked = [dataclasses.replace(pair, source=ranking_source(["r1"])) for pair in ranked]
    assert set(without_near(ranked, 0.9)) == set(ranked)
    elsewhere = [dataclasses.replace(pair, prompt=LONG, group=prompt_group(LONG)) for pair in ranked[:1]]
    near = [dataclasses.replace(pair, prompt=LONG + " end", group=prompt_group(LONG + " end")) for pair in elsewhere]
    assert len(without_near([*elsewhere, *near], 0.9)) == 1, (
        "rankings of two prompts are duplicates where both are alike"
    )
    voted = dataclasses.replace(ranked[0], source="file", margin=9.0)
    assert without_near([*ranked, voted], 0.9) == [voted]


def test_exact_duplicates_keep_the_surest_label():
    weak = preference(margin=1.0, pair_id="a")
    strong = preference(prompt="  where IS it?", chosen="here.", margin=2.0, pair_id="b")
    opposite = preference(chosen="There.", rejected="Here.", margin=5.0, pair_id="c")
    assert without_exact([weak, strong, opposite]) == [opposite, strong]


def test_short_texts_that_differ_in_a_word_all_stay():
    pairs = [
        preference(
            prompt=f"Notes: The lamp: aisle {aisle}. Customer: {ask}",
            chosen=f"It is in aisle {aisle}.",
            pair_id=aisle + ask,
        )
        for aisle in "ABCDEFGH"
        for ask in ("Where is the lamp?", "Hello. Where is the lamp?", "Where can I find the lamp?")
    ]
    assert len(without_near(pairs, 0.9)) == len(pairs)


def test_leaks_are_near_duplicates_of_held_out_prompts():
    heldout = [LONG + " and what does it cost", "Is the lamp 15 dollars?"]
    train = [LONG.upper() + "  and what does it cost", LONG[::-1], "Is the lamp 25 dollars?", LONG + " and what is it"]
    assert leaking_prompts(train, heldout, 0.95) == {train[0]}
    assert leaking_prompts(train, heldout, 0.9) == {train[0], train[3]}
    assert leaking_prompts(train, [], 0.9) == set()


words = st.sampled_from(["one", "two", "three", "four", "5", "6"])
phrases = st.lists(words, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(phrases, phrases, phrases, st.integers(0, 3)), max_size=12),
    seed=st.integers(0, 10),
)
def test_the_order_of_rows_changes_nothing_and_nothing_kept_is_a_duplicate(rows, seed):
    pairs = [preference(*texts, pair_id=str(i), margin=float(m)) for i, (*texts, m) in enumerate(rows)]
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    for rule in (without_exact, lambda some: without_near(some, 0.6)):
        kept = rule(pairs)
        assert kept == rule(shuffled)
        assert rule(kept) == kept
    assert len({pair.content for pair in without_exact(pairs)}) == len({pair.content for pair in pairs})
