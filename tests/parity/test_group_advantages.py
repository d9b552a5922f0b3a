"""RLOO, GRPO and the clipped loss against TRL 1.16, in float64.

Its advantages are computed in the middle of methods that also sample; their statements are executed from its source.
"""

import ast
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.source import execute, statements
from support.trl import OneProcess, trainer
from torch import Tensor

from rlhf_core.objectives.baselines import group_relative_advantages, leave_one_out_advantages, over_tokens
from rlhf_core.objectives.policy_gradient import ppo_policy_losses

pytestmark = pytest.mark.parity

PROMPTS, K, R = 4, 5, 6


def totals(seed: int) -> Tensor:
    return 3 * torch.randn(PROMPTS * K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


def run(module: Any, first: str, last: str, rewards: Tensor, **settings: Any) -> Tensor:
    """TRL's statements between two assignments, on these rewards; returns its `advantages`."""
    from trl.trainer.utils import nanstd

    scope = {"torch": torch, "nanstd": nanstd, "rewards": rewards.clone(), "num_generations": K}
    scope |= {"self": SimpleNamespace(**settings)}
    execute(statements(ast.parse(inspect.getsource(module)), first, last), scope, "trl 1.16")
    return scope["advantages"]


def close(ours: Tensor, trls: Tensor) -> None:
    assert trls.dtype == torch.float64
    torch.testing.assert_close(ours, trls, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out(seed: int) -> None:
    from trl.trainer import rloo_trainer

    trls = run(rloo_trainer, "grouped_rewards", "is_std_zero", totals(seed), normalize_advantages=False)
    close(leave_one_out_advantages(totals(seed), torch.arange(PROMPTS).repeat_interleave(K)), trls)


@pytest.mark.parametrize("seed", range(3))
def test_group_relative(seed: int) -> None:
    from trl.trainer import grpo_trainer

    trls = run(grpo_trainer, "mean_grouped_rewards", "is_std_zero", totals(seed), scale_rewards="group")
    groups = torch.arange(PROMPTS).repeat_interleave(K)
    ours = group_relative_advantages(totals(seed), groups)
    # TRL's correction n / (n - 1) is a quotient of integers, which torch takes in float32: 1e-8 of its value
    torch.testing.assert_close(ours, trls, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_clipped_loss_over_all_tokens(seed: int) -> None:
    """`GRPOTrainer._compute_loss` with `bnpo`, whose token mean is that of PPO."""
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(seed)
    rows = PROMPTS * K
    logprobs_BR = (-3 * torch.rand(rows, R, generator=generator, dtype=torch.float64)).requires_grad_()
    old_BR = logprobs_BR.detach() + 0.3 * torch.randn(rows, R, generator=generator, dtype=torch.float64)
    mask_BR = (torch.arange(R) < torch.randint(1, R + 1, (rows, 1), generator=generator)).double()
    advantages_B = totals(seed)
    accelerator = OneProcess()
    accelerator.reduce = lambda tensor, reduction: tensor
    stand_in = trainer(
        accelerator=accelerator,
        args=SimpleNamespace(delta=None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BR, torch.zeros_like(logprobs_BR), None),
    )
    inputs = {
        "prompt_ids": torch.ones(rows, 1),
        "prompt_mask": torch.ones(rows, 1),
        "completion_ids": torch.ones(rows, R),
        "completion_mask": mask_BR,
        "advantages": advantages_B,
        "old_per_token_logps": old_BR,
    }
    trls = GRPOTrainer._compute_loss(stand_in, None, inputs)
    losses_BR, _ = ppo_policy_losses(logprobs_BR, old_BR, over_tokens(advantages_B, mask_BR), mask_BR, 0.2)
    ours = losses_BR.sum() / mask_BR.sum()
    close(ours, trls)
    gradients = [torch.autograd.grad(loss, logprobs_BR, retain_graph=True)[0] for loss in (ours, trls)]
    close(*gradients)
