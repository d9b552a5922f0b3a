"""Every trainer, sampler and scorer on a pretend GPU (see `device_support`): nothing is left behind on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device import pretend_gpu
from support.device_jobs import JOBS, NARROW_JOBS, PROMPTS, differing, policy
from support.device_tensors import GPU, PretendTensor
from support.preference import PAD

from rlhf_core.engine.batches import collate
from rlhf_core.engine.matmul import linear
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import STEPS_BETWEEN_LOOKS, Sampling, sample_responses

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_says_the_same_on_both_devices(name: str) -> None:
    expected = JOBS[name](CPU)
    with pretend_gpu():
        found = JOBS[name](GPU)
    assert not differing(expected, found, 2e-4)


@pytest.mark.parametrize("name", NARROW_JOBS)
def test_a_job_in_bfloat16_says_nearly_the_same(name: str) -> None:
    """Logits that are rounded differently can draw another token here and there."""
    expected = NARROW_JOBS[name](CPU)
    with pretend_gpu():
        found = NARROW_JOBS[name](GPU)
    assert len(differing(expected, found, 0.1)) <= len(expected) / 5


def test_products_of_a_size_for_onednn_stay_off_it_on_a_gpu() -> None:
    """The jobs' models are too small for it; on a CPU it is what a product of this size goes through."""
    x_NK, weight_MK = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    with pretend_gpu():
        found = linear(x_NK.to(GPU), weight_MK.to(GPU)).cpu()
    torch.testing.assert_close(found, x_NK @ weight_MK.t())


def test_decoding_waits_for_the_device_at_looks_alone() -> None:
    """Rows that have ended are counted every few tokens; nothing else makes the host wait while tokens are drawn."""

    def waits(tokens: int) -> int:
        with pretend_gpu() as counted:
            sample_responses(
                policy(GPU),
                PROMPTS,
                Sampling(eos_ids=(), pad_id=PAD, max_new_tokens=tokens),
                temperature=1.0,
                generator=torch.Generator(),
                batch_size=8,
            )
        return counted.total()

    assert waits(17) - waits(9) == 8 / STEPS_BETWEEN_LOOKS["cuda"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda there, here: there + here, "same device"),
        (lambda there, here: torch.cat([there, here]), "same device"),
        (lambda there, here: torch.stack([there.sum(), here.sum()]), "same device"),
        (lambda there, here: here.sum().add_(there.sum()), "same device"),
        (lambda there, here: torch.where(here > 0, there, 0.0), "same device"),
        (lambda there, here: there.masked_fill(here > 0, 0.0), "same device"),
        (lambda there, here: there[:3].index_put_((torch.tensor([0, 1]),), here[:2]), "same device"),
        (lambda there, here: here[there.argsort()], "same device"),
        (lambda there, here: there.gather(0, here.long()), "same device"),
        (lambda there, here: torch.nn.functional.embedding(here.long(), there[:, None]), "same device"),
        (lambda there, here: there.uniform_(generator=torch.Generator()), "device type for generator"),
        (lambda there, here: there.numpy(), "to numpy"),
        (lambda there, here: there.median(0), "deterministic"),
        (lambda there, here: torch.mm(there[:, None], there[None], out_dtype=torch.float32), "out_dtype"),
    ],
)  # fmt: skip
def test_the_pretend_gpu_refuses_what_a_gpu_refuses(call: Callable[..., Any], message: str) -> None:
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match=message):
        call(torch.arange(4.0).to(GPU), torch.arange(4.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda there, here: there + here.sum(),
        lambda there, here: there[here.long()],
        lambda there, here: there.index_fill(0, torch.tensor([1], device=there.device), 0.0),
        lambda there, here: there.copy_(here),
        lambda there, here: torch.tensor(here.tolist(), device=there.device),
        lambda there, here: torch.where(there > 0, there, torch.tensor(2.0)),
        lambda there, here: torch.mm(there[:, None].bfloat16(), there[None].bfloat16(), out_dtype=torch.float32),
    ],
)
def test_the_pretend_gpu_permits_what_a_gpu_permits(call: Callable[..., Any]) -> None:
    with pretend_gpu():
        found = call(torch.arange(4.0).to(GPU), torch.arange(4.0))
        assert isinstance(found, PretendTensor)
        assert found.device == GPU
        assert found.dtype == torch.float32


def test_a_batch_that_stays_behind_is_found() -> None:
    """The harness sees the plainest of all device faults, in the forward and for a list as an index."""
    batch = collate([[7, 8]], [[9]], PAD)
    with pretend_gpu():
        there = torch.zeros(3).to(GPU)
        there[[0, 2]] = True
        assert there.tolist() == [1.0, 0.0, 1.0]
        with pytest.raises(RuntimeError, match="same device"):
            response_logprobs(policy(GPU), batch)
