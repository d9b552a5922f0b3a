"""The whole pipeline on a single file of judgements: grades by several people, or votes, and nothing else."""

import json
import signal
from collections.abc import Iterator
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_project
from support.project import change_sections, edited_yaml

from tasks.frame.process import run_stage
from tasks.params import load_params

THINGS = (
    "lamp", "rake", "bed", "rug", "saw", "pot", "cup", "desk", "vase", "sofa", "fan", "jug", "bowl", "hose", "nail",
    "oven", "tile", "wok", "axe", "bin", "clip", "drum", "easel", "fork", "gate",
)  # fmt: skip
REPLIES = ("The {} is in aisle 5, as I was told.", "I know no {}, sorry.", "")
"""From best to worst; of the last, people saw nothing and said so."""

Rows = Iterator[dict[str, Any]]


def asked() -> Iterator[tuple[str, list[str]]]:
    """Every prompt with its responses."""
    for place, thing in enumerate(THINGS):
        others = (THINGS[(place * step + step) % len(THINGS)] for step in (3, 7))  # no two prompts share two words
        yield f"Is it a {thing}, a {' or a '.join(others)}?", [reply.format(thing) for reply in REPLIES]


def grades() -> Rows:
    for prompt, replies in asked():
        for place, reply in enumerate(replies):
            for annotator, severity in (("ann", 0), ("bob", 1)):
                yield {"prompt": prompt, "response": reply, "score": 5 - place - severity, "annotator": annotator}


def votes() -> Rows:
    for prompt, replies in asked():
        for better, worse in combinations(replies, 2):
            shown = {"prompt": prompt, "response_a": worse, "response_b": better}
            yield from (shown | {"annotator": annotator, "choice": "b"} for annotator in ("ann", "bob"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny profile on a single file that the test names; only what such data cannot have is set."""
    folder = make_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    with edited_yaml(folder / "params.yaml") as params:
        params["data"] = {}
    change_sections(
        folder,
        label={"source": "file"},
        generate={"num_prompts": 0, "num_heldout_prompts": 0},
        validate={"keep_empty_responses": True},
        sft={"max_steps": 8},
        evaluate={"judges": ["reward_model"]},
    )
    yield folder
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(project: Path, algorithm: str) -> None:
    """Every stage, in this process."""
    change_sections(project, align={"algorithms": [algorithm]})
    params = load_params(project / "params.yaml")
    for stage in ("validate", "sft", "generate", "label", "preferences", "reward", f"align@{algorithm}", "evaluate"):
        body = import_module(f"tasks.stages.{stage.partition('@')[0]}.run").run
        assert run_stage(stage, body, params, project) == 0, stage
    assert run_stage("report", import_module("tasks.stages.report.run").run, params, project) == 0


def figures(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def write(project: Path, kind: str, rows: Rows) -> None:
    (project / f"data/{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change_sections(project, data={kind: f"data/{kind}.jsonl"})


def test_grades_alone_end_in_a_report(project: Path) -> None:
    write(project, "graded", grades())
    run(project, "dpo")
    prompts = {prompt for prompt, _ in asked()}
    assert figures(project, "validate")["rows_bad"] == 0, "empty replies that people graded are kept"
    demonstrations = pq.read_table(project / "artifacts/validate/demonstrations.parquet").to_pylist()
    assert {row["response"][:3] for row in demonstrations} == {"The"}, "the best one of each prompt"
    labels = figures(project, "label")
    assert labels["num_labelled_pairs"] == 3 * len(prompts)
    assert labels["num_votes"] == 6 * len(prompts)
    train = pq.read_table(project / "artifacts/preferences/train.parquet").to_pylist()
    assert {row["agreement"] for row in train} == {1.0}
    assert sum(row["rejected"] == "" for row in train) == 2 * len({row["prompt"] for row in train})
    assert "dpo" in figures(project, "evaluate")
    assert (project / "reports/html/report.html").stat().st_size > 10_000


def test_votes_alone_end_in_a_policy_by_ppo(project: Path) -> None:
    write(project, "votes", votes())
    run(project, "ppo")
    assert figures(project, "label")["num_labelled_pairs"] == 3 * len(list(asked()))
    assert "ppo" in figures(project, "evaluate")
