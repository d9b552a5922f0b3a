"""Losses are blind to how rows came together: their order, their company, the width of the padding, the cut into parts.

To the bit, since a loss of one item reads that item alone. Two things change the order of a sum and so the last digits:
padding beside tokens that are summed over, and the order of rows where a mean over them is taken; these agree to 1e-5.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.objectives.advantages import gae, shape_rewards
from rlhf_core.objectives.baselines import group_relative_advantages, leave_one_out_advantages
from rlhf_core.objectives.kl import kl_estimate
from rlhf_core.objectives.masked import masked_sum, masked_whiten
from rlhf_core.objectives.policy_gradient import entropy_losses, ppo_policy_losses, value_losses
from rlhf_core.objectives.preference import PAIR_LOSSES, PairLogprobs, PairOptions, nll_losses, pair_losses
from rlhf_core.objectives.ranking import bradley_terry_losses, margin_losses, plackett_luce_losses, tie_losses
from rlhf_core.objectives.replay import token_importance_weights
from rlhf_core.objectives.uncertainty import distilled_pair_losses, gaussian_pair_losses
from rlhf_core.objectives.unpaired import kto_losses

Rows = dict[str, Tensor]


def as_pairs(rows: Rows) -> PairLogprobs:
    """Each row a pair: summed log-probabilities of four kinds and two lengths."""
    mask = rows["mask"]
    sums = [masked_sum(-rows[name].abs(), mask) for name in "abcd"]
    return PairLogprobs(
        policy_chosen_N=sums[0],
        policy_rejected_N=sums[1],
        reference_chosen_N=sums[2],
        reference_rejected_N=sums[3],
        chosen_tokens_N=mask.sum(1),
        rejected_tokens_N=mask.sum(1) + 1,
    )


def scores(rows: Rows) -> tuple[Tensor, Tensor]:
    return masked_sum(rows["a"], rows["mask"]), masked_sum(rows["b"], rows["mask"])


def pair_loss(kind: str) -> Callable[[Rows], object]:
    options = PairOptions(beta=0.3, label_smoothing=0.1, target_margin=0.2)
    return lambda rows: pair_losses(kind, as_pairs(rows), options)


BY_ROW: dict[str, Callable[[Rows], object]] = {
    "policy": lambda x: ppo_policy_losses(x["a"], x["b"], x["c"], x["mask"], 0.2),
    "value": lambda x: value_losses(x["a"], x["b"], x["c"], x["mask"], 0.2),
    "entropy": lambda x: entropy_losses(x["a"], x["mask"]),
    "nll": lambda x: nll_losses(x["a"], x["mask"]),
    "k1": lambda x: kl_estimate("k1", x["a"], x["b"], x["mask"]),
    "k2": lambda x: kl_estimate("k2", x["a"], x["b"], x["mask"]),
    "k3": lambda x: kl_estimate("k3", x["a"], x["b"], x["mask"]),
    "gae": lambda x: gae(x["a"], x["b"], x["mask"], 0.95, 0.9),
    "rewards": lambda x: shape_rewards(x["score"], x["a"], x["mask"], 0.1),
    "importance": lambda x: token_importance_weights(x["a"], x["b"], x["mask"], 2.0),
    "plackett_luce": lambda x: plackett_luce_losses(x["a"], x["mask"]),
    "bradley_terry": lambda x: bradley_terry_losses(*scores(x), x["score"]),
    "hinge margin": lambda x: margin_losses(*scores(x), 1.0),
    "tie": lambda x: tie_losses(*scores(x), 0.5),
    "thurstone": lambda x: gaussian_pair_losses(*scores(x), x["score"].exp(), x["score"].exp() + 1),
    "distilled": lambda x: distilled_pair_losses(*scores(x), x["score"].sigmoid()),
    "kto": lambda x: kto_losses(*scores(x), x["score"] > 0, torch.tensor(0.3), 0.5, 1.5, 0.5),
    **{f"pairs, {kind}": pair_loss(kind) for kind in PAIR_LOSSES},
}


def draw(seed: int, rows: int, width: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    drawn = {name: 2 * torch.randn(rows, width, generator=generator) for name in "abcd"}
    return drawn | {
        "score": torch.randn(rows, generator=generator),
        "mask": (torch.arange(width) < lengths).float(),
    }


def outputs(function: Callable[[Rows], object], rows: Rows) -> list[Tensor]:
    """Everything a function gives, statistics included, as a flat list."""

    def flat(result: object) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        parts = result.values() if isinstance(result, dict) else result
        return [tensor for part in parts for tensor in flat(part)]  # type: ignore[attr-defined]

    return flat(function(rows))


def widened(rows: Rows, by: int) -> Rows:
    """More padding on the right, full of rubbish."""
    wide = {}
    for name, tensor in rows.items():
        fill = {"mask": 0.0, "a": torch.nan, "b": torch.inf}.get(name, 1e30)
        wide[name] = tensor if name == "score" else torch.nn.functional.pad(tensor, (0, by), value=fill)
    return wide


CASES = given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), width=st.integers(1, 7))


@pytest.mark.parametrize("name", BY_ROW)
@settings(max_examples=12, deadline=None)
@CASES
def test_order_company_and_padding_change_nothing(name: str, seed: int, rows: int, width: int) -> None:
    function, given_rows = BY_ROW[name], draw(seed, rows, width)
    whole = outputs(function, given_rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    shuffled = outputs(function, {key: tensor[order] for key, tensor in given_rows.items()})
    one_by_one = [outputs(function, {key: t[i : i + 1] for key, t in given_rows.items()}) for i in range(rows)]
    wide = outputs(function, widened(given_rows, 1 + seed % 3))
    for place, tensor in enumerate(whole):
        assert tensor.shape[0] == rows
        assert tensor.isfinite().all()
        assert torch.equal(tensor[order], shuffled[place])
        assert torch.equal(tensor, torch.cat([parts[place] for parts in one_by_one]))
        if tensor.ndim == 1:
            torch.testing.assert_close(tensor, wide[place], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(tensor, wide[place][:, :width])
            assert not bool(wide[place][:, width:].any())


OVER_ROWS: dict[str, Callable[[Rows], object]] = {
    "whiten": lambda x: masked_whiten(x["a"], x["mask"]),
    "leave one out": lambda x: leave_one_out_advantages(x["score"], x["group"]),
    "group relative": lambda x: group_relative_advantages(x["score"], x["group"]),
}


@pytest.mark.parametrize("name", OVER_ROWS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), prompts=st.integers(1, 3), width=st.integers(2, 7))
def test_what_reads_all_rows_does_not_read_their_order(name: str, seed: int, prompts: int, width: int) -> None:
    rows = draw(seed, 3 * prompts, width) | {"group": torch.arange(prompts).repeat(3)}
    order = torch.randperm(3 * prompts, generator=torch.Generator().manual_seed(seed))
    (whole,) = outputs(OVER_ROWS[name], rows)
    (shuffled,) = outputs(OVER_ROWS[name], {key: tensor[order] for key, tensor in rows.items()})
    torch.testing.assert_close(whole[order], shuffled, rtol=1e-5, atol=1e-5)
