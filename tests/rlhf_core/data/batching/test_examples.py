"""Which tokens of a dialogue are learned, worked out by hand, and how a pass over the data is laid out."""

from collections import Counter

import pytest
import torch

from rlhf_core.data.batching.epochs import balanced_rows, token_batches
from rlhf_core.data.batching.examples import Example, join_turns

# "Human: 5 Assistant:" is 5 9, a reply ends with 1
FIRST = ([5, 9], [10, 11, 1])
SECOND = ([5, 9, 10, 11, 1, 6, 9], [12, 1])
THIRD = ([5, 9, 10, 11, 1, 6, 9, 12, 1, 7, 7, 9], [13, 14, 1])


def test_a_dialogue_is_one_row_that_learns_every_reply_and_no_other_token() -> None:
    assert join_turns([FIRST, SECOND, THIRD], "chat") == [
        Example(
            prompt=[5, 9],
            response=[10, 11, 1, 6, 9, 12, 1, 7, 7, 9, 13, 14, 1],
            mask=[1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1],
            task="chat",
        )
    ]


def test_one_reply_is_an_ordinary_row() -> None:
    assert join_turns([FIRST]) == [Example([5, 9], [10, 11, 1])]
    assert Example([5, 9], [10, 11, 1]).num_targets == 3


def test_a_prompt_that_lost_its_beginning_starts_a_row_of_its_own() -> None:
    cut = (THIRD[0][-4:], THIRD[1])
    rows = join_turns([FIRST, SECOND, cut])
    assert rows[0] == Example([5, 9], [10, 11, 1, 6, 9, 12, 1], [1, 1, 1, 0, 0, 1, 1])
    assert rows[1] == Example([1, 7, 7, 9], [13, 14, 1])
    assert sum(row.num_targets for row in rows) == 8


def test_a_reply_that_was_cut_is_learned_up_to_the_cut_and_read_whole() -> None:
    assert join_turns([([5, 9], [10]), SECOND]) == [Example([5, 9], [10, 11, 1, 6, 9, 12, 1], [1, 0, 0, 0, 0, 1, 1])]


GROUPS = ["a"] * 7 + ["b"] * 2 + ["c"] * 12


def test_every_group_has_the_same_places_in_every_pass() -> None:
    for epoch in range(4):
        rows = balanced_rows(GROUPS, 0, "sft", epoch)
        assert Counter(GROUPS[row] for row in rows) == {"a": 7, "b": 7, "c": 7}


def test_a_group_goes_on_where_it_stopped_and_repeats_only_when_all_have_come() -> None:
    drawn: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for epoch in range(12):
        for row in balanced_rows(GROUPS, 0, "sft", epoch):
            drawn[GROUPS[row]].append(row)
    for name, rows in drawn.items():
        size = GROUPS.count(name)
        for start in range(0, len(rows) - size, size):
            assert len(set(rows[start : start + size])) == size, name
    assert balanced_rows(GROUPS, 0, "sft", 3) == balanced_rows(GROUPS, 0, "sft", 3), "any pass without those before"
    assert balanced_rows(GROUPS, 0, "sft", 0) != balanced_rows(GROUPS, 1, "sft", 0)


def test_places_that_do_not_divide_go_to_the_first_groups() -> None:
    rows = balanced_rows(["a", "b", "b", "b", "c"], 0, "sft", 0)
    assert Counter("abbbc"[row] for row in rows) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize("budget", [40, 300])
def test_token_batches_keep_the_budget_and_take_every_row_once(budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 40, (500,), generator=generator).tolist()
    tokens[17] = 1000
    batches = token_batches(tokens, tokens, budget, torch.Generator().manual_seed(2))
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert [17] in batches
    used = [sum(tokens[row] for row in batch) for batch in batches if batch != [17]]
    assert max(used) <= budget
    assert sum(used) / len(used) > 0.6 * budget
    assert batches == token_batches(tokens, tokens, budget, torch.Generator().manual_seed(2))
    assert batches != token_batches(tokens, tokens, budget, torch.Generator().manual_seed(3))
    padded = sum(len(batch) * max(tokens[row] for row in batch) for batch in batches)
    assert padded < 1.25 * sum(tokens), "rows of a batch are of similar length"
