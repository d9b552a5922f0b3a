"""What the stages are, a row each: in which order, what they train and register, and what people see of them.

What a stage reads and writes stands in `dvc.yaml`, its settings in `rlhf_core/config`, its work in
`tasks/stages/<name>`; everything else that has to know of a stage asks here. A new stage is one row, one entry of
`dvc.yaml` and its folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Figures = tuple[tuple[str, str], ...]
Role = Literal["", "base", "judge", "policy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """One stage of `dvc.yaml`.

    Attributes:
        name: as in `dvc.yaml`, without the item of a matrix; also the name of its folder in `tasks/stages/`.
        title: what the report calls it.
        items: item of its matrix -> what the report calls that one; empty for a stage without a matrix.
        trains: it may have several processes (`compute.processes`).
        on_gpu: it computes with models, so that a GPU is kept for it.
        registers: registered model that its output is a version of; empty for none.
        role: what that model is in the comparison: the base, a judge, or a policy that may win.
        shown: its first figures for people, as (label, dotted key in its metrics file); what a file lacks is left out.
        run_figures: dotted keys that stand on the run as a whole, in MLflow and in `reports/headline.json`; those of an
            item begin with its name there.
    """

    name: str
    title: str
    items: Mapping[str, str] = field(default_factory=dict)
    trains: bool = False
    on_gpu: bool = False
    registers: str = ""
    role: Role = ""
    shown: Figures = ()
    run_figures: tuple[str, ...] = ()


CATALOGUE = (
    StageRow(
        name="validate",
        title="Validation",
        shown=(("rows", "rows_in"), ("bad", "rows_bad"), ("duplicates", "rows_duplicate")),
    ),
    StageRow(
        name="sft",
        title="Supervised fine-tuning",
        trains=True,
        on_gpu=True,
        registers="rlhf-sft",
        role="base",
        shown=(("held-out loss", "heldout_loss"), ("steps", "steps")),
        run_figures=("heldout_loss", "heldout_perplexity"),
    ),
    StageRow(
        name="generate",
        title="Generation",
        on_gpu=True,
        shown=(("responses", "num_responses"), ("finished", "finished_share")),
    ),
    StageRow(
        name="label",
        title="Labelling",
        shown=(("pairs", "num_labelled_pairs"), ("votes", "num_votes"), ("agreement", "mean_agreement")),
        run_figures=("mean_agreement", "krippendorff_alpha"),
    ),
    StageRow(
        name="preferences",
        title="Preferences",
        shown=(("pairs to train", "pairs_train"), ("held out", "pairs_heldout")),
        run_figures=("pairs_train", "pairs_heldout"),
    ),
    StageRow(
        name="reward",
        title="Reward model",
        trains=True,
        on_gpu=True,
        registers="rlhf-reward",
        role="judge",
        shown=(("pairwise accuracy", "pairwise_accuracy"), ("Spearman", "spearman"), ("ECE", "ece")),
        run_figures=(
            "pairwise_accuracy",
            "pairwise_accuracy_low",
            "pairwise_accuracy_high",
            "spearman",
            "spearman_within",
            "ece",
        ),
    ),
    StageRow(
        name="align",
        title="Alignment",
        items={"ppo": "PPO", "dpo": "DPO", "chain": "Chain"},
        trains=True,
        on_gpu=True,
        registers="rlhf-policy",
        role="policy",
        shown=(
            ("train score", "train_score"),
            ("SFT's", "train_score_sft"),
            ("train KL to SFT", "train_kl_to_sft"),
            ("steps", "steps"),
            ("ended by the guard, back to step", "guard_best_step"),
        ),
        run_figures=("train_score", "train_kl_to_sft"),
    ),
    StageRow(
        name="combine",
        title="Combination",
        items={"weights": "Averaged weights", "probabilities": "Mixed probabilities"},
        on_gpu=True,
        registers="rlhf-policy",
        role="policy",
        shown=(
            ("PPO", "shares.ppo"),
            ("DPO", "shares.dpo"),
            ("chain", "shares.chain"),
            ("value", "value"),
            ("gain", "gain_over_best_member"),
        ),
        run_figures=("value", "gain_over_best_member"),
    ),
    StageRow(
        name="evaluate",
        title="Evaluation",
        on_gpu=True,
        shown=(("win rate", "verdict.win_rate"), ("KL to SFT", "verdict.kl_to_sft")),
        run_figures=("verdict.win_rate", "verdict.win_rate_low", "verdict.win_rate_high", "verdict.kl_to_sft"),
    ),
    StageRow(
        name="regressions",
        title="Regressions",
        shown=(("figures that got worse", "num_worse"),),
        run_figures=("num_worse",),
    ),
    StageRow(name="report", title="Report"),  # its figures are those of the stages before it
)
STAGES = tuple(row.name for row in CATALOGUE)
MODEL_NAMES = tuple(dict.fromkeys(row.registers for row in CATALOGUE if row.registers))
POLICIES = {item: title for row in CATALOGUE for item, title in row.items.items()}

_BY_NAME = {row.name: row for row in CATALOGUE}


def stage_row(stage: str) -> StageRow | None:
    """The row of `sft` or `align@ppo`; None for a stage of somebody's own `dvc.yaml`."""
    return _BY_NAME.get(stage.partition("@")[0])


def stage_title(stage: str) -> str:
    """What the report calls a stage: `align@ppo` is PPO; a stage without a row keeps its name."""
    row, item = stage_row(stage), stage.partition("@")[2]
    if row is None:
        return stage
    return row.items.get(item, item) if item else row.title


def policy_stage(policy: str) -> str:
    """The stage that makes a policy: `ppo` comes from `align@ppo`, `weights` from `combine@weights`."""
    row = next((row for row in CATALOGUE if policy in row.items), _BY_NAME["align"])
    return f"{row.name}@{policy}"


def models_name(stage: str) -> str | None:
    """Registered model that a stage's output belongs to: `align@ppo` gives `rlhf-policy`; None for other stages."""
    row = stage_row(stage)
    return row.registers if row and row.registers else None
