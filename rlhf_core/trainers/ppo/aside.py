"""Responses of which something is no number: found before anything is learned, set aside, counted and named.

One such response would make every advantage of its rollout NaN, for all are whitened together. Its place in the passes
through the models is taken by a copy of a good response that counts for nothing: what is not finite must not even be
computed with, since 0 times NaN is NaN in a gradient, and every process goes through its models equally often.
Shape suffixes: B = rows of a part, R = response tokens, N = all responses of the rollout, Q = quantities.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.config.ppo import ADVANTAGE_ROWS
from rlhf_core.objectives.masked import zero_masked
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.optimisation import note_refusal
from rlhf_core.trainers.ppo.parts import Rollout, RolloutPart
from rlhf_core.trainers.ppo.replay import Written

SET_ASIDE = "set_aside"
NAMED = 20
"""Responses that are named in the state and in the stage's metrics; all are counted."""
LARGEST = 1e15
"""A log-probability or value beyond it is none either: float32 cannot square the sums of such numbers."""
QUANTITIES = (
    "log-probability under the policy",
    "log-probability under the reference",
    "value",
    "value of the last state",
    "entropy",
    "importance weight",
    "score",
)
ALONE_IN_ITS_GROUP = "no other response is left to compare it with"


def not_finite(rollout: Rollout, world: World = ALONE) -> dict[int, str]:
    """Rows that count and of which something is not a finite number, and what; the same in all processes."""
    first_N = rollout.gather([_first_bad(part) * (part.counts_B > 0) for part in rollout.parts()], world)
    return {row: QUANTITIES[int(bad) - 1] for row, bad in enumerate(first_N.tolist()) if bad}


def _first_bad(part: RolloutPart) -> Tensor:
    """1 + the number of the first quantity of each row that is not finite; 0 where all are, first_B."""
    mask_BR = part.batch.response_mask_BR
    columns = (
        zero_masked(part.old_logprobs_BR, mask_BR),
        zero_masked(part.ref_logprobs_BR, mask_BR),
        zero_masked(part.old_values_BR, mask_BR),
        part.last_values_B[:, None],
        zero_masked(part.entropy_BR, mask_BR),
        zero_masked(part.weights_BR, mask_BR),
    )
    bad = [~(column.abs() <= LARGEST).all(1) for column in columns]  # NaN is at most nothing
    bad_BQ = torch.stack([*bad, ~part.scores_B.isfinite()], 1)
    return torch.where(bad_BQ.any(1), bad_BQ.int().argmax(1) + 1, 0)


def left_alone(cfg: PPOConfig, num_rows: int, aside: Mapping[int, str]) -> dict[int, str]:
    """Rows that lost all the others which the method compares them with."""
    if cfg.has_value_model or not aside:
        return {}
    compares = ADVANTAGE_ROWS[cfg.advantages.method].compares
    size = num_rows if compares == "rollout" else cfg.responses_per_prompt
    groups = [[row for row in range(start, start + size) if row not in aside] for start in range(0, num_rows, size)]
    return {group[0]: ALONE_IN_ITS_GROUP for group in groups if len(group) == 1}


def with_stand_ins(responses: Sequence[Written], num_fresh: int, aside: Mapping[int, str]) -> list[Written]:
    """The responses, each that is set aside replaced by the shortest good one of its kind, fresh or replayed.

    Without the replayed ones where none of them is good; empty where no fresh one is.
    """
    kept: list[Written] = []
    for rows in (range(num_fresh), range(num_fresh, len(responses))):
        good = [responses[row] for row in rows if row not in aside]
        if not good:
            return kept
        stand_in = min(good, key=lambda one: len(one.response_ids))
        kept += [stand_in if row in aside else responses[row] for row in rows]
    return kept


def note_set_aside(state: TrainState, rollout: Rollout, world: World) -> None:
    """Count and name what a rollout set aside, in the state and in a line of output.

    Raises:
        Diverged: no response of three rollouts in a row was finite.
    """
    if rollout.aside:
        known = state.extra.setdefault(SET_ASIDE, {"responses": 0, "rollouts": 0, "named": []})
        known["responses"] += len(rollout.aside)
        known["rollouts"] += 1
        named = [
            {"step": state.step + 1, "prompt": rollout.responses[row].prompt, "reason": reason}
            for row, reason in rollout.aside.items()
        ]
        known["named"] = (known["named"] + named)[:NAMED]
        if world.rank == 0:
            listed = "; ".join(f"prompt {one['prompt']}: {one['reason']}" for one in named[:5])
            more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
            print(
                f"WARNING: rollout {state.step + 1}: {len(named)} of {len(rollout.responses)} responses set aside, "
                f"not a finite number: {listed}{more}",
                flush=True,
            )
    reason = next(iter(rollout.aside.values()), "")
    note_refusal(state, "rollout", bool(rollout.counted_fresh), f"no response is left to learn from ({reason})")
