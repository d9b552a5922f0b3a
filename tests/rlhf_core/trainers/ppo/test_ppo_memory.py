"""What PPO keeps from rollout to rollout: replay, curriculum, and all of it through a broken-off run."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ppo import (
    CFG,
    PROMPTS,
    changed,
    make_state,
    roll,
    run,
    setup_of,
)

from rlhf_core.config.ppo import ReplayConfig
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.ppo.credit import assign_credit
from rlhf_core.trainers.ppo.curriculum import (
    COUNTS,
    MEANS,
    choose_prompts,
    draw_easy_prompts,
    draw_prompts,
    note_scores,
    share_of_prompts,
)
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.ppo.replay import Group, Written, added, draw, from_tensors, recall, to_tensors
from rlhf_core.trainers.ppo.rollout import collect_rollout, importance, with_logprobs
from rlhf_core.trainers.ppo.terms import diversity_term
from rlhf_core.trainers.ppo.update import run_epochs

REPLAY = changed(CFG, replay={"rows": 8, "capacity": 24})


def group(prompt: int, priority: float, size: int = 1) -> Group:
    rows = tuple(
        Written(prompt=prompt, response_ids=[7, 8 + i], finished=i == 0, logprobs=[-0.1, -1 / 3 - i], score=i / 7,
                further=-0.5)
        for i in range(size)
    )  # fmt: skip
    return Group(responses=rows, priority=priority)


def test_the_buffer_comes_back_from_its_tensors_to_the_bit() -> None:
    groups = [group(3, 0.25, size=2), group(1, 1 / 3, size=2), group(3, 2.0, size=2)]
    assert from_tensors(to_tensors(groups)) == groups
    assert from_tensors({}) == []
    assert from_tensors(to_tensors([])) == []


def test_the_oldest_responses_leave_a_full_buffer() -> None:
    old = [group(0, 1.0, size=2), group(1, 1.0, size=2)]
    kept = added(old, [group(2, 1.0, size=2), group(3, 1.0, size=2)], capacity=6)
    assert [one.responses[0].prompt for one in kept] == [1, 2, 3]


def test_groups_are_drawn_by_priority_and_weighed_for_it() -> None:
    """Priorities 1 and 3 to the power 1: chances 1/4 and 3/4; of one draw the weight is 1 whichever it is."""
    groups = [group(0, 1.0), group(1, 3.0)]
    generator = torch.Generator().manual_seed(0)
    first = [draw(groups, 1, 1.0, 0.5, generator)[0].prompt for _ in range(2000)]
    assert sum(first) / 2000 == pytest.approx(0.75, abs=0.03)
    # Two of priorities 1, 1 and 6 take part with chances 1/2, 1/2 and 1: weights (N chance / 2)^-0.5 over the larger.
    two = draw([group(0, 1.0), group(1, 1.0), group(2, 6.0)], 2, 1.0, 0.5, generator)
    weights = {row.prompt: row.weight for row in two}
    assert weights.pop(2) == pytest.approx(math.sqrt(1 / 2))
    assert list(weights.values()) == [1.0]


def test_a_buffer_that_is_replayed_whole_is_weighed_evenly() -> None:
    """Nothing was drawn unevenly, so there is nothing to take back: the mean of what was drawn is the buffer's."""
    groups = [group(number, float(number + 1)) for number in range(32)]
    rows = draw(groups, 32, 0.6, 0.4, torch.Generator().manual_seed(0))
    assert sorted(row.prompt for row in rows) == list(range(32))
    assert {row.weight for row in rows} == {1.0}


def test_even_drawing_needs_no_correction() -> None:
    groups = [group(0, 1.0), group(1, 300.0)]
    assert [row.weight for row in draw(groups, 2, 0.0, 1.0, torch.Generator())] == [1.0, 1.0]


def test_nothing_is_drawn_before_the_buffer_holds_enough() -> None:
    assert draw([], 2, 1.0, 1.0, torch.Generator()) == []
    assert draw([group(0, 1.0)], 2, 1.0, 1.0, torch.Generator()) == []
    assert len(draw([group(0, 1.0, size=2)], 2, 1.0, 1.0, torch.Generator())) == 2


def test_the_settings_say_how_much_priority_and_correction_count() -> None:
    tensors = to_tensors([group(0, 1.0), group(1, 3.0), group(2, 4.0)])

    def drawn(rows: int, **settings: float) -> list[list[Written]]:
        cfg = ReplayConfig(rows=rows, capacity=8, **settings)
        return [recall(cfg, tensors, torch.Generator().manual_seed(seed)) for seed in range(20)]

    assert {row.prompt for rows in drawn(1, priority=50.0) for row in rows} == {2}
    assert {row.prompt for rows in drawn(1, priority=0.0) for row in rows} == {0, 1, 2}
    weights = [
        {row.prompt: row.weight for rows in drawn(2, priority=1.0, correction=c) for row in rows} for c in (0.0, 1.0)
    ]
    assert weights[0] == {0: 1.0, 1: 1.0, 2: 1.0}
    # Chances 1/4, 3/4 and 1: 2 is always there, and whoever is with it counts 1.
    assert weights[1] == pytest.approx({0: 1.0, 1: 1.0, 2: weights[1][2]})
    assert weights[1][2] in (pytest.approx(1 / 4), pytest.approx(3 / 4))


def test_importance_weights_worked_by_hand() -> None:
    """exp(now - then): e^0.5 below the cap of 2, e^1 cut to 2, padding 0; times the response's own weight."""
    now_BR = torch.tensor([[-0.5, -1.0, 99.0], [-2.0, -1.0, -1.0]])
    mask_BR = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    then = [
        Written(prompt=0, response_ids=[7, 8], finished=True, logprobs=[-1.0, -2.0], weight=0.5),
        Written(prompt=0, response_ids=[7, 8, 9], finished=True, logprobs=[-2.0, 0.0, -1.0]),
    ]
    expected = torch.tensor([[0.5 * math.exp(0.5), 1.0, 0.0], [1.0, math.exp(-1.0), 1.0]])
    torch.testing.assert_close(importance(now_BR, mask_BR, then, 2.0), expected)
    fresh = [Written(prompt=0, response_ids=[7], finished=True)] * 2
    assert torch.equal(importance(now_BR, mask_BR, fresh, 2.0), torch.ones(2, 3))


def test_replayed_tokens_count_by_their_weight_and_start_from_a_ratio_of_one() -> None:
    """Old responses under a policy that has moved: PPO's ratio is to the policy of now, the weight to that of then."""
    state = make_state()
    old = with_logprobs(roll(REPLAY, state), range(8))
    run(changed(CFG, learning_rate=2e-2, warmup_steps=0, steps=1), state)
    fresh = roll(REPLAY, state, seed=4).responses
    rollout = collect_rollout(setup_of(REPLAY, state), fresh, old, torch.Generator())
    assert [row.score for row in rollout.responses[16:]] == [row.score for row in old]
    plain = changed(REPLAY, advantages={"scaling": "none"})
    minibatches, _ = assign_credit(plain, {}, rollout)
    assert [minibatch.fresh for minibatch in minibatches] == [True, True, False]
    credited = minibatches[2].parts[0]
    part = credited.part
    for place, row in enumerate(part.rows):
        then = torch.tensor(rollout.responses[row].logprobs)
        ratio = (part.old_logprobs_BR[place, : len(then)] - then).exp().clamp(max=2.0)
        assert bool((ratio - 1).abs().max() > 1e-3)
        torch.testing.assert_close(part.weights_BR[place, : len(then)], ratio)
    before = part.weights_BR.clone()
    part.weights_BR.fill_(1.0)
    unweighted = assign_credit(plain, {}, rollout)[0][2].parts[0].advantages_BR
    torch.testing.assert_close(credited.advantages_BR, unweighted * before)
    value = [p.detach().clone() for p in state.modules["value"].parameters()]
    figures = run_epochs(changed(REPLAY, epochs=1), state, [minibatches[2]], torch.Generator())
    assert figures["policy/ratio_max"] == 1.0
    assert "loss/value" not in figures
    unmoved = zip(value, state.modules["value"].parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in unmoved), "old responses teach the value model nothing"


def test_a_run_with_replay_takes_more_steps_from_the_same_rollouts() -> None:
    state = run(REPLAY)
    assert [row["policy/updates"] for row in state.history] == [4, 6, 6, 6, 6, 6]
    assert [row["rollout/replay_stored"] for row in state.history] == [16, 24, 24, 24, 24, 24]
    stored = [row for one in from_tensors(state.tensors) for row in one.responses]
    assert all(len(row.logprobs) == len(row.response_ids) for row in stored)
    assert state.history[0]["reward/score"] == run(CFG).history[0]["reward/score"]


def test_replay_keeps_the_responses_to_a_prompt_together() -> None:
    cfg = changed(REPLAY, advantages={"method": "rloo"}, responses_per_prompt=4)
    groups = from_tensors(run(changed(cfg, steps=2)).tensors)
    assert [len({row.prompt for row in one.responses}) for one in groups] == [1] * 6
    assert [len(one.responses) for one in groups] == [4] * 6


def test_the_share_of_prompts_grows_in_a_line() -> None:
    assert [share_of_prompts(step, 0.2, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_easy_prompts_are_those_with_the_best_mean_scores() -> None:
    tensors: dict[str, torch.Tensor] = {}
    note_scores(tensors, 6, [0, 1, 2, 3], [1.0, -1.0, 0.5, -2.0])
    note_scores(tensors, 6, [1, 0, 3], [3.0, 2.0, math.nan])
    assert tensors[COUNTS].tolist() == [2, 2, 1, 1, 0, 0]
    assert tensors[MEANS].tolist() == [1.5, 1.0, 0.5, -2.0, 0.0, 0.0]
    drawn = [draw_easy_prompts(tensors[MEANS], tensors[COUNTS], 0.5, 3, step, seed=1) for step in range(20)]
    assert all(sorted(one) == [0, 1, 2] for one in drawn)
    assert len({tuple(one) for one in drawn}) > 1
    # 4 and 5 were never answered: as good as the mean of those that were, 0.25, and so before 3
    most = [draw_easy_prompts(tensors[MEANS], tensors[COUNTS], 5 / 6, 5, step, seed=1) for step in range(5)]
    assert all(sorted(one) == [0, 1, 2, 4, 5] for one in most)
    twice = draw_easy_prompts(tensors[MEANS], tensors[COUNTS], 1 / 6, 3, 0, seed=1)
    assert twice == [0, 0, 0]


def test_a_curriculum_draws_hard_prompts_last() -> None:
    """The score is the prompt's own: prompts that begin with a high token are easy."""

    def by_prompt(batch: Any) -> torch.Tensor:
        return batch.ids_BS[:, batch.prompt_width - 1].float() / 10

    cfg = changed(CFG, steps=8, rollout_batch=8, curriculum={"start_share": 0.3, "steps": 8}, learning_rate=1e-6)
    state = run(cfg, reward_fn=by_prompt)
    scores = [row["reward/score"] for row in state.history]
    assert scores[4] > scores[0]
    every = sum(PROMPTS[i % 23][-1] for i in range(23)) / 230
    assert scores[4] > every + 0.1
    assert scores[7] < scores[4]
    assert state.tensors[COUNTS].sum().item() == 64


def test_without_a_curriculum_prompts_come_in_turn_each_as_often_as_asked() -> None:
    cfg = changed(CFG, responses_per_prompt=4)
    assert choose_prompts(cfg, TrainState(step=3), 10, seed=1) == [
        index for index in draw_prompts(10, 4, 3, seed=1) for _ in range(4)
    ]


EVERYTHING = {
    "method gae": {"value": {"model": "separate"}},
    "shared trunk": {"value": {"model": "shared"}},
    "rloo": {"advantages": {"method": "rloo"}, "responses_per_prompt": 4},
}


@pytest.mark.parametrize("normalise", ["running", "quantile"])
@pytest.mark.parametrize("variant", EVERYTHING)
def test_n41_broken_off_and_resumed_with_everything_on_it_ends_with_the_same_bits(
    variant: str, normalise: str, harness: Callable[..., Any], same_state: Callable[..., None]
) -> None:
    cfg = changed(
        CFG,
        learning_rate=5e-3,
        kl={"controller": "adaptive", "target": 0.5, "horizon": 50.0, "estimator": "k3"},
        scores={"normalise": normalise, "window": 40},
        replay={"rows": 8, "capacity": 24},
        curriculum={"start_share": 0.5, "steps": 4},
        guard={"every": 2, "scorer": "m:f", "prompts": 4, "patience": 9},
        entropy_coef=0.01,
        **EVERYTHING[variant],
    )
    watch = Watch(prompts=PROMPTS[:4], rate=lambda rows: [-float(len(row.response_ids)) for row in rows])
    terms = [diversity_term(0.1)]

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return run(cfg, state, log=log, checkpoint=checkpoint, terms=terms, watch=watch)

    runs = harness(lambda: make_state(cfg), train)
    unbroken = runs.unbroken()
    assert {"kl_coef", "guard"} <= set(unbroken.extra)
    for step in (2, 3, 5):
        same_state(runs.resumed_after(step), unbroken)


def test_a_checkpoint_holds_all_that_ppo_remembers(tmp_path: Any) -> None:
    cfg = changed(REPLAY, curriculum={"start_share": 0.5, "steps": 4}, scores={"normalise": "running"}, steps=2)
    state = run(cfg)
    Checkpointer(tmp_path, {}).save(state)
    restored = make_state(cfg)
    assert Checkpointer(tmp_path, {}).restore(restored)
    assert from_tensors(restored.tensors) == from_tensors(state.tensors)
    assert torch.equal(restored.tensors[MEANS], state.tensors[MEANS])
    assert restored.extra == state.extra
