"""What a version must show before it may become champion: figures against limits, nothing else.

What is held against a limit is the end of the figure's interval that is nearer to it: chance alone must not pass.
A figure that is undefined never passes: every comparison with it is written so that it comes out false.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.config import GatesConfig
from tasks.lineage.manifest import bars_promotion
from tasks.tracking.names import POLICY_MODEL, SCORING_MODEL, SFT_MODEL, ModelVersion

Figures = Mapping[str, float | None]
Manifest = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One rule with the figure it was held against.

    Attributes:
        name: of the rule, as in `params.yaml`, section `gates`, or `lineage`.
        figure: what was measured; None where it is undefined.
        limit: what it must not fall below (`at_least`) or exceed.
        detail: what was measured, in words.
    """

    name: str
    figure: float | None
    limit: float
    at_least: bool
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the figure is defined and on the right side of the limit, the limit itself included."""
        if self.figure is None or not math.isfinite(self.figure):
            return False
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        figure = "undefined" if self.figure is None or not math.isfinite(self.figure) else f"{self.figure:.4g}"
        relation = ">=" if self.at_least else "<="
        return f"{self.name}: {self.detail} is {figure}, must be {relation} {self.limit:g}"


def gates_for(
    version: ModelVersion, manifest: Manifest, config: GatesConfig, versus_champion: Figures | None
) -> list[Gate]:
    """Every gate that a version has to pass.

    Args:
        manifest: what the version was made from.
        versus_champion: `win_rate_low` of the A/B against the champion; None where there is no champion.
    """
    gates = [lineage_gate(manifest)]
    if version.name == SFT_MODEL:
        gates += sft_gates(config, version.metrics)
    if version.name == SCORING_MODEL:
        gates += reward_gates(config, version.metrics)
    if version.name == POLICY_MODEL:
        gates += policy_gates(config, version.metrics, versus_champion)
        gates += reward_gates(config, upstream_figures(manifest, "reward"))
    return gates


def policy_gates(config: GatesConfig, figures: Figures, versus_champion: Figures | None) -> list[Gate]:
    """Win rate against SFT and, where there is one, against the champion; drift from SFT."""
    gates = [
        _at_least(
            "min_win_rate_low",
            figures.get("win_rate_low"),
            config.min_win_rate_low,
            "lower bound of the win rate against SFT",
        )
    ]
    if versus_champion is not None:
        gates.append(
            _at_least(
                "min_win_rate_low_champion",
                versus_champion.get("win_rate_low"),
                config.min_win_rate_low_champion,
                "lower bound of the win rate against the champion",
            )
        )
    drift = Gate(
        name="max_kl_to_sft",
        figure=figures.get("kl_to_sft_high"),
        limit=config.max_kl_to_sft,
        at_least=False,
        detail="upper bound of the KL to SFT in nats a response",
    )
    return [*gates, drift]


def sft_gates(config: GatesConfig, figures: Figures) -> list[Gate]:
    """How well the SFT model predicts demonstrations it was not trained on, and whether it ends its replies."""
    gates = []
    if config.max_heldout_loss is not None:
        gates.append(
            Gate(
                name="max_heldout_loss",
                figure=figures.get("heldout_loss_high"),
                limit=config.max_heldout_loss,
                at_least=False,
                detail="upper bound of the held-out loss in nats a token",
            )
        )
    if config.min_finished_share is not None:
        gates.append(
            _at_least(
                "min_finished_share",
                figures.get("finished_share_low"),
                config.min_finished_share,
                "lower bound of the share of evaluation replies that it ended within the limit",
            )
        )
    return gates


def reward_gates(config: GatesConfig, figures: Figures) -> list[Gate]:
    """Accuracy of the reward model and, where asked for, its rank correlation with grades and its calibration."""
    gates = [
        _at_least(
            "min_pairwise_accuracy",
            figures.get("pairwise_accuracy_low"),
            config.min_pairwise_accuracy,
            "lower bound of the held-out pairwise accuracy of the reward model",
        )
    ]
    if config.min_spearman is not None:
        gates.append(
            _at_least(
                "min_spearman",
                figures.get("spearman_low"),
                config.min_spearman,
                "lower bound of Spearman's rho of the reward model",
            )
        )
    if config.max_ece is not None:
        gates.append(
            Gate(
                name="max_ece",
                figure=figures.get("ece_high"),
                limit=config.max_ece,
                at_least=False,
                detail="upper bound of the calibration error of the reward model",
            )
        )
    return gates


def lineage_gate(manifest: Manifest) -> Gate:
    """No uncommitted change but those that the manifest carries: else the version cannot be built again."""
    barring = bars_promotion(manifest["git"]["files"])
    shown = ", ".join(barring[:5]) + (f" and {len(barring) - 5} more" if len(barring) > 5 else "")
    return Gate(
        name="lineage",
        figure=float(len(barring)),
        limit=0.0,
        at_least=False,
        detail=f"number of uncommitted files it was built with ({shown})"
        if barring
        else "number of uncommitted files it was built with",
    )


def upstream_figures(manifest: Manifest, stage: str) -> Figures:
    """Headline figures of a stage that a version was made from; empty where there are none."""
    figures: Mapping[str, Any] = manifest["metrics"].get(stage, {})
    return {
        name: value
        for name, value in figures.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def refusal(reference: str, gates: Sequence[Gate]) -> str | None:
    """One line naming every gate that does not pass, with its figure; None when all pass."""
    failed = [str(gate) for gate in gates if not gate.passed]
    if not failed:
        return None
    return (
        f"{reference}: not promoted: {'; '.join(failed)}. "
        "Fix: train or evaluate a version that passes, commit what it was built with, or change `gates` in params.yaml"
    )


def _at_least(name: str, figure: float | None, limit: float, detail: str) -> Gate:
    return Gate(name=name, figure=figure, limit=limit, at_least=True, detail=detail)
