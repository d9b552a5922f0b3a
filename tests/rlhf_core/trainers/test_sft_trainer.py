"""The SFT trainer: what it learns from, how steps are cut, when it stops, resume to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_core.config import SFTConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.engine.batches import collate
from rlhf_core.errors import Diverged
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers import sft
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.sft import accumulate_gradients, epoch_batches, heldout_loss, train_sft

PAD, EOS, FIRST, LAST = 0, 1, 4, 20
RUN = RunContext(seed=0, pad_id=PAD)


def count_task(count: int, seed: int = 1) -> list[Example]:
    """The response counts on from the prompt's last token to the next multiple of 5; one to five tokens and an end."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(1, 5, (1,), generator=generator))
        prompt = torch.randint(FIRST, LAST, (length,), generator=generator).tolist()
        after = prompt[-1] + 1
        examples.append(Example(prompt, [*range(after, after + -after % 5 + 1), EOS]))
    return examples


def config(**settings: Any) -> SFTConfig:
    return SFTConfig(
        **{"max_steps": 12, "batch_size": 4, "warmup_steps": 2, "eval_every": 3, "save_every": 2, **settings}
    )


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[], TrainState]:
    def make() -> TrainState:
        policy = tiny_policy()
        return TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})

    return make


def train(cfg: SFTConfig, state: TrainState, log: Callable, checkpoint: Callable, heldout: bool = True) -> TrainState:
    return train_sft(
        cfg,
        state,
        count_task(30),
        count_task(9, seed=2) if heldout else [],
        RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint),
    )


def gradients(policy: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in policy.parameters()]


def test_the_loss_is_the_mean_over_response_tokens_and_no_others(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy, rows = tiny_policy(), count_task(6)
    loss, _ = accumulate_gradients(policy, rows, 1, RUN)
    each = [response_logprobs(policy, collate([row.prompt], [row.response], PAD)).sum() for row in rows]
    assert loss == pytest.approx(-sum(each).item() / sum(len(row.response) for row in rows), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_n25_cutting_a_step_into_parts_changes_nothing(tiny_policy: Callable[[], PreTrainedModel], parts: int) -> None:
    """The rows are of unequal length, so a mean of micro-batch means would differ by far more than this bound."""
    whole, cut, rows = tiny_policy().double(), tiny_policy().double(), count_task(6)
    one_loss, many_loss = (accumulate_gradients(p, rows, n, RUN)[0] for p, n in ((whole, 1), (cut, parts)))
    assert one_loss == pytest.approx(many_loss, rel=1e-12)
    for one, two in zip(gradients(whole), gradients(cut), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


def test_a_pass_on_a_cpu_holds_few_tokens(
    tiny_policy: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, rows = tiny_policy().double(), tiny_policy().double(), count_task(6)
    loss, _ = accumulate_gradients(whole, rows, 1, RUN)
    most, held = max(row.num_tokens for row in rows) + 1, []
    read = sft.target_logprobs
    monkeypatch.setattr(sft, "CPU_PASS_TOKENS", most)
    monkeypatch.setattr(
        sft, "target_logprobs", lambda policy, some, pad_id: held.append(some) or read(policy, some, pad_id)
    )
    assert accumulate_gradients(cut, rows, 1, RUN)[0] == pytest.approx(loss, rel=1e-12)
    for one, two in zip(gradients(whole), gradients(cut), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)
    assert [row for some in held for row in some] == rows
    assert 1 < len(held) < len(rows)
    assert all(sum(row.num_tokens for row in some) <= most for some in held)


def test_n13_the_end_token_is_learned(make_state: Callable[[], TrainState], sink: Any) -> None:
    state = make_state()
    cfg = config(max_steps=60, batch_size=8, learning_rate=1e-2)
    rows = [Example([5, number], [9, EOS]) for number in range(FIRST, LAST)]
    train_sft(cfg, state, rows, [], RunContext(seed=0, pad_id=PAD, log=sink))
    end = response_logprobs(state.modules["policy"], collate([[5, 7]], [[9, EOS]], PAD))[0, 1]
    assert end.item() > -0.1


def test_n26_a_step_of_several_micro_batches_is_one_step_of_the_optimiser(
    make_state: Callable[[], TrainState], sink: Any
) -> None:
    state = train(config(accumulation=4), make_state(), sink, lambda state: None)
    counts = {int(moments["step"]) for moments in state.optimizers["policy"].state.values()}
    assert counts == {12}


def test_accumulation_trains_the_same_policy(make_state: Callable[[], TrainState], sink: Callable) -> None:
    one = train(config(max_steps=6), make_state(), sink, lambda state: None)
    four = train(config(max_steps=6, accumulation=4), make_state(), sink, lambda state: None)
    for first, second in zip(one.modules["policy"].parameters(), four.modules["policy"].parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_every_demonstration_is_seen_once_a_pass_in_another_order_each(
    make_state: Callable[[], TrainState],
) -> None:
    examples = count_task(30)
    passes = [epoch_batches(config(), examples, 0, epoch) for epoch in (0, 1)]
    for batches in passes:
        assert sorted(row for batch in batches for row in batch) == list(range(30))
    assert passes[0] != passes[1]
    assert passes[0] != epoch_batches(config(), examples, 1, 0)


def test_heldout_loss_does_not_depend_on_batching(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy, rows = tiny_policy(), count_task(9)
    assert heldout_loss(policy, rows, 9, RUN) == pytest.approx(heldout_loss(policy, rows, 2, RUN), rel=1e-5)


@pytest.mark.parametrize("step", [1, 2, 5, 8, 11])
def test_stopped_and_resumed_ends_with_the_same_bits(
    make_state: Callable[[], TrainState], harness: Callable, same_state: Callable, step: int
) -> None:
    cfg = config(save_every=1 if step == 1 else 2)
    runs = harness(make_state, lambda state, log, save: train(cfg, state, log, save))
    unbroken, resumed = runs.unbroken(), runs.resumed_after(step)
    same_state(unbroken, resumed)
    assert unbroken.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(value, resumed.tensors[key]) for key, value in unbroken.tensors.items())


def scripted_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    script = iter(losses)
    monkeypatch.setattr("rlhf_core.trainers.sft.heldout_loss", lambda *_: next(script))


def test_it_stops_when_the_heldout_loss_has_not_fallen_and_ends_with_the_best_weights(
    make_state: Callable[[], TrainState], sink: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, [3.0, 2.0, 2.25, 2.5, 9.9])
    cfg = config(max_steps=30, patience=2, save_every=1)
    weights = {}

    def note(state: TrainState) -> None:
        weights[state.step] = [parameter.detach().clone() for parameter in state.modules["policy"].parameters()]

    state = train(cfg, make_state(), sink, note)
    assert (state.step, state.extra["stopped_early"], state.extra["best_step"]) == (12, True, 6)
    assert state.extra["best_heldout_loss"] == 2.0
    for parameter, best, last in zip(state.modules["policy"].parameters(), weights[6], weights[12], strict=True):
        assert torch.equal(parameter, best)
        assert not torch.equal(best, last)
    assert train(cfg, state, sink, note).step == 12, "a stopped run does not go on when it is resumed"


def test_the_state_that_orders_a_stop_is_kept(
    make_state: Callable[[], TrainState], sink: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, [3.0, 3.5])
    kept = []
    train(config(max_steps=30, patience=1, save_every=100), make_state(), sink, lambda state: kept.append(state.step))
    assert kept == [6]


def test_a_better_loss_in_between_resets_the_patience(
    make_state: Callable[[], TrainState], sink: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, [3.0, 3.5, 2.9, 3.5, 2.8])
    state = train(config(max_steps=15, patience=2), make_state(), sink, lambda state: None)
    assert (state.step, state.extra["stopped_early"], state.extra["best_step"]) == (15, False, 15)


def test_without_heldout_examples_all_steps_are_taken_and_kept(make_state: Callable[[], TrainState], sink: Any) -> None:
    state = train(config(), make_state(), sink, lambda state: None, heldout=False)
    assert state.step == 12
    assert not state.tensors
    assert not any("loss/heldout" in row for row in state.history)


def test_what_is_reported(make_state: Callable[[], TrainState], sink: Any) -> None:
    state = train(config(), make_state(), sink, lambda state: None)
    assert [row[:2] for row in sink.rows] == [(step, 12) for step in range(1, 13)]
    assert [step for step, _, figures, _ in sink.rows if "loss/heldout" in figures] == [3, 6, 9, 12]
    one_pass = sum(row.num_tokens for row in count_task(30))
    assert sink.rows[7][3] == one_pass, "tokens are counted without padding; 8 batches are one pass"
    assert [row["step"] for row in state.history] == list(range(1, 13))


def test_a_policy_that_is_no_longer_finite_ends_training(make_state: Callable[[], TrainState], sink: Any) -> None:
    state = make_state()
    with torch.no_grad():
        next(state.modules["policy"].parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="step 3: loss nan"):
        train(config(), state, sink, lambda state: None)
    told = [["optim/learning_rate", "optim/not_finite"]] * 2
    assert [list(row[2]) for row in sink.rows] == told, "no NaN is reported or checkpointed"
    assert [row[2]["optim/not_finite"] for row in sink.rows] == [2, 2]
    assert state.extra["refused/policy"] == 3


def test_it_learns_a_toy_task(make_state: Callable[[], TrainState], sink: Any) -> None:
    state = make_state()
    cfg = config(max_steps=200, batch_size=32, learning_rate=1e-2, warmup_steps=20, eval_every=50)
    train_sft(cfg, state, count_task(640), count_task(64, 2), RunContext(seed=0, pad_id=PAD, log=sink))
    unseen = count_task(100, seed=3)
    samples = sample_responses(
        state.modules["policy"],
        [row.prompt for row in unseen],
        Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8),
        temperature=0.0,
        generator=torch.Generator(),
        batch_size=100,
    )
    right = sum(ids == row.response for ids, row in zip(samples.response_ids, unseen, strict=True))
    assert right >= 95
    assert state.extra["best_heldout_loss"] < 0.1
