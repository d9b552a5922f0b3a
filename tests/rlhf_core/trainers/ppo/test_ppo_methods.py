"""What varies in PPO's loop: advantages, value models, adapters, temperature, micro-batches, processes."""

import statistics
from typing import Any

import pytest
import torch
from support.ppo import (
    CFG,
    EOS,
    GOOD,
    PROMPTS,
    SAMPLING,
    changed,
    make_state,
    roll,
    run,
    tiny_policy,
    weights,
)
from support.preference import ThreadWorld, in_processes
from torch import nn

from rlhf_core.config import PPOConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import add_adapters
from rlhf_core.rollout.sampler import sample_rows
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.credit import assign_credit, response_advantages
from rlhf_core.trainers.ppo.forward import policy_outputs, reference_token_logprobs
from rlhf_core.trainers.ppo.update import run_epochs, set_learning_rates, update

LEARNING = changed(
    CFG, steps=30, rollout_batch=64, minibatch=32, learning_rate=5e-3, value_learning_rate=5e-3, kl_coef=0.02,
    missing_end_penalty=0.0, target_kl=1.0,
)  # fmt: skip
VARIANTS = {
    "shared trunk": {"value": {"model": "shared"}},
    "reinforce": {"advantages": {"method": "reinforce"}},
    "rloo": {"advantages": {"method": "rloo"}, "responses_per_prompt": 4},
    "grpo": {"advantages": {"method": "grpo"}, "responses_per_prompt": 4},
    "rloo as it is": {"advantages": {"method": "rloo", "scaling": "none"}, "responses_per_prompt": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_method_learns_the_toy_task(variant: str) -> None:
    cfg = changed(LEARNING, **VARIANTS[variant])
    scores = [row["reward/score"] for row in run(cfg).history]
    assert scores[0] < 0.15
    assert scores[-1] > 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("variant", [{}, {"value": {"model": "shared"}}, {"entropy_coef": 0.1}, {"microbatch": 3}])
def test_n01_n04_all_log_probabilities_are_at_the_sampling_temperature_and_from_one_path(
    temperature: float, variant: dict[str, Any]
) -> None:
    """Old, new and reference are bit for bit the same before anything is learned; the sampler's own agree closely."""
    cfg = changed(CFG, temperature=temperature, **variant)
    state = make_state(cfg)
    rollout = roll(cfg, state)
    for part in rollout.parts():
        assert torch.equal(part.old_logprobs_BR, part.ref_logprobs_BR)
        with torch.no_grad():
            logits_BSV = state.modules["policy"](part.batch.ids_BS, part.batch.mask_BS).logits
        plain_BRV = torch.log_softmax(logits_BSV[:, part.batch.prompt_width - 1 : -1] / temperature, -1)
        plain_BR = plain_BRV.gather(2, part.batch.response_ids_BR[..., None])[..., 0] * part.batch.response_mask_BR
        torch.testing.assert_close(part.old_logprobs_BR, plain_BR, atol=2e-5, rtol=0)
    minibatches, _ = assign_credit(cfg, {}, rollout)
    for minibatch in minibatches:
        figures, stopped = update(cfg, make_state(cfg), minibatch)
        assert (figures["policy/approx_kl"], figures["policy/ratio_max"], stopped) == (0.0, 1.0, False)


@pytest.mark.parametrize("model", ["separate", "shared"])
def test_n17_cut_responses_are_bootstrapped_where_asked_for(model: str) -> None:
    """The value of the state after the last token, by transformers' own forward; none for a response that ended."""
    cfg = changed(CFG, value={"model": model}, advantages={"truncated": "bootstrap"}, missing_end_penalty=0.0)
    state = make_state(cfg)
    head = state.modules["value"]
    nn.init.normal_(head.scalar.weight, generator=torch.Generator().manual_seed(2))
    body = state.modules["policy"].model if model == "shared" else head.body
    rollout = roll(cfg, state)
    assert {row.finished for row in rollout.responses} == {True, False}
    for part in rollout.parts():
        with torch.no_grad():
            mask_BS = part.batch.mask_BS
            states_BSD = body(part.batch.ids_BS, mask_BS, position_ids=part.batch.position_ids_BS).last_hidden_state
            places_B = (mask_BS * torch.arange(mask_BS.shape[1])).argmax(1)
            values_B = head.scalar(states_BSD[torch.arange(len(places_B)), places_B])[:, 0]
        cut_B = torch.tensor([not rollout.responses[row].finished for row in part.rows])
        torch.testing.assert_close(part.last_values_B, values_B * cut_B, atol=1e-5, rtol=0)
    minibatches, _ = assign_credit(cfg, {}, rollout)
    for credited in (credited for minibatch in minibatches for credited in minibatch.parts):
        last_B1 = (credited.part.batch.response_mask_BR.sum(1).long() - 1)[:, None]
        returns_B, rewards_B = (one.gather(1, last_B1)[:, 0] for one in (credited.returns_BR, credited.rewards_BR))
        torch.testing.assert_close(returns_B, rewards_B + cfg.gamma * credited.part.last_values_B)
    plain = roll(changed(cfg, advantages={"truncated": "terminal"}), state)
    assert all(not part.last_values_B.any() for part in plain.parts())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_n01_n02_the_distribution_sampled_from_is_the_one_that_training_computes(temperature: float) -> None:
    cfg, state = changed(CFG, temperature=temperature), make_state()
    rollout = roll(cfg, state)
    uniform_NT = torch.rand(16, SAMPLING.max_new_tokens, generator=torch.Generator().manual_seed(3))
    policy = state.modules["policy"]
    samples = sample_rows(policy, PROMPTS[:16], uniform_NT, SAMPLING, temperature=temperature, batch_size=16)
    assert [row.response_ids for row in rollout.responses] == samples.response_ids
    for part in rollout.parts():
        for row, logprobs in zip(part.rows, part.old_logprobs_BR.tolist(), strict=True):
            drawn_from = samples.behaviour_logprobs[row]
            assert logprobs[: len(drawn_from)] == pytest.approx(drawn_from, abs=1e-5)


def test_n06_a_log_ratio_beyond_all_bounds_leaves_a_finite_step() -> None:
    state = make_state()
    minibatch = assign_credit(CFG, {}, roll(CFG, state))[0][0]
    minibatch.parts[0].part.old_logprobs_BR.sub_(500.0)
    cfg = changed(CFG, target_kl=1e30)
    figures, _ = update(cfg, state, minibatch)
    assert figures["policy/ratio_max"] == pytest.approx(statistics.math.exp(20.0))
    assert figures["optim/grad_norm_policy"] is not None
    assert all(bool(one.isfinite().all()) for one in weights(state))


def test_n13_responses_end_with_their_first_stop_token_which_counts() -> None:
    rollout = roll(CFG, make_state())
    assert any(row.finished for row in rollout.responses)
    for row in rollout.responses:
        assert row.finished == (row.response_ids[-1] == EOS)
        assert EOS not in row.response_ids[:-1]
    for part in rollout.parts():
        ended_BR = (part.batch.response_ids_BR == EOS) & (part.batch.response_mask_BR == 1)
        assert bool((part.old_logprobs_BR[ended_BR] != 0).all()), "the end token has a log-probability"


@pytest.mark.parametrize("model", ["separate", "shared"])
def test_n16_a_value_is_read_before_its_token_is_known(model: str) -> None:
    cfg = changed(CFG, value={"model": model})
    state = make_state(cfg)
    nn.init.normal_(state.modules["value"].scalar.weight)
    part = max(roll(cfg, state).parts(), key=lambda part: part.batch.ids_BS.shape[1])
    width, place = part.batch.prompt_width, 2
    part.batch.ids_BS[:, width + place] = GOOD + 1
    from rlhf_core.trainers.ppo.forward import values_of

    with torch.no_grad():
        moved_BR = values_of(state.modules, part.batch, policy_outputs(state.modules, part.batch, 1.0))
    rows = part.batch.response_mask_BR[:, place + 1] == 1
    torch.testing.assert_close(moved_BR[rows, : place + 1], part.old_values_BR[rows, : place + 1])
    assert bool((moved_BR[rows, place + 1] - part.old_values_BR[rows, place + 1]).abs().max() > 1e-3)


@pytest.mark.parametrize("model", ["separate", "shared"])
def test_n23_values_start_at_zero(model: str) -> None:
    cfg = changed(CFG, value={"model": model})
    assert all(not bool(part.old_values_BR.any()) for part in roll(cfg, make_state(cfg)).parts())


def test_a_shared_trunk_costs_one_pass_of_one_body(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = changed(CFG, value={"model": "shared"})
    state = make_state(cfg)
    minibatches, _ = assign_credit(cfg, {}, roll(cfg, state))
    passes = []
    from rlhf_core.engine import packed

    def counted(*arguments: Any, states: Any = packed.packed_states) -> Any:
        passes.append(arguments[0])
        return states(*arguments)

    monkeypatch.setattr("rlhf_core.engine.states.packed_states", counted)
    update(cfg, state, minibatches[0])
    assert passes == [state.modules["policy"].get_decoder()]


def test_the_value_loss_reaches_the_shared_trunk_with_its_weight() -> None:
    """With no advantage anywhere only the value loss moves the policy's body, in proportion to `value.coef`."""
    norms = []
    for coef in (0.1, 0.3):
        cfg = changed(CFG, value={"model": "shared", "coef": coef}, epochs=1)
        state = make_state(cfg)
        nn.init.normal_(state.modules["value"].scalar.weight, generator=torch.Generator().manual_seed(0))
        minibatch = assign_credit(cfg, {}, roll(cfg, state))[0][0]
        for credited in minibatch.parts:
            credited.advantages_BR.zero_()
        norms.append(update(cfg, state, minibatch)[0]["optim/grad_norm_policy"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)


def test_methods_without_a_value_model_train_none() -> None:
    cfg = changed(CFG, **VARIANTS["rloo"], steps=1)
    state = run(cfg)
    assert set(state.modules) == {"policy"}
    assert not {"loss/value", "rollout/explained_variance", "optim/grad_norm_value"} & set(state.history[0])


def test_response_advantages_worked_by_hand() -> None:
    """Two prompts of two responses, totals (1, 3) and (2, 8).

    RLOO: 1 - 3, 3 - 1; 2 - 8, 8 - 2. GRPO: the mean is 2 and 5, the deviation (n - 1) sqrt 2 and sqrt 18.
    REINFORCE: the others' means are 13/3, 11/3, 12/3, 6/3.
    """
    totals_N = torch.tensor([1.0, 3.0, 2.0, 8.0], dtype=torch.float64)
    expected = {
        "rloo": [-2.0, 2.0, -6.0, 6.0],
        "grpo": [-(2**-0.5), 2**-0.5, -(2**-0.5), 2**-0.5],
        "reinforce": [1 - 13 / 3, 3 - 11 / 3, 2 - 4, 8 - 2],
    }
    for method, advantages in expected.items():
        cfg = changed(CFG, advantages={"method": method}, responses_per_prompt=2)
        assert response_advantages(cfg, totals_N, torch.ones(4, dtype=torch.bool)).tolist() == pytest.approx(
            advantages, abs=1e-3
        )


@pytest.mark.parametrize("method", ["rloo", "grpo", "reinforce"])
@pytest.mark.parametrize("total", [0.1, 1e-3, 4096.3, -1e6 / 3])
def test_responses_that_earn_alike_have_no_advantage_to_whiten(method: str, total: float) -> None:
    """Also an odd number of them, whose sum in float32 is no multiple of the total."""
    cfg = changed(CFG, advantages={"method": method}, responses_per_prompt=33, rollout_batch=99, minibatch=33)
    advantages_N = response_advantages(cfg, torch.full((99,), total), torch.ones(99, dtype=torch.bool))
    assert advantages_N.tolist() == [0.0] * 99


def test_group_advantages_stand_on_every_token_of_their_own_response() -> None:
    cfg = changed(CFG, advantages={"method": "rloo", "scaling": "none"}, responses_per_prompt=4, kl_coef=0.0,
                  missing_end_penalty=0.0)  # fmt: skip
    rollout = roll(cfg, make_state(cfg))
    minibatches, _ = assign_credit(cfg, {}, rollout)
    scores = [row.score for row in rollout.responses]
    for minibatch in minibatches:
        for credited in minibatch.parts:
            mask_BR = credited.part.batch.response_mask_BR
            for place, row in enumerate(credited.part.rows):
                first = row // 4 * 4
                others = [scores[other] for other in range(first, first + 4) if other != row]
                wanted_R = (scores[row] - statistics.fmean(others)) * mask_BR[place]
                torch.testing.assert_close(credited.advantages_BR[place], wanted_R, atol=1e-6, rtol=0)
    prompts = [row.prompt for row in rollout.responses]
    assert prompts == [prompt for prompt in range(4) for _ in range(4)]


def test_responses_to_a_prompt_share_a_minibatch() -> None:
    cfg = changed(CFG, responses_per_prompt=4)
    for parts in roll(cfg, make_state(cfg)).minibatches:
        groups = [row // 4 for part in parts for row in part.rows]
        assert sorted(groups) == sorted(list(set(groups)) * 4)


def test_adapters_make_the_policy_its_own_reference() -> None:
    cfg = changed(CFG, steps=3, learning_rate=1e-2, warmup_steps=0)
    policy = tiny_policy()
    add_adapters(policy, LoraConfig(rank=4), seed=5)
    state = make_state(cfg)
    state.modules["policy"] = policy
    state.optimizers["policy"] = make_optimizer(policy, 1e-2)
    run(cfg, state, reference=policy)
    assert state.history[0]["rollout/kl_to_reference"] == 0.0
    assert state.history[-1]["rollout/kl_to_reference"] != 0.0
    part = roll(cfg, state).parts()[0]
    with torch.no_grad():
        torch.testing.assert_close(reference_token_logprobs(policy, policy, part.batch, 1.0), part.ref_logprobs_BR)
        assert not torch.equal(policy_outputs(state.modules, part.batch, 1.0).logprobs_BR, part.ref_logprobs_BR)
    frozen = dict(tiny_policy().named_parameters())
    kept = {name.replace(".base_layer", ""): p for name, p in policy.named_parameters() if not p.requires_grad}
    assert set(kept) == set(frozen)
    assert all(torch.equal(kept[name], frozen[name]) for name in frozen)


def test_an_entropy_bonus_keeps_the_policy_spread() -> None:
    """With no reward to earn, entropy falls by nothing but the bonus raises it."""
    entropies = []
    for coef in (0.0, 0.5):
        cfg = changed(CFG, entropy_coef=coef, kl_coef=0.0, learning_rate=5e-3, steps=8)
        entropies.append(run(cfg).history[-1]["policy/entropy"])
    assert entropies[1] > entropies[0] + 0.02


@pytest.mark.parametrize("variant", [{}, VARIANTS["shared trunk"], VARIANTS["grpo"], {"entropy_coef": 0.1}])
def test_n25_micro_batches_change_nothing_but_rounding(variant: dict[str, Any]) -> None:
    ends = []
    for microbatch in (None, 3):
        cfg = changed(CFG, microbatch=microbatch, learning_rate=3e-3, steps=2, **variant)
        ends.append(run(cfg))
    for whole, cut in zip(weights(ends[0]), weights(ends[1]), strict=True):
        torch.testing.assert_close(cut, whole, atol=2e-5, rtol=0)
    for key, value in ends[0].history[0].items():
        assert ends[1].history[0][key] == pytest.approx(value, abs=1e-4), key


PROCESSES = {
    "gae": {},
    "grpo, running": {**VARIANTS["grpo"], "scores": {"normalise": "running", "terms": {"length": -0.1}}},
    "shared, adaptive": {**VARIANTS["shared trunk"], "kl": {"controller": "adaptive", "horizon": 100.0}},
    "replay, curriculum": {"replay": {"rows": 8, "capacity": 24}, "curriculum": {"start_share": 0.5, "steps": 4}},
    "micro-batches": {"microbatch": 3},
}


@pytest.mark.parametrize("variant", PROCESSES)
def test_two_processes_take_the_steps_of_one(variant: str) -> None:
    cfg = changed(CFG, steps=3, learning_rate=2e-3, **PROCESSES[variant])

    def work(world: ThreadWorld) -> TrainState:
        return run(cfg, world=world)

    alone, (first, second) = run(cfg), in_processes(2, work)
    assert first.history == second.history
    assert first.extra == second.extra
    for one, two, whole in zip(weights(first), weights(second), weights(alone), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole, atol=1e-6, rtol=0)
    for key, value in alone.history[-1].items():
        assert first.history[-1][key] == pytest.approx(value, abs=1e-4), key


def test_a_minibatch_that_cannot_be_dealt_evenly_is_refused() -> None:
    cfg = changed(CFG, rollout_batch=9, minibatch=3)
    with pytest.raises(ConfigError, match=r"minibatch: 3 responses cannot be dealt evenly to 2 processes. Fix:"):
        in_processes(2, lambda world: run(cfg, world=world))


def test_n26_steps_are_epochs_times_minibatches_and_stop_early_alike_in_two_processes() -> None:
    far = changed(CFG, learning_rate=0.05, warmup_steps=0, target_kl=1e-4)

    def work(world: ThreadWorld) -> dict[str, float | None]:
        state = make_state()
        set_learning_rates(far, state)
        minibatches, _ = assign_credit(far, {}, roll(far, state, world=world), world)
        return run_epochs(far, state, minibatches, torch.Generator().manual_seed(1), world)

    for figures in in_processes(2, work):
        assert (figures["policy/updates"], figures["policy/stopped_early"]) == (1, 1.0)
    assert run(CFG).history[-1]["policy/updates"] == 4


def test_the_processes_stop_by_the_divergence_of_the_whole_minibatch_and_keep_no_gradient() -> None:
    """Three quarters of it are more than either process sees in its own half."""
    fast = changed(CFG, learning_rate=0.02, warmup_steps=0)

    def second_update(cfg: PPOConfig, world: World) -> tuple[float | None, bool, bool]:
        state = make_state(cfg)
        set_learning_rates(cfg, state)
        minibatches, _ = assign_credit(cfg, {}, roll(cfg, state, world=world), world)
        update(changed(cfg, target_kl=1e9), state, minibatches[0], world)
        figures, stopped = update(cfg, state, minibatches[1], world)
        return figures["policy/approx_kl"], stopped, all(p.grad is None for p in state.modules["policy"].parameters())

    moved, stopped, _ = second_update(fast, ALONE)
    assert not stopped
    near = changed(fast, target_kl=0.75 * moved)
    for divergence, *rest in [
        second_update(near, ALONE),
        second_update(changed(near, microbatch=3), ALONE),
        *in_processes(2, lambda world: second_update(near, world)),
    ]:
        assert divergence == pytest.approx(moved, rel=1e-3)
        assert rest == [True, True]
