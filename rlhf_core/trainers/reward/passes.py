"""The gradient of a reward model's step, by several processes and in several passes through the model.

A loss sees the whole step: means are over all its pairs, and some terms compare responses of different prompts. Yet a
process computes its share of the groups, and where memory is short a few of them at a time. What the model said of the
other groups is then a constant: each pass has the part of the gradient that flows through its own rows, and the
parts sum to the gradient of one process that computes all at once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data.batching.pairs import PreferenceGroup, collate_responses
from rlhf_core.models.scoring.reward_model import Beside, RewardModel, RewardOutput
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import run_gathered
from rlhf_core.state.world import World
from rlhf_core.trainers.figures import numbers
from rlhf_core.trainers.passes import CPU_PASS_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoss:
    """The loss of a step.

    Attributes:
        of: loss and figures, from what the model said of all responses of the step.
        beside: what of a `RewardOutput` it wants beside scores and variances.
        coupled: whether the gradient that one group gets depends on what the model says of another. Several passes
            then need a look at all groups first, without a gradient.
    """

    of: Callable[[RewardOutput], tuple[Tensor, dict[str, Tensor]]]
    beside: Collection[Beside] = ()
    coupled: bool = False


def lay_gradient(
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    step_loss: StepLoss,
    per_forward: int | None,
    run: RunContext,
) -> dict[str, float]:
    """Add this process's part of the gradient of a step's loss to the model; return the whole step's figures.

    Args:
        model: is learning.
        groups: of the step, the same in every process.
        step_loss: what is asked.
        per_forward: most groups in a pass; None sets no limit. On a CPU `CPU_PASS_TOKENS` are one too, a rough one.
        run: padding token, and the processes that train together.
    """
    world, beside, pad_id = run.world, step_loss.beside, run.pad_id
    device, mine = model.shift.device, world.share(range(len(groups)))
    num_passes = _num_passes(groups, per_forward, device, world)
    size = -(-len(mine) // num_passes)
    passes = [mine[number * size : (number + 1) * size] for number in range(num_passes)]
    if num_passes == 1:
        reading, own = _read(model, groups, mine, beside, pad_id)
        loss, figures = step_loss.of(_joined(_of_all_groups(own, mine, device, world), own))
        (loss if mine else loss + _nothing(reading)).backward()
        return numbers({"loss/train": loss, **figures})
    known = None
    if step_loss.coupled:
        with torch.no_grad():
            looks = [_read(model, groups, some, beside, pad_id)[1] for some in passes]
            known = _of_all_groups({place: said for own in looks for place, said in own.items()}, mine, device, world)
    seen: dict[int, RewardOutput] = {}
    for some in passes:
        reading, own = _read(model, groups, some, beside, pad_id)
        loss, _ = step_loss.of(_joined(known or _blank(reading, groups), own))
        (loss if some else loss + _nothing(reading)).backward()
        seen |= {place: _moved(said, device) for place, said in own.items()}
    with torch.no_grad():
        loss, figures = step_loss.of(_joined(known or _of_all_groups(seen, mine, device, world), {}))
    return numbers({"loss/train": loss, **figures})


def _num_passes(groups: Sequence[PreferenceGroup], per_forward: int | None, device: torch.device, world: World) -> int:
    """How often a process goes through the model: as often as any other, since weights may be divided among them."""
    share = -(-len(groups) // world.size)
    num_passes = -(-share // per_forward) if per_forward else 1
    if device.type == "cpu":
        tokens = sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups)
        num_passes = max(num_passes, min(share, -(-tokens // (world.size * CPU_PASS_TOKENS))))
    return num_passes


def _read(
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    places: Sequence[int],
    beside: Collection[Beside],
    pad_id: int,
) -> tuple[RewardOutput, dict[int, RewardOutput]]:
    """What the model says of the groups at `places`: of all together, and of each.

    Where there are none it reads the first group, for every process goes through the model equally often.
    """
    some = [groups[place] for place in places] or groups[:1]
    reading = run_gathered(model, RewardModel.read, collate_responses(some, pad_id).to(model.shift.device), beside)
    sizes = [len(group.responses) for group in some]
    fields = [[None] * len(sizes) if values is None else values.split(sizes) for values in reading]
    return reading, dict(zip(places, (RewardOutput(*values) for values in zip(*fields, strict=True)), strict=False))


def _of_all_groups(
    own: Mapping[int, RewardOutput], mine: Sequence[int], device: torch.device, world: World
) -> list[RewardOutput]:
    """What the model said of every group, in whichever process, on `device` and without gradients."""
    between = device if world.size == 1 else torch.device("cpu")
    return [_moved(said, device) for said in world.collect([_moved(own[place], between) for place in mine])]


def _blank(like: RewardOutput, groups: Sequence[PreferenceGroup]) -> list[RewardOutput]:
    """Zeros for every group, where it does not matter what the model says of the others."""
    return [
        RewardOutput(
            *(None if values is None else values.new_zeros(len(group.responses), *values.shape[1:]) for values in like)
        )
        for group in groups
    ]


def _joined(known: Sequence[RewardOutput], own: Mapping[int, RewardOutput]) -> RewardOutput:
    """One reading of all groups: `own` with its gradient, and what is known of the others."""
    parts = [own.get(place, said) for place, said in enumerate(known)]
    return RewardOutput(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))


def _moved(reading: RewardOutput, device: torch.device) -> RewardOutput:
    """The reading on a device, without its gradient."""
    return RewardOutput(*(None if values is None else values.detach().to(device) for values in reading))


def _nothing(reading: RewardOutput) -> Tensor:
    """Zero, with a gradient of zero for all that the other processes give one to."""
    return torch.stack([0.0 * values.sum() for values in reading if values is not None]).sum()
