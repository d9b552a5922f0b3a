"""Splits know nothing of other rows; the normal form decides what is the same prompt."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.cleaning.splits import SplitRule, heldout_groups, is_heldout, unit_of
from rlhf_core.text.identity import prompt_group, prompt_id
from rlhf_core.text.normal import normal_form

texts = st.text(max_size=30)
groups = st.integers(0, 2**64).map(lambda number: prompt_group(str(number)))


@given(texts)
def test_normal_form_is_its_own_normal_form(text):
    assert normal_form(normal_form(text)) == normal_form(text)


@given(texts, st.sampled_from(["NFC", "NFD"]))
def test_unicode_form_white_space_and_case_make_no_other_group(text, form):
    same = "\n " + unicodedata.normalize(form, text).replace(" ", "\t ").upper().casefold() + " "
    if normal_form(text.upper()) == normal_form(text):
        assert prompt_group(same) == prompt_group(text)


def test_what_makes_a_group_and_what_an_id():
    assert prompt_group("How  much is it?\n") == prompt_group("how MUCH is it?")
    assert prompt_group("How much is it?") != prompt_group("How much is it ?")
    assert prompt_group("Cafe\u0301 STRASSE") == prompt_group("café straße")
    assert prompt_id("abc") == "ba7816bf8f01cfea"  # the published SHA-256 of abc
    assert prompt_id("How much?") != prompt_id("how much?")


@given(groups, st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_larger_share_only_adds_groups(group, one, other):
    small, large = sorted((one, other))
    assert not is_heldout(group, 0.0)
    if is_heldout(group, small):
        assert is_heldout(group, large)


def test_the_share_is_met_and_pinned():
    heldout = [number for number in range(4000) if is_heldout(prompt_group(f"prompt {number}"), 0.2)]
    assert 0.18 < len(heldout) / 4000 < 0.22
    # An old row must never move: these stay as they are in every version.
    assert heldout[:8] == [4, 8, 9, 16, 19, 23, 25, 31]


@given(st.lists(texts, min_size=1, max_size=10), st.lists(texts, max_size=10), st.floats(0, 0.9))
def test_new_rows_move_no_old_row_and_no_group_stands_on_both_sides(old, new, share):
    def sides(prompts):
        rows = [(prompt, unit_of(prompt, None, None)) for prompt in prompts]
        groups = heldout_groups(rows, {unit for _, unit in rows if is_heldout(unit, share)})
        return {prompt: SplitRule(frozenset(groups))(prompt) for prompt in prompts}

    before, after = sides(old), sides([*new, *old])
    assert {prompt: after[prompt] for prompt in old} == before
    found = {(prompt_group(prompt), side) for prompt, side in after.items()}
    assert len(found) == len({group for group, _ in found})


def test_a_group_among_the_held_out_ones_is_held_out_in_any_disguise():
    split = SplitRule(frozenset({prompt_group("how MUCH?")}))
    assert split("How much?") == "heldout"
    assert split("How many?") == "train"
    dialogue = "\n\nHuman: how\u200b much?\n\nAssistant: Ten.\n\nHuman: And two?\n\nAssistant:"
    assert split(dialogue) == "heldout"


def test_a_unit_is_what_the_column_says_or_the_dialogue():
    rows = [(f"Ask {number}?", unit_of(f"Ask {number}?", "user", f"user {number % 40}")) for number in range(400)]
    groups = heldout_groups(rows, {unit for _, unit in rows if is_heldout(unit, 0.3)})
    split = SplitRule(frozenset(groups))
    held = {number for number, (prompt, _) in enumerate(rows) if split(prompt) == "heldout"}
    assert {number % 40 for number in held}.isdisjoint({number % 40 for number in set(range(400)) - held})
    assert 0 < len(held) < 400
    assert unit_of("p", "user", " ANN\u200b ") == unit_of("q", "user", "ann") != unit_of("q", "source", "ann")
    assert unit_of("How much?", "user", None) == unit_of("how MUCH?", None, "ann") == prompt_group("how much?")
