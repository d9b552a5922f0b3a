"""Thinning a preference data set until no task, prompt or length rule dominates it. Labels are never changed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from rlhf_core.data.cleaning.labelled import Preference
from rlhf_core.data.reading.rankings import is_ranked
from rlhf_core.errors import DataError
from rlhf_core.text.identity import content_id


def cap_per_prompt(pairs: Iterable[Preference], most: int) -> list[Preference]:
    """Keep at most `most` pairs of each prompt, drawn by a hash of their content.

    The surest ones would be those that are easiest to tell apart, more often by length than others are. Pairs of
    rankings stay and do not count: a ranking without some of its pairs is none.
    """
    counts: Counter[str] = Counter()
    kept = []
    for pair in sorted(pairs, key=_place):
        counts[pair.group] += not is_ranked(pair.source)
        if is_ranked(pair.source) or counts[pair.group] <= most:
            kept.append(pair)
    return kept


def balance_tasks(pairs: Sequence[Preference], ratio: float) -> list[Preference]:
    """Thin each task to at most `ratio` times the pairs of the rarest one.

    Raises:
        DataError: there are fewer than two tasks.
    """
    buckets = _buckets(pairs, lambda pair: pair.task)
    if len(buckets) < 2:
        only = f"all {len(pairs)} pairs have task {next(iter(buckets))!r}" if buckets else "there are no pairs"
        raise DataError(f"preferences.balance_task: cannot balance: {only}. Fix: set balance_task to false")
    most = int(ratio * min(map(len, buckets.values())))
    return [pair for bucket in buckets.values() for pair in _sample(bucket, most)]


def balance_lengths(pairs: Sequence[Preference]) -> list[Preference]:
    """Thin the larger side until the longer response is chosen as often as it is rejected; equal lengths stay.

    Raises:
        DataError: one of the two sides is empty.
    """
    longer = [pair for pair in pairs if pair.length_difference > 0]
    shorter = [pair for pair in pairs if pair.length_difference < 0]
    for bucket, words in ((longer, "longer"), (shorter, "shorter")):
        if not bucket:
            raise DataError(
                f"preferences.balance_length: cannot balance: no pair of {len(pairs)} has the {words} response "
                "chosen. Fix: set balance_length to false"
            )
    most = min(len(longer), len(shorter))
    equal = [pair for pair in pairs if pair.length_difference == 0]
    return [*_sample(longer, most), *_sample(shorter, most), *equal]


def share_longer_chosen(pairs: Sequence[Preference]) -> float | None:
    """Share of pairs whose chosen response is the longer one, equal lengths counting half; None without pairs."""
    if not pairs:
        return None
    longer = sum(pair.length_difference > 0 for pair in pairs)
    equal = sum(pair.length_difference == 0 for pair in pairs)
    return (longer + equal / 2) / len(pairs)


def mean_length_difference(pairs: Sequence[Preference]) -> float | None:
    """Mean of chosen minus rejected length, in characters; None without pairs."""
    return sum(pair.length_difference for pair in pairs) / len(pairs) if pairs else None


def _buckets(pairs: Iterable[Preference], key: Callable[[Preference], str]) -> dict[str, list[Preference]]:
    buckets: defaultdict[str, list[Preference]] = defaultdict(list)
    for pair in pairs:
        buckets[key(pair)].append(pair)
    return dict(sorted(buckets.items()))


def _sample(pairs: Sequence[Preference], most: int) -> list[Preference]:
    """A part of the pairs chosen by a hash of their content: like a random one, and the same in any order of rows."""
    return sorted(pairs, key=_place)[:most]


def _place(pair: Preference) -> str:
    return content_id("balance", pair.pair_id, pair.prompt, pair.chosen, pair.rejected)
