"""What people are told of judges, label sources, losses and formats is what the registries hold."""

import ast
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


def compared_texts(path: Path) -> set[str]:
    """Texts that the code of a file compares with, or that it matches."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    sides = [side for node in nodes if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)]
    sides += [node.value for node in nodes if isinstance(node, ast.MatchValue)]
    sides += [item for side in sides if isinstance(side, ast.Tuple | ast.List | ast.Set) for item in side.elts]
    return {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}


def test_no_code_asks_for_an_entry_by_its_name() -> None:
    """What is particular to an entry stands in it; the exceptions are the same words for something else."""
    names = {*JUDGE_ROWS, *SOURCE_ROWS, *LOSS_ROWS, *REWARD_LOSS_ROWS, *ADVANTAGE_ROWS}
    files = [path for package in ("rlhf_core", "tasks", "flows") for path in (ROOT / package).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): compared_texts(path) & names for path in files}
    assert {path: said for path, said in found.items() if said} == {
        "rlhf_core/config/data.py": {"reward_model"},  # generate.best_of.scorer
        "tasks/stages/generate/candidates.py": {"reward_model"},
        "tasks/tracking/store.py": {"file"},  # of an address
    }
