"""How often the published 95 % intervals hold the truth, in simulated worlds with known truth, from five prompts up.

`python -m benchmarks.coverage [--runs N]` prints one line an interval and number of prompts: the mean over the worlds
of that kind, and the lowest and the highest of them. Counts are few and whole at five prompts, so that no interval of a
share can hold a given truth in exactly 95 of 100 runs: the mean over truths is what can be asked for there.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rlhf_core.evaluation.agreement_intervals import agreement_intervals, alpha_of, coincidences, kappa_of
from rlhf_core.evaluation.calibration import calibration_error
from rlhf_core.evaluation.intervals import Interval, grouped_share_interval, mean_interval, win_rate_interval
from rlhf_core.evaluation.jackknife import ratio_interval
from rlhf_core.evaluation.rank_intervals import rank_intervals

PROMPTS = (5, 8, 20)
Found = dict[str, tuple[Interval | None, float]]  # figure -> its interval and the truth
World = Callable[[np.random.Generator, int], Found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Coverage of one figure's interval at one number of prompts, over the worlds it was tried in."""

    figure: str
    prompts: int
    mean: float
    lowest: float
    highest: float


def shares(right: float, likeness: float) -> World:
    """Pairs on prompts that are easy or hard: a share of pairs in the right order."""

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        sizes = rng.integers(2, 7, prompts)
        spread = 1.0 / likeness - 1.0
        rates = rng.beta(right * spread, (1.0 - right) * spread, prompts)
        groups = np.repeat(np.arange(prompts), sizes)
        outcomes = (rng.random(len(groups)) < rates[groups]).astype(float)
        return {"pairwise accuracy": (grouped_share_interval(outcomes, groups.tolist()), right)}

    return draw


def means(skewed: float) -> World:
    """One value a prompt, normal or with a long tail: KL, scores, lengths, gains."""

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        if not skewed:
            return {"mean, KL": (mean_interval(rng.normal(2.0, 1.5, prompts)), 2.0)}
        shape = 4.0 / skewed**2
        return {"mean, KL": (mean_interval(rng.gamma(shape, 1.0, prompts)), shape)}

    return draw


def losses(spread: float, each: int) -> World:
    """Replies of prompts that are easy or hard, long or short: nats a token of all of them together."""
    many = np.random.default_rng(0)
    hardness, tokens = many.lognormal(0.0, spread, 1_000_000), 1.0 + many.negative_binomial(3, 0.1, 1_000_000)
    truth = float((hardness * tokens ** (1.0 - spread / 4.0)).sum() / tokens.sum())

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        groups = np.repeat(np.arange(prompts), each)
        tokens = 1.0 + rng.negative_binomial(3, 0.1, len(groups))
        nats = rng.lognormal(0.0, spread, prompts)[groups] * tokens ** (1.0 - spread / 4.0)  # the longer, the easier
        return {"held-out loss": (ratio_interval(nats.tolist(), tokens.tolist(), groups.tolist()), truth)}

    return draw


def win_rates(rate: float, tie: float) -> World:
    """One outcome a prompt."""

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        wins, ties, losses = rng.multinomial(prompts, [rate - tie / 2, tie, 1 - rate - tie / 2]).tolist()
        return {"win rate": (win_rate_interval(wins, ties, losses), rate)}

    return draw


def ranks(rho: float, each: int) -> World:
    """Grades and scores, both normal, with a part that responses to one prompt share."""

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        def side() -> np.ndarray:
            shared, own = rng.normal(size=(prompts, 1)), rng.normal(size=(prompts, each))
            return (math.sqrt(0.3) * shared + math.sqrt(0.7) * own).ravel()

        grades = side()
        scores = rho * grades + math.sqrt(1 - rho**2) * side()
        groups = np.repeat(np.arange(prompts), each).tolist()
        spearman, kendall = rank_intervals(groups, grades, scores, 0.95)
        return {
            "Spearman": (spearman, 6 / math.pi * math.asin(rho / 2)),
            "Kendall": (kendall, 2 / math.pi * math.asin(rho)),
        }

    return draw


def agreement(right: float, raters: int, each: int = 4) -> World:
    """Votes of raters who are right more often on easy prompts."""

    def votes(rng: np.random.Generator, prompts: int) -> list[list[int]]:
        chance = np.repeat(right + rng.uniform(-0.1, 0.1, prompts), each)[:, None]
        truth = rng.integers(0, 2, (prompts * each, 1)) * 2
        wrong = np.where(rng.random((prompts * each, raters)) < 0.3, 1, 2 - truth)
        return np.where(rng.random((prompts * each, raters)) < chance, truth, wrong).tolist()

    many = votes(np.random.default_rng(0), 20_000)
    matrix = coincidences(many, np.zeros(len(many), dtype=int)).sum(0)
    figures = {"kappa": kappa_of, "alpha": alpha_of}
    true = {name: figure(matrix) or 0.0 for name, figure in figures.items()}

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        groups = np.repeat(np.arange(prompts), each).tolist()
        found = agreement_intervals(groups, votes(rng, prompts), figures)
        return {name: (interval, true[name]) for name, interval in found.items()}

    return draw


def calibrations(scale: float, each: int = 4) -> World:
    """Pairs of a model whose log-odds are the true ones over `scale`; 1 is calibrated."""

    def gap(margins: np.ndarray) -> float:
        claimed, rate = 1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(-scale * margins))
        place = np.minimum(((claimed - 0.5) * 20).astype(int), 9)
        return float(np.abs(np.bincount(place, weights=claimed - rate)).sum() / len(margins))

    truth = gap(np.abs(np.random.default_rng(0).normal(0, 2, 1_000_000)))

    def draw(rng: np.random.Generator, prompts: int) -> Found:
        margins = np.abs(rng.normal(0, 2, prompts * each))
        right = rng.random(len(margins)) < 1 / (1 + np.exp(-scale * margins))
        found = calibration_error(np.where(right, margins, -margins), np.repeat(np.arange(prompts), each).tolist())
        low, high = found["ece_low"], found["ece_high"]
        return {"ECE": (None if low is None or high is None else (low, high), truth)}

    return draw


def worlds() -> list[World]:
    """Every world that is tried."""
    return [
        *(shares(right, likeness) for right in (0.6, 0.75, 0.85, 0.9) for likeness in (0.05, 0.2, 0.4)),
        *(means(skewed) for skewed in (0.0, 0.5, 1.0, 2.0)),
        *(losses(spread, each) for spread in (0.15, 0.3, 0.6) for each in (1, 3)),
        *(win_rates(rate, tie) for rate in (0.5, 0.6, 0.7, 0.8) for tie in (0.0, 0.1, 0.2)),
        *(ranks(rho, each) for rho in (0.0, 0.5, 0.9) for each in (2, 4)),
        *(agreement(right, raters) for right in (0.65, 0.8) for raters in (2, 3, 5)),
        *(calibrations(scale) for scale in (0.4, 1.0, 2.5)),
    ]


def coverage(tried: list[World], prompts: int, runs: int, seed: int = 0) -> list[Line]:
    """Coverage of each figure at a number of prompts."""
    found: dict[str, list[float]] = {}
    for number, world in enumerate(tried):
        rng = np.random.default_rng([seed, prompts, number])
        hits: dict[str, list[bool]] = {}
        for _ in range(runs):
            for figure, (interval, truth) in world(rng, prompts).items():
                if interval is not None:
                    low, high = interval
                    hits.setdefault(figure, []).append(low <= truth + 1e-12 and truth - 1e-12 <= high)
        for figure, held in hits.items():
            found.setdefault(figure, []).append(fmean(held))
    return [
        Line(figure=figure, prompts=prompts, mean=fmean(shares), lowest=min(shares), highest=max(shares))
        for figure, shares in found.items()
    ]


def report(runs: int) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| interval | prompts | mean | lowest | highest |"
    yield "|---|---|---|---|---|"
    for prompts in PROMPTS:
        for line in coverage(worlds(), prompts, runs):
            yield f"| {line.figure} | {line.prompts} | {line.mean:.3f} | {line.lowest:.3f} | {line.highest:.3f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="simulated data sets a world")
    for row in report(parser.parse_args().runs):
        print(row, flush=True)
