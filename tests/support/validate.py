"""Data files by record kind in a folder of their own, and the validate stage run on them."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlhf_core.config import Params
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.validate import run as validate
from tasks.tables import SCHEMAS

DEMONSTRATIONS = [{"prompt": f"Ask {i}?", "response": f"Reply {i}."} for i in range(6)]
HELDOUT = [{"prompt": f"Held-out {i}?"} for i in range(3)]


def dialogue(*contents: str) -> str:
    """A prompt in which human and assistant take turns, the human first and last."""
    speakers = ("\n\nHuman:", "\n\nAssistant:")
    return "".join(f"{speakers[place % 2]} {content}" for place, content in enumerate(contents)) + "\n\nAssistant:"


class DataProject:
    """Files by record kind, and the stage run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data: dict[str, str] = {}
        self.write("demonstrations", DEMONSTRATIONS)
        self.write("heldout_prompts", HELDOUT)

    def write(self, kind: str, rows: list[Any], name: str | None = None) -> None:
        path = self.root / (name or f"{kind}.jsonl")
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        self.data[kind] = path.name

    def run(
        self,
        out: str = "out",
        max_bad_share: float = 1.0,
        heldout_share: float | None = 0.0,
        split_by: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        params = Params.model_validate(
            {
                "data": {**self.data, "heldout_share": heldout_share, "split_by": split_by},
                "validate": {"max_bad_share": max_bad_share, **settings},
            }
        )
        (self.root / out).mkdir(parents=True)
        definition = StageDefinition(name="validate", deps=(), params=(), outs=())
        stage = Stage(definition, params, self.root, self.root / out, Progress(self.root / "progress.jsonl"))
        metrics = validate.run(stage)
        json.dumps(metrics, allow_nan=False)
        return metrics

    def table(self, name: str, out: str = "out") -> list[dict[str, Any]]:
        table = pq.read_table(self.root / out / f"{name}.parquet")
        assert table.schema == SCHEMAS[name]
        return table.to_pylist()

    def quarantine(self, out: str = "out") -> list[dict[str, Any]]:
        return self.entries("quarantine", out)

    def entries(self, name: str, out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / out / f"{name}.jsonl").read_text().splitlines()]
