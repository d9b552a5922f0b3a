"""Every response token of a rollout counts the same, and responses that are no numbers count nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from support.ppo import (
    CFG,
    EOS,
    changed,
    make_state,
    roll,
    run,
    setup_of,
    share_of_good,
    tiny_policy,
    weights,
)
from support.preference import in_processes
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_core.config import PPOConfig
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.errors import Diverged
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.batches import mixed_minibatches, passes
from rlhf_core.trainers.ppo.credit import assign_credit
from rlhf_core.trainers.ppo.forward import PolicyOutputs
from rlhf_core.trainers.ppo.parts import Rollout
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.rollout import collect_rollout
from rlhf_core.trainers.ppo.update import policy_term

LENGTHS = [1 + row * 29 // 63 for row in range(64)]
"""Responses of 1 to 30 tokens."""


def of_lengths(cfg: PPOConfig, state: TrainState, seed: int = 0) -> Rollout:
    written = [
        Written(prompt=row % 23, response_ids=[7 + row % 9] * (length - 1) + [EOS], finished=True)
        for row, length in enumerate(LENGTHS)
    ]
    generator = torch.Generator().manual_seed(seed)
    return collect_rollout(setup_of(cfg, state), written, [], generator)


def token_weights(cfg: PPOConfig, rollout: Rollout) -> dict[int, float]:
    """By how much the policy loss of a pass over the rollout moves for one token of each row."""
    found = {}
    for minibatch in assign_credit(cfg, {}, rollout)[0]:
        for credited in minibatch.parts:
            logprobs_BR = credited.part.old_logprobs_BR.clone().requires_grad_()
            plain = replace(credited, advantages_BR=torch.ones_like(credited.advantages_BR))
            policy_term(cfg, plain, PolicyOutputs(logprobs_BR, torch.zeros_like(logprobs_BR), None), minibatch)[
                0
            ].backward()
            for row, gradient_R in zip(credited.part.rows, logprobs_BR.grad, strict=True):
                found[row] = gradient_R[: LENGTHS[row]].abs().max().item()
                assert gradient_R[: LENGTHS[row]].abs().min().item() == pytest.approx(found[row])
    return found


@pytest.mark.parametrize("minibatch", [8, 32])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_n25_a_token_of_a_short_response_counts_as_much_as_one_of_a_long_response(
    minibatch: int, microbatch: int | None
) -> None:
    """Minibatches by length, each divided by its own tokens, gave 8.3 times the weight (minibatch 8), or 2.9 (32)."""
    cfg = changed(CFG, rollout_batch=64, minibatch=minibatch, microbatch=microbatch)
    found = token_weights(cfg, of_lengths(cfg, make_state()))
    assert sorted(found) == list(range(64))
    assert max(found.values()) <= 1.05 * min(found.values())
    assert sum(found[row] * LENGTHS[row] for row in found) == pytest.approx(64 / minibatch, rel=1e-5)


@pytest.mark.parametrize(("minibatch", "group"), [(8, 1), (32, 1), (8, 4)])
def test_minibatches_are_not_made_by_length_either(minibatch: int, group: int) -> None:
    """A step is clipped to a norm and scaled by Adam, so short ones among themselves would count more all the same.

    Over 400 rollouts responses of the short half and of the long half stand in equally long company (each a little in
    that of the others, for none is its own); by length it would be 8 tokens against 23.
    """
    company: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(400):
        dealt = mixed_minibatches(range(64), group, minibatch, torch.Generator().manual_seed(seed))
        assert sorted(row for rows in dealt for row in rows) == list(range(64))
        for rows in dealt:
            assert all(rows[place] // group == rows[place - place % group] // group for place in range(minibatch))
            for half in (False, True):
                own = [row for row in rows if (row >= 32) == half]
                company[half] += [fmean(LENGTHS[o] for o in rows if o // group != row // group) for row in own]
    assert fmean(company[False]) == pytest.approx(fmean(company[True]), rel=0.1)


def test_passes_go_by_length_and_keep_groups_together() -> None:
    lengths = [9, 1, 5, 5, 2, 2, 8, 8]
    assert passes(range(8), lengths, 2, None, padded=False) == [[4, 5, 2, 3, 6, 7, 0, 1]]
    assert passes(range(8), lengths, 2, 3, padded=False) == [[4, 5, 2], [3, 6, 7], [0, 1]]
    assert passes(range(8), lengths, 2, None, padded=True) == [[4, 5], [2, 3, 6, 7], [0, 1]]


def test_a_model_that_computes_its_padding_goes_over_a_minibatch_in_passes_of_like_length() -> None:
    """GPT-2 has no packed forward: the slots that it computes stay near the tokens, and no step is taken more."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    policy = GPT2LMHeadModel(config).eval()
    cfg = changed(CFG, rollout_batch=64, minibatch=32, advantages={"method": "reinforce"})
    state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})
    rollout = of_lengths(cfg, state)
    assert [len(parts) > 1 for parts in rollout.minibatches] == [True, True]
    slots = sum(part.old_logprobs_BR.numel() for part in rollout.parts())
    assert slots < 1.35 * sum(LENGTHS)
    assert len(of_lengths(cfg, make_state(cfg)).parts()) == 2, "the packed forward computes no padding"


def spoiled(bad: Callable[[SequenceBatch], Tensor], number: float = math.nan) -> Callable[[SequenceBatch], Tensor]:
    """The toy reward with `number` in the place of the score where `bad` says so."""
    return lambda batch: share_of_good(batch).masked_fill(bad(batch), number)


def answers_prompt(batch: SequenceBatch) -> Tensor:
    """Rows that answer the prompt [9, 9]: number 2 of 23."""
    last_B = batch.ids_BS[:, batch.prompt_width - 1]
    return (last_B == 9) & (batch.mask_BS[:, : batch.prompt_width].sum(1) == 1)


METHODS: dict[str, dict[str, Any]] = {
    "gae": {},
    "gae, shared": {"value": {"model": "shared"}},
    "gae, microbatch": {"microbatch": 3},
    "reinforce": {"advantages": {"method": "reinforce"}},
    "rloo": {"advantages": {"method": "rloo"}, "responses_per_prompt": 4},
    "rloo of two": {"advantages": {"method": "rloo"}, "responses_per_prompt": 2},
    "grpo, not scaled": {"advantages": {"method": "grpo", "scaling": "none"}, "responses_per_prompt": 4},
    "running scores": {"scores": {"normalise": "running"}},
    "quantiles of scores": {"scores": {"normalise": "quantile"}},
    "one minibatch": {"minibatch": 16, "epochs": 4},
    "replay": {"replay": {"rows": 8, "capacity": 32}},
    "adaptive": {"kl": {"controller": "adaptive"}},
    "easy first": {"curriculum": {"start_share": 0.9}},
}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_one_bad_prompt_neither_ends_the_run_nor_spoils_the_rest(
    method: str, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = changed(CFG, steps=8, **METHODS[method])
    state = run(cfg, reward_fn=spoiled(answers_prompt, number))
    assert state.step == 8
    aside = sum(row["rollout/set_aside"] for row in state.history)
    known = state.extra["set_aside"]
    assert (known["responses"], known["rollouts"]) == (
        aside,
        sum(row["rollout/set_aside"] > 0 for row in state.history),
    )
    assert aside >= 1
    assert {one["prompt"] for one in known["named"] if one["reason"] == "score"} == {2}
    assert "set aside, not a finite number: prompt 2: score" in capsys.readouterr().out
    assert not any("refused/" in key for key in state.extra), "every step was taken"
    assert all(bool(one.isfinite().all()) for one in weights(state))
    assert all(row["optim/not_finite"] == 0 for row in state.history)
    before = weights(make_state(cfg))
    assert any(not torch.equal(one, other) for one, other in zip(weights(state), before, strict=True))


def test_what_is_set_aside_moves_no_other_advantage() -> None:
    """The others are credited as if the rollout had never had it: whitened, summed and divided without it."""
    cfg = changed(CFG, advantages={"method": "reinforce"})
    whole = roll(cfg, make_state(cfg))
    fresh = [replace(row, score=math.nan) for row in whole.responses]

    def credit(reward_fn: Callable[[SequenceBatch], Tensor], rows: Sequence[Written]) -> dict[tuple[int, ...], Tensor]:
        setup = setup_of(cfg, make_state(cfg), reward_fn)
        rollout = collect_rollout(setup, rows, [], torch.Generator().manual_seed(1))
        found = {}
        for credited in (one for minibatch in assign_credit(cfg, {}, rollout)[0] for one in minibatch.parts):
            for place, row in enumerate(credited.part.rows):
                length = int(credited.part.mask_BR[place].sum())
                if length:
                    key = (row if len(rows) == 16 else row + (row >= 2), *rollout.responses[row].response_ids)
                    found[key] = credited.advantages_BR[place, :length]
                else:
                    assert credited.advantages_BR[place].abs().max() == 0
        return found

    marred = credit(spoiled(answers_prompt), fresh)
    without = credit(share_of_good, [row for row in fresh if row.prompt != 2])
    assert len(marred) == 15
    assert marred.keys() == without.keys()
    for key, advantages in marred.items():
        torch.testing.assert_close(advantages, without[key], atol=1e-5, rtol=0)


def test_what_is_no_number_in_a_model_is_found_too() -> None:
    """A value model and a reference that are spoilt for one token are named, and nothing is learned from that token."""
    for name, reason in (("value", "value"), ("reference", "log-probability under the reference")):
        state, reference = make_state(), tiny_policy()
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())  # no longer tied
        body = state.modules["value"].body if name == "value" else reference.model
        with torch.no_grad():
            body.embed_tokens.weight[11] = math.nan  # prompt 4 begins with it
        state = run(changed(CFG, steps=3), state, reference=reference)
        assert {one["reason"] for one in state.extra["set_aside"]["named"]} == {reason}
        assert all(bool(one.isfinite().all()) for one in state.modules["policy"].parameters())


def test_a_rollout_without_a_finite_response_teaches_nothing_and_three_in_a_row_end_the_run() -> None:
    def rollouts(bad: Sequence[int]) -> Callable[[SequenceBatch], Tensor]:
        count = 0

        def score(batch: SequenceBatch) -> Tensor:
            nonlocal count
            count += 1
            return share_of_good(batch) * (math.nan if (count - 1) // 2 in bad else 1.0)  # two minibatches a rollout

        return score

    state = run(CFG, reward_fn=rollouts([1, 2, 4]))
    assert [row["rollout/set_aside"] for row in state.history] == [0, 16, 16, 0, 16, 0]
    assert "loss/policy" not in state.history[1]
    assert state.history[3]["policy/updates"] == 4
    with pytest.raises(Diverged, match=r"rollout: step 4: no response is left to learn from \(score\)"):
        run(CFG, reward_fn=rollouts([1, 2, 3]))


def test_a_response_that_lost_all_it_is_compared_with_is_set_aside_too() -> None:
    cfg = changed(CFG, **METHODS["rloo of two"], steps=1)
    fresh = [replace(row, score=math.nan) for row in roll(cfg, make_state(cfg)).responses]
    score = spoiled(lambda batch: torch.arange(len(batch.ids_BS)) == 0)
    rollout = collect_rollout(setup_of(cfg, make_state(cfg), score), fresh, [], torch.Generator())
    reasons = sorted(rollout.aside.values())
    assert reasons == ["no other response is left to compare it with"] * 2 + ["score"] * 2
    assert {row // 2 for row, reason in rollout.aside.items()} == {
        row // 2 for row, reason in rollout.aside.items() if reason == "score"
    }


def test_two_processes_set_aside_what_one_does() -> None:
    cfg = changed(CFG, steps=3)
    alone = run(cfg, reward_fn=spoiled(answers_prompt))
    first, second = in_processes(2, lambda world: run(cfg, reward_fn=spoiled(answers_prompt), world=world))
    assert first.extra == second.extra
    assert first.extra["set_aside"] == alone.extra["set_aside"]
    for one, two, whole in zip(weights(first), weights(second), weights(alone), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole, atol=1e-6, rtol=0)


def test_n41_broken_off_and_resumed_with_responses_set_aside_it_ends_with_the_same_bits(
    harness: Callable[..., Any], same_state: Callable[..., None]
) -> None:
    cfg = changed(CFG, save_every=2, replay={"rows": 8, "capacity": 32}, kl={"controller": "adaptive"})

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return run(cfg, state, spoiled(answers_prompt), log=log, checkpoint=checkpoint)

    runs = harness(lambda: make_state(cfg), train)
    same_state(runs.resumed_after(3), runs.unbroken())


def test_refused_steps_of_one_rollout_do_not_end_a_run() -> None:
    """The loss of every step of the second and third rollout is no number; the fourth is learned from."""
    state, steps = make_state(), []

    def log(step: int, *_: object) -> None:
        steps.append(step)

    norm = state.modules["policy"].model.norm
    norm.weight.register_hook(lambda gradient: gradient * (math.nan if len(steps) in (1, 2) else 1.0))
    state = run(changed(CFG, steps=4), state, log=log)
    assert state.extra["refused/policy"] == 8
    assert state.extra["refused_in_a_row/policy"] == 0
    assert steps == [1, 2, 3, 4]


def test_a_score_that_depends_on_the_batch_is_asked_until_all_that_count_are_numbers() -> None:
    """The first row of each pass has none, whoever it is: each time others come to stand there."""
    first = spoiled(lambda batch: torch.arange(len(batch.ids_BS)) == 0)
    state = run(changed(CFG, steps=2, microbatch=2), reward_fn=first)
    assert all(bool(one.isfinite().all()) for one in weights(state))
    assert all(row["rollout/set_aside"] >= 8 for row in state.history)
