"""How many tokens go through a model together, from the lengths of a sample of rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_core.planning.activations import Reading
from rlhf_core.planning.workload import longest_mean, mean


class Rows(NamedTuple):
    """Rows, or prompts with all their responses, that make a step or a batch; of the longest that come together.

    Attributes:
        reading: all of them.
        units: how many rows or prompts.
        several: they go through the model in more than one pass.
    """

    reading: Reading
    units: int
    several: bool = False

    def cut(self, most: int | None, token_limit: int | None) -> "Rows":
        """One pass of those that they are cut into: `most` units, and about `token_limit` tokens of at least one."""
        passes = math.ceil(self.units / most) if most else 1
        if token_limit:
            passes = max(passes, min(self.units, math.ceil(self.reading.tokens / token_limit)))
        size = math.ceil(self.units / passes) / self.units if self.units else 1.0
        if token_limit and self.reading.tokens > token_limit:  # whole rows fill the limit as far as they go
            size = min(size, max(token_limit / self.reading.tokens, 1 / self.units))
        part = Reading(*(math.ceil(number * size) for number in self.reading))
        return Rows(part, math.ceil(self.units * size), passes > 1)


def examples(lengths: Sequence[tuple[int, int]], rows: int) -> Rows:
    """A step of demonstrations, each a prompt and a response; batches have rows of like length."""
    tokens = rows * longest_mean([prompt + response for prompt, response in lengths])
    share = _share(sum(response for _, response in lengths), sum(map(sum, lengths)))
    responses = round(tokens * share)
    return Rows(Reading(round(tokens), responses, responses), rows)


def groups(lengths: Sequence[Sequence[int]], count: int, *, logprobs: bool, last: bool = False) -> Rows:
    """A step of preference groups, each a prompt and its responses, the prompt read once.

    Args:
        lengths: prompt, then responses, of some groups.
        count: groups of the step.
        logprobs: responses go through the output layer.
        last: only the last state of each response is read.
    """
    tokens = count * longest_mean([sum(one) for one in lengths])
    responses = round(tokens * _share(sum(sum(one[1:]) for one in lengths), sum(map(sum, lengths))))
    answers = round(count * mean([len(one) - 1 for one in lengths]))
    return Rows(Reading(round(tokens), answers if last else responses, responses if logprobs else 0), count)


def responses_apart(lengths: Sequence[Sequence[int]], most: int, total: int, *, logprobs: bool, last: bool) -> Rows:
    """A batch of responses that are read by themselves, the longest of `total`; those to one prompt share it half
    the time."""
    each = [(one[0], response) for one in lengths for response in one[1:]]
    rows = min(most, total)
    share = min(1.0, max(1 / 64, rows / max(total, 1)))
    tokens = rows * longest_mean([prompt + response for prompt, response in each], share)
    responses = round(tokens * _share(sum(response for _, response in each), sum(map(sum, each))))
    return Rows(Reading(round(tokens), rows if last else responses, responses if logprobs else 0), rows)


def written(prompts: Sequence[int], new: float, rows: int) -> Rows:
    """A batch of responses that a model wrote, of `new` tokens each, after the longer half of the prompts."""
    responses = round(rows * new)
    return Rows(Reading(round(rows * longest_mean(prompts, 0.5)) + responses, responses, responses), rows)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
