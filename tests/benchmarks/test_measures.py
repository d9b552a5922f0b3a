"""What the benchmarks count: lengths, operations, and the table made of them."""

from statistics import median

import pytest
import torch

from benchmarks.clock import Clock
from benchmarks.flops import data_tokens, matmul_rate, training_flop
from benchmarks.table import page
from benchmarks.workload import END, PROMPT_TOKENS, RESPONSE_MOST, SIZES, Pair, Size, make_pairs

TOY = Size(hidden=2, layers=3, heads=1, intermediate=5, vocabulary=7)
ROW = Pair(prompt=[9, 9], chosen=[9], rejected=[9, 9, 9])


def test_lengths_follow_the_law_and_the_seed() -> None:
    pairs = make_pairs(400, 100, seed=3)
    assert pairs == make_pairs(400, 100, seed=3)
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
    setting = {"size": "S", "rows": 16, "steps": 2, "threads": 1}
    row = page(setting, {"sft": [{"ours": ours, "trl": peer}]}).splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:6] == ["**2.00** (2.00)", "1.8 met", "4.00"]
    assert cells[8:] == ["0.40 (bar 0.5 met)", "80% of 10 GFLOP/s (bar 60% met)"]
    slower = page(setting, {"sft": [{"ours": ours | {"cpu_s": 2.0, "peak_mb": 600.0}, "trl": peer}]})
    assert slower.count("**missed**") == 3
