"""What the commands print: tables that fit the window, whatever stands in them."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from prunelab.pages import console as kit

CELLS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)


def printed(width: int, header: list[str], rows: list[list[str]]) -> str:
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "console", Console(file=file, width=width))
        kit.show_table(header, rows)
    return file.getvalue()


def test_columns_that_do_not_fit_follow_below_beside_the_first() -> None:
    header = ["method", "accuracy, %", "up / client / round", "time"]
    rows = [["fedavg", "87.65 ± 1.20", "314 kB", "2 min 05 s"]]
    lines = printed(34, header, rows).splitlines()
    assert max(map(len, lines)) <= 34
    assert [line.count("fedavg") for line in lines].count(1) == 2
    assert sum("87.65 ± 1.20" in line for line in lines) == 1
    assert sum("2 min 05 s" in line for line in lines) == 1
    assert printed(80, header, rows).count("fedavg") == 1


def test_a_long_first_column_leaves_room_for_the_others() -> None:
    lines = printed(60, ["file", "score"], [["a/long/path/" * 8, "0.135"]]).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("0.135" in line for line in lines) == 1
    assert "".join(line[2:32] for line in lines if line[0] == "│") == "a/long/path/" * 8 + " " * 24


def test_a_row_of_a_list_is_one_line_and_what_is_cut_says_so() -> None:
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "console", Console(file=file, width=30))
        rows = [["a-long-name", "40", "[2] fits"], ["b", "", "ends where the window ends 京"]]
        patch.setattr(kit, "say", lambda text: kit.console.print(kit.escaped(text), soft_wrap=True))
        kit.show_list(["method", "models", "what"], rows)
    assert file.getvalue().splitlines() == [
        "method       models  what",
        "a-long-name  40      [2] fits",
        "b                    ends whe…",
    ]


@given(
    rows=st.lists(st.lists(CELLS, min_size=5, max_size=5), max_size=3),
    header=st.lists(CELLS, min_size=5, max_size=5),
    width=st.integers(60, 120),
)
def test_no_line_is_wider_than_the_window_and_no_cell_is_cut(
    rows: list[list[str]], header: list[str], width: int
) -> None:
    """Brackets are text and not markup; a letter may be two columns wide."""
    text = printed(width, header, rows)
    assert max(map(cell_len, text.splitlines())) <= width
    assert all(cell in text for row in rows for cell in row)
