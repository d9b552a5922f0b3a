"""PPO's arithmetic against numbers that TRL 1.12's own statements gave (`record_ppo_arithmetic.py`), in float64.

TRL puts the score into the slot after a response's last token, where that exists, and lets the value model speak
there too ("mask p1"). Ours puts it onto the last token. The functions are the same ones: given the p1 mask they must
give TRL's numbers, which is how they are called here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.advantages import gae, shape_rewards
from rlhf_core.objectives.kl import kl_estimate, kl_k2
from rlhf_core.objectives.masked import masked_whiten
from rlhf_core.objectives.policy_gradient import ppo_policy_losses, value_losses

pytestmark = pytest.mark.parity

CASES = json.loads(Path(__file__).with_name("ppo_arithmetic_trl_1_12.json").read_text())["cases"]


class Case:
    """One recorded rollout: its tensors, TRL's results, and the two masks."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.settings, self.estimator = recorded["settings"], recorded["estimator"]
        self.whiten_rewards = recorded["whiten_rewards"]
        self.given = {name: self._tensor(value) for name, value in recorded["inputs"].items()}
        self.trl = {name: self._tensor(value) for name, value in recorded["outputs"].items()}
        columns, lengths = torch.arange(self.given["values"].shape[1]), torch.tensor(recorded["lengths"])
        self.mask_BR = (columns < lengths[:, None]).double()
        self.mask_p1_BR = (columns < lengths[:, None] + 1).double()

    @staticmethod
    def _tensor(value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    def rewards(self) -> Tensor:
        kl_BR = kl_estimate(self.estimator, self.given["logprobs"], self.given["ref_logprobs"], self.mask_BR)
        rewards_BR = shape_rewards(self.given["scores"], kl_BR, self.mask_p1_BR, self.settings["kl_coef"])
        if not self.whiten_rewards:
            return rewards_BR
        # TRL's option, which we do not have: the variance becomes 1 and the mean stays
        mean = (rewards_BR * self.mask_p1_BR).sum() / self.mask_p1_BR.sum()
        return whiten_as_trl(rewards_BR, self.mask_p1_BR) + self.mask_p1_BR * mean


def whiten_as_trl(values: Tensor, mask: Tensor) -> Tensor:
    """TRL divides the variance by n - 1, ours by n: with c = n / (n - 1), rsqrt(c v + e) = rsqrt(c) rsqrt(v + e / c).

    Its c is a quotient of two integer tensors, which torch takes in float32.
    """
    count = mask.sum().long()
    correction = (count / (count - 1)).item()
    return masked_whiten(values, mask, 1e-8 / correction) / correction**0.5


@pytest.fixture(params=CASES, ids=lambda case: f"{case['estimator']}{', whitened' * case['whiten_rewards']}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(ours: Tensor, trls: Tensor) -> None:
    torch.testing.assert_close(ours, trls, rtol=1e-9, atol=1e-9)


def test_kl_estimates(case: Case) -> None:
    kl_BR = kl_estimate(case.estimator, case.given["logprobs"], case.given["ref_logprobs"], case.mask_BR)
    close(kl_BR, case.trl["kl"])


def test_rewards(case: Case) -> None:
    close(case.rewards(), case.trl["rewards"])


def test_generalised_advantages_and_returns(case: Case) -> None:
    settings = case.settings
    values_BR = case.given["values"] * case.mask_p1_BR
    advantages_BR, returns_BR = gae(case.rewards(), values_BR, case.mask_p1_BR, settings["gamma"], settings["lam"])
    close(returns_BR, case.trl["returns"])
    close(whiten_as_trl(advantages_BR, case.mask_BR), case.trl["advantages"])


def test_clipped_policy_loss(case: Case) -> None:
    losses_BR, stats = ppo_policy_losses(
        case.given["new_logprobs"],
        case.given["logprobs"],
        case.trl["advantages"],
        case.mask_BR,
        case.settings["cliprange"],
    )
    total = case.mask_BR.sum()
    close(losses_BR.sum() / total, case.trl["pg_loss"])
    # TRL counts tokens that the clipping stops, ours those outside the band: the former are a part of the latter.
    assert case.trl["pg_clipfrac"] <= stats["policy/clip_fraction"].sum() / total


def test_clipped_value_loss(case: Case) -> None:
    losses_BR, stats = value_losses(
        case.given["new_values"],
        case.given["values"],
        case.trl["returns"],
        case.mask_p1_BR,
        case.settings["cliprange_value"],
    )
    total = case.mask_p1_BR.sum()
    close(losses_BR.sum() / total, case.trl["vf_loss"])
    # TRL's figure is a mean in float32
    fraction = stats["loss/value_clip_fraction"].sum() / total
    torch.testing.assert_close(fraction, case.trl["vf_clipfrac"], rtol=0, atol=1e-7)


def test_n08_trl_averages_its_approximate_kl_over_padding(case: Case) -> None:
    """TRL's figure is k2 over all slots, padding among them; over tokens it is larger, and ours counts only tokens."""
    k2_BR = kl_k2(case.given["logprobs"], case.given["new_logprobs"], case.mask_BR)
    close(k2_BR.sum() / k2_BR.numel(), case.trl["approxkl"])
    assert (k2_BR.sum() / case.mask_BR.sum()).item() > 1.5 * case.trl["approxkl"].item()
