"""One row a stage, held against what else says what the stages are: dvc.yaml, the schema, the modules, the demo."""

import importlib.util
import json
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from rlhf_core.config import Params
from rlhf_core.config.lora import AdaptedStage
from tasks import paths
from tasks.catalogue import (
    CATALOGUE,
    MODEL_NAMES,
    POLICIES,
    STAGES,
    models_name,
    policy_stage,
    stage_row,
    stage_title,
)
from tasks.frame.definition import stage_reads
from tasks.stages.report.headline import find_figure

ROOT = Path(__file__).parents[2]
GRAPH = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
SOMETIMES = {"guard_best_step", "value", "gain_over_best_member", "shares.ppo", "shares.dpo", "shares.chain"}


def test_rows_stand_in_the_order_of_the_graph() -> None:
    assert tuple(GRAPH) == STAGES
    reads = stage_reads(ROOT, ["align@ppo" if name == "align" else name for name in STAGES if name != "combine"])
    order = list(reads)
    assert all(order.index(before) < order.index(stage) for stage, found in reads.items() for before in found)


def test_every_row_has_its_module_and_its_items() -> None:
    for row in CATALOGUE:
        assert importlib.util.find_spec(f"tasks.stages.{row.name}.run") is not None
        assert bool(row.items) == ("matrix" in GRAPH[row.name])


def choices(section: str, field: str) -> set[str]:
    """What a parameter that is a list of names may hold."""
    (names,) = get_args(Params.model_fields[section].annotation.model_fields[field].annotation)[:1]
    return set(get_args(names))


def test_what_may_be_chosen_by_name_are_the_stages_and_items_that_there_are() -> None:
    assert choices("align", "algorithms") == choices("combine", "members") == set(stage_row("align").items)
    assert choices("combine", "methods") == set(stage_row("combine").items)
    assert set(get_args(AdaptedStage)) == {row.name for row in CATALOGUE if row.trains}


def test_what_a_stage_registers_has_a_description_and_a_folder_in_the_graph() -> None:
    described = YAML(typ="safe").load((ROOT / "mlflow/registry.yaml").read_text())["models"]
    assert tuple(described) == MODEL_NAMES
    assert models_name("align@ppo") == models_name("combine@weights") == "rlhf-policy"
    assert (models_name("generate"), models_name("first")) == (None, None)
    assert {row.name for row in CATALOGUE if row.role} == {row.name for row in CATALOGUE if row.registers}


@pytest.mark.parametrize("row", [row for row in CATALOGUE if row.shown], ids=lambda row: row.name)
def test_what_is_shown_is_what_the_demo_measured(row) -> None:
    keys = {key for _, key in row.shown} | set(row.run_figures)
    names = [f"{row.name}@{item}" for item in row.items] or [row.name]
    files = [path for name in names if (path := ROOT / paths.metrics_file(name)).exists()]
    assert files or row.name == "combine", "the demo has no combined policy"
    for path in files:
        metrics = json.loads(path.read_text())
        assert {key for key in keys - SOMETIMES if find_figure(metrics, key) is None} == set()


def test_names_for_people() -> None:
    assert [stage_title(name) for name in ("sft", "align@ppo", "combine@weights", "align@own", "first")] == [
        "Supervised fine-tuning", "PPO", "Averaged weights", "own", "first",
    ]  # fmt: skip
    assert {policy_stage(name) for name in POLICIES} == {
        "align@ppo", "align@dpo", "align@chain", "combine@weights", "combine@probabilities",
    }  # fmt: skip
