"""A way to credit responses that the registry is given by a test trains a policy."""

from typing import get_args

import pytest
import torch
from support.ppo import CFG, changed, run

from rlhf_core.config.ppo import ADVANTAGE_ROWS, AdvantageMethod, AdvantageRow
from rlhf_core.trainers.ppo.credit import RESPONSE_ADVANTAGES


def test_a_method_of_the_registry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every response earns the sign of its total beyond the mean of its prompt's."""
    seen: list[torch.Tensor] = []

    def signs(totals_K: torch.Tensor, groups_K: torch.Tensor) -> torch.Tensor:
        seen.append(groups_K)
        means_G = totals_K.new_zeros(4).index_add(0, groups_K, totals_K) / 4
        return (totals_K - means_G[groups_K]).sign()

    monkeypatch.setitem(ADVANTAGE_ROWS, "signs", AdvantageRow(docs="the sign", compares="prompt"))
    monkeypatch.setitem(RESPONSE_ADVANTAGES, "signs", signs)
    cfg = changed(CFG, steps=2, responses_per_prompt=4)
    cfg = cfg.model_copy(update={"advantages": cfg.advantages.model_copy(update={"method": "signs"})})
    assert not cfg.has_value_model
    state = run(cfg)
    assert state.step == 2
    assert [groups.tolist() for groups in seen] == [[row // 4 for row in range(16)]] * 2


def test_every_method_of_the_schema_is_there() -> None:
    assert list(ADVANTAGE_ROWS) == list(get_args(AdvantageMethod))
    without_values = [name for name, row in ADVANTAGE_ROWS.items() if row.compares != "values"]
    assert list(RESPONSE_ADVANTAGES) == without_values
