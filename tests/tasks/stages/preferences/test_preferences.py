"""The preferences stage: every step counts what it leaves out, and neither order nor newcomers move a pair."""

import random
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.preference_stage import pair, run_preferences

from rlhf_core.config import PreferencesConfig
from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.demo.world import draw_reply, draw_scenes
from rlhf_core.errors import DataError
from rlhf_core.text.identity import prompt_group
from tasks.stages.preferences import run as preferences

LONG = " ".join(f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(80))
BACKWARDS = " ".join(reversed(LONG.split()))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stage on pairs; return metrics, funnel by step, and both tables."""
    monkeypatch.chdir(tmp_path)
    return partial(run_preferences, tmp_path)


def test_every_step_counts_what_it_leaves_out(run):
    rows = [
        pair("Held?", "good", "bad"),
        pair("Plain?", "good", "bad", "b"),
        pair("Tie?", "good", "bad", "tie", margin=0.0),
        pair("Weak?", "good", "bad", margin=0.25),
        pair("Equal?", "Good ", "good"),
        pair("Torn?", "good", "bad", "a"),
        pair("torn?", "good", "bad", "b"),
        pair("Twice?", "good", "bad"),
        pair("twice? ", "good", "bad"),
        pair(LONG, LONG + " yes", LONG + " no", margin=2.0),
        pair(LONG + " please", LONG + " yes", LONG + " no"),
        pair("Torn " + LONG, BACKWARDS, "bad", margin=2.0),
        pair("Torn " + LONG + " now", "bad", BACKWARDS + " then"),
        pair(f"held {BACKWARDS}?", "good", "bad"),
        *(pair("Many?", "good", f"bad {i}", margin=float(i)) for i in range(1, 5)),
    ]
    metrics, funnel, train, heldout = run(
        rows, ["HELD?", f"held {BACKWARDS} too?"], min_margin=0.5, max_pairs_per_prompt=3, leakage_threshold=0.9
    )
    assert metrics["removed"] == {
        "ties": 1,
        "min_margin": 1,
        "equal_responses": 1,
        "contradictions": 2,
        "near_contradictions": 1,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "leakage": 1,
        "cap_per_prompt": 1,
    }
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in heldout] == [("Held?", "good", "bad")]
    kept = {row["prompt"]: row for row in train}
    assert (kept["Plain?"]["chosen"], kept["Plain?"]["rejected"]) == ("bad", "good")
    assert LONG in kept
    assert len([row for row in train if row["prompt"] == "Many?"]) == 3
    assert (metrics["pairs_in"], metrics["pairs_train"], metrics["pairs_heldout"]) == (len(rows), 7, 1)
    assert (metrics["prompts_train"], metrics["prompts_heldout"]) == (5, 1)
    steps = list(funnel.values())
    assert [step["pairs_in"] for step in steps[1:]] == [step["pairs_out"] for step in steps[:-1]]
    assert steps[-1]["pairs_out"] == len(train) + len(heldout)


def test_balancing_thins_training_pairs_only_and_reports_both_sides_of_it(run):
    rows = [pair(f"long {i}?", "xxxx", "y", task="many") for i in range(9)]
    rows += [pair(f"short {i}?", "x", "yyyy", task="few") for i in range(3)]
    rows += [pair("Held?", "xxxx", "y")]
    metrics, funnel, train, heldout = run(rows, balance_task=True, balance_ratio=2.0, balance_length=True)
    assert funnel["balance_task"]["removed"] == 3
    assert funnel["balance_length"]["removed"] == 3
    assert metrics["tasks"] == {"few": 3, "many": 3}
    assert (metrics["share_longer_chosen_before"], metrics["share_longer_chosen"]) == (0.75, 0.5)
    assert (metrics["mean_length_difference_before"], metrics["mean_length_difference"]) == (1.5, 0.0)
    assert (len(train), len(heldout)) == (6, 1)


def test_a_cap_that_moves_the_share_of_longer_ones_says_so(run, capsys):
    rows = [pair("Many?", "good " * 9, f"bad {i}") for i in range(6)]
    rows += [pair(f"Other {name}?", "x", f"bad {name}") for name in "abcdef"]
    run([*rows, pair("Held?", "good", "bad")], max_pairs_per_prompt=1)
    assert (
        "warning: max_pairs_per_prompt moves the share of pairs whose longer response is chosen from 0.500 to 0.143"
        in (capsys.readouterr().out)
    )


def test_a_side_without_pairs_is_refused_with_what_was_lost(run):
    with pytest.raises(DataError, match=r"no held-out pair is left of 1 \(left out: none\)\. Fix") as refusal:
        run([pair("Plain?", "a", "b")])
    assert refusal.value.exit_code == 4
    with pytest.raises(DataError, match=r"no training pair is left of 2 \(left out: ties 1\)"):
        run([pair("Held?", "a", "b"), pair("Tie?", "a", "b", "tie", margin=0.0)])


def test_the_same_pairs_in_another_order_give_the_same_bytes(run, tmp_path):
    rng = random.Random(0)
    rows = [
        pair(
            f"Ask {rng.randrange(8)}?", f"x {rng.randrange(3)}", f"y {rng.randrange(3)}", rng.choice("ab"), float(i % 3)
        )
        for i in range(60)
    ]
    contents = set()
    for _ in range(4):
        rng.shuffle(rows)
        run([*rows, pair("Held?", "a", "b")], share=0.3, max_pairs_per_prompt=2)
        contents.add(b"".join((tmp_path / f"out/{name}").read_bytes() for name in ("train.parquet", "heldout.parquet")))
    assert len(contents) == 1


def test_new_pairs_move_no_old_pair_to_the_other_side(run):
    rows = [pair(f"Ask {i}?", "good", "bad") for i in range(40)]
    _, _, train, heldout = run(rows, share=0.4)
    _, _, more_train, more_heldout = run([*rows, *(pair(f"New {i}?", "good", "bad") for i in range(40))], share=0.4)
    for before, after in ((train, more_train), (heldout, more_heldout)):
        assert {row["prompt"] for row in before} <= {row["prompt"] for row in after}
    assert {row["prompt"] for row in heldout} == {
        f"Ask {i}?" for i in range(40) if is_heldout(prompt_group(f"Ask {i}?"), 0.4)
    }


def test_the_side_of_a_pair_is_the_one_that_it_came_with(run):
    """The split is applied once, in `validate`: a pair carries its side, and nobody asks the rule again."""
    rows = [pair("Plain?", "good", "bad", split="heldout"), pair("Other?", "good", "bad", split="train")]
    _, _, train, heldout = run(rows, heldout=[])
    assert ([row["prompt"] for row in train], [row["prompt"] for row in heldout]) == (["Other?"], ["Plain?"])


def test_the_demo_world_loses_no_pair_as_a_near_duplicate():
    rng = random.Random(5)
    rows = []
    for scene in draw_scenes(rng, 120, "train"):
        replies = sorted({draw_reply(rng, scene) for _ in range(4)})
        rows += [pair(scene.prompt(), a, b) for i, a in enumerate(replies) for b in replies[i + 1 :]]
    kept, funnel = preferences.clean(rows, PreferencesConfig())
    assert len(kept) == len(rows) > 500, funnel.steps


texts = st.sampled_from(["yes", "Yes ", "no", "no way", LONG, LONG + " end", LONG + " END"])
prompts = st.sampled_from(["p", "P", "q", LONG, LONG + " please"])
rows = st.lists(
    st.tuples(prompts, texts, texts, st.sampled_from(["a", "b", "tie"]), st.integers(0, 2)), max_size=14
).map(lambda items: [pair(p, a, b, label, float(m)) for p, a, b, label, m in items])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows, seed=st.integers(0, 5))
def test_cleaning_knows_no_order_and_changes_no_label(rows, seed):
    config = PreferencesConfig()
    kept, funnel = preferences.clean(rows, config)
    again, other = preferences.clean(random.Random(seed).sample(rows, len(rows)), config)
    assert set(kept) == set(again)
    assert funnel.steps == other.steps
    labels = {
        (
            row["prompt"],
            *(
                (row["response_a"], row["response_b"])
                if row["label"] == "a"
                else (row["response_b"], row["response_a"])
            ),
        )
        for row in rows
        if row["label"] != "tie"
    }
    assert {(item.prompt, item.chosen, item.rejected) for item in kept} <= labels
    contents = [item.content for item in kept]
    assert len(set(contents)) == len(contents)
    assert not {(group, b, a) for group, a, b in contents} & set(contents)
