"""What holds on a GPU: `pytest -m gpu tests/rlhf_core/gpu`. Bodies that make sense on a CPU run there too, always.

Needs torch, transformers, safetensors, pydantic, numpy, scipy, pytest; peft for the cases with adapters. Nothing of
the orchestration.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import parallel_jobs
from support.device_jobs import (
    ENDS,
    JOBS,
    MODES,
    NARROW_JOBS,
    PAD,
    PROMPTS,
    differing,
    policy,
    ppo_config,
    ppo_state,
    resumed,
    state_of,
)
from support.preference import toy_groups

from rlhf_core.config import DPOConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.rollout.token_draw import OPEN, CutOff
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.state.run_context import RunContext
from rlhf_core.trainers.ppo.rollout import RolloutSetup, collect_rollout, write_responses
from rlhf_core.trainers.preference.trainer import train_dpo

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ROOT = Path(__file__).parents[3]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="torch sees no CUDA device")]
)  # fmt: skip
FORMATS = {"float32": ComputeMode(), "bfloat16": MODES["bfloat16"]}
NEAR = {"float32": 1e-4, "bfloat16": 0.15}
"""Absolute, in nats, of a token's log-probability between two ways of computing it."""

on_each_device = pytest.mark.parametrize("device", [pytest.param("cpu"), CUDA])
in_each_format = pytest.mark.parametrize("number_format", FORMATS)


@pytest.fixture(autouse=True)
def as_in_a_stage() -> Iterator[None]:
    """Deterministic algorithms, for which torch before 2.10 wants cuBLAS told."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", JOBS)
def test_a_job_says_the_same_on_cpu_and_gpu(name: str) -> None:
    """Every trainer, sampler and scorer; the pretend GPU of `test_devices.py` keeps to 2e-4."""
    found = JOBS[name](torch.device("cuda"))
    assert not differing(JOBS[name](torch.device("cpu")), found, 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", NARROW_JOBS)
def test_a_job_in_bfloat16_says_nearly_the_same_on_cpu_and_gpu(name: str) -> None:
    found = NARROW_JOBS[name](torch.device("cuda"))
    expected = NARROW_JOBS[name](torch.device("cpu"))
    assert len(differing(expected, found, 0.1)) <= len(expected) / 5


def toy_batch(device: str) -> SequenceBatch:
    responses = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [1], [14, 15, 1], [3, 3, 2], [9, 1], [4, 4, 4, 4, 1]]
    return collate(PROMPTS, responses, PAD).to(device)


@on_each_device
@in_each_format
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_the_plain_forward_in_float64(
    device: str, number_format: str, kind: str
) -> None:
    batch = toy_batch("cpu")
    model = policy("cpu", kind).double()
    with torch.no_grad():
        logits_BSV = model(
            input_ids=batch.ids_BS, attention_mask=batch.mask_BS, position_ids=batch.position_ids_BS
        ).logits
        plain_BSV = logits_BSV[:, batch.prompt_width - 1 : -1].log_softmax(-1)
        expected_BR = plain_BSV.gather(-1, batch.response_ids_BR[..., None])[..., 0] * batch.response_mask_BR
        with computing(FORMATS[number_format]):
            found_BR = response_logprobs(policy(device, kind), batch.to(device))
    assert found_BR.device.type == device
    torch.testing.assert_close(found_BR.double().cpu(), expected_BR, atol=NEAR[number_format], rtol=0.0)


@on_each_device
@in_each_format
@pytest.mark.parametrize("shared", [False, True])
def test_n04_the_first_log_ratio_is_exactly_zero(device: str, number_format: str, shared: bool) -> None:
    cfg = ppo_config(steps=1, value={"model": "shared" if shared else "separate"})
    with computing(FORMATS[number_format]):
        state, scorer = ppo_state(torch.device(device), cfg)
        setup = RolloutSetup(
            cfg=cfg,
            modules=state.modules,
            reference=policy(device),
            score=scorer,
            prompts=PROMPTS,
            sampling=Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=8),
            run=RunContext(seed=0, pad_id=PAD),
        )
        generator = torch.Generator().manual_seed(3)
        rollout = collect_rollout(setup, write_responses(setup, range(8), generator), [], generator)
        for part in rollout.parts():
            logprobs_BR = response_logprobs(state.modules["policy"], part.batch)
            assert logprobs_BR.requires_grad
            assert torch.equal(logprobs_BR.detach(), part.old_logprobs_BR)
            assert torch.equal(part.old_logprobs_BR, part.ref_logprobs_BR), "the reference has the same weights"


@on_each_device
@in_each_format
def test_n32_the_first_dpo_loss_is_exactly_ln_2(device: str, number_format: str) -> None:
    cfg = DPOConfig(prompts_per_step=16, learning_rate=1e-9, warmup_steps=0)
    with computing(FORMATS[number_format]):
        state = train_dpo(
            cfg, state_of(policy=policy(device)), policy(device), toy_groups(16), RunContext(seed=0, pad_id=PAD)
        )
    assert state.history[0]["loss/preference"] == pytest.approx(math.log(2.0), abs=1e-7)
    assert (state.history[0]["implicit_reward/chosen"], state.history[0]["implicit_reward/rejected"]) == (0.0, 0.0)


@on_each_device
@in_each_format
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("cut_off", [OPEN, CutOff(top_p=0.8)])
def test_a_sampled_token_has_the_probability_that_the_model_gives_it(
    device: str, number_format: str, kind: str, cut_off: CutOff
) -> None:
    with computing(FORMATS[number_format]), torch.no_grad():
        model = policy(device, kind)
        samples = sample_responses(
            model,
            PROMPTS * 4,
            Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=12),
            temperature=0.8,
            generator=torch.Generator().manual_seed(1),
            batch_size=32,
            cut_off=cut_off,
        )
        batch = collate(PROMPTS * 4, samples.response_ids, PAD).to(device)
        found = response_logprobs(model, batch, 0.8).cpu()
    for row, said in zip(found, samples.logprobs, strict=True):
        torch.testing.assert_close(row[: len(said)], torch.tensor(said), atol=NEAR[number_format], rtol=0.0)


@on_each_device
@in_each_format
def test_greedy_decoding_takes_the_likeliest_token(device: str, number_format: str) -> None:
    """By the forward pass of training; a token that is not the likeliest there is as likely but for rounding."""
    with computing(FORMATS[number_format]), torch.no_grad():
        model = policy(device)
        greedy = sample_responses(
            model,
            PROMPTS,
            Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=8),
            temperature=0.0,
            generator=torch.Generator(),
            batch_size=8,
        )
        for prompt, response in zip(PROMPTS, greedy.response_ids, strict=True):
            others = [[*response[:-1], token] for token in range(24)]
            batch = collate([prompt] * 24, others, PAD).to(device)
            last_B = response_logprobs(model, batch)[:, len(response) - 1]
            assert last_B[response[-1]] >= last_B.max() - NEAR[number_format]


@on_each_device
@in_each_format
def test_a_resumed_run_ends_with_the_same_bits(device: str, number_format: str) -> None:
    with computing(FORMATS[number_format]):
        assert resumed(torch.device(device))[0] == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"torch sees {GPUS} CUDA devices, two are needed")
def test_two_gpus_take_the_steps_of_one(tmp_path: Path) -> None:
    """NCCL, whole models and FSDP; the cases and bounds of `parallel/`, a little wider for the GPU's order of sums."""
    orders = ("sft", "dpo", "reward", "ppo", "sft+sharded")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(Path(parallel_jobs.__file__)), str(tmp_path), *orders],
        env={**os.environ, "PYTHONPATH": str(ROOT), parallel_jobs.DEVICE_VARIABLE: "cuda"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for order in orders:
        alone = parallel_jobs.finish(order.partition("+")[0])
        both = load_file(tmp_path / order / "weights.safetensors")
        for name, weight in parallel_jobs.weights(alone).items():
            torch.testing.assert_close(both[name], weight, atol=1e-5, rtol=0.0)
        history = json.loads((tmp_path / order / "history.json").read_text())
        assert [row["step"] for row in history] == [row["step"] for row in alone.history]
