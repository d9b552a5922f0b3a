"""The smallest change of the settings that makes a run fit: candidates in order, each estimated as the run itself.

A knob is a ladder of values from the mildest on. One knob is tried before two and two before three, in the order in
which `KNOBS` stand, which is that of what they cost: smaller passes give the same result, checkpointing takes a third
more time, adapters train something else.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from rlhf_core.config import Params
from tasks.planning.plan import Known, Machine, Problem, StagePlan, problems, stage_plans

MOST_KNOBS = 4
Ladder = Sequence[Mapping[str, Any]]


Knob = Callable[[Params, bool], Ladder]
"""Of the settings, and whether a GPU computes: dotted keys with their values, the mildest first; none where there is
nothing to turn."""


def smallest_change(
    known: Known, params: Params, stages: Sequence[str], cached: Collection[str], machine: Machine
) -> tuple[str, ...] | None:
    """The change, as values for `--set`; empty where none is needed, None where none of the knobs is enough."""

    def fits(change: Mapping[str, Any]) -> bool:
        changed = with_changes(params, change)
        return changed is not None and not problems(stage_plans(known, changed, stages, cached), machine)

    if fits({}):
        return ()
    ladders = [ladder for knob in KNOBS if (ladder := knob(params, known.on_gpu))]
    for count in range(1, MOST_KNOBS + 1):
        for chosen in combinations(ladders, count):
            if fits(_joined([ladder[-1] for ladder in chosen])):
                return tuple(f"{key}={_yaml(value)}" for key, value in _mildest(chosen, fits).items())
    return None


def _mildest(ladders: Sequence[Ladder], fits: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """Of each ladder in turn the mildest step that still fits with the others as they are."""
    steps = [ladder[-1] for ladder in ladders]
    for place, ladder in enumerate(ladders):
        for step in ladder:
            tried = [*steps[:place], step, *steps[place + 1 :]]
            if fits(_joined(tried)):
                steps = tried
                break
    return _joined(steps)


def with_changes(params: Params, change: Mapping[str, Any]) -> Params | None:
    """The settings with dotted keys changed; None where the schema refuses them."""
    document = params.model_dump(mode="json", by_alias=True)
    for key, value in change.items():
        *path, last = key.split(".")
        section = document
        for part in path:
            section = section[part]
        section[last] = value
    try:
        return Params.model_validate(document)
    except ValidationError:
        return None


def with_cures(
    found: Sequence[Problem], known: Known, params: Params, plans: Sequence[StagePlan], machine: Machine
) -> list[Problem]:
    """Problems with the smallest change that solves all of them, where there is one."""
    if not found:
        return []
    stages, cached = [plan.stage for plan in plans], [plan.stage for plan in plans if plan.cached]
    cure = smallest_change(known, params, stages, cached, machine) or ()
    return [problem.model_copy(update={"cure": cure}) for problem in found]


def _joined(changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for change in changes for key, value in change.items()}


def _halves(key: str, value: int | None, least: int = 1) -> Ladder:
    """Half of a number, a quarter and so on, whole numbers all."""
    steps: list[Mapping[str, Any]] = []
    while value is not None and value > least:
        value //= 2
        steps.append({key: max(least, value)})
    return steps


def _accumulation(params: Params, on_gpu: bool) -> Ladder:
    cfg = params.sft
    parts = (cfg.accumulation * 2**power for power in range(1, 11)) if on_gpu else ()  # a CPU's passes are cut anyhow
    return [{"sft.accumulation": part} for part in parts if part <= cfg.batch_size and cfg.batch_size % part == 0]


def _groups(key: str, per_forward: int | None, per_step: int) -> Ladder:
    return _halves(f"{key}.prompts_per_forward", per_forward or per_step)


def _microbatch(params: Params, on_gpu: bool) -> Ladder:
    cfg = params.align.ppo
    return _halves("align.ppo.microbatch", cfg.microbatch or cfg.minibatch, cfg.responses_per_prompt)


def _adapters(params: Params, on_gpu: bool) -> Ladder:
    if params.model.lora:
        return []
    stages = ["reward", "align"] if params.model.source == "config" else ["sft", "reward", "align"]
    return [{"model.lora": {"rank": 16, "stages": stages}}]


def _shared_trunk(params: Params, on_gpu: bool) -> Ladder:
    cfg = params.align.ppo
    separate = cfg.has_value_model and cfg.value.model == "separate"
    return [{"align.ppo.value.model": "shared"}] if separate and "ppo" in params.align.algorithms else []


def _bfloat16(params: Params, on_gpu: bool) -> Ladder:
    return [{"compute.precision": "bfloat16"}] if on_gpu and params.compute.precision == "float32" else []


def _checkpointing(params: Params, on_gpu: bool) -> Ladder:
    return [] if params.compute.activation_checkpointing else [{"compute.activation_checkpointing": True}]


def _reward_groups(params: Params, on_gpu: bool) -> Ladder:
    return _groups("reward", params.reward.prompts_per_forward, params.reward.prompts_per_step)


def _dpo_groups(params: Params, on_gpu: bool) -> Ladder:
    cfg = params.align.dpo
    return _groups("align.dpo", cfg.prompts_per_forward, cfg.prompts_per_step)


def _rows_at_once(params: Params, on_gpu: bool) -> Ladder:
    most = params.compute.memory_gb or 2.0
    return [{"compute.memory_gb": share} for share in (1.0, 0.5, 0.25, 0.1) if share < most]


def _compact(params: Params, on_gpu: bool) -> Ladder:
    return [] if on_gpu or params.machine.compact_memory else [{"machine.compact_memory": True}]


KNOBS: tuple[Knob, ...] = (
    _compact,
    _accumulation,
    _reward_groups,
    _dpo_groups,
    _microbatch,
    _rows_at_once,
    _checkpointing,
    _bfloat16,
    _adapters,
    _shared_trunk,
)
"""In the order in which they are tried."""


def _yaml(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value)
