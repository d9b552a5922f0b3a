"""Where everything lies, relative to the root of a checkout or of a run's worktree."""

from pathlib import Path

DATA = Path("data")
PARAMS = Path("params.yaml")
DVC_FILE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
PROFILES = Path("profiles")

VALIDATE = Path("artifacts/validate")
SFT = Path("artifacts/sft")
GENERATE = Path("artifacts/generate")
LABEL = Path("artifacts/label")
PREFERENCES = Path("artifacts/preferences")
REWARD = Path("artifacts/reward")
ALIGN = Path("artifacts/align")
EVALUATE = Path("artifacts/evaluate")
REPORT = Path("reports/html")
REPORT_PAGE = REPORT / "report.html"
RUN_PAGE = Path("reports/report.html")

METRICS = Path("reports/metrics")
PLOTS = Path("reports/plots")
HEADLINE = Path("reports/headline.json")
SUMMARY = Path("reports/summary.json")

STATE = Path(".rlhf")
PROGRESS = STATE / "progress"
CHECKPOINTS = STATE / "checkpoints"
STAGING = STATE / "staging"
LOCKS = STATE / "locks"
REFERENCE_CACHE = STATE / "cache/reference"
RUNS = Path("runs")


def slug(stage: str) -> str:
    """File-name form of a stage name: `align@ppo` becomes `align-ppo`."""
    return stage.replace("@", "-")


def stage_output(stage: str) -> Path:
    """Folder that a stage publishes: `artifacts/sft`, `artifacts/align/ppo`, `reports/html`.

    A combined policy stands beside the aligned ones, since whoever reads policies reads both.
    """
    if stage == "report":
        return REPORT
    name, _, item = stage.partition("@")
    if name == "combine":
        return ALIGN / item
    return Path("artifacts") / name / item if item else Path("artifacts") / name


def metrics_file(stage: str) -> Path:
    """Figures of a stage; those of the report are the few of the whole run that `dvc metrics` and `dvc exp` show."""
    return HEADLINE if stage == "report" else METRICS / f"{slug(stage)}.json"


def plots_file(stage: str) -> Path:
    """Curves of a stage that trains."""
    return PLOTS / f"{slug(stage)}.csv"


def progress_file(stage: str) -> Path:
    """Live figures of a stage with times; never an input of anything that is reproduced."""
    return PROGRESS / f"{slug(stage)}.jsonl"


def home(root: Path) -> Path:
    """Return the main checkout that a run's worktree belongs to, or `root` itself where it is none.

    Servers, tracking stores and their locks live in the main checkout's `.rlhf`, whichever worktree a run has.
    """
    root = root.resolve()
    link = root / ".git"
    if root.parent.name == RUNS.name and link.is_file():
        target = link.read_text().removeprefix("gitdir:").strip()
        common = (root / target).resolve().parents[1]
        if common.name == ".git" and common.parent == root.parent.parent:
            return common.parent
    return root
