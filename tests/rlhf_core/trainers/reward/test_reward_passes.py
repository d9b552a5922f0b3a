"""A step in several processes and passes: its gradient is that of one process that computes all at once."""

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from support.reward import PAD, settings, toy_groups, train
from torch import Tensor

from rlhf_core.config.reward import RewardConfig
from rlhf_core.models.scoring.reward_model import RewardModel, RewardOutput
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.reward import passes as reward_passes
from rlhf_core.trainers.reward.passes import StepLoss, lay_gradient

MakeState: TypeAlias = Callable[[RewardConfig], TrainState]


class Threads:
    """Processes of a world as threads of this one."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def job(rank: int) -> None:
            try:
                results[rank] = work(OneOf(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=job, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class OneOf:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def share(self, rows: Sequence[Any]) -> list[Any]:
        return list(rows[self.rank :: self.size])

    def collect(self, items: Sequence[Any]) -> list[Any]:
        everyone = self.threads.exchange(self.rank, list(items))
        return [item for row in itertools.zip_longest(*everyone) for item in row if item is not None]

    def total(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.threads.exchange(self.rank, tensor.detach().clone())).sum(0)


TOGETHER: dict[str, dict[str, Any]] = {
    "gated": {"head": "gated"},
    "all at once": {
        "head": "mixed",
        "criteria": {"overall": 1.0, "contrary": 0.5},
        "loss": {"weights": "difficulty", "average": "prompt", "center": "pairs"},
        "auxiliary": {"sft_coef": 0.2, "contrastive_coef": 0.1},
    },
    "thurstone": {"loss": {"name": "thurstone"}},
    "plackett_luce": {"loss": {"name": "plackett_luce", "average": "prompt"}},
    "distilled": {"ensemble": {"members": 2, "distill": "preferences"}},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_n25_two_processes_take_the_steps_of_one(make_reward_state: MakeState, name: str) -> None:
    """13 different prompts in steps of 4: the last step has one, so that one of the two has none of its own."""
    cfg = settings(**TOGETHER[name], learning_rate=1e-4, prompts_per_step=4, epochs=1)
    groups = toy_groups(14, seed=5, criteria=("overall", "contrary"))
    alone = train(cfg, make_reward_state(cfg), groups)
    states = [make_reward_state(cfg) for _ in range(2)]
    first, second = Threads(2).run(lambda world: train(cfg, states[world.rank], groups, world))
    for key, value in first.modules["reward"].state_dict().items():
        assert torch.equal(value, second.modules["reward"].state_dict()[key])
        torch.testing.assert_close(value, alone.modules["reward"].state_dict()[key], atol=1e-6, rtol=0)
    assert first.history == second.history
    for row, expected in zip(first.history, alone.history, strict=True):
        assert row == pytest.approx(expected, abs=1e-5, rel=1e-4)


def weights_of(state: TrainState) -> Tensor:
    return torch.cat([value.flatten() for value in state.modules["reward"].state_dict().values()])


def gradient_of(model: RewardModel, loss_of: Any, *, count: int, world: World, **settings: Any) -> list[Tensor | None]:
    """Gradients that a step on toy groups lays on the model, a weight each."""
    per_forward = settings.pop("per_forward", None)
    run = RunContext(seed=0, pad_id=PAD, world=world)
    lay_gradient(model, toy_groups(count, seed=6), StepLoss(of=loss_of, **settings), per_forward, run)
    return [parameter.grad for parameter in model.parameters()]


def squares(said: RewardOutput) -> tuple[Tensor, dict[str, Tensor]]:
    return sum((values.square().sum() for values in said if values is not None), torch.zeros(())), {}


def test_n25_gradients_of_shares_sum_to_the_gradient_of_all(make_reward_state: MakeState) -> None:
    def gradient(world: World) -> Tensor:
        model = make_reward_state(settings()).modules["reward"]
        return torch.cat([one.flatten() for one in gradient_of(model, squares, count=3, world=world)])

    both = Threads(2).run(gradient)
    torch.testing.assert_close(both[0] + both[1], gradient(ALONE), atol=1e-4, rtol=1e-4)
    assert both[0].abs().max() > 0 < both[1].abs().max()


@pytest.mark.parametrize(("per_forward", "coupled"), [(None, False), (1, False), (1, True)])
def test_a_process_without_rows_still_gives_every_weight_a_gradient(
    make_reward_state: MakeState, per_forward: int | None, coupled: bool
) -> None:
    """A gradient of zeros: divided weights are summed by all processes or by none."""
    cfg = settings(head="gated", loss={"name": "thurstone"}, auxiliary={"sft_coef": 0.1, "contrastive_coef": 0.1})

    def gradients(world: World) -> list[Tensor | None]:
        model, beside = make_reward_state(cfg).modules["reward"], ["states", "logprobs"]
        return gradient_of(
            model, squares, count=1, world=world, beside=beside, per_forward=per_forward, coupled=coupled
        )

    with_rows, without = Threads(2).run(gradients)
    assert all(gradient is not None and gradient.any() for gradient in with_rows[:3])
    assert all(gradient is not None and not gradient.any() for gradient in without)


def test_every_process_goes_backward_as_often_as_any_other(make_reward_state: MakeState) -> None:
    """Three prompts, one at a time: the second process has one, and sums divided weights twice all the same."""

    def backwards(world: World) -> int:
        model, passes = make_reward_state(settings()).modules["reward"], []
        model.head.scalar.weight.register_post_accumulate_grad_hook(passes.append)
        gradient_of(model, squares, count=3, world=world, per_forward=1)
        return len(passes)

    assert Threads(2).run(backwards) == [2, 2]


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("size", [1, 2])
def test_few_prompts_at_a_time_take_the_same_steps(
    make_reward_state: MakeState, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    cfg = settings(**TOGETHER[name], learning_rate=1e-4, prompts_per_step=4, epochs=1)
    few = cfg.model_copy(update={"prompts_per_forward": 1})
    groups = toy_groups(14, seed=5, criteria=("overall", "contrary"))
    whole, held, collate = train(cfg, make_reward_state(cfg), groups), [], reward_passes.collate_responses
    monkeypatch.setattr(
        reward_passes, "collate_responses", lambda some, pad_id: held.append(len(some)) or collate(some, pad_id)
    )
    states = [make_reward_state(few) for _ in range(size)]
    cut = (
        Threads(size).run(lambda world: train(few, states[world.rank], groups, world))
        if size > 1
        else [train(few, states[0], groups)]
    )
    assert set(held) == {1}
    assert name != "gated" or len(held) == {1: 13, 2: 14}[size], "no more passes than the longest share has prompts"
    for state in cut:
        torch.testing.assert_close(weights_of(state), weights_of(whole), atol=1e-6, rtol=0)
        for row, expected in zip(state.history, whole.history, strict=True):
            assert row == pytest.approx(expected, abs=1e-5, rel=1e-4)


class Kept:
    """Bytes that autograd keeps for the backward pass, the most at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        box = Box(tensor)
        weakref.finalize(box, self._let_go, size)
        return box

    def _let_go(self, size: int) -> None:
        self.now -= size


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("coupled", [False, True])
def test_what_a_pass_keeps_is_gone_before_the_next(make_reward_state: MakeState, coupled: bool) -> None:
    model, most = make_reward_state(settings()).modules["reward"], {}
    for per_forward in (None, 2):
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda box: box.tensor):
            gradient_of(model, squares, count=8, world=ALONE, per_forward=per_forward, coupled=coupled)
        most[per_forward] = kept.most
    assert most[2] < 0.5 * most[None]


def test_a_pass_on_a_cpu_holds_few_tokens(make_reward_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(learning_rate=1e-4)
    groups = toy_groups(8, seed=5)
    whole, held, collate = train(cfg, make_reward_state(cfg), groups), [], reward_passes.collate_responses
    tokens = sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups)
    monkeypatch.setattr(reward_passes, "CPU_PASS_TOKENS", tokens // 3)
    monkeypatch.setattr(
        reward_passes, "collate_responses", lambda some, pad_id: held.append(len(some)) or collate(some, pad_id)
    )
    cut = train(cfg, make_reward_state(cfg), groups)
    assert held == [2, 2, 2, 2] * 2
    torch.testing.assert_close(weights_of(cut), weights_of(whole), atol=1e-6, rtol=0)
