"""What people are told of judges, label sources, losses and formats is what the registries hold."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from rlhf_core.config.data import SOURCE_ROWS
from rlhf_core.config.evaluation import JUDGE_ROWS, JudgeRow
from rlhf_core.config.ppo import ADVANTAGE_ROWS
from rlhf_core.config.preference import LOSS_ROWS
from rlhf_core.config.reward import REWARD_LOSS_ROWS
from rlhf_core.data.reading.readers import READERS
from rlhf_core.evaluation.judge_registry import JUDGES, PairwiseJudge
from tasks.reference import choices

ROOT = Path(__file__).parents[2]


def first_cells(text: str, heading: str) -> list[str]:
    """Names in the first column of the table whose first heading this is."""
    table = text[text.index(f"| {heading} |") :].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)`", table.split("\n", 2)[2], re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "heading", "names"),
    [
        ("trainers/preference.md", "`loss`", LOSS_ROWS),
        ("trainers/reward.md", "`reward.loss.name`", REWARD_LOSS_ROWS),
        ("trainers/ppo.md", "`advantages.method`", ADVANTAGE_ROWS),
    ],
)
def test_tables_with_formulas_have_every_loss(page: str, heading: str, names: Iterable[str]) -> None:
    assert sorted(first_cells((ROOT / "docs" / page).read_text(), heading)) == sorted(names)


def test_the_guide_names_every_format_judge_and_source() -> None:
    formats = (ROOT / "docs/quick-start.md").read_text().split("Its format goes by its name:")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\.\w+)`", formats)) - {".gz"} == set(READERS) | {".json"}
    stages = (ROOT / "docs/stages.md").read_text()
    assert all(f"`{name}`" in stages for name in (*JUDGE_ROWS, *SOURCE_ROWS))


def test_a_new_entry_is_in_the_reference_page(monkeypatch: pytest.MonkeyPatch) -> None:
    row = JudgeRow(docs="prefers short replies", title="shortness")
    monkeypatch.setitem(JUDGES, "short", PairwiseJudge(row=row, open=lambda material: lambda *rows: []))
    lines = choices()
    assert "| `short` | two responses | no | prefers short replies |" in lines
    assert f"| `gold` | a response | yes | {JUDGE_ROWS['gold'].docs} |" in lines
    assert "| `orpo` | no | – | ORPO: no reference is affordable; starts from a base model |" in lines
    assert "| `.parquet` | no | row groups are streamed |" in lines
