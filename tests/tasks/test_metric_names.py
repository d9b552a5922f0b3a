"""One name, one meaning: docs/metrics.md against every figure that a finished run wrote."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
SHARED, SUMMARY = "Names that several stages write", "reports/summary.json"
COUNTS = re.compile(r"(kinds|tasks|tables|removed|reasons|warnings|criteria|undefined)\.")  # keys that the data give


def sections() -> dict[str, str]:
    """Title -> text of each part of the page."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def keys_of(text: str) -> list[str]:
    """Names in the first column of the tables of a section."""
    cells = re.findall(r"^\| ((?:`[^`]+`[^|`]*)+)\|", text, flags=re.MULTILINE)
    return [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]


def kind(stage: str) -> str:
    return stage.partition("-")[0]


def leaves(figures: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


@pytest.fixture(scope="session")
def written(finished_project: Path) -> dict[str, set[str]]:
    """Stage -> dotted keys of its metrics file."""
    files = sorted((finished_project / "reports/metrics").glob("*.json"))
    return {path.stem: set(leaves(json.loads(path.read_text()))) for path in files}


def test_every_figure_of_a_run_is_on_the_page(written: dict[str, set[str]]) -> None:
    page = sections()
    for stage, names in written.items():
        (own,) = (text for title, text in page.items() if f"{stage}.json" in title)
        said = set(re.findall(r"`\.?([^`]+)`", own + page[SHARED]))
        patterns = [
            re.sub(r"<[^>]+>", "[^.]+", re.escape(word).replace(r"\<", "<").replace(r"\>", ">")) for word in said
        ]
        for name in names:
            if COUNTS.search(name):
                continue
            leaf = re.sub(r"(_low|_high|_before)$", "", name.rpartition(".")[2])
            known = leaf in said or any(re.fullmatch(pattern, name) for pattern in patterns)
            known = known or any(word.rpartition(".")[2] == leaf for word in said)
            assert known, f"{stage}.json: {name} is not on docs/metrics.md"


def test_a_name_that_two_stages_write_is_defined_once_for_both(written: dict[str, set[str]]) -> None:
    writers = defaultdict(set)
    for stage, names in written.items():
        for name in names:
            if not COUNTS.search(name):
                writers[name.rpartition(".")[2]].add(kind(stage))
    shared = {name for name, stages in writers.items() if len(stages) > 1}
    assert {"steps", "train_loss", "finished_share"} <= shared
    assert shared <= set(keys_of(sections()[SHARED]))


def test_no_name_has_a_row_in_two_sections_of_the_page() -> None:
    rows = defaultdict(list)
    for title, text in sections().items():
        if title != SUMMARY:
            for key in set(keys_of(text)):
                rows[key].append(title)
    assert rows["train_kl_to_sft"] == ["align-ppo.json and align-dpo.json"]
    assert {key: titles for key, titles in rows.items() if len(titles) > 1 and not key.startswith("_")} == {
        "criteria.<name>": ["label.json", "preferences.json"],
    }


def test_each_column_of_a_curve_has_one_row_that_names_its_stages(finished_project: Path) -> None:
    curves = sections()["Curves"]
    found = 0
    for path in sorted((finished_project / "reports/plots").glob("*.csv")):
        with path.open() as file:
            columns = next(csv.reader(file))[1:]
        for column in columns:
            rows = [row for row in curves.splitlines() if row.startswith("|") and f"`{column}`" in row.split("|")[1]]
            assert len(rows) == 1, f"{column}: {len(rows)} rows on docs/metrics.md"
            stages = rows[0].split("|")[2]
            assert "all" in stages or path.stem.removeprefix("align-") in stages, f"{column}: {path.stem} is not named"
            found += 1
    assert found > 20
