"""Masks, weights, balance, token budgets and several processes of the SFT trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.config.sft import HardExamplesConfig, SFTBatchesConfig
from rlhf_core.data.batching.examples import Example, join_turns
from rlhf_core.engine.batches import collate
from rlhf_core.models.adapters import add_adapters
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers import hard_examples
from rlhf_core.trainers.optimisation import apply_gradients, make_optimizer
from rlhf_core.trainers.sft import accumulate_gradients, epoch_batches, heldout_loss, target_logprobs, train_sft

PAD, EOS = 0, 1
RUN = RunContext(seed=0, pad_id=PAD)
TURNS = [
    ([5, 9], [10, 11, EOS]),
    ([5, 9, 10, 11, EOS, 6, 9], [12, EOS]),
    ([5, 9, 10, 11, EOS, 6, 9, 12, EOS, 7, 9], [8, EOS]),
]


@dataclass
class Half:
    """One of two processes, without the other: shares are real, sums are of this half alone."""

    rank: int
    size: int = 2

    def share(self, rows: Sequence[Any]) -> list[Any]:
        return list(rows)[self.rank :: 2]

    def collect(self, items: Sequence[Any]) -> list[Any]:
        return list(items)

    def total(self, tensor: Tensor) -> Tensor:
        return tensor.detach()


def rows_of(count: int, seed: int = 1) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randint(1, 7, (count, 2), generator=generator).tolist()
    return [
        Example(
            torch.randint(4, 24, (prompt,), generator=generator).tolist(),
            [*torch.randint(4, 24, (response,), generator=generator).tolist(), EOS],
            task="ab"[number % 3 == 0],
        )
        for number, (prompt, response) in enumerate(shapes)
    ]


def gradient(policy: PreTrainedModel) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def test_a_joined_dialogue_teaches_what_its_turns_teach_one_by_one(
    tiny_policy: Callable[[], PreTrainedModel],
) -> None:
    joined, apart = tiny_policy().double(), tiny_policy().double()
    one, _ = accumulate_gradients(joined, join_turns(TURNS), 1, RUN)
    many, _ = accumulate_gradients(apart, [Example(*turn) for turn in TURNS], 1, RUN)
    assert one == pytest.approx(many, rel=1e-12)
    torch.testing.assert_close(gradient(joined), gradient(apart), atol=1e-12, rtol=1e-9)


def test_n34_tokens_of_other_speakers_have_no_part_in_loss_or_gradient(
    tiny_policy: Callable[[], PreTrainedModel],
) -> None:
    """Against the sum over the assistant's tokens, picked out one by one."""
    policy = tiny_policy()
    (row,) = join_turns(TURNS)
    logprobs_BR, mask_BR = target_logprobs(policy, [row, Example([5], [6, EOS])], PAD)
    assert mask_BR.tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1], [1, 1, *[0] * 9]]
    assert (logprobs_BR == 0).tolist() == (mask_BR == 0).tolist()
    whole = response_logprobs(policy, collate([row.prompt], [row.response], PAD))[0]
    loss, _ = accumulate_gradients(policy, [row], 1, RUN)
    assert loss == pytest.approx(-whole[[0, 1, 2, 5, 6, 9, 10]].sum().item() / 7, rel=1e-6)


def test_only_the_tokens_that_predict_a_target_get_a_gradient(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    """The output layer is untied here, so its row of a token moves only by that token's probability, and up only as
    a target: the tokens 6 and 7, which only the user says, are pushed down."""
    policy = tiny_policy()
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    policy.config.tie_word_embeddings = False
    (row,) = join_turns(TURNS)
    before = policy.lm_head.weight.detach().clone()
    accumulate_gradients(policy, [row], 1, RUN)
    states = policy.model(torch.tensor([row.prompt + row.response])).last_hidden_state[0]
    places = torch.tensor([1, 2, 3, 6, 7, 10, 11])  # worked out by hand: those before 10, 11, 1, 12, 1, 8, 1
    targets = torch.tensor([10, 11, EOS, 12, EOS, 8, EOS])
    probs = (states[places] @ before.T).softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, len(before))
    torch.testing.assert_close(
        policy.lm_head.weight.grad, (probs - onehot).T @ states[places] / 7, atol=1e-6, rtol=1e-4
    )


def test_the_heldout_loss_counts_targets_only(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy = tiny_policy()
    apart = heldout_loss(policy, [Example(*turn) for turn in TURNS], 3, RUN)
    assert heldout_loss(policy, join_turns(TURNS), 3, RUN) == pytest.approx(apart, rel=1e-6)


def test_n25_two_processes_add_up_to_one(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    rows = [*rows_of(7), *join_turns(TURNS)]
    one, halves = tiny_policy().double(), [tiny_policy().double() for _ in range(2)]
    loss, _ = accumulate_gradients(one, rows, 2, RUN)
    parts = [
        accumulate_gradients(half, rows, 2, RunContext(seed=0, pad_id=PAD, world=Half(rank)))[0]
        for rank, half in enumerate(halves)
    ]
    assert sum(parts) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sum(map(gradient, halves)), gradient(one), atol=1e-12, rtol=1e-9)


def test_a_process_without_rows_adds_nothing(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    policy = tiny_policy()
    loss, each = accumulate_gradients(policy, rows_of(1), 2, RunContext(seed=0, pad_id=PAD, world=Half(1)), [1.0])
    assert (loss, each) == (0.0, [])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_weights_weigh_rows_and_the_mean_stays_a_mean(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    rows, policy = rows_of(4), tiny_policy()
    _, each = accumulate_gradients(policy, rows, 2, RUN, [1.0] * 4)
    loss, _ = accumulate_gradients(policy, rows, 2, RUN, [0.5, 2.0, 1.0, 3.0])
    weighted = [w * row.num_targets for w, row in zip([0.5, 2.0, 1.0, 3.0], rows, strict=True)]
    assert loss == pytest.approx(sum(w * e for w, e in zip(weighted, each, strict=True)) / sum(weighted), rel=1e-5)


def test_weights_follow_the_running_loss() -> None:
    cfg = HardExamplesConfig(exponent=2.0, max_weight=3.0, memory=0.25)
    losses = hard_examples.unseen(5)
    assert hard_examples.weights(losses, [0, 4], cfg) == [1.0, 1.0]
    hard_examples.follow(losses, [0, 1, 2], [1.0, 2.0, 3.0], cfg.memory)
    assert hard_examples.weights(losses, [2, 1, 0, 3], cfg) == pytest.approx([2.25, 1.0, 1 / 3, 1.0])
    hard_examples.follow(losses, [2, 0], [1.0, float("nan")], cfg.memory)
    assert losses[:3].tolist() == [1.0, 2.0, 0.25 * 3.0 + 0.75 * 1.0]


def config(**settings: Any) -> SFTConfig:
    return SFTConfig(
        **{"max_steps": 12, "batch_size": 4, "warmup_steps": 2, "eval_every": 3, "save_every": 2, **settings}
    )


VARIANTS = {
    "tokens": {"batches": SFTBatchesConfig(by="tokens", tokens=30)},
    "balanced": {"batches": SFTBatchesConfig(balance="task")},
    "hard": {"hard_examples": HardExamplesConfig(memory=0.3), "max_grad_value": 0.01},
    "lora": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_to_the_bit(
    name: str, tiny_policy: Callable[[], PreTrainedModel], harness: Callable, same_state: Callable
) -> None:
    cfg, examples = config(**VARIANTS[name]), [*rows_of(17), *join_turns(TURNS)]

    def make() -> TrainState:
        policy = tiny_policy()
        add_adapters(policy, LoraConfig(rank=2) if name == "lora" else None, seed=1)
        return TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})

    def train(state: TrainState, log: Callable, save: Callable) -> TrainState:
        return train_sft(cfg, state, examples, rows_of(5, 2), RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save))

    runs = harness(make, train)
    unbroken, resumed = runs.unbroken(), runs.resumed_after(7)
    same_state(unbroken, resumed)
    assert unbroken.tensors.keys() == resumed.tensors.keys()
    for key, value in unbroken.tensors.items():
        assert torch.equal(value.nan_to_num(-1.0), resumed.tensors[key].nan_to_num(-1.0)), key
    if name == "lora":
        assert all("lora_" in key for key in unbroken.tensors)
        saved = next(runs.folder.rglob("step-*/module-policy.safetensors"))
        assert saved.stat().st_size < 20_000, "a checkpoint holds the adapters and not what they stand beside"


def test_a_budget_of_tokens_is_kept_in_every_step() -> None:
    examples = rows_of(40)
    cfg = config(batches=SFTBatchesConfig(by="tokens", tokens=40))
    batches = epoch_batches(cfg, examples, 0, 0)
    assert max(sum(examples[row].num_tokens for row in batch) for batch in batches) <= 40
    assert sorted(row for batch in batches for row in batch) == list(range(40))


def test_balanced_batches_take_both_types_of_task_alike() -> None:
    examples = rows_of(42)  # 14 of one type, 28 of the other
    cfg = config(batches=SFTBatchesConfig(balance="task"))
    taken = [examples[row].task for batch in epoch_batches(cfg, examples, 0, 3) for row in batch]
    assert (taken.count("a"), taken.count("b")) == (21, 21)


def test_what_is_hard_is_learned_better_with_weights(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    """Twenty examples say one thing and two another: weighted by loss, the two are learned sooner."""
    examples = [Example([5], [6, 7, EOS])] * 20 + [Example([8], [9, 10, EOS])] * 2

    def loss_of_the_rare(weigh: HardExamplesConfig | None) -> float:
        policy = tiny_policy()
        state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})
        cfg = config(max_steps=20, batch_size=22, hard_examples=weigh, learning_rate=3e-3)
        train_sft(cfg, state, examples, [], RUN)
        return heldout_loss(policy, examples[-1:], 1, RUN)

    assert loss_of_the_rare(HardExamplesConfig(exponent=2.0, max_weight=8.0, memory=0.0)) < 0.8 * loss_of_the_rare(None)


def test_the_trainer_cuts_entries_where_it_is_told_to(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    def ends(most: float | None) -> Tensor:
        policy = tiny_policy()
        state = TrainState(modules={"policy": policy}, optimizers={"policy": torch.optim.SGD(policy.parameters(), 1.0)})
        cfg = config(max_steps=1, warmup_steps=0, learning_rate=1.0, max_grad_value=most)
        train_sft(cfg, state, rows_of(4), [], RUN)
        return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])

    start = torch.cat([parameter.detach().flatten() for parameter in tiny_policy().parameters()])
    assert (ends(1e-3) - start).abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert (ends(None) - start).abs().max() > 1e-2


def test_entries_of_a_gradient_are_cut_after_the_norm(tiny_policy: Callable[[], PreTrainedModel]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    module = torch.nn.Module()
    module.weight = parameter
    state = TrainState(modules={"m": module}, optimizers={"m": torch.optim.SGD([parameter], lr=1.0)})
    parameter.grad = torch.tensor([3.0, 0.0, -4.0])
    assert apply_gradients(state, "m", 0.0, 1.0, max_grad_value=0.7) == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.6, 0.0, 0.7])
    parameter.grad = torch.tensor([float("inf"), 0.0, 0.0])
    assert apply_gradients(state, "m", 0.0, 1.0, max_grad_value=0.7) is None, "cutting must not hide what is not finite"
