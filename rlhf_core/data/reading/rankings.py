"""Rankings of several responses to one prompt: what makes one sound, and the choices that it implies.

`ranking[i]` is the rank of `responses[i]`; 1 is the best, equal ranks are a tie. Only the order of the ranks counts, so
[1, 2, 2, 4], [1, 2, 2, 3] and [2, 5, 5, 9] say the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from rlhf_core.text.normal import visible

RANKINGS = "rankings"
"""How the `source` of a pair begins that a ranking gave."""


def ranking_source(rankings: Sequence[str]) -> str:
    """The `source` of a pair that rankings gave: `rankings:` and their identities, a blank between."""
    return f"{RANKINGS}:{' '.join(rankings)}"


def rankings_of(source: str) -> tuple[str, ...]:
    """The identities of the rankings that a pair with this `source` comes from; none for any other pair."""
    kind, _, identities = source.partition(":")
    return tuple(identities.split()) if kind == RANKINGS else ()


def is_ranked(source: str) -> bool:
    """Whether a pair with this `source` comes from a ranking."""
    return source.partition(":")[0] == RANKINGS


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A number that a sound ranking keeps within bounds.

    Attributes:
        code: what a breach is counted under.
        name: what is measured.
        least, most: bounds, both allowed; None where there is none.
        measure: the number for (responses, ranking).
        say: words for a breach, beginning with the field.
    """

    code: str
    name: str
    least: int | None = None
    most: int | None = None
    measure: Callable[[Sequence[str], Sequence[int]], int]
    say: Callable[[Sequence[str], Sequence[int]], str]


_NONE_EMPTY = Bound(
    code="responses.empty",
    name="characters of the shortest response",
    least=1,
    measure=lambda responses, _: min((len(visible(text)) for text in responses), default=1),
    say=lambda responses, _: f"responses: item {1 + [bool(visible(text)) for text in responses].index(False)} is empty",
)


def ranking_bounds(max_response_chars: int, *, empty: bool = False) -> tuple[Bound, ...]:
    """All that must hold of a row's two lists beside each other, once both are of the right type.

    Args:
        empty: responses of which nothing can be seen are allowed.
    """
    return (
        *(() if empty else (_NONE_EMPTY,)),
        Bound(
            code="responses.few",
            name="number of responses",
            least=2,
            measure=lambda responses, _: len(responses),
            say=lambda responses, _: f"responses: holds {len(responses)}, a ranking needs at least two",
        ),
        Bound(
            code="responses.long",
            name="characters of the longest response",
            most=max_response_chars,
            measure=lambda responses, _: max(map(len, responses), default=1),
            say=lambda responses, _: (
                f"responses: item {1 + responses.index(max(responses, key=len))} is longer than {max_response_chars} "
                "characters"
            ),
        ),
        Bound(
            code="ranking.length",
            name="ranks beyond the responses",
            least=0,
            most=0,
            measure=lambda responses, ranking: len(ranking) - len(responses),
            say=lambda responses, ranking: (
                f"ranking: holds {len(ranking)} ranks for {len(responses)} responses, must have one for each"
            ),
        ),
        Bound(
            code="ranking.value",
            name="lowest rank",
            least=1,
            measure=lambda _, ranking: min(ranking, default=1),
            say=lambda _, ranking: f"ranking: holds {min(ranking)}, ranks begin with 1, the best",
        ),
    )


def ranked_choices(
    responses: Sequence[str], ranking: Sequence[int]
) -> Iterator[tuple[str, str, Literal["a", "b", "tie"]]]:
    """All C(K, 2) pairs of the responses, in the order of the list, and which of the two is better.

    Raises:
        ValueError: there are more or fewer ranks than responses.
    """
    for (one, its_rank), (other, other_rank) in combinations(zip(responses, ranking, strict=True), 2):
        yield one, other, "tie" if its_rank == other_rank else "a" if its_rank < other_rank else "b"
