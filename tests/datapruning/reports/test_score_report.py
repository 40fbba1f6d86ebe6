"""The page of scores: what it shows, and what it does with tables that are not fit to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datapruning.errors import ScoreError, SelectionError
from datapruning.reports.score_report import class_counts, write_score_report
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples


def digits_table(method: str, scores: torch.Tensor | None = None, **changes: Any) -> ScoreTable:
    samples = ImageSamples.of(load_dataset("digits"))
    if scores is None:
        scores = torch.rand(len(samples), generator=torch.Generator().manual_seed(len(method)))
    values = {
        "ids": samples.ids,
        "scores": scores.double(),
        "method": method,
        "dataset": "digits",
        "fingerprint": samples.fingerprint,
        "seed": 0,
        "labels": samples.labels,
        "provenance": {"source": "digits", "settings": {"training": {"epochs": 3}}},
    }
    return ScoreTable(**{**values, **changes})


def page_of(tmp_path: Path, *tables: ScoreTable, **settings: Any) -> str:
    paths = []
    for number, table in enumerate(tables):
        paths.append(tmp_path / f"{number}.parquet")
        table.write(paths[-1])
    return write_score_report(paths, tmp_path / "page.html", **settings).read_text()


def test_pictures_of_each_class_balance_and_agreement(tmp_path: Path) -> None:
    first, second = digits_table("el2n"), digits_table("random")
    text = page_of(tmp_path, first, second, subset=select(first, keep=0.3))
    assert text.count("data:image/png") == 20  # ten classes, two sides
    assert "Agreement between methods" in text
    assert "431 of 1,437 samples kept by hardest" in text
    assert "training" in text
    assert "<script" not in text
    before = write_score_report([tmp_path / "0.parquet"], tmp_path / "again.html").read_bytes()
    assert (
        write_score_report([tmp_path / "0.parquet"], tmp_path / "again.html").read_bytes() == before
    )


def test_class_counts_by_hand() -> None:
    table = ScoreTable(
        torch.tensor([10, 11, 12, 13]), torch.arange(4.0).double(), "m", "d", "f", 0,
        labels=torch.tensor([0, 0, 2, 2]),
    )  # fmt: skip
    kept = select(table, keep=3)
    assert class_counts(table, kept) == ([2, 0, 2], [1, 0, 2])


@pytest.mark.parametrize("kind", ["nan", "half nan", "constant", "no labels", "no source", "gone"])
def test_tables_that_cannot_be_shown_in_full_are_shown_in_part(kind: str, tmp_path: Path) -> None:
    scores = torch.rand(1437)
    changes: dict[str, Any] = {}
    if kind == "nan":
        scores[:] = torch.nan
    elif kind == "half nan":
        scores[::2] = torch.nan
    elif kind == "constant":
        scores[:] = 1.0
    elif kind == "no labels":
        changes["labels"] = None
    elif kind == "no source":
        changes["provenance"] = {}
    else:
        changes["provenance"] = {"source": str(tmp_path / "gone")}
    text = page_of(tmp_path, digits_table("el2n", scores, **changes))
    assert "el2n on digits" in text
    assert ("No pictures" in text) == (kind in ("no labels", "no source", "gone"))


def test_other_data_are_refused(tmp_path: Path) -> None:
    first, second = digits_table("el2n"), digits_table("aum", fingerprint="f" * 16)
    with pytest.raises(ScoreError, match="different data"):
        page_of(tmp_path, first, second)
    other = select(digits_table("aum", fingerprint="f" * 16), keep=0.5)
    with pytest.raises(SelectionError, match="subset is of other data"):
        page_of(tmp_path, first, subset=other)
    with pytest.raises(ScoreError, match="no such file"):
        write_score_report([tmp_path / "none.parquet"], tmp_path / "page.html")


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    table = digits_table("<img src=x>", dataset="<b>bold</b>")
    text = page_of(tmp_path, table)
    assert "<img src=x>" not in text
    assert "<b>bold" not in text
