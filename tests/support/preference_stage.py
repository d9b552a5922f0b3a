"""The preferences stage run on pairs that a test wrote down."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlhf_core.config import Params
from rlhf_core.data.cleaning.splits import SplitRule, is_heldout
from rlhf_core.text.identity import content_id, prompt_group, prompt_id
from tasks import paths
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.preferences import run as preferences
from tasks.tables import SCHEMAS, write_table

Rows = list[dict[str, Any]]


def pair(
    prompt: str,
    a: str,
    b: str,
    label: str = "a",
    margin: float = 1.0,
    num_votes: int = 3,
    task: str = "t",
    **more: Any,
) -> dict[str, Any]:
    """A row of `pairs.parquet`; `run_preferences` gives it its side, if `more` gives none."""
    return {
        "pair_id": content_id(prompt, a, b),
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "task": task,
        "split": "",
        "response_a": a,
        "response_b": b,
        "criterion": "overall",
        "label": label,
        "num_votes": num_votes,
        "agreement": 1.0,
        "margin": margin,
        "source": "file",
        **more,
    }


def run_preferences(
    folder: Path,
    pairs: Rows,
    heldout: Sequence[str] = ("Held?",),
    share: float = 0.0,
    grades: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], Rows, Rows]:
    """Run the stage below `folder`, the current one; return metrics, funnel by step, and both tables."""
    prompts = [{"id": str(i), "prompt": prompt, "task": "t"} for i, prompt in enumerate(heldout)]
    write_table(paths.VALIDATE / "heldout_prompts.parquet", prompts, SCHEMAS["heldout_prompts"])
    asked = [*(row["prompt"] for row in pairs), *(row["prompt"] for row in grades)]
    groups = {prompt_group(prompt) for prompt in heldout}
    groups |= {group for group in map(prompt_group, asked) if is_heldout(group, share)}
    write_table(
        paths.VALIDATE / "heldout_groups.parquet",
        [{"group": group} for group in sorted(groups)],
        SCHEMAS["heldout_groups"],
    )
    named = [{"annotator": "file"} | row for row in grades]
    write_table(paths.VALIDATE / "criteria.parquet", named, SCHEMAS["criteria"])
    split = SplitRule(frozenset(groups))
    labelled = [row | {"split": row["split"] or split(row["prompt"])} for row in pairs]
    write_table(paths.LABEL / "pairs.parquet", labelled, SCHEMAS["pairs"])
    params = Params.model_validate({"preferences": options})
    definition = StageDefinition(name="preferences", deps=(), params=(), outs=())
    stage = Stage(definition, params, folder, folder / "out", Progress(folder / "progress.jsonl"))
    metrics = preferences.run(stage)
    json.dumps(metrics, allow_nan=False)
    steps = json.loads((folder / "out/funnel.json").read_text())
    return metrics, {step["step"]: step for step in steps}, read(folder, "train"), read(folder, "heldout")


def read(folder: Path, name: str) -> Rows:
    """Rows of a table that the stage wrote, whose schema is checked."""
    table = pq.read_table(folder / "out" / f"{name}.parquet")
    assert table.schema == SCHEMAS[name]
    return table.to_pylist()
