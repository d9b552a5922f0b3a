"""The preference losses against TRL 1.16's own, on random log-probabilities in float64."""

from typing import Any

import pytest
import torch
from support.trl import model_of_logprobs, trainer
from torch import Tensor

from rlhf_core.objectives.masked import masked_sum
from rlhf_core.objectives.preference import PairLogprobs, PairOptions, nll_losses, pair_losses
from rlhf_core.objectives.unpaired import kto_baseline, kto_losses

pytestmark = pytest.mark.parity

N, S, PROMPT = 5, 9, 3
BETA, EPS = 0.3, 0.15


class Pairs:
    """Random per-token log-probabilities of policy and reference for N chosen and N rejected responses."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.policy_BR, self.reference_BR = -3 * torch.rand(2, 2 * N, S - 1, generator=generator, dtype=torch.float64)
        self.policy_BR.requires_grad_()
        lengths = torch.randint(1, S - PROMPT + 1, (2 * N, 1), generator=generator)
        columns = torch.arange(S)
        self.mask_BS = ((columns >= PROMPT) & (columns < PROMPT + lengths)).long()
        self.mask_BR = self.mask_BS[:, 1:].double()

    def sums(self, logprobs_BR: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = masked_sum(logprobs_BR, self.mask_BR).chunk(2)
        return chosen, rejected

    def ours(self) -> PairLogprobs:
        policy, reference = self.sums(self.policy_BR), self.sums(self.reference_BR)
        tokens = self.mask_BR.sum(1).chunk(2)
        return PairLogprobs(
            policy_chosen_N=policy[0],
            policy_rejected_N=policy[1],
            reference_chosen_N=reference[0],
            reference_rejected_N=reference[1],
            chosen_tokens_N=tokens[0],
            rejected_tokens_N=tokens[1],
        )

    def close(self, ours: Tensor, trls: Tensor) -> None:
        """The same losses, and the same gradients on every token's log-probability."""
        assert trls.dtype == torch.float64
        torch.testing.assert_close(ours, trls, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(loss.sum(), self.policy_BR, retain_graph=True)[0] for loss in (ours, trls)]
        assert gradients[0].abs().max().item() > 1e-3
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=range(3))
def pairs(request: pytest.FixtureRequest) -> Pairs:
    return Pairs(request.param)


def trl_dpo(pairs: Pairs, kind: str, **more: Any) -> tuple[Tensor, dict[str, list[float]]]:
    """`DPOTrainer._compute_loss` with its reference log-probabilities precomputed."""
    from trl import DPOTrainer

    stand_in = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=EPS,
        use_weighting=False,
        **more,
    )
    chosen, rejected = pairs.sums(pairs.reference_BR)
    inputs = {
        "input_ids": torch.ones_like(pairs.mask_BS),
        "attention_mask": torch.ones_like(pairs.mask_BS),
        "completion_mask": pairs.mask_BS,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(stand_in, model_of_logprobs(pairs.policy_BR), inputs, False)
    return loss, stand_in._metrics["train"]


@pytest.mark.parametrize(
    ("kind", "trls"), [("sigmoid", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge"), ("robust", "robust")]
)
def test_losses_with_a_reference(pairs: Pairs, kind: str, trls: str) -> None:
    options = PairOptions(beta=BETA, label_smoothing=EPS if kind == "robust" else 0.0)
    losses_N, stats = pair_losses(kind, pairs.ours(), options)
    loss, metrics = trl_dpo(pairs, trls)
    pairs.close(losses_N.mean(), loss)
    if kind != "ipo":  # TRL reports summed rewards for IPO as well; ours are those that the loss reads
        assert stats["implicit_reward/chosen"].mean().item() == pytest.approx(metrics["rewards/chosen"][0], abs=1e-9)
        assert stats["implicit_reward/margin"].mean().item() == pytest.approx(metrics["rewards/margins"][0], abs=1e-9)
        assert stats["implicit_reward/accuracy"].mean().item() == pytest.approx(
            metrics["rewards/accuracies"][0], abs=1e-6
        )


def test_likelihood_term(pairs: Pairs) -> None:
    chosen_BR, mask_BR = pairs.policy_BR[:N], pairs.mask_BR[:N]
    pairs.close(nll_losses(chosen_BR, mask_BR).sum() / mask_BR.sum(), trl_dpo(pairs, "sft")[0])


def trl_cpo(chosen: Tensor, rejected: Tensor, kind: str, smoothing: float = 0.0, gamma: float = 0.0) -> Tensor:
    """`CPOTrainer.cpo_loss`: TRL keeps label smoothing and SimPO there; without a reference, so ours gets ratios."""
    from trl.experimental.cpo import CPOTrainer

    stand_in = trainer(alpha=0.0, loss_type=kind, beta=BETA, label_smoothing=smoothing, simpo_gamma=gamma)
    return CPOTrainer.cpo_loss(stand_in, chosen, rejected)[0]


def log_ratios(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    chosen_N = pairs.policy_chosen_N - pairs.reference_chosen_N
    return chosen_N, pairs.policy_rejected_N - pairs.reference_rejected_N


def means(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    return pairs.policy_chosen_N / pairs.chosen_tokens_N, pairs.policy_rejected_N / pairs.rejected_tokens_N


def test_n36_conservative_loss_pair_by_pair(pairs: Pairs) -> None:
    ours = pairs.ours()
    losses_N, _ = pair_losses("conservative", ours, PairOptions(beta=BETA, label_smoothing=EPS))
    chosen, rejected = (
        ours.policy_chosen_N - ours.reference_chosen_N,
        ours.policy_rejected_N - ours.reference_rejected_N,
    )
    pairs.close(losses_N, trl_cpo(chosen, rejected, "sigmoid", EPS))


def test_summed_ipo_pair_by_pair(pairs: Pairs) -> None:
    ours = pairs.ours()
    losses_N, _ = pair_losses("ipo_sum", ours, PairOptions(beta=BETA))
    chosen, rejected = (
        ours.policy_chosen_N - ours.reference_chosen_N,
        ours.policy_rejected_N - ours.reference_rejected_N,
    )
    pairs.close(losses_N, trl_cpo(chosen, rejected, "ipo"))


def test_simpo_pair_by_pair(pairs: Pairs) -> None:
    ours = pairs.ours()
    losses_N, _ = pair_losses("simpo", ours, PairOptions(beta=BETA, target_margin=0.4))
    pairs.close(losses_N, trl_cpo(*means(ours), "simpo", gamma=0.4))


def test_orpo_pair_by_pair(pairs: Pairs) -> None:
    """TRL casts log-probabilities to float32 there, so it is 1e-6; its `losses` are to be subtracted."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer, log1mexp

    ours = pairs.ours()
    losses_N, _ = pair_losses("orpo", ours, PairOptions(beta=BETA))
    trls, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=BETA), *means(ours))
    torch.testing.assert_close(losses_N.float(), -trls, rtol=2e-6, atol=1e-6)
    # its formula in float64, on its own log(1 - exp(x))
    chosen_N, rejected_N = means(ours)
    log_odds_N = (chosen_N - rejected_N) - (log1mexp(chosen_N) - log1mexp(rejected_N))
    pairs.close(losses_N, -BETA * torch.nn.functional.logsigmoid(log_odds_N))


def test_kto_and_its_reference_point(pairs: Pairs) -> None:
    """`KTOTrainer._compute_loss` on 2N single responses, with shifted ones as the mismatched responses of its KL."""
    from trl import KTOTrainer

    policy_B, reference_B = masked_sum(pairs.policy_BR, pairs.mask_BR), masked_sum(pairs.reference_BR, pairs.mask_BR)
    mismatched = policy_B.roll(1) + 0.5, reference_B.roll(1)
    liked_B = torch.arange(2 * N) % 3 != 0
    stand_in = trainer(
        loss_type="kto",
        beta=BETA,
        precompute_ref_logps=True,
        calculate_KL=True,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: mismatched[0],
    )
    batch = {
        "input_ids": torch.ones_like(pairs.mask_BS),
        "attention_mask": torch.ones_like(pairs.mask_BS),
        "completion_mask": pairs.mask_BS,
        "label": liked_B,
        "ref_logps": reference_B,
        "ref_KL_logps": mismatched[1],
    }
    loss = KTOTrainer._compute_loss(stand_in, model_of_logprobs(pairs.policy_BR), batch, False)
    baseline = kto_baseline(*mismatched)
    losses_B, _ = kto_losses(policy_B, reference_B, liked_B, baseline, BETA, 1.2, 0.7)
    pairs.close(losses_B.mean(), loss)
    assert baseline.item() == pytest.approx(stand_in._metrics["train"]["kl"][0], abs=1e-9)
