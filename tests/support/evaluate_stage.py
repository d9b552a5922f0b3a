"""Runs the stage `evaluate` in a folder, without the process around it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.config import AlignConfig, ComputeConfig, EvaluateConfig, ModelConfig, Params
from tasks import paths
from tasks.frame.definition import stage_definition
from tasks.frame.stage import Stage
from tasks.stages.evaluate import run as evaluate
from tasks.tables import SCHEMAS, write_table

REPOSITORY = Path(__file__).parents[2]
PARAMS = Params(
    compute=ComputeConfig(device="cpu", threads=1),
    model=ModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32, vocab_size=300, max_response_tokens=8),
    align=AlignConfig(algorithms=("ppo", "dpo")),
    evaluate=EvaluateConfig(num_prompts=12, num_samples=4),
)


@dataclass
class Log:
    """Keeps what a stage reports."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, step: int, total: int, metrics: Any, tokens: int) -> None:
        self.rows.append((step, total, tokens))

    def event(self, kind: str, **words: str) -> None:
        """Warnings are read from the figures here."""


def write_prompts(root: Path, prompts: list[str]) -> None:
    rows = [{"id": str(row), "prompt": prompt, "task": "any"} for row, prompt in enumerate(prompts)]
    write_table(root / paths.VALIDATE / "heldout_prompts.parquet", rows, SCHEMAS["heldout_prompts"])


def run(root: Path, params: Params = PARAMS, out: str = "out") -> tuple[dict[str, Any], Path, Log]:
    folder, log = root / out, Log()
    folder.mkdir()
    stage = Stage(stage_definition(REPOSITORY, "evaluate"), params, root, folder, log)
    return evaluate.run(stage), folder, log
