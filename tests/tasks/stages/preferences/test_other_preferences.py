"""Pairs beside the preferences on the whole: ties, criteria that labels or grades name, and rankings."""

import json
from functools import partial

import pytest
from support.preference_stage import pair, read, run_preferences

from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.errors import DataError
from rlhf_core.text.identity import content_id, prompt_group


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stage on pairs; return metrics, funnel by step, and both tables."""
    monkeypatch.chdir(tmp_path)
    return partial(run_preferences, tmp_path)


def test_ties_are_handed_on_only_where_they_are_kept(run, tmp_path):
    rows = [
        pair("Plain?", "good", "bad"),
        pair("Held?", "good", "bad"),
        pair("Tie?", "one", "two", "tie", margin=0.0),
        pair("tie? ", "Two", "one", "tie", margin=0.0),  # the same tie again
        pair("Plain?", "bad", "good", "tie", margin=0.0),  # other rows prefer one of the two
        pair("Held?", "one", "two", "tie", margin=0.0),
    ]
    without, _, train, heldout = run(rows)
    assert read(tmp_path, "other_pairs") == []
    kept, _, same_train, same_heldout = run(rows, keep_ties=True)
    assert (train, heldout) == (same_train, same_heldout)
    found = [
        (row["prompt"], row["chosen"], row["split"], row["tie"], row["margin"]) for row in read(tmp_path, "other_pairs")
    ]
    assert sorted(found) == [("Held?", "one", "heldout", True, 0.0), ("Tie?", "one", "train", True, 0.0)]
    assert kept == without | {"ties_train": 1}


def test_pairs_of_several_raters_carry_the_share_that_agrees(run, tmp_path):
    """By hand. x and y: ann, bob find x better, cem y: 2/3. z: only ann graded it and the others. p and q: nobody
    graded both. Of the unnamed 5, 1 for u and 4 for v the means are 3 and 4."""
    grades = {
        "x": {"ann": (5,), "bob": (4,), "cem": (1,)}, "y": {"ann": (2,), "bob": (2,), "cem": (3,)}, "z": {"ann": (6,)},
    }  # fmt: skip
    unnamed = {"u": {"file": (5, 1)}, "v": {"file": (4,)}}
    apart = {"p": {"ann": (3,)}, "q": {"bob": (1,)}}
    rows = [
        {"prompt": prompt, "response": text, "criterion": "harmless", "annotator": name, "score": float(score)}
        for prompt, given in (("Plain?", grades), ("Other?", unnamed), ("Apart?", apart))
        for text, by_name in given.items()
        for name, scores in by_name.items()
        for score in scores
    ]
    run([pair("Plain?", "good", "bad"), pair("Held?", "good", "bad")], grades=rows)
    found = {(row["chosen"], row["rejected"]): row for row in read(tmp_path, "other_pairs")}
    assert {key: round(row["agreement"], 4) for key, row in found.items()} == {
        ("x", "y"): 0.6667, ("z", "x"): 1.0, ("z", "y"): 1.0, ("v", "u"): 1.0, ("p", "q"): 1.0,
    }  # fmt: skip
    assert found["x", "y"]["margin"] == pytest.approx(10 / 3 - 7 / 3)
    run([pair("Plain?", "good", "bad"), pair("Held?", "good", "bad")], grades=rows, min_grade_gap=1.5, keep_ties=True)
    found = {(row["chosen"], row["rejected"]): row for row in read(tmp_path, "other_pairs")}
    assert found["x", "y"]["tie"]
    assert found["x", "y"]["agreement"] == 0, "nobody finds them within 1.5 of each other, though their means are"
    assert found["z", "x"]["agreement"] == 0, "ann finds z better by 1 only, the means by more than 1.5"


def test_grades_on_a_criterion_become_pairs(run, tmp_path):
    grades = {"worst": 1.0, "middle": 2.0, "equal": 2.0, "best": 4.0}
    rows = [
        {"prompt": prompt, "response": text, "criterion": "harmless", "score": score}
        for prompt in ("Plain?", "Held?")
        for text, score in grades.items()
    ]
    labelled = [pair("Plain?", "good", "bad"), pair("Held?", "good", "bad")]
    metrics, *_ = run(labelled, grades=rows)
    found = {
        (row["prompt"], row["split"], row["criterion"], row["chosen"], row["rejected"], row["margin"])
        for row in read(tmp_path, "other_pairs")
    }
    expected = [
        ("middle", "worst", 1.0), ("equal", "worst", 1.0), ("best", "worst", 3.0),
        ("best", "middle", 2.0), ("best", "equal", 2.0),
    ]  # fmt: skip
    assert found == {
        (prompt, split, "harmless", *one)
        for prompt, split in (("Plain?", "train"), ("Held?", "heldout"))
        for one in expected
    }
    assert (metrics["criteria"], metrics["criteria_heldout"]) == ({"harmless": 5}, {"harmless": 5})
    wider, *_ = run(labelled, grades=rows, min_grade_gap=1.0, max_pairs_per_prompt=2)
    assert [row["margin"] for row in read(tmp_path, "other_pairs") if row["split"] == "train"].count(3.0) == 1
    assert wider["criteria"] == {"harmless": 2}, "the widest of three"
    assert {row["rejected"] for row in read(tmp_path, "other_pairs")} <= {"worst", "middle", "equal"}
    tied, *_ = run(labelled, grades=rows, keep_ties=True)
    assert tied == metrics | {"ties_train": 1}


def on(criterion, *args, **more):
    return pair(*args, criterion=criterion, **more)


def contents(rows):
    return sorted((row["prompt"], row["criterion"], row["chosen"], row["rejected"], row["tie"]) for row in rows)


LABELLED = [pair("Plain?", "good", "bad"), pair("Held?", "good", "bad")]


def test_labels_on_a_criterion_are_cleaned_by_themselves_and_leave_the_others_as_they_are(run, tmp_path):
    rows = [
        on("harmless", "Plain?", "bad", "good"),  # the opposite of `overall`, and no contradiction of it
        on("harmless", "plain? ", "Bad", "good"),  # the same again
        on("harmless", "Torn?", "one", "two", "a"),
        on("harmless", "torn?", "one", "two", "b"),
        on("harmless", "Held?", "bad", "good"),
        on("harmless", "Tie?", "one", "two", "tie", margin=0.0),
        on("tone", "Weak?", "one", "two", margin=0.25),
        on("tone", "Plain?", "warm", "cold"),
    ]
    plain, _, train, heldout = run(LABELLED, min_margin=0.5)
    metrics, _, same_train, same_heldout = run([*LABELLED, *rows], min_margin=0.5)
    assert (train, heldout) == (same_train, same_heldout)
    assert contents(read(tmp_path, "other_pairs")) == [
        ("Held?", "harmless", "bad", "good", False),
        ("Plain?", "harmless", "bad", "good", False),
        ("Plain?", "tone", "warm", "cold", False),
    ]
    assert {row["prompt"]: row["split"] for row in read(tmp_path, "other_pairs")} == {
        "Held?": "heldout",
        "Plain?": "train",
    }
    removed = metrics.pop("criteria_removed")
    assert metrics == plain | {"criteria": {"harmless": 1, "tone": 1}, "criteria_heldout": {"harmless": 1}}
    assert {step: count for step, count in removed["harmless"].items() if count} == {
        "ties": 1,
        "contradictions": 2,
        "exact_duplicates": 1,
    }
    assert {step: count for step, count in removed["tone"].items() if count} == {"min_margin": 1}
    funnels = json.loads((tmp_path / "out/criteria_funnel.json").read_text())
    assert [(funnels[name][0]["pairs_in"], funnels[name][-1]["pairs_out"]) for name in ("harmless", "tone")] == [
        (6, 2),
        (2, 1),
    ]


def test_ties_on_a_criterion_keep_it(run, tmp_path):
    rows = [on("harmless", "Tie?", "one", "two", "tie", margin=0.0), pair("Tie?", "one", "two", "tie", margin=0.0)]
    metrics, *_ = run([*LABELLED, *rows], keep_ties=True)
    assert contents(read(tmp_path, "other_pairs")) == [
        ("Tie?", "harmless", "one", "two", True),
        ("Tie?", "overall", "one", "two", True),
    ]
    assert metrics["ties_train"] == 2


def test_what_people_compared_is_not_derived_from_grades(run, tmp_path):
    grades = [
        {"prompt": "Plain?", "response": text, "criterion": "harmless", "score": score}
        for text, score in {"good": 3.0, "bad": 1.0, "middle": 2.0}.items()
    ]
    rows = [on("harmless", "Plain?", "Bad", "Good"), on("tone", "Plain?", "middle", "bad")]
    run([*LABELLED, *rows], grades=grades)
    found = contents(row for row in read(tmp_path, "other_pairs") if row["criterion"] == "harmless")
    assert found == [
        ("Plain?", "harmless", "Bad", "Good", False),
        ("Plain?", "harmless", "good", "middle", False),
        ("Plain?", "harmless", "middle", "bad", False),
    ]


@pytest.mark.parametrize("named", [True, False])
def test_no_prompt_is_held_out_on_one_criterion_and_trained_on_in_another(run, tmp_path, named):
    """Nor is one that is nearly the same, whether the prompt is held out by name or by its hash."""
    share = 0.1
    words = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))
    endings = [f"{words} end{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    near, *_, held = sorted(endings, key=lambda prompt: is_heldout(prompt_group(prompt), share))
    assert is_heldout(prompt_group(held), share)
    rows = [*LABELLED, pair(near, "good", "bad"), on("harmless", held, "good", "bad"), on("tone", near, "one", "two")]
    metrics, _, train, _ = run(rows, heldout=["Held?", *([held] if named else [])], share=0.0 if named else share)
    assert [row["prompt"] for row in train] == ["Plain?"]
    assert contents(read(tmp_path, "other_pairs")) == [(held, "harmless", "good", "bad", False)]
    assert (metrics["removed"]["leakage"], metrics["criteria_removed"]["tone"]["leakage"]) == (1, 1)


def test_training_pairs_of_a_criterion_are_capped_and_held_out_ones_are_not(run, tmp_path):
    rows = [
        on("harmless", prompt, f"good {i}", f"bad {i}", margin=float(i))
        for prompt in ("Plain?", "Held?")
        for i in range(1, 5)
    ]
    metrics, *_ = run([*LABELLED, *rows], max_pairs_per_prompt=3)
    assert (metrics["criteria"], metrics["criteria_heldout"]) == ({"harmless": 3}, {"harmless": 4})
    assert metrics["criteria_removed"]["harmless"]["cap_per_prompt"] == 1
    kept = {row["margin"] for row in read(tmp_path, "other_pairs") if row["split"] == "train"}
    assert kept < {1.0, 2.0, 3.0, 4.0}
    assert len(kept) == 3


@pytest.mark.parametrize("criterion", ["overall", "harmless"])
def test_the_cap_leaves_rankings_whole(run, tmp_path, criterion):
    texts = ["one", "two", "three", "four"]
    ranked = [
        on(criterion, "Ranked?", better, worse, source=ranking_source(["r1"]))
        for place, better in enumerate(texts)
        for worse in texts[place + 1 :]
    ]
    loose = [on(criterion, "Ranked?", f"good {i}", f"bad {i}", margin=float(i)) for i in range(1, 4)]
    _, _, train, _ = run([*LABELLED, *ranked, *loose], max_pairs_per_prompt=1)
    rows = train if criterion == "overall" else read(tmp_path, "other_pairs")
    kept = [(row["chosen"], row["rejected"]) for row in rows if row["prompt"] == "Ranked?"]
    assert set(kept) > {(row["response_a"], row["response_b"]) for row in ranked}
    assert len(kept) == len(ranked) + 1
    assert sum(row["source"] == ranking_source(["r1"]) for row in rows) == len(ranked)


def test_labels_on_a_criterion_do_not_replace_those_on_the_whole(run):
    rows = [on("harmless", "Plain?", "good", "bad"), on("harmless", "Held?", "good", "bad")]
    with pytest.raises(DataError, match=r"no training pair is left of 0 .*on 'overall', which no other criterion"):
        run(rows)


def test_one_pair_has_one_id_on_every_criterion(run, tmp_path):
    run([*LABELLED, on("harmless", "Plain?", "good", "bad")])
    (other,) = read(tmp_path, "other_pairs")
    assert other["pair_id"] == content_id("Plain?", "good", "bad") == read(tmp_path, "train")[0]["pair_id"]
