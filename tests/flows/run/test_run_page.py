"""The report with the run's own band on top: what it says, when it is written, which page is shown."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.tracking import git

import flows.run.report_band
from flows.run.advice import Unknown, against_champion, gates_verdict, what_to_do
from flows.run.execution import PipelineRun
from flows.run.page import page_of_run
from flows.run.report_band import best_standing, write_run_page
from flows.run.request import RunRequest, prepare_run
from flows.run.summary import RunSummary, StageSummary
from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem
from tasks import paths
from tasks.frame.runner import Stop
from tasks.tracking import ModelVersion, Standing
from tasks.tracking.gates import Gate

BARE = "<html><body><h1>verdict</h1>\n<!-- the run -->\n<p>&lt;!-- the run --&gt;</p></body></html>"
VERSION = ModelVersion(
    name="rlhf-policy", version=3, stage="align@ppo", outputs_hash="h", aliases=(), metrics={}, tags={}, run_id="r",
    created=0.0,
)  # fmt: skip
WIN = Gate(name="min_win_rate_low", figure=0.48, limit=0.5, at_least=True, detail="lower bound against SFT")
DRIFT = Gate(name="max_kl_to_sft", figure=2.0, limit=10.0, at_least=False, detail="KL")
AGAINST = {
    "judge": "gold", "temperature": 1.0, "wins": 30, "ties": 5, "losses": 5, "win_rate": 0.8125,
    "win_rate_low": 0.67, "win_rate_high": 0.9, "p_value": 2.2e-5,
}  # fmt: skip


def standing(*gates: Gate, champion: int | None = None, against: dict | None = None, note: str = "") -> Standing:
    return Standing(version=VERSION, champion=champion, gates=gates, against=against or {}, note=note)


def summary(**more) -> RunSummary:
    stages = [
        StageSummary(name="align@ppo", status="done", outputs_hash="h", model_version="rlhf-policy/3"),
        StageSummary(name="evaluate", status="done"),
        StageSummary(name="report", status="unchanged"),
    ]
    return RunSummary(**{"run": "nightly", "run_key": "k", "started": 1000.0, "stages": stages} | more)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".gitignore").write_text("/reports/\n/.rlhf/\n/data/\n")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "start")
    (tmp_path / paths.REPORT).mkdir(parents=True)
    (tmp_path / paths.REPORT_PAGE).write_text(BARE)
    (tmp_path / paths.METRICS).mkdir()
    (tmp_path / paths.metrics_file("evaluate")).write_text('{"verdict": {"best": "ppo"}}')
    return tmp_path


def text_of(html: str) -> str:
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(html)
    return " ".join(" ".join(words).split())


def test_the_band_says_run_date_commit_time_versions_gates_champion_and_what_to_do(root: Path, monkeypatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    found = standing(WIN, DRIFT, champion=1, against=AGAINST)
    assert write_run_page(root, summary(), Params(), found, now=1137.0)
    page = (root / paths.RUN_PAGE).read_text()
    commit = git(root, "rev-parse", "HEAD")[:12]
    shown = text_of(page)
    for part in (
        "Run nightly", "Ended 1970-01-01 00:18", "Took 2 min 17 s: 2 of 3 stages computed", f"{commit} (main)",
        "align@ppo rlhf-policy/3",
        "rlhf-policy/3 beats rlhf-policy/1 on the same prompts: win rate 0.812 [0.670, 0.900] (95% interval), "
        "wins 30, ties 5, losses 5, p = 2×10⁻⁵, judged by gold at temperature 1",
        "rlhf-policy/3 fails 1 of 2: min_win_rate_low: lower bound against SFT is 0.48, must be >= 0.5",
        "What to do. Do not promote rlhf-policy/3: it is not shown to win often enough against the SFT model. "
        "Instead: evaluate on more prompts (evaluate.num_prompts) or train with another setting",
    ):  # fmt: skip
        assert part in shown, part
    assert "uncommitted" not in shown
    (root / "code.py").write_text("2\n")
    write_run_page(root, summary(), Params(), found, now=1137.0)
    assert "with uncommitted changes: code.py" in text_of((root / paths.RUN_PAGE).read_text())


def test_every_text_is_escaped_and_nothing_runs(root: Path) -> None:
    hostile = "<script>alert(1)</script>\u202e"
    gate = Gate(name=hostile, figure=None, limit=1.0, at_least=True, detail=hostile)
    write_run_page(root, summary(run=hostile), Params(), standing(gate, champion=1, note=hostile), now=1001.0)
    page = (root / paths.RUN_PAGE).read_text()
    assert "<script" not in page
    assert "\u202e" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert not re.search(r"style=|src=|href=", page)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (standing(DRIFT), "rlhf-policy/3 passes every gate; make it champion: rlhf models promote rlhf-policy/3"),
        (standing(DRIFT, champion=3), "Nothing: rlhf-policy/3, the best policy of this run, is champion already."),
        (Unknown(reason="the store is away", cure="rlhf sync"), "Nothing can be promoted yet: the store is away. rlhf"),
    ],
)
def test_what_to_do(found: Standing | Unknown, said: str) -> None:
    assert what_to_do(found).startswith(said)


def test_every_gate_that_there_is_has_a_meaning() -> None:
    from rlhf_core.config import GatesConfig

    policy_gates = {"lineage"} | {
        name for name in GatesConfig.model_fields if name not in ("max_heldout_loss", "min_finished_share")
    }
    from flows.run.advice import MEANINGS

    assert policy_gates == set(MEANINGS)


@pytest.mark.parametrize(
    ("low", "high", "finding"), [(0.51, 0.9, "beats"), (0.2, 0.49, "loses to"), (0.5, 0.9, "cannot be told from")]
)
def test_the_champion_is_beaten_only_by_a_whole_interval(low: float, high: float, finding: str) -> None:
    against = AGAINST | {"win_rate_low": low, "win_rate_high": high}
    assert f"rlhf-policy/3 {finding} rlhf-policy/1" in against_champion(standing(champion=1, against=against), 0.95)
    few = against_champion(standing(champion=1, against=AGAINST | {"win_rate_low": None, "win_rate_high": None}), 0.95)
    assert "cannot be told from" in few
    assert "too few for an interval" in few


def test_no_champion_no_comparison_and_an_absent_store_are_said() -> None:
    assert against_champion(standing(), 0.95) == "rlhf-policy has no champion yet."
    assert against_champion(standing(champion=3), 0.95) == "rlhf-policy/3 is the champion."
    told = against_champion(standing(champion=1, note="it has no recorded responses"), 0.95)
    assert told == "Not compared with rlhf-policy/1: it has no recorded responses."
    away = Unknown(reason="the store is away", cure="")
    assert gates_verdict(away) == "Not held: the store is away."
    assert against_champion(away, 0.95) == "Not compared: the store is away."


def test_a_store_that_is_away_is_said_and_ends_no_run(root: Path, monkeypatch) -> None:
    unregistered = summary()
    unregistered.stages[0].model_version = None
    waiting = best_standing(root, unregistered, Params())
    assert isinstance(waiting, Unknown)
    assert "did not answer" in waiting.reason
    assert "rlhf sync" in waiting.cure
    for error in (EnvironmentProblem("the MLflow store does not answer"), ValueError("row 3: scores must be finite")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(flows.run.report_band, "standing_of", fail)
        found = best_standing(root, summary(), Params())
        assert isinstance(found, Unknown)
        assert str(error) in found.reason


def test_the_page_of_a_run_is_shown_as_long_as_it_is_of_the_figures_as_they_stand(root: Path) -> None:
    assert page_of_run(root) == root / paths.REPORT_PAGE
    write_run_page(root, summary(), Params(), standing(DRIFT), now=1001.0)
    assert page_of_run(root) == root / paths.RUN_PAGE
    assert (root / paths.REPORT_PAGE).read_text() == BARE
    (root / paths.REPORT_PAGE).write_text(BARE.replace("verdict", "another"))  # as `dvc repro` does
    assert page_of_run(root) == root / paths.REPORT_PAGE
    (root / paths.REPORT_PAGE).unlink()
    assert page_of_run(root) is None


def test_a_run_writes_its_page_at_its_end_only_when_it_is_done(root: Path, monkeypatch) -> None:
    (root / "dvc.yaml").write_text("stages:\n  sft: {cmd: x}\n  report: {cmd: x}\n")
    (root / "params.yaml").write_text("data: {prompts: data/p.jsonl}\n")
    (root / "data").mkdir()
    (root / "data/p.jsonl").write_text("{}\n")
    (root / paths.metrics_file("evaluate")).unlink()
    page = root / paths.RUN_PAGE

    def end(status: str, report: str) -> None:
        run = PipelineRun(prepare_run(root, RunRequest()), set(), stop=Stop())
        run.summary.stage("report").status = report  # type: ignore[assignment]
        run.close(status, 0)  # type: ignore[arg-type]

    for status, report in (("failed", "done"), ("interrupted", "done"), ("done", "waiting")):
        end(status, report)
        assert not page.exists(), (status, report)
    end("done", "unchanged")
    first = page.read_text()
    assert "no policy was compared" in first
    assert json.loads((root / paths.SUMMARY).read_text())["run"] in first
    monkeypatch.setattr(flows.run.report_band, "write_run_page", lambda *_: pytest.fail("nothing was to do"))
    end("done", "unchanged")
    assert page.read_text() == first
