"""The guard against over-optimisation: a reward that can be gamed, and a scorer that sees it."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.ppo import CFG, GOOD, PAD, changed, make_state, run, tiny_policy, weights
from support.preference import in_processes

from rlhf_core.config.ppo import GuardConfig
from rlhf_core.errors import DataError
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.ppo import guard
from rlhf_core.trainers.ppo.guard import BEST, GuardReading, Watch, go_back, take_in
from rlhf_core.trainers.ppo.replay import Written

HELDOUT = [[9, 8], [12], [20, 7], [11], [16, 10], [18]]
GAMED = changed(
    CFG, steps=40, rollout_batch=32, minibatch=16, learning_rate=5e-3, value_learning_rate=5e-3, kl_coef=0.0,
    missing_end_penalty=0.0, target_kl=1.0, guard={"every": 2, "scorer": "m:f", "max_drop": 0.05, "patience": 2},
)  # fmt: skip


def gold(rows: Sequence[Written]) -> list[float]:
    """Likes one GOOD in a response, and nothing else in it twice: what the proxy overrates, it rates down."""
    return [min(row.response_ids.count(GOOD), 1) - 0.3 * max(row.response_ids.count(GOOD) - 1, 0) for row in rows]


def reading(step: int, proxy: float, heldout: float, kl: float = 1.0) -> GuardReading:
    return GuardReading(step=step, proxy=proxy, heldout=heldout, kl=kl)


def test_a_gamed_reward_ends_the_run_at_its_best_policy() -> None:
    """The proxy counts a token; a policy that writes nothing else scores high and is worse by the gold scorer."""
    free = run(changed(GAMED, guard={"patience": 1000}), watch=Watch(prompts=HELDOUT, rate=gold))
    proxies = [row["eval/proxy_score"] for row in free.history if "eval/proxy_score" in row]
    golds = [row["eval/heldout_score"] for row in free.history if "eval/heldout_score" in row]
    assert proxies[-1] > proxies[0] + 0.4, "the reward can be gamed"
    assert max(golds) > golds[-1] + 0.3, "and the gold score shows it"

    state = run(GAMED, watch=Watch(prompts=HELDOUT, rate=gold))
    stopped = state.extra["stopped_by_guard"]
    assert 0 < stopped["best_step"] < stopped["step"] == state.step < 40
    assert state.history[-1]["eval/stopped_by_guard"] == 1.0
    assert sum(row["eval/stopped_by_guard"] for row in state.history) == 1.0
    by_step = {row["step"]: row["eval/heldout_score"] for row in state.history if "eval/heldout_score" in row}
    assert by_step[stopped["best_step"]] == max(by_step.values())
    assert "held-out score" in stopped["reason"]

    same = run(changed(GAMED, guard={"every": 0}), make_until(stopped["best_step"]))
    assert all(torch.equal(one, two) for one, two in zip(weights(state), weights(same), strict=True))
    ended = run(GAMED, state, watch=Watch(prompts=HELDOUT, rate=gold))
    assert ended.step == stopped["step"], "a run that the guard ended does not go on"


class Ended(Exception):
    pass


def make_until(step: int) -> TrainState:
    """The state of the unguarded run after `step` rollouts, marked as ended."""
    state = make_state(GAMED)

    def log(done: int, *_: Any) -> None:
        if done == step:
            raise Ended

    with pytest.raises(Ended):
        run(changed(GAMED, guard={"every": 0}), state, log=log)
    state.extra["stopped_by_guard"] = {}
    return state


def test_watching_changes_no_weight() -> None:
    watched = run(changed(GAMED, steps=4), watch=Watch(prompts=HELDOUT, rate=gold))
    alone = run(changed(GAMED, steps=4))
    assert all(torch.equal(one, two) for one, two in zip(weights(watched), weights(alone), strict=True))
    assert [("eval/heldout_score" in row) for row in watched.history] == [False, True, False, True]
    assert not [key for row in alone.history for key in row if key.startswith("eval/")]


def test_a_policy_that_stands_still_reads_the_same_every_time() -> None:
    """The same random numbers each time: what differs between two readings is the policy."""
    cfg = changed(GAMED, steps=3, learning_rate=1e-12, value_learning_rate=1e-12, guard={"every": 1})
    history = run(cfg, watch=Watch(prompts=HELDOUT, rate=gold)).history
    assert len({(row["eval/heldout_score"], row["eval/proxy_score"]) for row in history}) == 1
    assert len({row["reward/score"] for row in history}) == 3


def test_divergence_beyond_the_cap_ends_the_run_at_once() -> None:
    cfg = changed(GAMED, guard={"max_kl": 0.5, "max_drop": 100.0})
    state = run(cfg, watch=Watch(prompts=HELDOUT, rate=gold))
    assert "above max_kl 0.5" in state.extra["stopped_by_guard"]["reason"]
    last = state.history[-1]
    assert max(last["rollout/kl_to_reference"], last.get("eval/kl_to_reference", 0.0)) > 0.5
    assert all(row["rollout/kl_to_reference"] <= 0.5 for row in state.history[:-1])


def test_bad_readings_count_only_in_a_row_and_only_while_the_proxy_is_above_that_of_the_best() -> None:
    cfg = GuardConfig(every=1, scorer="m:f", max_drop=0.1, patience=2, max_kl=5.0)
    state = make_state()
    assert take_in(cfg, state, reading(0, 0.0, 1.0)) is None
    assert take_in(cfg, state, reading(1, 0.5, 0.8)) is None, "the first bad one"
    assert take_in(cfg, state, reading(2, -0.5, 0.8)) is None, "the proxy fell too: nothing is gamed"
    assert take_in(cfg, state, reading(3, 0.5, 0.8)) is None, "the first again"
    assert take_in(cfg, state, reading(4, 0.5, 0.95)) is None, "within the bound"
    assert take_in(cfg, state, reading(5, 0.5, 0.8)) is None
    reason = take_in(cfg, state, reading(6, 0.5, 0.8))
    assert reason == "proxy score 0 to 0.5 since step 0, held-out score 1 to 0.8"
    assert take_in(cfg, state, reading(7, 0.5, 9.0, kl=5.1)) == "KL to the reference 5.1 is above max_kl 5"
    assert state.extra["guard"]["best"]["step"] == 0, "what is beyond the cap is never the best"


def test_the_best_weights_are_those_of_the_best_reading() -> None:
    cfg = GuardConfig(every=1, scorer="m:f")
    state = make_state()
    first = weights(state)
    take_in(cfg, state, reading(0, 0.0, 0.0))
    scale(state, 2.0)
    second = weights(state)
    take_in(cfg, state, reading(1, 1.0, 1.0))
    scale(state, 2.0)
    take_in(cfg, state, reading(2, 2.0, 0.5))
    go_back(state, "because")
    assert all(torch.equal(one, two) for one, two in zip(weights(state), second, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(weights(state), first, strict=True))
    assert state.extra["stopped_by_guard"] == {"step": 0, "best_step": 1, "reason": "because"}
    assert all(name.startswith(BEST) for name in state.tensors)


@torch.no_grad()
def scale(state: TrainState, factor: float) -> None:
    for module in state.modules.values():
        for parameter in module.parameters():
            parameter.mul_(factor)


def test_a_scorer_that_gives_no_number_is_named() -> None:
    watch = Watch(prompts=HELDOUT, rate=lambda rows: [math.nan] * len(rows))
    with pytest.raises(DataError, match=r"guard.scorer: nan for response 0 of 6"):
        run(GAMED, watch=watch)


def test_a_reading_is_of_the_responses_that_the_scorer_was_shown() -> None:
    """Proxy and divergence by hand: shares of a token, and log-ratios from the evaluation's own reading."""
    seen: list[Written] = []
    reference, still = make_state().modules["policy"], {"learning_rate": 1e-12, "value_learning_rate": 1e-12}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    cfg = changed(GAMED, steps=1, minibatch=4, guard={"every": 1}, **still)
    watch = Watch(prompts=HELDOUT, rate=lambda rows: seen.extend(rows) or [0.0] * len(rows))
    last = run(cfg, reference=reference, watch=watch).history[-1]
    responses = [row.response_ids for row in seen[-len(HELDOUT) :]]
    assert [HELDOUT[row.prompt] for row in seen[-len(HELDOUT) :]] == HELDOUT
    shares = [ids.count(GOOD) / len(ids) for ids in responses]
    assert last["eval/proxy_score"] == pytest.approx(sum(shares) / len(shares))
    own, other = (response_logprob_sums(one, HELDOUT, responses, pad_id=PAD) for one in (tiny_policy(), reference))
    assert last["eval/kl_to_reference"] == pytest.approx((own - other).mean(), abs=1e-4)
    assert abs(last["eval/kl_to_reference"]) > 0.1


def test_a_pass_for_the_sake_of_other_processes_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with fewer rows goes through a divided policy as often as the others: its first pass comes again."""
    cfg, watch = changed(GAMED, steps=2, minibatch=4), Watch(prompts=HELDOUT, rate=gold)
    plain = run(cfg, watch=watch).history[-1]

    def once_more(items: list[list[int]], *_: Any) -> list[tuple[list[int], float]]:
        return [*((item, 1.0) for item in items), (items[0], 0.0)]

    monkeypatch.setattr(guard, "in_step", once_more)
    again = run(cfg, watch=watch).history[-1]
    for key in ("eval/proxy_score", "eval/heldout_score", "eval/kl_to_reference"):
        assert again[key] == plain[key]


def test_two_processes_read_what_one_reads() -> None:
    cfg = changed(GAMED, steps=2, minibatch=16)
    watch = Watch(prompts=HELDOUT, rate=gold)
    alone = run(cfg, watch=watch).history[-1]
    first, second = in_processes(2, lambda world: run(cfg, watch=watch, world=world).history[-1])
    assert first == second
    for key in ("eval/proxy_score", "eval/heldout_score", "eval/kl_to_reference"):
        assert first[key] == pytest.approx(alone[key], abs=1e-4)
