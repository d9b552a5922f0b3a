"""Figures and verdicts as people read them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.config.evaluation import JUDGE_ROWS
from tasks.catalogue import POLICIES as POLICY_TITLES

# Control characters, bidirectional overrides and zero-width marks: they would hide or reorder what a model wrote.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

JUDGES = {name: row.title for name, row in JUDGE_ROWS.items()}
POLICIES = {"sft": "SFT", **POLICY_TITLES}


def visible(text: str) -> str:
    """Return the text with every character that cannot be seen written as its code point, such as `⟨U+202E⟩`."""
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def figure_text(value: Any) -> str:
    """Return a figure for a table: four significant digits, counts whole, `None` as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e6:
            return f"{value:,.1f}"
        return f"{value:.4g}"
    return visible(str(value))


def percent_text(share: float | None) -> str:
    """Return a share as a percentage, `None` as a dash."""
    return "–" if share is None else f"{share:.1%}"


def p_text(value: float | None) -> str:
    """Return a p-value: three decimals, or its order of magnitude below a thousandth."""
    if value is None:
        return "–"
    if value < 1e-300:
        return "<10⁻³⁰⁰"
    if value >= 0.001:
        return f"{value:.3f}"
    digit, _, exponent = f"{value:.0e}".partition("e")
    return f"{digit}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def interval_text(figures: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """Return `0.760 [0.722, 0.795]` from `key`, `key_low` and `key_high`; what is undefined is left out."""
    value, low, high = figures.get(key), figures.get(f"{key}_low"), figures.get(f"{key}_high")
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def bounds_text(figures: Mapping[str, Any], key: str) -> str:
    """Return `interval 72.2% to 79.5%` from `key_low` and `key_high`, or that there is none."""
    low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
    if low is None or high is None:
        return "too few prompts for an interval"
    return f"interval {low:.1%} to {high:.1%}"


def sampling(temperature: float) -> str:
    """Return how responses were drawn: `greedy` or `temperature 0.7`."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def verdict_sentence(verdict: Mapping[str, Any]) -> str:
    """Return what the comparison with the SFT model says, in one sentence that claims no more than its interval."""
    name = POLICIES.get(verdict["best"], verdict["best"])
    low, high = verdict["win_rate_low"], verdict["win_rate_high"]
    if low is None or high is None:
        finding = f"Too few prompts to tell {name} from the SFT model"
    elif low > 0.5:
        finding = f"{name} beats the SFT model"
    elif high < 0.5:
        finding = f"No policy beats the SFT model; the best, {name}, loses to it"
    else:
        finding = f"{name} cannot be told from the SFT model"
    return (
        f"{finding}: win rate {interval_text(verdict, 'win_rate')} on {verdict['num_prompts']:,} held-out prompts, "
        f"p = {p_text(verdict['p_value'])}.".replace("= <", "< ")
    )


def verdict_terms(verdict: Mapping[str, Any]) -> str:
    """Return who judged and under what terms."""
    judge = JUDGES.get(verdict["judge"], verdict["judge"])
    return (
        f"Judge: {judge}, both orders, {sampling(verdict['temperature'])}. Ties count half; "
        f"{verdict['confidence']:.0%} score interval; exact sign test without ties. "
        "Intervals and p are corrected for the number of policies compared."
    )


def changes(evaluation: Mapping[str, Any], algorithms: Sequence[str]) -> Iterator[str]:
    """Yield, for each policy, how the length of its replies and its over-refusal changed from SFT's."""
    for name in algorithms:
        figures, policy = evaluation[name], POLICIES[name]
        ratio, low, high = (figures.get(key) for key in ("tokens_ratio", "tokens_gain_low", "tokens_gain_high"))
        if ratio is not None and figures.get("tokens_gain") is not None:
            by = f"{figures['tokens_gain']:+.1f} tokens a reply"
            found = f"{by} [{low:+.1f}, {high:+.1f}]" if low is not None and high is not None else by
            if low is None or high is None:
                yield f"{policy}: too few prompts to say whether replies grew longer ({by})."
            elif low > 0 or high < 0:
                longer = "longer" if low > 0 else "shorter"
                yield f"{policy}: replies are {abs(ratio - 1):.0%} {longer} than SFT's ({found})."
            else:
                yield f"{policy}: replies are not shown to be longer or shorter than SFT's ({found})."
        gain = figures.get("over_refusal_gain")
        if gain is not None:
            bounds = [figures.get(f"over_refusal_gain_{end}") for end in ("low", "high")]
            shown = "too few for an interval" if None in bounds else ", ".join(f"{100 * one:+.1f}" for one in bounds)
            yield f"{policy}: over-refusal {100 * gain:+.1f} points from SFT's [{shown}]."


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested figures as dotted names; lists are written as they are in JSON, empty mappings are left out."""
    rows: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows |= flattened(item, f"{prefix}{key}.")
        elif isinstance(item, (list, tuple)):
            rows[f"{prefix}{key}"] = ", ".join(figure_text(entry) for entry in item)
        else:
            rows[f"{prefix}{key}"] = item
    return rows
