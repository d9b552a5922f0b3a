"""Reference log-probabilities on disk: a hit is a miss to the bit, and nothing that could differ is ever taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.preference import PAD, in_processes, toy_groups
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference import reference as module
from rlhf_core.trainers.preference.reference import LogprobCache, reference_logprobs, rows_digest
from rlhf_core.trainers.preference.trainer import train_dpo

RUN = RunContext(seed=0, pad_id=PAD)

IDENTITY = {"model": "1f", "tokenizer": "2e", "dtype": "float32", "max_response_tokens": 8}
BATCHES = [[0, 2, 1], [3]]


@pytest.fixture
def cache(tmp_path: Path) -> LogprobCache:
    return LogprobCache(folder=tmp_path / "cache", identity=IDENTITY)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every forward pass of the reference."""
    passes: list[int] = []
    plain = module.group_logprob_sums

    def counted(*arguments: Any) -> torch.Tensor:
        passes.append(1)
        return plain(*arguments)

    monkeypatch.setattr(module, "group_logprob_sums", counted)
    return passes


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_n37_a_run_that_finds_them_equals_one_that_asks(
    loss: str,
    cache: LogprobCache,
    asked: list[int],
    tiny_policy: Callable[[], PreTrainedModel],
    same_state: Callable[..., None],
) -> None:
    def run(kept: LogprobCache | None) -> TrainState:
        policy = tiny_policy()
        state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, 1e-3)})
        cfg = DPOConfig(loss=loss, prompts_per_step=3, epochs=2)
        groups = toy_groups(7)
        return train_dpo(cfg, state, tiny_policy(), groups, RUN, cache=kept)

    alone, missed = run(None), run(cache)
    count = len(asked)
    assert count == 2 * (3 if loss == "sigmoid" else 6)
    found = run(cache)
    assert len(asked) == count
    for state in (missed, found):
        same_state(alone, state)
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, state.tensors[name])


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "no digest"])
def test_a_damaged_file_is_made_again_and_that_is_said(
    harm: str,
    cache: LogprobCache,
    asked: list[int],
    tiny_policy: Callable[[], PreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = toy_groups(4)
    first = reference_logprobs(tiny_policy(), groups, BATCHES, RUN, cache=cache)
    (file,) = cache.folder.iterdir()
    good = file.read_bytes()
    harmed = {
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "cut": good[:-4],
        "empty": b"",
        "no digest": b"\xff" + good[1:],
    }
    file.write_bytes(harmed[harm])
    again = reference_logprobs(tiny_policy(), groups, BATCHES, RUN, cache=cache)
    assert "are computed again: " in capsys.readouterr().out
    assert len(asked) == 4
    assert torch.equal(first, again)
    assert file.read_bytes() == good
    reference_logprobs(tiny_policy(), groups, BATCHES, RUN, cache=cache)
    assert len(asked) == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("part", IDENTITY)
def test_n37_whatever_the_numbers_depend_on_is_in_the_name(
    part: str, cache: LogprobCache, asked: list[int], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    reference_logprobs(tiny_policy(), toy_groups(4), BATCHES, RUN, cache=cache)
    other = LogprobCache(folder=cache.folder, identity=IDENTITY | {part: "other"})
    reference_logprobs(tiny_policy(), toy_groups(4), BATCHES, RUN, cache=other)
    assert len(asked) == 4
    assert len(list(cache.folder.iterdir())) == 2


def test_n37_every_token_and_every_pass_is_in_the_digest_of_the_rows() -> None:
    groups = toy_groups(4)
    plain = (groups, BATCHES, PAD, None, 1)
    prompt, response, moved = (toy_groups(4) for _ in range(3))
    prompt[1].prompt[0] += 1
    response[2].responses[1][0] += 1
    # the same tokens in a row, the border between two responses elsewhere
    moved[0].responses[1].insert(0, moved[0].responses[0].pop())
    digests = [
        rows_digest(*plain),
        rows_digest(prompt, *plain[1:]),
        rows_digest(response, *plain[1:]),
        rows_digest(moved, *plain[1:]),
        rows_digest(groups, [[0, 1, 2], [3]], PAD, None, 1),
        rows_digest(groups, [[0, 2], [1, 3]], PAD, None, 1),
        rows_digest(groups, BATCHES, PAD + 1, None, 1),
        rows_digest(groups, BATCHES, PAD, 2, 1),
        rows_digest(groups, BATCHES, PAD, None, 2),
    ]
    assert len(set(digests)) == len(digests)
    assert rows_digest(toy_groups(4), *plain[1:]) == digests[0]


def test_two_processes_keep_and_find_one_file(
    cache: LogprobCache, asked: list[int], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    def ask(world: Any) -> torch.Tensor:
        return reference_logprobs(
            tiny_policy(), toy_groups(4), BATCHES, RunContext(seed=0, pad_id=PAD, world=world), cache=cache
        )

    first = in_processes(2, ask)
    count = len(asked)
    assert torch.equal(first[0], first[1])
    assert len(list(cache.folder.iterdir())) == 1
    again = in_processes(2, ask)
    assert len(asked) == count
    assert all(torch.equal(one, first[0]) for one in again)


def test_the_reference_sees_the_very_forward_passes_of_training(
    tiny_policy: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other company may give other last bits, and then the first loss would be ln 2 by luck only."""
    seen: list[list[list[int]]] = []
    plain = module.group_logprob_sums

    def noted(model: Any, groups: Any, pad_id: int) -> torch.Tensor:
        seen.append([group.prompt for group in groups])
        return plain(model, groups, pad_id)

    monkeypatch.setattr(module, "group_logprob_sums", noted)
    groups = toy_groups(4)
    reference_logprobs(tiny_policy(), groups, BATCHES, RUN, per_forward=2)
    passes = [some for members in BATCHES for some in module.forward_passes(members, 2, ALONE)]
    assert passes == [[0, 2], [1], [3]]
    assert seen == [[groups[place].prompt for place in some] for some in passes]


def test_a_process_that_finds_its_file_still_helps_those_that_do_not(
    tmp_path: Path, asked: list[int], tiny_policy: Callable[[], PreTrainedModel]
) -> None:
    """Machines without a common folder: all ask or none does, else one would wait for the other for ever."""

    def ask(world: Any) -> torch.Tensor:
        cache = LogprobCache(folder=tmp_path / str(world.rank), identity=IDENTITY)
        return reference_logprobs(
            tiny_policy(), toy_groups(4), BATCHES, RunContext(seed=0, pad_id=PAD, world=world), cache=cache
        )

    first = in_processes(2, ask)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"], "the first process writes"
    count = len(asked)
    assert all(torch.equal(one, first[0]) for one in in_processes(2, ask))
    assert len(asked) == 2 * count
