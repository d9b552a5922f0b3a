"""What a person should do after a run, and why, in plain sentences: from the gates and the champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.stages.report.html.words import interval_text, p_text

if TYPE_CHECKING:
    from tasks.tracking import Standing

MORE_PROMPTS = "evaluate on more prompts (evaluate.num_prompts) or train with another setting"
BETTER_REWARD = "give the reward model more or cleaner preferences, or another setting"
# gate -> (what it means that it failed, what to do then)
MEANINGS = {
    "lineage": ("it was built with uncommitted files, so it could not be built again", "commit them and run again"),
    "min_win_rate_low": ("it is not shown to win often enough against the SFT model", MORE_PROMPTS),
    "min_win_rate_low_champion": ("it is not shown to win often enough against the champion", MORE_PROMPTS),
    "max_kl_to_sft": (
        "it has drifted further from the SFT model than is allowed",
        "charge more for drift (align.ppo.kl_coef, align.dpo.beta) or take fewer steps",
    ),
    "min_pairwise_accuracy": ("its reward model orders too few held-out pairs right", BETTER_REWARD),
    "min_spearman": ("its reward model agrees too little with given grades", BETTER_REWARD),
    "max_ece": ("its reward model is surer of itself, or less sure, than it is right", BETTER_REWARD),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """Why nothing can be said of how a run's best policy stands, and what to do about that."""

    reason: str
    cure: str


def what_to_do(standing: "Standing | Unknown") -> str:
    """One sentence, with the command where there is one."""
    if isinstance(standing, Unknown):
        return f"Nothing can be promoted yet: {standing.reason}. {standing.cure}"
    version = standing.version
    if standing.is_champion:
        return f"Nothing: {version}, the best policy of this run, is champion already."
    if not standing.failed:
        return f"{version} passes every gate; make it champion: rlhf models promote {version}"
    reasons = list(dict.fromkeys(_meaning(gate.name)[0] for gate in standing.failed))
    cures = list(dict.fromkeys(_meaning(gate.name)[1] for gate in standing.failed))
    return f"Do not promote {version}: {', and '.join(reasons)}. Instead: {'; '.join(cures)}."


def gates_verdict(standing: "Standing | Unknown") -> str:
    """How many gates passed and which did not, with figures."""
    if isinstance(standing, Unknown):
        return f"Not held: {standing.reason}."
    failed, count = standing.failed, len(standing.gates)
    if not failed:
        return f"{standing.version} passes all {count}."
    return f"{standing.version} fails {len(failed)} of {count}: {'; '.join(str(gate) for gate in failed)}."


def against_champion(standing: "Standing | Unknown", confidence: float) -> str:
    """The A/B against the champion, or why there is none."""
    if isinstance(standing, Unknown):
        return f"Not compared: {standing.reason}."
    version = standing.version
    if standing.champion is None:
        return f"{version.name} has no champion yet."
    if standing.is_champion:
        return f"{version} is the champion."
    champion = f"{version.name}/{standing.champion}"
    if not standing.against:
        return f"Not compared with {champion}: {standing.note}."
    return f"{version} {_finding(standing.against)} {champion} on the same prompts: {_figures(standing, confidence)}."


def _finding(against: Mapping[str, Any]) -> str:
    low, high = against.get("win_rate_low"), against.get("win_rate_high")
    if low is not None and low > 0.5:
        return "beats"
    if high is not None and high < 0.5:
        return "loses to"
    return "cannot be told from"


def _figures(standing: "Standing", confidence: float) -> str:
    against = standing.against
    interval = f"{confidence:.0%} interval" if against.get("win_rate_low") is not None else "too few for an interval"
    return (
        f"win rate {interval_text(against, 'win_rate')} ({interval}), wins {against['wins']}, ties {against['ties']}, "
        f"losses {against['losses']}, p = {p_text(against['p_value'])}, judged by {against['judge']} at temperature "
        f"{against['temperature']:g}"
    ).replace("= <", "< ")


def _meaning(gate: str) -> tuple[str, str]:
    return MEANINGS.get(gate, (f"it fails the gate {gate}", "see what the gate says below"))
