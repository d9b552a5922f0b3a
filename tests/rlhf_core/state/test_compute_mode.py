"""Number formats and activation checkpointing: what they change, and what they must not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import ModelConfig, Params
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.compute_mode import ComputeMode, compute_mode, computing, set_compute_mode
from rlhf_core.trainers.optimisation import make_optimizer
from tasks.frame.definition import stage_definition
from tasks.frame.machine_memory import total_bytes
from tasks.frame.stage import Progress, Stage

VOCABULARY = 64
BATCH = collate([[5, 6, 7, 8], [9], [5, 6, 7, 8]], [[12, 1], [13, 14, 15, 16, 1], [17, 18]], 0)
BFLOAT16 = ComputeMode(precision="bfloat16")
CHECKPOINTING = ComputeMode(activation_checkpointing=True)


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    before = compute_mode()
    yield
    set_compute_mode(before)


def tiny(kind: str = "llama") -> PreTrainedModel:
    if kind == "gpt2":
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    cfg = ModelConfig(family=kind, hidden_size=32, heads=2, layers=3, intermediate_size=48, init_std=0.2)
    return build_policy(cfg, VOCABULARY, 0, 1, seed=0)


def counting_rows() -> SequenceBatch:
    """Rows that count: the token after n is n + 1."""
    starts = torch.randint(2, 50, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    return collate([[start, start + 1] for start in starts], [[start + 2 + i for i in range(6)] for start in starts], 0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_n30_training_in_bfloat16_learns_and_weights_stay_float32(kind: str) -> None:
    """A step of 1e-3 of a weight is lost in bfloat16, whose numbers are 4e-3 apart; in float32 masters it is not."""
    model, batch = tiny(kind), counting_rows()
    optimizer = make_optimizer(model, 1e-3)
    with computing(BFLOAT16):
        losses = []
        for _ in range(120):
            logprobs_BR = response_logprobs(model, batch)
            assert logprobs_BR.dtype == torch.float32
            loss = -logprobs_BR.sum() / batch.response_mask_BR.sum()
            loss.backward()
            assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[0] > 3.0
    assert losses[-1] < 0.3
    assert any((p != p.bfloat16().float()).any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_n03_bfloat16_is_in_force_and_log_probabilities_are_float32(kind: str) -> None:
    """Off by what products of 8 bits leave, some 1e-2, and not rounded to bfloat16 themselves (n03, n39)."""
    model = tiny(kind)
    exact = response_logprobs(model, BATCH)
    with computing(BFLOAT16):
        found = response_logprobs(model, BATCH)
        assert torch.equal(found, response_logprobs(model, BATCH).detach())
        with torch.no_grad():
            assert torch.equal(found, response_logprobs(model, BATCH))
    real = BATCH.response_mask_BR.bool()
    assert 1e-4 < (found - exact)[real].abs().max() < 0.1
    assert not torch.equal(found, found.bfloat16().float())


def test_gradients_in_bfloat16_point_where_those_in_float32_do() -> None:
    gradients = []
    for mode in (ComputeMode(), BFLOAT16):
        model = tiny()
        with computing(mode):
            response_logprobs(model, BATCH).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_converted_weight_outlives_an_optimisers_step(kind: str) -> None:
    """Autocast keeps converted weights for as long as its block lasts; a step inside it would go unseen."""
    model = tiny(kind)
    with computing(BFLOAT16), torch.autocast("cpu", dtype=torch.bfloat16):
        before = response_logprobs(model, BATCH).detach()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        after = response_logprobs(model, BATCH).detach()
    with computing(BFLOAT16):
        assert torch.equal(after, response_logprobs(model, BATCH).detach())
    assert not torch.equal(before, after)


def test_n39_scores_are_float32_in_bfloat16() -> None:
    model = RewardModel.from_policy(tiny(), "last", seed=0)
    with computing(BFLOAT16):
        scores = model(BATCH)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def kept_bytes(model: nn.Module, mode: ComputeMode) -> tuple[int, list[Tensor]]:
    """Bytes that autograd keeps between the passes, parameters left out, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = counting_rows()
    with computing(mode), saved_tensors_hooks(note, lambda tensor: tensor):
        total = response_logprobs(model, batch).sum()
        bytes_kept = sum(kept.values())
        total.backward()
    return bytes_kept, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_activation_checkpointing_keeps_less_and_changes_no_bit(kind: str) -> None:
    model = tiny(kind)
    plain_bytes, plain = kept_bytes(model, ComputeMode())
    model.zero_grad(set_to_none=True)
    bytes_kept, gradients = kept_bytes(model, CHECKPOINTING)
    assert bytes_kept < 0.6 * plain_bytes
    assert all(map(torch.equal, plain, gradients))
    assert not model.training
    assert not any(part.training for part in model.modules())


def test_a_stage_sets_the_mode_of_its_process(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {toy: {cmd: unused, deps: [], params: [compute], outs: []}}\n")
    params = Params.model_validate({"compute": {"precision": "bfloat16", "activation_checkpointing": True}})
    log = Progress(tmp_path / "progress.jsonl")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        device = Stage(stage_definition(tmp_path, "toy"), params, tmp_path, tmp_path, log).device
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        log.close()
    assert device.type in ("cpu", "cuda")
    expected = ComputeMode(precision="bfloat16", activation_checkpointing=True, pass_bytes=compute_mode().pass_bytes)
    assert compute_mode() == expected
    assert 0 < (compute_mode().pass_bytes or 0) <= total_bytes()
