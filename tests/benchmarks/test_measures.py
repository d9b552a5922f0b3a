"""What the benchmarks count: lengths, operations, and the table made of them."""

from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks.clock import Clock
from benchmarks.flops import data_tokens, decode_bytes, model_flop, num_weights, training_flop
from benchmarks.rates import bandwidth, matmul_rate
from benchmarks.table import page
from benchmarks.workload import END, PROMPT_TOKENS, RESPONSE_MOST, SIZES, Pair, Size, Subject, make_pairs

TOY = Size(hidden=2, layers=3, heads=1, intermediate=5, vocabulary=7)
ROW = Pair(prompt=[9, 9], chosen=[9], rejected=[9, 9, 9])


def test_lengths_follow_the_law_and_the_seed() -> None:
    subject = Subject(folder=Path(), size=TOY, pad=0, end=END, words=range(2, 100))
    pairs = make_pairs(400, subject, seed=3)
    assert pairs == make_pairs(400, subject, seed=3)
    responses = [row.chosen for row in pairs] + [row.rejected for row in pairs]
    assert {len(row.prompt) for row in pairs} <= set(range(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
    assert max(map(len, responses)) <= RESPONSE_MOST
    assert 44 <= median(map(len, responses)) <= 52
    assert all(response[-1] == END and END not in response[:-1] for response in responses)


@pytest.mark.parametrize(
    ("reads", "expected", "tokens"),
    [
        # Of h = 2, i = 5: queries, keys, values 6 h h = 24 a token and layer, the rest 2 h h + 6 h i = 68.
        # chosen: 3 tokens, 1 wanted. 24 * 3 * 3 + 68 * (2 * 3 + 1) + attention 2 h * 3 * 3^2 + output 2 h * 7 * 1.
        ("chosen", 3 * (216 + 476 + 108 + 28), 3),
        # both: 2 + 1 + 3 tokens, 4 wanted; places seen: 2^2 + (3^2 - 2^2) + (5^2 - 2^2) = 30.
        ("both", 3 * (24 * 18 + 68 * (12 + 4) + 4 * 3 * 30 + 28 * 4), 8),
        # ends: the same tokens, 2 wanted, one output each.
        ("ends", 3 * (24 * 18 + 68 * (12 + 2) + 4 * 3 * 30 + 4 * 2), 8),
    ],
)
def test_operations_by_hand(reads: str, expected: int, tokens: int) -> None:
    assert training_flop(TOY, [ROW], reads) == expected
    assert training_flop(TOY, [ROW, ROW], reads) == 2 * expected
    assert data_tokens([ROW], reads) == tokens


def test_model_operations_by_hand() -> None:
    """Weights: 3 (4 h h + 3 h i) + h 7 = 3 (16 + 30) + 14; attention 12 * 3 * h = 72 a token and token of its row."""
    assert num_weights(TOY) == 3 * 46 + 14 == 152
    assert model_flop(TOY, [ROW], "chosen") == 6 * 152 * 3 + 72 * 3**2
    assert model_flop(TOY, [ROW], "both") == 6 * 152 * 8 + 72 * (3**2 + 5**2)
    assert model_flop(TOY, [ROW], "ends") == 6 * 138 * 8 + 72 * (3**2 + 5**2)


def test_grouped_queries_and_frozen_weights_by_hand() -> None:
    """Of h = 4, 2 heads, 1 of keys, i = 5: queries, keys and values 2 h (4 + 2 + 2) = 64, the rest 2 h h + 6 h i = 152.

    3 tokens, 1 wanted, one layer: 64 * 3 + 152 + attention 2 h * 3^2 + output 2 h * 7. Weights 4 h + 4 h + 3 h i + 7 h.
    """
    size = Size(hidden=4, layers=1, heads=2, intermediate=5, vocabulary=7, kv_heads=1)
    forward = 64 * 3 + 152 + 72 + 56
    assert training_flop(size, [ROW], "chosen") == 3 * forward
    assert training_flop(size, [ROW], "chosen", frozen=True) == 2 * forward
    assert num_weights(size) == 136
    attention = 12 * 1 * 4 * 3**2
    assert model_flop(size, [ROW], "chosen", frozen=True) == 4 * 136 * 3 + attention
    assert decode_bytes(size, [2], 2, at_once=1, width=2) == 2 * (136 + 2 * 2 * 3)


def test_bytes_of_decoding_by_hand() -> None:
    """Prompts of 2 and 5 tokens, 3 new ones: two steps read 3 + 4 and 6 + 7 places of 2 * 3 * h = 12 numbers."""
    assert decode_bytes(TOY, [2, 5], 3, at_once=2, width=2) == 2 * (2 * 152 + 12 * 20)
    assert decode_bytes(TOY, [2, 5], 3, at_once=1, width=4) == 4 * (2 * 2 * 152 + 12 * 20)
    assert decode_bytes(TOY, [2, 5], 1, at_once=2, width=2) == 0.0, "one token comes with the prompt"


def test_parameters_of_the_large_sizes() -> None:
    """With both embeddings: about 0.1 and 0.5 billion."""
    for name, low, high in (("L", 0.10e9, 0.15e9), ("XL", 0.45e9, 0.55e9)):
        size = SIZES[name]
        assert low < num_weights(size) + size.hidden * size.vocabulary < high
        assert size.hidden // size.heads == 64


def test_the_bandwidth_is_that_of_a_copy() -> None:
    """Within a factor of three of one large copy, whatever else the machine does."""
    source = torch.ones(2**27, dtype=torch.uint8)
    target = source.clone()
    clock = Clock(warmup=0)
    clock.begin()
    for _ in range(4):
        target.copy_(source)
    clock.tick(1)
    plain = 4 * 2 * 2**27 / clock.figures()["wall_s"]
    assert plain / 3 < bandwidth() < 3 * plain


def test_the_matmul_rate_is_what_torch_reaches() -> None:
    """Within a factor of three of one large product, whatever else the machine does."""
    one, two = torch.randn(1024, 1024), torch.randn(1024, 1024)
    clock = Clock(warmup=0)
    clock.begin()
    for _ in range(4):
        one @ two
    clock.tick(1)
    plain = 4 * 2 * 1024**3 / clock.figures()["cpu_s"]
    assert plain / 3 < matmul_rate(SIZES["S"], with_output=True) < 3 * plain


def test_the_clock_leaves_the_warm_up_out() -> None:
    clock = Clock(warmup=2)
    clock.begin()
    for tokens in (100, 100, 7, 8):
        clock.tick(tokens)
    figures = clock.figures()
    assert (figures["steps"], figures["tokens"]) == (2, 15)
    assert figures["peak_mb"] > 0
    nothing = Clock(warmup=1)
    nothing.begin()
    nothing.tick(5)
    with pytest.raises(RuntimeError, match="nothing was measured"):
        nothing.figures()


def test_the_table_says_which_bars_are_met() -> None:
    ours = {"tokens": 2000, "cpu_s": 1.0, "wall_s": 1.0, "peak_mb": 400.0}
    ours |= {"flop_per_token": 4e6, "matmul_flop_per_s": 1e10}
    peer = {"tokens": 1000, "cpu_s": 1.0, "wall_s": 2.0, "peak_mb": 1000.0}
    setting = {"size": "S", "rows": 16, "responses": 64, "steps": 2, "threads": 1, "device": "cpu"}
    row = page(setting, {"sft": [{"ours": ours, "trl": peer}]}).splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:6] == ["**2.00** (2.00)", "1.8 met", "4.00"]
    assert cells[8:] == ["0.40 (bar 0.5 met)", "80% of 10 GFLOP/s (bar 60% met)"]
    slower = page(setting, {"sft": [{"ours": ours | {"cpu_s": 2.0, "peak_mb": 600.0}, "trl": peer}]})
    assert slower.count("**missed**") == 3


def test_a_table_of_a_gpu_counts_seconds_of_the_clock() -> None:
    ours = {"tokens": 2000, "cpu_s": 1.0, "wall_s": 2.0, "peak_mb": 400.0}
    counted = ours | {"flop_per_token": 4e6, "model_flop_per_token": 5e6, "matmul_flop_per_s": 1e10}
    peer = {"tokens": 1000, "cpu_s": 9.0, "wall_s": 4.0, "peak_mb": 1000.0}
    setting = {"size": "L", "rows": 128, "responses": 64, "steps": 2, "threads": 1, "device": "cuda"}
    found = {
        "sft": [{"ours": counted, "trl": peer}],
        "reward": [{"ours": counted}],
        "sampling": [{"ours": ours | {"bytes_per_token": 1e6, "bytes_per_s": 4e9}, "trl": peer}],
    }
    text = page(setting, found, "a GPU")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert text.startswith("Size L, 128 examples")
    assert "Machine: a GPU." in text
    assert rows[0][1] == "tokens/s ours"
    assert len(rows[0]) == len(rows[2]) == len(rows[3]) == len(rows[4])
    assert rows[2][1:6] == ["1,000", "250", "**4.00** (4.00)", "", "4.00"]
    assert rows[2][9:] == ["40% of 10 GFLOP/s", "50%", "12%"]
    assert rows[3][2].startswith("not measured")
    assert rows[3][11] == ""
    assert rows[4][9:] == ["25% of 4 GB/s", "", ""]
