"""The report of a run with what only the run knows on top: when, from which commit, which versions, what the gates say.

The page that DVC keeps (`reports/html/report.html`) is the same bytes for the same inputs, so it can hold none of it.
At the end of a run the control plane writes `reports/report.html`: that page, with a band put in where it leaves room.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows.run.advice import Unknown, against_champion, gates_verdict, what_to_do
from flows.run.headlines import seconds
from flows.run.page import ROOM, text_of
from flows.run.summary import RunSummary, read_metrics
from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import write_text
from tasks import paths
from tasks.catalogue import policy_stage
from tasks.lineage.manifest import bars_promotion, commit_of, git_state
from tasks.stages.report.html.words import visible
from tasks.tracking import Standing, standing_of


def write_run_page(root: Path, summary: RunSummary, params: Params, standing: Standing | Unknown, now: float) -> bool:
    """Write `reports/report.html`; whether there was a page to put the band into.

    Args:
        standing: of the run's best policy, or why nothing can be said of it.
        now: seconds since 1970.
    """
    page = text_of(root / paths.REPORT_PAGE)
    if ROOM not in page:
        return False
    write_text(root / paths.RUN_PAGE, page.replace(ROOM, band(root, summary, params, standing, now), 1))
    return True


def best_policy(root: Path) -> str | None:
    """The stage that made the policy with the highest win rate; None where none was compared."""
    best = (read_metrics(root, "evaluate").get("verdict") or {}).get("best")
    return policy_stage(best) if best else None


def best_standing(root: Path, summary: RunSummary, params: Params) -> Standing | Unknown:
    """How the best policy of a run stands, once its version is known; else why that cannot be said."""
    stage = best_policy(root)
    if stage is None:
        return Unknown(
            reason="no policy was compared with the SFT model in this run", cure="Run the stage evaluate on a policy."
        )
    version = next((one.model_version for one in summary.stages if one.name == stage), None)
    if version is None:
        return Unknown(
            reason="the tracking store did not answer, so the models wait to be registered",
            cure="Once it is back: rlhf sync, then rlhf models promote rlhf-policy@candidate",
        )
    try:
        return standing_of(root, version, params)
    except Exception as error:  # a page about a run must not be what the run fails by
        why = str(error).strip() or type(error).__name__
        return Unknown(
            reason=f"{version} could not be held against the gates ({why})",
            cure=f"Once that is mended: rlhf models promote {version}",
        )


def band(root: Path, summary: RunSummary, params: Params, standing: Standing | Unknown, now: float) -> str:
    """The band as HTML; every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(str(value)),
    )
    return environment.get_template("report_band.html.j2").render(
        run=summary.run,
        ended=time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now)),
        took=_took(summary, now),
        commit=_commit(root),
        versions=_versions(summary),
        verdict=gates_verdict(standing),
        gates=standing.gates if isinstance(standing, Standing) else (),
        champion=against_champion(standing, params.evaluate.confidence),
        advice=what_to_do(standing),
    )


def _took(summary: RunSummary, now: float) -> str:
    ran = sum(stage.status == "done" for stage in summary.stages)
    whole = f"{seconds(now - summary.started)}"
    if not ran:
        return f"{whole}: nothing had changed, every stage is of an earlier run"
    return f"{whole}: {ran} of {len(summary.stages)} stages computed"


def _commit(root: Path) -> str:
    commit, branch = commit_of(root)
    if not commit:
        return "none: not a git checkout"
    try:
        uncommitted = bars_promotion(git_state(root).files)
    except EnvironmentProblem:
        return commit[:12]
    named = f"{commit[:12]} ({branch})" if branch != "HEAD" else commit[:12]
    return named + (f", with uncommitted changes: {_some(uncommitted)}" if uncommitted else "")


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _versions(summary: RunSummary) -> str:
    made = [(stage.name, stage.model_version) for stage in summary.stages if stage.outputs_hash or stage.model_version]
    if not made:
        return "no model in this run"
    return " · ".join(f"{stage} {version or 'not registered yet (rlhf sync)'}" for stage, version in made)
