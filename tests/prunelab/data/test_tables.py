"""Tables of other programs, as their own readers read them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.data.tables import read_lines, read_table
from prunelab.errors import DataError


def columns(path: Path) -> dict[str, list[Any]]:
    table = read_table(path)
    return {name: list(table[name]) for name in table.column_names}


def table_of(folder: Path, text: str | bytes, name: str = "t.csv") -> dict[str, list[Any]]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return columns(path)


def test_tabs_do_without_quotes(tmp_path: Path) -> None:
    """A cell that begins with a quote swallows no rows."""
    lines = ["user\ttitle", *(f'{n}\t"{n} inch single' for n in range(20))]
    found = table_of(tmp_path, "\n".join(lines), "r.inter")
    assert found["user"] == [str(n) for n in range(20)]
    assert found["title"] == [f'"{n} inch single' for n in range(20)]


def test_tabs_with_a_quoted_first_line_have_quotes(tmp_path: Path) -> None:
    found = table_of(tmp_path, '"a"\t"b"\n"1"\t"x\ty"\n', "r.tsv")
    assert found == {"a": ["1"], "b": ["x\ty"]}


def test_commas_and_semicolons_have_quotes(tmp_path: Path) -> None:
    for mark in ",;":
        text = f'a{mark}b\n1{mark}"x{mark} ""y""\nz"\n2{mark}5" disc\n'
        assert table_of(tmp_path, text) == {"a": ["1", "2"], "b": [f'x{mark} "y"\nz', '5" disc']}


@pytest.mark.parametrize(
    "text",
    ['a,b\n1,"7 inch single\n2,x\n3,y\n', 'a,b\n1,"7 inch" single\n', 'a,b\n1,"x\n2,"y\n'],
)
def test_a_quote_that_swallows_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"t\.csv, line \d: .*; a quote within a quoted field is"):
        table_of(tmp_path, text)


@pytest.mark.parametrize("size", [131_072, 131_073, 1_000_000])
def test_cells_of_any_length(tmp_path: Path, size: int) -> None:
    before = csv.field_size_limit()
    assert table_of(tmp_path, f"a,b\n1,{'x' * size}\n")["a"] == ["1"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_ends_of_lines(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    for delimiter in "\t,":
        text = mark + end.join([f"userId{delimiter}b", f"1{delimiter}ä\u2028\x85\x0b", ""])
        assert table_of(tmp_path, text.encode(encoding)) == {
            "userId": ["1"],
            "b": ["ä\u2028\x85\x0b"],
        }


def test_other_encodings_name_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv, line 3: not utf-8 .*; save it as UTF-8"):
        table_of(tmp_path, "a,b\n1,x\n2,Amélie\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.csv, line \d: not utf-16"):
        table_of(tmp_path, b"\xff\xfea\0,\0b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\na,b\n\n1,2\n\n\n", {"a": ["1"], "b": ["2"]}),
        ("a,b\n", {"a": [], "b": []}),
        ("a,b\n,\n", {"a": [""], "b": [""]}),
        ("a\nx\n", {"a": ["x"]}),
        ("a,b\n1,\0\n", {"a": ["1"], "b": ["\0"]}),
    ],
)
def test_lines_that_hold_little(tmp_path: Path, text: str, expected: dict[str, list[str]]) -> None:
    assert table_of(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("1,2\n3,4\n", "needs a first line with the names of its columns"),
        ("a,b\n1,2\n1\n", "line 3: 1 values for 2 columns"),
        ("a,b\n1,2,3\n", "line 2: 3 values for 2 columns"),
    ],
)
def test_texts_that_are_no_tables(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        table_of(tmp_path, text)


def test_a_column_twice_matters_to_who_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,b\n1,2,3\n")
    assert read_table(path)["a"] == ["1"]
    with pytest.raises(DataError, match=r"t\.csv has two columns called 'b'; rename one"):
        read_table(path)["b"]


def test_a_column_that_nobody_asks_for_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    when = pa.array([2**62], pa.timestamp("ns"))
    pq.write_table(pa.table({"a": [1], "when": when, "list": [[1]]}), path)
    table = read_table(path)
    assert (list(table.column_names), list(table["a"])) == (["a", "when", "list"], [1])
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_table(path)
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv")


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NAMES = ["a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=6), mark=st.sampled_from(",;"))
def test_what_csv_writers_write_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], mark: str
) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=mark).writerows([NAMES, *rows])
    found = table_of(tmp_path_factory.mktemp("csv"), buffer.getvalue())
    assert [tuple(row) for row in zip(*found.values(), strict=True)] == rows


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), max_size=6)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(PLAIN, PLAIN, PLAIN), max_size=6))
def test_what_is_joined_by_tabs_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    text = "".join("\t".join(row) + "\n" for row in [NAMES, *rows])
    found = table_of(tmp_path_factory.mktemp("tsv"), text, "t.tsv")
    assert [tuple(row) for row in zip(*found.values(), strict=True)] == rows


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), ending=st.sampled_from([".csv", ".tsv", ".parquet"]))
def test_any_bytes_are_a_table_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, ending: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"t{ending}"
    path.write_bytes(b"a,b\tc" + data if data[:1] < b"\x80" else data)
    try:
        table = read_table(path)
    except DataError as error:
        assert path.name in str(error)  # noqa: PT017
        return
    names = set(table.column_names)
    assert (
        len({len(table[name]) for name in names if list(table.column_names).count(name) == 1}) < 2
    )


def test_lines_end_at_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffa\u2028b\r\n\r\nc\x0c\n".encode())
    assert read_lines(path) == ["a\u2028b", "", "c\x0c"]
