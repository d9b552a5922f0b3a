"""A format that the registry is given by a test is read by the stage `validate`, without any other edit."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.validate import DataProject

from rlhf_core.data.reading.lines import read_lines
from rlhf_core.data.reading.readers import READERS, Reader, Refused, Row, format_suffix
from rlhf_core.errors import DataError


def read_columns(path: Path, cap: int) -> Iterator[Row | Refused]:
    """`prompt=response`, one a line; a line without a `=` is refused."""
    for line in read_lines(path, cap):
        prompt, found, response = line.content.decode().partition("=")
        digest = hashlib.sha256(line.content).hexdigest()
        if found:
            yield Row(line=line.number, sha256=digest, value={"prompt": prompt, "response": response})
        else:
            yield Refused(line=line.number, sha256=digest, reason="no `=`")


@pytest.mark.parametrize("name", ["mine.pairs", "mine.pairs.gz"])
def test_a_format_of_the_registry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(rows=read_columns, docs="prompt=response", gzipped=name.endswith(".pairs.gz"))
    monkeypatch.setitem(READERS, ".pairs", reader)
    project = DataProject(tmp_path)
    project.write("demonstrations", ["Ask one?=Reply one.", "no equals sign", "Ask two?=Reply two."], name)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    metrics = project.run()
    rows = pq.read_table(tmp_path / "out/demonstrations.parquet").to_pylist()
    assert [row["response"] for row in rows] == ["Reply one.", "Reply two."]
    assert metrics["kinds"]["demonstrations"]["rows_bad"] == 1
    (refused,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert "no `=`" in refused
    assert '"line": 2' in refused


def test_what_is_not_gzipped_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, ".pairs", Reader(rows=read_columns, docs="prompt=response", gzipped=False))
    assert format_suffix(Path("a.PAIRS")) == ".pairs"
    with pytest.raises(DataError, match=r"\.csv, .*\.pairs, \.parquet, all but \.pairs, \.parquet also with \.gz"):
        format_suffix(Path("a.pairs.gz"))
