"""The side-by-side table: prompts with every model's response to them.

Half of the rows are drawn at random. The other half are the prompts on which the best candidate lost most against
the baseline: what went wrong is as much worth reading as what went right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_core.evaluation.judged_set import JudgedSet


def side_by_side(
    prompts: Sequence[str],
    sets: Mapping[str, JudgedSet],
    *,
    best: str,
    gains: Sequence[float],
    count: int,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return `count` rows (fewer only where there are fewer prompts); `why` is "drawn" or "largest loss".

    `gains` is by how much `best` was judged better than the baseline on each prompt. Only prompts on which it lost
    count as losses; drawn rows fill their places where there are too few.
    """
    worst_first = sorted(range(len(prompts)), key=lambda row: (gains[row], row))
    losses = [row for row in worst_first if gains[row] < 0][: count // 2]
    order = torch.randperm(len(prompts), generator=generator).tolist()
    drawn = sorted([row for row in order if row not in losses][: count - len(losses)])
    return [
        {
            "why": why,
            "prompt": prompts[row],
            "temperature": sets[best].responses.temperature,
            "responses": {name: _response(judged, row) for name, judged in sets.items()},
        }
        for why, rows in (("drawn", drawn), ("largest loss", losses))
        for row in rows
    ]


def _response(judged: JudgedSet, row: int) -> dict[str, Any]:
    return {
        "text": judged.responses.texts[row],
        "finished": judged.responses.finished[row],
        "scores": {name: scores[row] for name, scores in judged.scores.items()},
    }
