"""The reward model's loss against TRL 1.16's `RewardTrainer`, with and without margin and centering, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trl import trainer

from rlhf_core.objectives.ranking import bradley_terry_losses, centering_losses

pytestmark = pytest.mark.parity

N = 7


@pytest.mark.parametrize("centering", [None, 0.03])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_loss_with_margin_and_centering(seed: int, with_margin: bool, centering: float | None) -> None:
    from trl import RewardTrainer

    generator = torch.Generator().manual_seed(seed)
    scores_B = (2 * torch.randn(2 * N, generator=generator, dtype=torch.float64)).requires_grad_()
    margin_N = torch.rand(N, generator=generator, dtype=torch.float64) if with_margin else None
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2 * N, 3)}
    if margin_N is not None:
        inputs["margin"] = margin_N
    stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    trls = RewardTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=scores_B[:, None]), inputs)

    chosen_N, rejected_N = scores_B.chunk(2)
    losses_N, stats = bradley_terry_losses(chosen_N, rejected_N, 0.0 if margin_N is None else margin_N)
    ours = losses_N.mean() + (centering or 0.0) * centering_losses(chosen_N, rejected_N).mean()
    torch.testing.assert_close(ours, trls, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, scores_B, retain_graph=True)[0] for loss in (ours, trls)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    metrics = stand_in._metrics["train"]
    assert stats["reward/accuracy"].mean().item() == pytest.approx(metrics["accuracy"][0], abs=1e-6)
    assert stats["reward/margin"].mean().item() == pytest.approx(metrics["margin"][0], abs=1e-9)


def test_n39_trl_counts_a_tie_of_scores_as_wrong_and_ours_as_half() -> None:
    from trl import RewardTrainer

    stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(2, 3)}
    RewardTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=torch.ones(2, 1)), inputs)
    assert stand_in._metrics["train"]["accuracy"] == [0.0]
    assert bradley_terry_losses(torch.ones(1), torch.ones(1))[1]["reward/accuracy"].tolist() == [0.5]
