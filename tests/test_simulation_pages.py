"""The Markdown pages of the simulations."""

from __future__ import annotations

from simulations.page import page, table


def test_page_by_hand() -> None:
    text = page(
        "Title",
        command="python -m x",
        at="abc",
        used=", one used",
        notes=["a note"],
        body=["The table:", "", table(["method", "error"], [["a | b", "1.5"]])],
        settings={"lr": 0.1, "training": {"steps": None}},
    )
    lines = text.splitlines()
    assert lines[:4] == ["# Title", "", "Written by `python -m x`.", ""]
    assert lines[4].startswith("- commit abc, ")
    assert " cores, one used, Python " in lines[4]
    assert lines[5:] == [
        "- a note", "", "The table:", "",
        "| method | error |", "| --- | ---: |", "| a \\| b | 1.5 |",
        "", "Settings:", "", "- `lr = 0.1`", "- `training.steps = None`",
    ]  # fmt: skip
    assert text.endswith("\n")


def test_columns_of_words_start_at_the_left() -> None:
    assert table(["n", "law", "x"], [], words=(1,)).splitlines()[1] == "| ---: | --- | ---: |"
    assert table(["n", "x"], [], words=()).splitlines()[1] == "| ---: | ---: |"
