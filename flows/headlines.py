"""The few figures of each stage that a person wants to see first, as text."""

from collections.abc import Mapping
from typing import Any

from flows.summary import StageSummary

# Per stage: (label, dotted key in its metrics file). What a file lacks is left out.
HEADLINES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "validate": (("rows", "rows_in"), ("bad", "rows_bad"), ("duplicates", "rows_duplicate")),
    "sft": (("held-out loss", "heldout_loss"), ("steps", "steps")),
    "generate": (("responses", "num_responses"), ("finished", "finished_share")),
    "label": (("pairs", "num_labelled_pairs"), ("votes", "num_votes"), ("agreement", "mean_agreement")),
    "preferences": (("pairs to train", "pairs_train"), ("held out", "pairs_heldout")),
    "reward": (("pairwise accuracy", "pairwise_accuracy"), ("Spearman", "spearman"), ("ECE", "ece")),
    "align": (
        ("train score", "train_score"),
        ("SFT's", "train_score_sft"),
        ("train KL to SFT", "train_kl_to_sft"),
        ("steps", "steps"),
        ("ended by the guard, back to step", "guard_best_step"),
    ),
    "combine": (
        ("PPO", "shares.ppo"),
        ("DPO", "shares.dpo"),
        ("chain", "shares.chain"),
        ("value", "value"),
        ("gain", "gain_over_best_member"),
    ),
    "evaluate": (("win rate", "verdict.win_rate"), ("KL to SFT", "verdict.kl_to_sft")),
}
FALLBACK_FIGURES = 3

# Per stage: dotted keys of its metrics file that stand on the run as a whole in MLflow, under the same names; those of
# `align`, `combine` and each model that `evaluate` compared begin with the policy's name. `dvc metrics` has them all.
RUN_FIGURES: Mapping[str, tuple[str, ...]] = {
    "sft": ("heldout_loss", "heldout_perplexity"),
    "label": ("mean_agreement", "krippendorff_alpha"),
    "preferences": ("pairs_train", "pairs_heldout"),
    "reward": (
        "pairwise_accuracy", "pairwise_accuracy_low", "pairwise_accuracy_high", "spearman", "spearman_within", "ece",
    ),
    "align": ("train_score", "train_kl_to_sft"),
    "combine": ("value", "gain_over_best_member"),
    "evaluate": ("verdict.win_rate", "verdict.win_rate_low", "verdict.win_rate_high", "verdict.kl_to_sft"),
}  # fmt: skip
POLICY_FIGURES = (
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "p_value",
    "kl_to_sft",
    "truthful_share_gain",
    "gold_gain",
)


def headline(stage: StageSummary) -> str:
    """`held-out loss 1.234 · steps 550`: the stage's first figures, or what went wrong with it."""
    if stage.message and stage.status in ("failed", "interrupted"):
        return stage.message
    name = stage.name.partition("@")[0]
    pairs = [(label, _find(stage.metrics, key)) for label, key in HEADLINES.get(name, ())]
    shown = [f"{label} {number(value)}" for label, value in pairs if _is_number(value)]
    if not shown:
        flat = [(key, value) for key, value in stage.metrics.items() if _is_number(value)]
        shown = [f"{key} {number(value)}" for key, value in flat[:FALLBACK_FIGURES]]
    return " · ".join(shown)


def run_figures(stage: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a stage's metrics stands on the run as a whole; what is undefined is left out."""
    kind, _, policy = stage.partition("@")
    prefix = f"{policy}." if policy else ""
    found = {f"{prefix}{key}": _find(metrics, key) for key in RUN_FIGURES.get(kind, ())}
    if kind == "evaluate":
        found |= {
            f"{name}.{key}": figures[key]
            for name, figures in metrics.items()
            if isinstance(figures, Mapping) and "judges" in figures
            for key in POLICY_FIGURES
            if key in figures
        }
    return {key: value for key, value in found.items() if _is_number(value)}


def number(value: float) -> str:
    """A figure in at most four significant digits; counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def seconds(value: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `1 h 02 min`; a dash for None."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _find(metrics: Mapping[str, Any], key: str) -> Any:
    value: Any = metrics
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
