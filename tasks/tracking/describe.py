"""The description of a registered version, in Markdown: what it is worth, and where it comes from."""

from collections.abc import Iterator, Mapping

from tasks.tracking.events import Judging
from tasks.tracking.fitting import LONGEST_DESCRIPTION, fitted
from tasks.tracking.names import SCORING_MODEL, SFT_MODEL, ModelVersion

GENERATED = "*Written by the pipeline, and again whenever a figure is added; put words of your own into a tag.*"
EVALUATED = "against rlhf-sft by"


def described(version: ModelVersion, figures: Mapping[str, float | None], verdict: Judging | None, before: str) -> str:
    """The description of a version, or what a person has put in its place.

    Args:
        figures: all that are known; None for an undefined one.
        verdict: how the win rate was measured; None leaves the words of an earlier evaluation.
        before: the description as it stands.
    """
    if before and GENERATED not in before:
        return before
    kept = next((line for line in before.splitlines() if EVALUATED in line), "")
    headline = _comparison(figures, verdict) if verdict else kept
    paragraphs = [headline or _quality(version, figures), _origin(version), _table(figures), GENERATED]
    return fitted("\n\n".join(paragraph for paragraph in paragraphs if paragraph), LONGEST_DESCRIPTION)


def _comparison(figures: Mapping[str, float | None], verdict: Judging) -> str:
    rate, low, high = (figures.get(f"win_rate{end}") for end in ("", "_low", "_high"))
    if rate is None or low is None or high is None:
        return ""
    finding = "Better than SFT" if low > 0.5 else "Worse than SFT" if high < 0.5 else "Not shown to differ from SFT"
    judge = f"{verdict.judge} (simulated)" if verdict.simulated else verdict.judge
    kl = figures.get("kl_to_sft")
    drift = "" if kl is None else f", KL to SFT {kl:.2f} nats a response"
    return (
        f"**{finding}**: win rate {rate:.3f} ({verdict.confidence:.0%} interval {low:.3f} to {high:.3f}) "
        f"{EVALUATED} {judge} on {verdict.num_prompts} held-out prompts at temperature "
        f"{verdict.temperature:g}{drift}."
    )


def _quality(version: ModelVersion, figures: Mapping[str, float | None]) -> str:
    """What a version that is compared with nothing is worth."""
    if version.name == SCORING_MODEL:
        value, interval = figures.get("pairwise_accuracy"), _interval(figures, "pairwise_accuracy")
        return "" if value is None else f"**Right on {value:.1%} of held-out pairs**{interval}."
    if version.name == SFT_MODEL:
        loss, interval = figures.get("heldout_loss"), _interval(figures, "heldout_loss")
        return "" if loss is None else f"**Held-out loss {loss:.4f} nats a token**{interval}."
    return "Not compared with SFT yet."


def _interval(figures: Mapping[str, float | None], name: str) -> str:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"


def _origin(version: ModelVersion) -> str:
    def said() -> Iterator[str]:
        tags = version.tags
        yield f"Made by `{version.stage}`"
        if run := tags.get("run"):
            yield f" of run `{run}`"
        if profile := tags.get("profile"):
            yield f", profile `{profile}`"
        if data := tags.get("data_hash"):
            yield f", from data `{data[:12]}`"
        if base := tags.get("base_model"):
            yield f", from the pretrained model `{base}`"
        if commit := tags.get("git_commit"):
            dirty = "" if tags.get("git_dirty", "clean") == "clean" else " with uncommitted changes"
            yield f", code `{commit[:12]}`{dirty}"

    return "".join(said()) + ". The whole lineage is `artifacts/lineage/manifest.json` of the logged model."


def _table(figures: Mapping[str, float | None]) -> str:
    if not figures:
        return ""
    rows = [
        f"| {name} | {'undefined' if value is None else f'{value:.6g}'} |" for name, value in sorted(figures.items())
    ]
    return "\n".join(["| figure | value |", "|---|---|", *rows])
