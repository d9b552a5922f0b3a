"""Every stage that makes tokens of texts says how many were cut: in its metrics, in one line, in table and report.

The limits of a finished project are lowered and its stages run again; what is cut is counted here from the tables and
the tokenizer alone.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.project import change_sections

from flows.cli.result import print_result
from flows.run.summary import RunSummary, StageSummary
from rlhf_core.text.tokenizer import load_tokenizer
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import run as align
from tasks.stages.combine import run as combine
from tasks.stages.evaluate import run as evaluate
from tasks.stages.generate import run as generate
from tasks.stages.report.html.page import render
from tasks.stages.report.html.sources import read_run
from tasks.stages.reward import run as reward
from tasks.stages.sft import run as sft
from tasks.stages.text_lines import texts_line

PROMPT_LIMIT, RESPONSE_LIMIT = 12, 6
BODIES = {module.__name__.split(".")[-2]: module.run for module in (align, combine, evaluate, generate, reward, sft)}


@pytest.fixture
def short(project: Path) -> Path:
    """The finished project with limits that cut most texts, and few steps."""
    change_sections(
        project,
        model={"max_prompt_tokens": PROMPT_LIMIT, "max_response_tokens": RESPONSE_LIMIT},
        sft={"max_steps": 2},
        reward={"min_pairwise_accuracy": 0.0},
    )
    return project


def run(project: Path, stage: str) -> int:
    return run_stage(stage, BODIES[stage.partition("@")[0]], load_params(project / "params.yaml"), project)


def figures(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage.replace('@', '-')}.json").read_text())


def table(project: Path, path: str) -> list[dict[str, Any]]:
    return pq.read_table(project / "artifacts" / path).to_pylist()


class Count:
    """Texts counted from their tokens without a limit, by the tokenizer's own call."""

    def __init__(self, project: Path) -> None:
        self.tokenizer = load_tokenizer(project / "artifacts/sft/model")

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompts(self, rows: Sequence[dict[str, Any]]) -> int:
        return sum(len(self.tokens(row["prompt"])) > PROMPT_LIMIT for row in rows)

    def responses(self, rows: Sequence[dict[str, Any]], *fields: str) -> int:
        """One token more than its text: the end token."""
        return sum(len(self.tokens(f" {row[field].strip()}")) + 1 > RESPONSE_LIMIT for row in rows for field in fields)

    def equal(self, rows: Sequence[dict[str, Any]]) -> int:
        def cut(text: str) -> list[int]:
            return [*self.tokens(f" {text.strip()}"), self.tokenizer.eos_token_id][:RESPONSE_LIMIT]

        return sum(cut(row["chosen"]) == cut(row["rejected"]) for row in rows)


def told(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.startswith("warning: "))


def test_sft_counts_replies_without_an_end_and_prompts_without_a_beginning(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(short, "sft") == 0
    count, rows = (
        Count(short),
        [row for row in table(short, "validate/demonstrations.parquet") if row["split"] == "train"],
    )
    said = figures(short, "sft")
    assert (said["responses_encoded"], said["prompts_encoded"]) == (len(rows), len(rows))
    assert 0 < said["responses_cut"] == count.responses(rows, "response")
    assert 0 < said["prompts_cut"] == count.prompts(rows)
    (line,) = told(capsys.readouterr().out)
    assert f"{said['responses_cut']:,} of {len(rows):,} responses lost their end to model.max_response_tokens" in line
    assert f"{said['prompts_cut']:,} of {len(rows):,} prompts lost their beginning" in line
    events = (short / ".rlhf/progress/sft.jsonl").read_text().splitlines()
    assert [json.loads(event)["event"] for event in events].count("warning") == 1


def test_reward_counts_training_held_out_and_graded_rows(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(short, "reward") == 0
    count, said = Count(short), figures(short, "reward")
    pairs = [row for split in ("train", "heldout") for row in table(short, f"preferences/{split}.parquet")]
    graded = table(short, "reward/graded_scores.parquet")
    assert (said["pairs_encoded"], said["responses_encoded"]) == (len(pairs), 2 * len(pairs) + len(graded))
    cut = count.responses(pairs, "chosen", "rejected") + count.responses(graded, "response")
    assert 0 < said["responses_cut"] == cut
    assert said["prompts_cut"] == count.prompts([*pairs, *graded])
    assert 0 < said["pairs_equal_when_cut"] == count.equal(pairs)
    assert len(list(told(capsys.readouterr().out))) == 1


def test_dpo_and_combine_count_their_pairs_and_ppo_its_prompts(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_sections(short, combine={"methods": ["weights"], "members": ["ppo", "dpo"], "pairs": 8})
    count = Count(short)
    prompts = [{"prompt": text} for text in {row["prompt"] for row in table(short, "validate/prompts.parquet")}]
    for stage, split in (("align@dpo", "train"), ("combine@weights", "heldout"), ("align@ppo", None)):
        assert run(short, stage) == 0
        said = figures(short, stage)
        lines = list(told(capsys.readouterr().out))
        assert len(lines) == 1
        if split:
            pairs = table(short, f"preferences/{split}.parquet")
            assert 0 < said["responses_cut"] == count.responses(pairs, "chosen", "rejected")
            assert said["pairs_equal_when_cut"] == count.equal(pairs)
        else:
            assert 0 < said["prompts_cut"] == count.prompts(prompts)
            assert "responses_cut" not in said, "its responses are sampled within the limit"


@pytest.mark.parametrize("stage", ["reward", "align@dpo"])
def test_pairs_that_are_all_equal_once_cut_are_refused(
    short: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    path = short / "artifacts/preferences/train.parquet"
    rows = pq.read_table(path)
    same = pa.array([f"{text} Right." for text in rows["rejected"].to_pylist()])
    longer = pa.array([f"{text} Wrong." for text in rows["rejected"].to_pylist()])
    pq.write_table(
        rows.set_column(rows.schema.get_field_index("chosen"), rows.schema.field("chosen"), same).set_column(
            rows.schema.get_field_index("rejected"), rows.schema.field("rejected"), longer
        ),
        path,
    )
    change_sections(short, model={"max_response_tokens": 3})
    capsys.readouterr()
    assert run(short, stage) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Fix:" in line]
    count = len(rows)
    assert f"preferences/train.parquet: no pair to learn from ({2 * count:,} of {2 * count:,} responses lost" in line
    assert f"{count:,} of {count:,} pairs have two responses that are the same once they are cut" in line
    assert line.endswith("Fix: raise model.max_response_tokens")


def test_generate_and_evaluate_count_prompts(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, cfg = Count(short), load_params(short / "params.yaml")
    held_out = table(short, "validate/heldout_prompts.parquet")
    asked = table(short, "validate/prompts.parquet")[: cfg.generate.num_prompts]
    asked += held_out[: cfg.generate.num_heldout_prompts]
    for stage, rows in (("generate", asked), ("evaluate", held_out[-cfg.evaluate.num_prompts :])):
        assert run(short, stage) == 0
        assert 0 < figures(short, stage)["prompts_cut"] == count.prompts(rows)
        assert len(list(told(capsys.readouterr().out))) == 1


def test_nothing_is_told_where_nothing_is_lost(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_sections(project, sft={"max_steps": 2}, model={"max_prompt_tokens": 400, "max_response_tokens": 200})
    assert run(project, "sft") == 0
    assert (figures(project, "sft")["responses_cut"], figures(project, "sft")["prompts_cut"]) == (0, 0)
    assert not list(told(capsys.readouterr().out))


def test_the_table_at_the_end_and_the_report_say_it(project: Path) -> None:
    path = project / "reports/metrics/sft.json"
    lost = json.loads(path.read_text()) | {"responses_cut": 7, "responses_encoded": 9, "responses_rewritten": 1}
    line = texts_line(lost)
    assert line.startswith("7 of 9 responses lost their end")
    assert "; 1 of 9 responses are not written whole by chat template or tokenizer" in line
    stages = [StageSummary(name="sft", metrics=lost), StageSummary(name="label", metrics={"num_votes": 3})]
    stream = io.StringIO()
    print_result(RunSummary(run="r", run_key="k", started=0.0, stages=stages), stream)
    assert " ".join(stream.getvalue().split()).count("warning: ") == 1
    assert f"warning: sft: {line}" in " ".join(stream.getvalue().split())
    params = load_params(project / "params.yaml")
    assert line not in render(read_run(project, params.candidates), params, project)
    path.write_text(json.dumps(lost))
    page = render(read_run(project, params.candidates), params, project)
    assert f"<strong>Supervised fine-tuning:</strong> {line}." in page
