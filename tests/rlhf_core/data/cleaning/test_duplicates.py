"""Near duplicates against brute force over all pairs, and what must never count as one."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.cleaning.banding import MISS_PROBABILITY, NUM_PERMUTATIONS, Banding, Buckets, Members, alike, bands
from rlhf_core.data.cleaning.duplicates import without_exact, without_near, without_near_contradictions
from rlhf_core.data.cleaning.labelled import Preference, without_equal
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.text.identity import prompt_identity
from rlhf_core.text.likeness import shingles, similarity
from rlhf_core.text.transcripts import parse_messages

LONG = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))


def preference(prompt="Where is it?", chosen="Here.", rejected="There.", pair_id="p", margin=1.0):
    return Preference(
        pair_id=pair_id,
        prompt_id="id",
        prompt=prompt,
        group=prompt_identity(prompt),
        task="",
        split="train",
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


def test_ids_of_calls_make_no_other_pair():
    """A server numbers its calls anew each time; what is asked, called and answered is the same."""

    def pair(name, item="lamp"):
        call = {"id": f"call_{name}", "function": {"name": "stock", "arguments": {"item": item, "of": 3}}}
        asked = [{"role": "user", "content": LONG}, {"role": "assistant", "tool_calls": [call]}]
        answer = {"role": "tool", "content": "None.", "tool_call_id": f"call_{name}"}
        again = {"role": "assistant", "content": "Let me look once more.", "tool_calls": [call]}
        dialogue = parse_messages([*asked, answer, again])
        return preference(prompt=dialogue.prompt, chosen=dialogue.response, rejected="No idea.", pair_id=name)

    assert [kept.pair_id for kept in without_near([pair("1"), pair("22")], 0.9)] == ["1"]
    assert len(without_near([pair("1"), pair("22", item="a red rug")], 0.9)) == 2


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
    banding = Banding(threshold, [frozenset()])
    members = Members(Buckets(banding.table([(text,) for text in texts], len(texts))))
    found = set()
    for position, text in enumerate(texts):
        near = [other for other in members.beside(position) if banding.alike((text,), (texts[other],))]
        assert len(near) == len(set(near))
        found |= {(other, position) for other in near}
        members.add(position)
    assert len(expected) > 20
    assert found <= expected, "something below the threshold was called a near duplicate"
    assert len(expected - found) <= 0.001 * len(expected)


def test_an_item_is_alike_only_in_all_its_texts():
    assert alike((LONG, LONG + " end"), (LONG, LONG + " end"), 1.0)
    assert not alike((LONG, LONG + " end"), (LONG, "something else entirely"), 0.9)
    assert alike((LONG + " end", LONG), (LONG, LONG + " end"), 0.9)


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
    elsewhere = [dataclasses.replace(pair, prompt=LONG, group=prompt_identity(LONG)) for pair in ranked[:1]]
    near = [dataclasses.replace(pair, prompt=LONG + " end", group=prompt_identity(LONG + " end")) for pair in elsewhere]
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


def test_near_duplicates_with_opposite_labels_keep_the_stronger_side():
    asked, yes, no = LONG, LONG + " yes", " ".join(reversed(LONG.split()))
    one = preference(prompt=asked, chosen=yes, rejected=no, pair_id="a", margin=2.0)
    against = preference(prompt=asked + " please", chosen=no, rejected=yes + " indeed", pair_id="b", margin=1.0)
    beside = preference(prompt=asked + " please", chosen=no + " well", rejected=yes, pair_id="c", margin=1.5)
    unlike = preference(prompt="Another?", chosen=no, rejected=yes, pair_id="d", margin=9.0)
    assert set(without_near_contradictions([one, against, unlike], 0.9)) == {one, unlike}
    assert set(without_near_contradictions([one, against, beside, unlike], 0.9)) == {against, beside, unlike}
    even = dataclasses.replace(one, margin=1.0)
    assert without_near_contradictions([even, against], 0.9) == []
    assert without_near_contradictions([even, dataclasses.replace(against, num_votes=6)], 0.9)[0].pair_id == "b"


def test_which_of_two_like_responses_is_better_contradicts_nothing():
    pairs = [
        preference(prompt=LONG, chosen=LONG + " one", rejected=LONG + " two", pair_id="a"),
        preference(prompt=LONG + " please", chosen=LONG + " two", rejected=LONG + " one", pair_id="b"),
    ]
    assert set(without_near_contradictions(pairs, 0.9)) == set(pairs)
    ranked = [
        preference(prompt=LONG, chosen=LONG, rejected="No.", pair_id="a"),
        preference(prompt=LONG, chosen="No.", rejected=LONG + " well", pair_id="b"),
    ]
    assert without_near_contradictions(ranked, 0.9) == []
    ranked = [dataclasses.replace(pair, source=ranking_source(["r"])) for pair in ranked]
    assert set(without_near_contradictions(ranked, 0.9)) == set(ranked)


def test_pairs_under_other_instructions_are_no_duplicates():
    pairs = [
        preference(prompt=f"{system}\n\nHuman: {LONG}\n\nAssistant:", chosen=LONG, rejected="No.", pair_id=system)
        for system in ("Answer at length, as a friend.", "Answer in one word, as a clerk.")
    ]
    assert set(without_near(pairs, 0.9)) == set(pairs)
    turned = [pairs[0], dataclasses.replace(pairs[1], chosen="No.", rejected=LONG)]
    assert set(without_near_contradictions(turned, 0.9)) == set(turned)


def test_a_threshold_of_one_leaves_out_what_differs_in_punctuation_alone():
    base = preference(prompt=LONG, chosen=LONG, rejected="No.", pair_id="a")
    same = dataclasses.replace(base, prompt=LONG + "!", rejected="no", pair_id="b")
    near = dataclasses.replace(base, prompt=LONG + " end", pair_id="c")
    assert set(without_near([base, same, near], 1.0)) == {base, near}


def test_near_duplicates_are_found_in_chinese():
    asked = "请问在北京春天的时候有什么好玩的地方可以带孩子一起去而且不需要花太多钱最好还能坐地铁到达" * 2
    base = preference(prompt=asked, chosen=asked + "可以去公园", rejected="不知道", pair_id="a")
    near = dataclasses.replace(base, prompt=asked + "呢", pair_id="b")
    other = dataclasses.replace(base, chosen="去长城和故宫都很好", pair_id="c")
    assert set(without_near([base, near, other], 0.9)) == {base, other}


def test_responses_that_differ_in_what_cannot_be_seen_are_equal():
    same = preference(chosen="Yes\u200b.", rejected="yes\ufeff. \u2800")
    assert without_equal([same, preference(chosen="👩\u200d🚀", rejected="👩🚀")]) == [
        preference(chosen="👩\u200d🚀", rejected="👩🚀")
    ]
    twice = [preference(pair_id="a"), preference(prompt="Where\u2060 is it?", chosen="He\u00adre.", pair_id="b")]
    assert len(without_exact(twice)) == 1


def test_likeness_is_asked_of_few_pairs_under_shared_instructions(monkeypatch):
    """A count and not a time: what is shared by all must not make every pair a candidate of every other."""
    instructions = " ".join(f"rule{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500))
    rng = random.Random(4)
    texts = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(4000)]
    pairs = [
        preference(
            prompt=f"{instructions} {' '.join(rng.sample(texts, 8))}",
            chosen=" ".join(rng.sample(texts, 8)),
            rejected="I am sorry, but that is nothing that I could ever help anybody with, " + instructions[:100],
            pair_id=str(number),
        )
        for number in range(400)
    ]
    asked = []
    monkeypatch.setattr(Banding, "alike", lambda *_: asked.append(1) and False)
    assert len(without_near(pairs, 0.9)) == len(without_near_contradictions(pairs, 0.9)) == 400
    assert len(asked) < 400
