"""The few figures of each stage that a person wants to see first, as text."""

from collections.abc import Mapping

from flows.summary import StageSummary
from tasks.headline import find_figure, is_number

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
    "report": (),  # its figures are those of the stages before it
}
FALLBACK_FIGURES = 3


def headline(stage: StageSummary) -> str:
    """`held-out loss 1.234 · steps 550`: the stage's first figures, or what went wrong with it."""
    if stage.message and stage.status in ("failed", "interrupted"):
        return stage.message
    name = stage.name.partition("@")[0]
    pairs = [(label, find_figure(stage.metrics, key)) for label, key in HEADLINES.get(name, ())]
    shown = [f"{label} {number(value)}" for label, value in pairs if is_number(value)]
    if name not in HEADLINES:
        flat = [(key, value) for key, value in stage.metrics.items() if is_number(value)]
        shown = [f"{key} {number(value)}" for key, value in flat[:FALLBACK_FIGURES]]
    return " · ".join(shown)


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
