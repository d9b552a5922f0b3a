"""Drawing tokens: frequencies, log-probabilities of what was drawn, cut-off distributions."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf_core.rollout.token_draw import OPEN, CutOff, draw_tokens

DRAWS = 40_000
CUT_OFFS = [OPEN, CutOff(top_k=7), CutOff(top_p=0.8), CutOff(top_k=20, top_p=0.6), CutOff(top_k=1), CutOff(top_p=1e-6)]


def logits_of(rows: int, size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def uniform_of(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def expected_logprobs(logits_BV: Tensor, temperature: float, cut_off: CutOff) -> Tensor:
    """Plain softmax in float64 over what transformers' own warpers leave."""
    scores = logits_BV.double() / temperature
    if cut_off.top_k is not None:
        scores = TopKLogitsWarper(cut_off.top_k)(None, scores)
    if cut_off.top_p < 1.0:
        scores = TopPLogitsWarper(cut_off.top_p)(None, scores)
    return scores.log_softmax(-1)


@pytest.mark.parametrize("cut_off", CUT_OFFS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, cut_off: CutOff) -> None:
    """Chi-square of 40,000 draws; the seed is fixed, and a p-value under 1e-4 would be a fault and not bad luck."""
    logits = logits_of(1, 70)
    tokens = draw_tokens(logits.expand(DRAWS, -1), temperature, uniform_of(DRAWS), cut_off).tokens_B
    counts = torch.bincount(tokens, minlength=70).double()
    expected = expected_logprobs(logits, temperature, cut_off)[0].exp() * DRAWS
    assert counts[expected == 0].sum() == 0, "a token was drawn that is cut off"
    common = expected >= 5  # the approximation needs expected counts that are not small; the rest is one class
    observed = torch.cat([counts[common], counts[~common & (expected > 0)].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common & (expected > 0)].sum()[None]])
    kept = wanted > 0
    assert kept.sum() == 1 or chisquare(observed[kept], wanted[kept]).pvalue > 1e-4


@pytest.mark.parametrize("cut_off", CUT_OFFS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_n02_both_logprobs_are_those_of_a_plain_softmax(temperature: float, cut_off: CutOff) -> None:
    """What training computes over the whole vocabulary, and what the token was really drawn with."""
    logits = logits_of(500, 1000)
    chosen = draw_tokens(logits, temperature, uniform_of(500), cut_off)
    tokens = chosen.tokens_B[:, None]
    plain = expected_logprobs(logits, temperature, OPEN).gather(1, tokens)[:, 0]
    behaviour = expected_logprobs(logits, temperature, cut_off).gather(1, tokens)[:, 0]
    torch.testing.assert_close(chosen.logprobs_B.double(), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(chosen.behaviour_logprobs_B.double(), behaviour, atol=1e-5, rtol=0)
    assert cut_off.is_open == torch.equal(chosen.logprobs_B, chosen.behaviour_logprobs_B)


def test_a_nucleus_wider_than_the_first_candidates_is_found_in_the_whole_vocabulary() -> None:
    flat, sharp = torch.zeros(1, 5000), torch.cat([torch.full((1, 3), 20.0), torch.zeros(1, 4997)], 1)
    rows = torch.cat([sharp, flat, sharp]).repeat(300, 1)
    chosen = draw_tokens(rows, 1.0, uniform_of(900), CutOff(top_p=0.9))
    assert chosen.tokens_B[0::3].max() < 3
    assert chosen.tokens_B[1::3].unique().numel() > 250
    torch.testing.assert_close(
        chosen.behaviour_logprobs_B[1::3], torch.full((300,), -math.log(4500)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(chosen.behaviour_logprobs_B[0::3], torch.full((300,), -math.log(3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [5, 64, 65, 1000])
def test_inversion_is_that_of_the_cumulative_sum(size: int) -> None:
    """Against float64; draws closer to a border than float32 resolves may fall on either side."""
    logits, uniform = logits_of(2000, size), uniform_of(2000)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform.double()[:, None], right=True)[:, 0]
    found = draw_tokens(logits, 1.0, uniform).tokens_B
    distance = (cumulative - uniform.double()[:, None]).abs().min(-1).values
    assert torch.equal(found[distance > 1e-6], expected[distance > 1e-6])
    assert (distance > 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("cut_off", CUT_OFFS)
def test_a_row_does_not_depend_on_its_batch(cut_off: CutOff) -> None:
    logits, uniform = logits_of(40, 700), uniform_of(40)
    together = draw_tokens(logits, 1.3, uniform, cut_off)
    for row in range(40):
        alone = draw_tokens(logits[row : row + 1], 1.3, uniform[row : row + 1], cut_off)
        assert [column.item() for column in alone] == [column[row].item() for column in together]


@pytest.mark.parametrize("cut_off", [OPEN, CutOff(top_k=3), CutOff(top_p=0.9)])
def test_the_ends_of_the_uniform_interval_find_a_possible_token(cut_off: CutOff) -> None:
    """Never one of probability 0, wherever in a block or at its borders it stands."""
    for first, last, size in ((1, 2, 4), (0, 63, 128), (64, 127, 200), (63, 64, 128), (130, 199, 200)):
        logits = torch.full((2, size), -math.inf)
        logits[:, [first, last]] = 0.0
        tokens = draw_tokens(logits, 1.0, torch.tensor([0.0, 1.0 - 2**-24]), cut_off).tokens_B.tolist()
        assert set(tokens) == {first, last}


def test_draws_at_the_borders_of_blocks_find_a_possible_token() -> None:
    """Where rounding puts the draw a little before or behind its block, whose first and last tokens are impossible."""
    possible = (torch.arange(1024) % 64 >= 10) & (torch.arange(1024) % 64 < 20)
    logits = logits_of(1, 1024).masked_fill(~possible, -math.inf)
    borders = logits.softmax(-1).view(-1, 64).sum(-1).cumsum(0)
    near = torch.cat([borders * (1 + step * 2**-24) for step in range(-40, 41)]).clamp(0.0, 1 - 2**-24)
    tokens = draw_tokens(logits.expand(len(near), -1), 1.0, near).tokens_B
    assert possible[tokens].all()


def test_every_row_has_its_own_temperature() -> None:
    logits, uniform = logits_of(30, 100), uniform_of(30)
    temperatures = torch.tensor([0.0, 0.7, 1.0] * 10)
    mixed = draw_tokens(logits, temperatures, uniform, CutOff(top_k=5))
    for row, temperature in enumerate(temperatures.tolist()):
        alone = draw_tokens(logits[row : row + 1], temperature, uniform[row : row + 1], CutOff(top_k=5))
        assert alone.tokens_B.item() == mixed.tokens_B[row].item()
        torch.testing.assert_close(alone.logprobs_B[0], mixed.logprobs_B[row])
        torch.testing.assert_close(alone.behaviour_logprobs_B[0], mixed.behaviour_logprobs_B[row])
    assert torch.equal(mixed.tokens_B[::3], logits[::3].argmax(-1))
    assert not mixed.behaviour_logprobs_B[::3].any(), "nothing was drawn: the token was certain"


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_a_cut_off_that_leaves_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="top_k"):
        CutOff(**wrong)
