"""What a watcher is told: live status from files, the table, the lines, the final result."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli.look import status as print_status
from flows.cli.progress import LiveTable, PlainLines, Row, expected_seconds, time_left, watch
from flows.cli.result import print_result, verdict_line
from flows.cli.status import interrupted_runs, read_status
from flows.run.headlines import headline, number, seconds
from flows.run.summary import RunSummary, StageSummary, Verdict, write_live
from rlhf_core.errors import ConfigError
from tasks import paths
from tasks.frame.locks import RunLock

VERDICT = Verdict(
    best="ppo", judge="gold", simulated=True, temperature=1.0, win_rate=0.75, win_rate_low=0.71, win_rate_high=0.79,
    p_value=1e-20, confidence=0.95, kl_to_sft=3.0, better_than_sft=True,
)  # fmt: skip


def summary(**fields) -> RunSummary:
    stages = [
        StageSummary(
            name="sft", status="done", wall_s=12.0, compute_s=10.0, overhead_s=2.0, metrics={"heldout_loss": 0.35482},
            model_version="rlhf-sft/3", outputs_hash="ab", peak_memory_mb=812.4, tokens_per_s=51234.0,
        ),
        StageSummary(name="align@ppo", status="running"),
        StageSummary(name="evaluate"),
    ]  # fmt: skip
    return RunSummary(**{"run": "night", "run_key": "night-1", "started": 1.7e9, "stages": stages, **fields})


def progress(step: int, seconds_since: float, tokens: int) -> dict:
    figures = {"loss/policy": 0.5, "reward/score": float("nan"), "kl": 2.0}
    return {"event": "progress", "step": step, "total": 20, "time": seconds_since, "metrics": figures, "tokens": tokens}


def test_a_running_stage_shows_step_speed_and_time_left(tmp_path: Path) -> None:
    write_live(tmp_path, summary())
    stream = tmp_path / paths.progress_file("align@ppo")
    stream.parent.mkdir(parents=True)
    events = [{"event": "start", "pid": 1}, progress(1, 100.0, 1000), progress(5, 104.0, 9000)]
    stream.write_text("".join(json.dumps(event) + "\n" for event in events))
    with RunLock(tmp_path, "night"):
        run = read_status(tmp_path).runs[0]
    stage = run.stages[1]
    assert (run.status, run.resume) == ("running", None)
    assert (stage.status, stage.step, stage.total) == ("running", 5, 20)
    assert stage.tokens_per_s == 2000.0
    assert stage.left_s == 15.0
    dead = read_status(tmp_path).runs[0]
    assert (dead.status, dead.stages[1].status, dead.resume) == ("interrupted", "interrupted", "rlhf resume")
    assert dead.pid is None


def test_nothing_was_run_yet(tmp_path: Path) -> None:
    found = read_status(tmp_path)
    assert [(run.root, run.status) for run in found.runs] == [(".", "none")]
    assert (found.servers, found.pending_records) == ({}, 0)


def test_the_latest_unfinished_run_is_gone_on_with_first(tmp_path: Path) -> None:
    write_live(tmp_path, summary(status="failed", started=5.0))
    for name, status, started in (("a", "interrupted", 9.0), ("b", "done", 10.0), ("c", "running", 1.0)):
        write_live(tmp_path / "runs" / name, summary(status=status, started=started))
    found = [folder.name for folder, _ in interrupted_runs(tmp_path)]
    assert found == ["a", tmp_path.name, "c"]
    with RunLock(tmp_path / "runs/a", "a"):
        assert [folder.name for folder, _ in interrupted_runs(tmp_path)] == [tmp_path.name, "c"]


def test_status_is_quick_with_long_curves(tmp_path: Path) -> None:
    write_live(tmp_path, summary())
    stream = tmp_path / paths.progress_file("align@ppo")
    stream.parent.mkdir(parents=True)
    stream.write_text("".join(json.dumps(progress(step % 20, step, step)) + "\n" for step in range(20_000)))
    started = time.process_time()
    read_status(tmp_path)
    assert time.process_time() - started < 1


def test_the_newest_run_comes_first_and_the_others_are_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    write_live(tmp_path, summary(status="done", started=5.0))
    for place, name in enumerate(("old", "new", "middle")):
        write_live(tmp_path / "runs" / name, summary(run=name, status="done", started=(1.0, 9.0, 7.0)[place]))
        (tmp_path / "runs" / name / ".git").touch()
    monkeypatch.chdir(tmp_path)
    assert [run.run for run in read_status(tmp_path).runs] == ["new", "middle", "night", "old"]
    print_status()
    brief = capsys.readouterr().out
    assert brief.startswith("run new (runs/new): done")
    assert brief.count("align@ppo") == 1, "only the newest stage by stage"
    assert brief.index("middle") < brief.index("night") < brief.index("old")
    print_status(all=True)
    assert capsys.readouterr().out.count("align@ppo") == 4
    print_status("middle")
    assert capsys.readouterr().out.count("align@ppo") == 1
    with pytest.raises(ConfigError, match=r"nope: no such run\. Fix: one of new, middle"):
        print_status("nope")


def test_rates_come_from_the_last_seconds_only() -> None:
    row = Row("x")
    assert row.rates() == (None, None)
    row.take(progress(1, 0.0, 0))
    row.take(progress(2, 100.0, 100))  # a slow start
    for step in range(3, 11):
        row.take(progress(step, 100.0 + step, step * 1000))
    rate, left = row.rates()
    assert rate == pytest.approx(1000.0, rel=0.2)
    assert left == pytest.approx(10.0 * 110 / 110, rel=0.4)


def test_rates_survive_a_clock_that_jumps_back() -> None:
    row = Row("x")
    row.take(progress(1, 100.0, 10))
    row.take(progress(2, 50.0, 20))
    assert row.rates() == (None, None)


def test_plain_lines_are_plain_and_few() -> None:
    stream = io.StringIO()
    view = watch(["sft", "align@ppo"], stream)
    assert isinstance(view, PlainLines)
    with view:
        view.stage_started("sft")
        view.stage_event("sft", {"event": "start"})
        for step in range(1, 20):
            view.stage_event("sft", progress(step, float(step), step))
        view.stage_finished(summary().stages[0])
    lines = stream.getvalue().splitlines()
    assert lines == ["sft: started", "sft: done  12.0 s  held-out loss 0.3548"]


def test_the_live_table_shows_every_stage() -> None:
    stream = io.StringIO()
    table = LiveTable(["sft", "align@ppo", "evaluate"], stream)
    table.stage_started("sft")
    table.stage_finished(summary().stages[0])
    table.stage_started("align@ppo")
    table.stage_event("align@ppo", progress(1, 100.0, 1000))
    table.stage_event("align@ppo", progress(5, 104.0, 9000))
    Console(file=stream, width=140).print(table)
    lines = stream.getvalue().splitlines()
    assert "51,234" in lines[1]
    assert "5/20" in lines[2]
    assert "2,000" in lines[2]
    assert "15.0 s" in lines[2]
    assert "loss/policy 0.5" in lines[2]
    assert "nan" not in lines[2]
    assert "evaluate" in lines[3]
    assert lines[4].rstrip().endswith("at least 15.0 s left"), "evaluate never ran here, so it may add to that"


def test_the_time_left_counts_what_is_still_to_come() -> None:
    running, waiting, unchanged = Row("align@ppo", started=0.0), Row("evaluate"), Row("report")
    running.take(progress(1, 100.0, 1000))
    running.take(progress(5, 104.0, 9000))  # a step a second, 15 of 20 to come
    rows = [running, waiting, unchanged]
    assert time_left(rows, {"evaluate": 12.0, "report": 0.0}) == "about 27.0 s left"
    assert time_left(rows, {"report": 0.0}) == "at least 15.0 s left"
    assert time_left([waiting], {}) == "time left not known yet"
    running.finished = summary().stages[0]
    assert time_left(rows, {"evaluate": 12.0, "report": 0.0}) == "about 12.0 s left"


def test_a_stage_is_expected_to_take_as_long_as_it_last_did(tmp_path: Path) -> None:
    stream = tmp_path / paths.progress_file("sft")
    stream.parent.mkdir(parents=True)
    stream.write_text('{"event": "start"}\n{"event": "done", "compute_s": 7.5}\n')
    found = expected_seconds(tmp_path, ["validate", "sft", "reward"], changed={"sft", "reward"})
    assert found == {"validate": 0.0, "sft": 7.5}


@pytest.mark.parametrize("width", [80, 60, 120])
def test_the_result_fits_the_page_and_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cli.result.PLAIN_WIDTH", width)
    stream = io.StringIO()
    done = summary(verdict=VERDICT)
    done.close("done", 0, 1.7e9 + 90)
    print_result(done, stream)
    lines = stream.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    text = " ".join(stream.getvalue().split())
    for part in ("align@ppo", "evaluate", "0.3548", "12.0 s", "2.0 s", "812", "rlhf-sft/3", "rlhf report"):
        assert part in text, part


def test_at_80_columns_the_live_table_keeps_names_and_figures() -> None:
    stream = io.StringIO()
    table = LiveTable(["sft", "align@ppo", "evaluate"], stream)
    table.stage_started("align@ppo")
    table.stage_event("align@ppo", progress(1, 100.0, 1000))
    table.stage_event("align@ppo", progress(5, 104.0, 9000))
    Console(file=stream, width=80).print(table)
    text = stream.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("align@ppo", "loss/policy 0.5 kl 2", "25%", "5/20", "tokens/s 2,000", "15.0 s"):
        assert part in text, part


def test_the_result_names_versions_verdict_and_next_commands() -> None:
    stream = io.StringIO()
    done = summary(verdict=VERDICT, tracking="4 records wait to be sent. Fix: rlhf sync")
    done.close("done", 0, 1.7e9 + 90)
    print_result(done, stream)
    text = " ".join(stream.getvalue().split())
    for part in (
        "rlhf-sft/3", "812 MB", "held-out loss 0.3548", "12.0 s", "total 1 min 30 s",
        "ppo against SFT by gold (simulated)",
        "0.750 (95% interval 0.710 to 0.790), p = 1e-20", "better than SFT", "4 records wait",
        "rlhf ui", "rlhf report", "rlhf models compare",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in stream.getvalue()


def test_a_verdict_that_shows_nothing_says_so() -> None:
    assert "not shown to be better" in verdict_line(VERDICT.model_copy(update={"better_than_sft": False}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.04, "0.0 s"), (59.94, "59.9 s"), (60.0, "1 min 00 s"), (185, "3 min 05 s"), (3725, "1 h 02 min")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_numbers_are_short() -> None:
    assert [number(value) for value in (1234567, 0.123456, 1e-9)] == ["1,234,567", "0.1235", "1e-09"]


def test_a_combined_policy_shows_each_share() -> None:
    metrics = {"shares": {"chain": 0.25, "ppo": 0.75}, "value": -1.5, "gain_over_best_member": -0.01}
    stage = StageSummary(name="combine@weights", status="done", metrics=metrics)
    assert headline(stage) == "PPO 0.75 · chain 0.25 · value -1.5 · gain -0.01"


def test_a_failed_stage_shows_why() -> None:
    assert headline(StageSummary(name="sft", status="failed", message="no data", metrics={"steps": 1})) == "no data"
    assert headline(StageSummary(name="unknown", status="done", metrics={"b": True, "c": 2, "d": "x"})) == "c 2"
