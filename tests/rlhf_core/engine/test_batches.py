"""Padding and batch composition."""

import pytest
import torch

from rlhf_core.engine.batches import by_length, collate, cut, length_buckets


def test_prompts_left_responses_right_and_masks_from_lengths() -> None:
    batch = collate([[7, 0], [8, 9, 0]], [[0, 1], [5]], pad_id=0)  # 0 is a token of these rows too
    assert batch.prompt_width == 3
    assert batch.ids_BS.tolist() == [[0, 7, 0, 0, 1], [8, 9, 0, 5, 0]]
    assert batch.mask_BS.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.position_ids_BS.tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    assert batch.response_ids_BR.tolist() == [[0, 1], [5, 0]]
    assert batch.response_mask_BR.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert batch.response_mask_BR.dtype == torch.float32
    assert batch.num_tokens == 8


@pytest.mark.parametrize(
    ("prompts", "responses"), [([], []), ([[1]], [[1], [2]]), ([[1], []], [[1], [2]])], ids=["none", "unequal", "empty"]
)
def test_impossible_batches_are_refused(prompts: list[list[int]], responses: list[list[int]]) -> None:
    with pytest.raises(ValueError):
        collate(prompts, responses, 0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 600, 1030])
def test_every_row_comes_once_in_full_batches_but_one(rows: int) -> None:
    lengths = torch.randint(1, 50, (rows,), generator=generator(1)).tolist()
    batches = length_buckets(lengths, 8, generator(2))
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(batches) == -(-rows // 8)
    assert sum(len(batch) != 8 for batch in batches) <= 1


def test_rows_of_a_batch_are_of_similar_length_and_batches_are_shuffled() -> None:
    lengths = torch.randint(1, 50, (1024,), generator=generator(1)).tolist()
    batches = length_buckets(lengths, 16, generator(2))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.12 * sum(lengths)  # unsorted batches of 16 need about 1.9 times the tokens
    means = [sum(lengths[row] for row in batch) for batch in batches]
    assert means != sorted(means)


def test_the_generator_decides_and_nothing_else() -> None:
    lengths = list(range(100))
    assert length_buckets(lengths, 8, generator(3)) == length_buckets(lengths, 8, generator(3))
    assert length_buckets(lengths, 8, generator(3)) != length_buckets(lengths, 8, generator(4))


def test_a_pass_without_gradients_goes_from_short_to_long_and_equal_rows_in_their_order() -> None:
    assert by_length([3, 1, 3, 2, 1], 2) == [[1, 4], [3, 0], [2]]
    assert by_length([(0, 9), (1, 1), (0, 2)], 2) == [[2, 0], [1]]
    assert by_length([]) == []
    assert [len(batch) for batch in by_length([7] * 150)] == [64, 64, 22]


def test_cutting_keeps_order_and_leaves_the_rest_last() -> None:
    assert cut("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert cut([], 3) == []
