"""A loss on pairs that the registry is given by a test trains a policy, without any other edit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.project import change_sections

from rlhf_core.config import Params
from rlhf_core.config.preference import LOSS_ROWS, PreferenceLoss
from rlhf_core.data.batching.pairs import PreferenceGroup
from rlhf_core.objectives.preference import PAIR_LOSSES, PairLogprobs, PairLoss, PairOptions
from rlhf_core.state.atomic import tree_digest
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align

OPTIONS = {"epochs": 1, "prompts_per_step": 5, "learning_rate": 0.01, "warmup_steps": 0, "beta": 0.5}


def params_with(project: Path, loss: str, **more: Any) -> Params:
    """Parameters with a loss that the schema may not know."""
    change_sections(project, align={"dpo": OPTIONS | more})
    params = load_params(project / "params.yaml")
    dpo = params.align.dpo.model_copy(update={"loss": loss})
    return params.model_copy(update={"align": params.align.model_copy(update={"dpo": dpo})})


def policy_by(project: Path, loss: str, **more: Any) -> dict[str, str]:
    assert run_stage("align@dpo", align.run, params_with(project, loss, **more), project) == 0
    return tree_digest(project / "artifacts/align/dpo/model")


def both_means(pairs: PairLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.policy_chosen_N / pairs.chosen_tokens_N, pairs.policy_rejected_N / pairs.rejected_tokens_N


def squared_gap(chosen_N: torch.Tensor, rejected_N: torch.Tensor, options: PairOptions) -> torch.Tensor:
    return (options.beta * (chosen_N - rejected_N) - 1.0).square()


@pytest.mark.parametrize("reads_reference", [True, False])
def test_a_loss_of_the_registry_alone(project: Path, monkeypatch: pytest.MonkeyPatch, reads_reference: bool) -> None:
    """It learns something else than DPO, and asks a reference only where it says so."""
    dpo = policy_by(project, "sigmoid")
    asked: list[int] = []

    def zeros(reference: Any, groups: Sequence[PreferenceGroup], *rest: Any, **more: Any) -> torch.Tensor:
        asked.append(len(groups))
        return torch.zeros(sum(len(group.responses) for group in groups))

    monkeypatch.setattr("rlhf_core.trainers.preference.trainer.reference_logprobs", zeros)
    loss = PairLoss(reads=both_means, losses=squared_gap, needs_reference=reads_reference)
    monkeypatch.setitem(PAIR_LOSSES, "squared_gap", loss)
    assert policy_by(project, "squared_gap") != dpo
    assert bool(asked) is reads_reference


def test_a_loss_under_another_name_trains_the_same_policy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ipo = policy_by(project, "ipo_sum")
    monkeypatch.setitem(PAIR_LOSSES, "again", PAIR_LOSSES["ipo_sum"])
    assert policy_by(project, "again") == ipo


def test_every_loss_of_the_schema_is_there() -> None:
    assert list(PAIR_LOSSES) == list(LOSS_ROWS) == list(get_args(PreferenceLoss))
