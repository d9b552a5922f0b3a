"""`rlhf data fetch`, by `datasets` as it comes against a server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import COMMIT, Hub, serving

from rlhf_core.data.reading.readers import read_rows
from rlhf_core.state.atomic import file_digest
from tasks.fetching.dataset import fit
from tasks.lineage.model_folders import data_notes

PAIRS = [
    {"prompt": "Where is it?", "chosen": "In aisle C.", "rejected": "No.", "source": "shop"},
    {"prompt": "And the price?", "chosen": "30 dollars.", "rejected": "Who asks?", "source": "shop"},
    {"prompt": "When do you close?", "chosen": None, "rejected": "Now.", "source": "shop"},
]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Pairs\n",
        "data/train-00000-of-00001.jsonl": lines(PAIRS),
        "data/test-00000-of-00001.jsonl": lines(PAIRS[:1]),
    }
    with serving(Hub(files, "datasets")) as served:
        served.licence = "mit"
        yield served


def rlhf(folder: Path, hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment = kept | {
        "HF_HOME": str(folder.parent / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HUB_ETAG_TIMEOUT": "3",
    }  # fmt: skip
    command = [sys.executable, "-m", "flows.cli.app", "data", "fetch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_a_split_becomes_a_file_with_its_origin_beside_it(tmp_path: Path, hub: Hub, name: str) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir()
    asked = ("hub:org/tiny@main", f"data/{name}", "--split", "train", "--kind", "comparisons")
    done = rlhf(tmp_path, hub, *asked, "--json")
    assert done.returncode == 0, done.stderr
    assert f"{COMMIT[:12]}, licence mit" in done.stderr
    assert "1 of 3 rows cannot be read as comparisons: chosen: " in done.stderr
    assert [row.value for row in read_rows(file)] == PAIRS
    note = json.loads((tmp_path / f"data/{name}.provenance.json").read_text())
    assert note == json.loads(done.stdout)
    assert note == {
        "source": "hub:org/tiny@main", "commit": COMMIT, "licence": "mit", "split": "train", "config": None,
        "kind": "comparisons", "rows": 3, "usable": 2, "sha256": file_digest(file),
    }  # fmt: skip
    assert sorted(path.name for path in file.parent.iterdir()) == [name, f"{name}.provenance.json"]
    params = f"data: {{comparisons: data/{name}, prompts: data/other.jsonl}}\n"
    assert data_notes(tmp_path, params) == {f"data/{name}": note | {"changed": False}}
    file.write_bytes(file.read_bytes() + b"\n")
    assert data_notes(tmp_path, params)[f"data/{name}"]["changed"] is True

    again = rlhf(tmp_path, hub, *asked)
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (("--split", "validation", "--kind", "comparisons"), 2, "hub:org/tiny@main: "),
        (("--split", "test", "--kind", "votes"), 4, "none of 1 rows is of kind votes"),
        (("--split", "test", "--kind", "pairs"), 2, "kind"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    tmp_path: Path, hub: Hub, options: tuple[str, ...], code: int, line: str
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    refused = rlhf(folder, hub, "hub:org/tiny@main", "rows.jsonl.gz", *options)
    assert refused.returncode == code, refused.stderr
    assert line in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert list(folder.iterdir()) == []


def test_a_compressed_file_holds_the_same_rows(tmp_path: Path, hub: Hub) -> None:
    done = rlhf(tmp_path, hub, f"hub:org/tiny@{COMMIT}", "rows.jsonl.gz", "--split", "test", "--kind", "comparisons")
    assert done.returncode == 0, done.stderr
    assert [row.value for row in read_rows(tmp_path / "rows.jsonl.gz")] == PAIRS[:1]


def test_a_field_that_is_not_needed_counts_where_it_is_wrong(tmp_path: Path) -> None:
    """`validate` sets such rows aside, so they are not called usable here."""
    more = [PAIRS[0] | {"strength": 2}, PAIRS[1] | {"strength": "very"}]
    (tmp_path / "rows.jsonl").write_bytes(lines([PAIRS[0], *more]))
    found = fit(tmp_path / "rows.jsonl", "comparisons")
    assert (found.rows, found.usable) == (3, 2)
    assert list(found.problems.values()) == [1]
    assert next(iter(found.problems)).startswith("strength: ")
