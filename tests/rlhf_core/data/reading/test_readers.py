"""Every byte sequence is either rows, refused rows with their line, or one DataError: never another exception."""

import csv
import gzip
import hashlib
import io
import json
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.reading.readers import Refused, Row, read_rows
from rlhf_core.errors import DataError


def read(tmp_path, content, name="rows.jsonl", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, **options))


def outcome(rows):
    return [(row.line, row.value if isinstance(row, Row) else row.reason) for row in rows]


def test_lines_are_counted_hashed_and_blank_ones_are_no_rows(tmp_path):
    rows = read(tmp_path, '{"a": 1}\n\n  \n{"a": 2}')
    assert outcome(rows) == [(1, {"a": 1}), (4, {"a": 2})]
    assert rows[0].sha256 == hashlib.sha256(b'{"a": 1}').hexdigest()


def test_gzip_is_known_by_its_content_and_keeps_lines_and_hashes(tmp_path):
    text = b'{"a": 1}\n\n{"a": 2}\n'
    plain = read(tmp_path, text)
    assert read(tmp_path, gzip.compress(text), "rows.jsonl.gz") == plain
    assert read(tmp_path, text, "misnamed.jsonl.gz") == plain


def test_windows_files_read_like_others(tmp_path):
    plain = read(tmp_path, '{"a": "x"}\n{"a": "y"}\n')
    assert read(tmp_path, b"\xef\xbb\xbf" + b'{"a": "x"}\r\n{"a": "y"}\r\n') == plain


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunks_may_cut_anywhere(tmp_path, monkeypatch, chunk):
    text = '{"a":\r\r 1}\r\n{"a": "\u00e9"}\r\n\r\n{"a":\r2}'
    whole = read(tmp_path, text)
    monkeypatch.setattr("rlhf_core.data.reading.lines._CHUNK", chunk)
    if chunk < 3:
        monkeypatch.setattr("rlhf_core.data.reading.lines._refuse_wide_encodings", lambda path, start: None)
    assert read(tmp_path, text) == whole
    assert whole[2].sha256 == hashlib.sha256(b'{"a":\r2}').hexdigest()


def test_only_line_feeds_end_lines(tmp_path):
    rows = read(tmp_path, '{"a": "x\u2028y\x85z"}\n{"a": 2}\n')
    assert outcome(rows) == [(1, {"a": "x\u2028y\x85z"}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (rb'{"\udc00": 1}', "surrogate pair, U+DC00"),
        (rb'"\u0000"', "control character U+0000"),
        (b"[NaN]", "nan is not a finite number"),
        (b'{"a": "\x00"}', "not JSON"),
        (b'{"a": "x', "not JSON"),
        (b'{"a": 1} {"a": 2}', "more text after the value"),
        (b"nonsense", "not JSON"),
        (b'{"a": "\xff"}', "byte 0xff at offset 7 of the line is not valid UTF-8"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64 levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "limit"),
        (b'{"a": "' + b"x" * 200_000 + b'"}', "more than the 150000 allowed"),
    ],
)
def test_a_bad_line_is_refused_and_reading_goes_on(tmp_path, line, reason):
    rows = read(tmp_path, b'{"a": 0}\n' + line + b'\n{"a": 3}\n', max_line_bytes=150_000)
    assert [row.line for row in rows] == [1, 2, 3]
    assert isinstance(rows[1], Refused)
    assert reason in rows[1].reason
    assert rows[1].sha256 == hashlib.sha256(line).hexdigest()
    assert rows[2].value == {"a": 3}


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        (b'{"b": 1, "b": 2}', "key 'b' stands twice"),
        (b"NaN", "nan is not a finite number"),
        (b"[-Infinity]", "-inf is not a finite number"),
        (b"1e999", "inf is not a finite number"),
        (rb'"\ud800"', "half of a surrogate pair, U+D800"),
        (rb'"\u0000"', "control character U+0000"),
        (rb'["\u001b[31m"]', "control character U+001B"),
        (b"[" * 66 + b"]" * 66, "nested deeper than 64 levels"),
    ],
)
def test_what_cannot_be_read_in_one_column_is_said_of_that_column(tmp_path, cell, fault):
    (row,) = read(tmp_path, b'{"a": 0, "x": ' + cell + b"}\n")
    assert isinstance(row, Row)
    assert list(row.faults) == ["x"]
    assert fault in row.faults["x"]
    assert row.value["a"] == 0


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "content",
    [
        BOM + b'{"a": 1}\n{"a": 2}\n',
        BOM + BOM + b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n' + BOM + b'{"a": 2}\n',  # two files put one behind the other
        b"\r\n" + BOM + b'\r\n{"a": 1}\r\n' + BOM + b' {"a": 2}',
        gzip.compress(BOM + b'{"a": 1}\n', mtime=0) + gzip.compress(BOM + b'{"a": 2}\n', mtime=0),
    ],
)
def test_byte_order_marks_spoil_no_row(tmp_path, content):
    assert [row.value for row in read(tmp_path, content)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Ndjson", "a.csv.JSONL", "a.JSONL.GZ", "a.jsonl.Gz"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, name):
    content = gzip.compress(b'{"a": 1}') if name.lower().endswith("gz") else b'{"a": 1}'
    assert outcome(read(tmp_path, content, name)) == [(1, {"a": 1})]


@pytest.mark.parametrize("header", [b"a,b,a ", b"a,b,\xc2\xa0a", b"a,b,a\xe2\x80\x8b", BOM + BOM + b"a,b,a"])
def test_a_csv_column_that_stands_twice_but_for_what_cannot_be_seen_is_refused(tmp_path, header):
    with pytest.raises(DataError, match=":1: column 'a' stands twice"):
        read(tmp_path, header + b"\n1,2,3\n", "rows.csv")


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: column 'a' stands twice. Fix"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    assert outcome(read(tmp_path, rb'{"a": "\ud83d\ude00"}')) == [(1, {"a": "😀"})]


def test_a_cut_last_line_says_so_and_a_whole_one_without_end_is_read(tmp_path):
    rows = read(tmp_path, '{"a": 1}\n{"a": "tex')
    assert rows[1].reason.startswith("last line is cut off")
    assert outcome(read(tmp_path, '{"a": 1}\n{"a": 2}')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_line_without_end_is_never_held_in_memory(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(range(11, 251)) * 4000)
    tracemalloc.start()
    rows = list(read_rows(path, 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than the 1048576 allowed" in rows[-1].reason
    assert peak < 8 << 20


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_wide_encodings_are_refused_with_the_cure(tmp_path, encoding, name):
    with pytest.raises(DataError, match=r":1: the file is UTF-16 or UTF-32. Fix: iconv"):
        read(tmp_path, '{"a": "x"}\n'.encode(encoding), name)


def test_a_torn_gzip_stream_names_the_line_it_reached(tmp_path):
    packed = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(50_000)))
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: broken gzip stream"):
        read(tmp_path, packed[: len(packed) // 2], "rows.jsonl.gz")


def test_a_gzip_bomb_is_refused(tmp_path):
    with pytest.raises(DataError, match="expands more than 250-fold"):
        read(tmp_path, gzip.compress(bytes([32]) * (96 << 20)), "rows.jsonl.gz")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    rows = read_rows(path)
    next(rows)
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        list(rows)


@pytest.mark.parametrize(("name", "message"), [("rows.txt", "unknown format '.txt'"), ("rows", "without suffix")])
def test_unknown_formats_name_the_known_ones(tmp_path, name, message):
    with pytest.raises(DataError, match=rf"{message}.*\.csv, \.json, \.jsonl, \.ndjson, \.parquet"):
        read(tmp_path, "{}", name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_missing_file_and_a_folder_are_data_errors(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="not a file"):
        list(read_rows(tmp_path / name))


def test_a_json_array_gives_each_row_its_line_and_refuses_single_rows(tmp_path):
    text = '[\n {"a": 1},\n NaN,\n\n {"a": 1, "a": 2}, {"a":\n  4}\n]\n'
    rows = read(tmp_path, text, "rows.json")
    assert [row.line for row in rows] == [2, 3, 5, 5]
    assert [type(row) for row in rows] == [Row, Refused, Refused, Row]
    assert rows[3].value == {"a": 4}
    assert read(tmp_path, "[]", "rows.json") == []


def test_a_json_array_names_bytes_that_are_not_utf8(tmp_path):
    rows = read(tmp_path, b'["\xe9", {"a": "\xe9"}, {"a": 2}]', "rows.json")
    assert rows[0].reason == "byte 0xe9 is not valid UTF-8"
    assert [row.faults for row in rows[1:]] == [{"a": "byte 0xe9 is not valid UTF-8"}, {}]
    assert [row.item for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', ":1: not an array of objects"),
        ("", ":1: not an array of objects"),
        ('[{"a": 1},\n{"a": }]', ":2: item 2: not JSON"),
        ('[{"a": 1}\n{"a": 2}]', ":1: item 1: the array is cut off, or a comma is missing"),
        ('[{"a": 1},', "not JSON"),
        ('[{"a": 1}] 2', "more text after the array"),
    ],
)
def test_a_broken_json_array_is_refused_as_a_whole(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, "rows.json")


def test_csv_cells_may_hold_lines_and_rows_keep_their_first_line(tmp_path):
    text = 'prompt,score\r\n"one\ntwo, ""three""",1\r\nx,y,z\r\n\r\nlast,2'
    rows = read(tmp_path, text, "rows.csv")
    assert outcome(rows) == [
        (2, {"prompt": 'one\ntwo, "three"', "score": "1"}),
        (4, "3 cells where the header has 2"),
        (6, {"prompt": "last", "score": "2"}),
    ]
    assert all(row.textual for row in rows if isinstance(row, Row))


def test_csv_refuses_rows_with_bad_bytes_and_headers_with_a_name_twice(tmp_path):
    rows = read(tmp_path, b"a,b\n\xff,1\nx,2\n", "rows.csv")
    assert [row.faults for row in rows] == [{"a": "byte 0xff is not valid UTF-8"}, {}]
    with pytest.raises(DataError, match=":1: column 'a' stands twice"):
        read(tmp_path, "a,a\n1,2\n", "rows.csv")


def test_a_quoted_cell_that_never_ends_is_refused(tmp_path):
    assert "not CSV" in read(tmp_path, 'a,b\n"x,1\n', "rows.csv")[0].reason
    with pytest.raises(DataError, match=r"rows.csv:2: a row is longer than 100 bytes. Fix: close its quoted cell"):
        read(tmp_path, 'a,b\n"x,1\n' + "y,2\n" * 50, "rows.csv", max_line_bytes=100)


def test_parquet_rows_are_numbered_and_checked(tmp_path):
    table = pa.table({"a": ["x", "y\x00", "z"], "score": [1.0, 2.0, float("nan")]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = list(read_rows(tmp_path / "rows.parquet"))
    assert [row.line for row in rows] == [1, 2, 3]
    assert [row.faults for row in rows] == [
        {},
        {"a": "control character U+0000"},
        {"score": "nan is not a finite number"},
    ]
    assert len({row.sha256 for row in rows}) == 3


def test_broken_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows.parquet:1: not readable as Parquet"):
        read(tmp_path, b"PAR1 and nothing else", "rows.parquet")


any_line = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value, ensure_ascii=True).encode()),
)


@given(lines=st.lists(any_line.map(lambda line: line.replace(b"\n", b"")), max_size=8), ended=st.booleans())
def test_any_lines_give_one_row_or_refusal_each_with_its_number(tmp_path_factory, lines, ended):
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(content)
    try:
        rows = list(read_rows(path))
    except DataError:
        assert content[:2] == b"\x1f\x8b" or content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:2]
        return
    text = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [number for number, line in enumerate(text, start=1) if re.sub(rb"\A(\xef\xbb\xbf|[ \t\r])+", b"", line)]
    assert [row.line for row in rows] == expected
    for row in rows:
        raw = text[row.line - 1]
        assert row.sha256 == hashlib.sha256(raw.removesuffix(b"\r")).hexdigest()


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.json", "a.csv", "a.parquet", "a.jsonl.gz"]))
def test_any_bytes_in_any_format_raise_nothing_but_data_errors(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    try:
        rows, refusal = list(read_rows(path, 64)), None
    except DataError as error:
        rows, refusal = [], str(error)
    assert all(row.line >= 1 and len(row.sha256) == 64 for row in rows)
    if refusal is not None:
        assert refusal.startswith(str(path))
        assert "\n" not in refusal
        assert "Fix: " in refusal


@given(
    rows=st.lists(
        st.fixed_dictionaries({"a": st.text("xyz,\"'\n é", max_size=6), "b": st.text("0123", min_size=1, max_size=3)}),
        min_size=1,
        max_size=6,
    )
)
def test_csv_written_by_python_comes_back(tmp_path_factory, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["a", "b"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("fuzz") / "rows.csv"
    path.write_bytes(text.getvalue().encode())
    assert [row.value for row in read_rows(path)] == rows
