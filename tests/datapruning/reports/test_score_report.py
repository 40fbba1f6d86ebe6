"""The page of scores: what it shows, and what it does with tables that are not fit to show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from PIL import Image

from datapruning.errors import ScoreError, SelectionError
from datapruning.reports.charts import histogram_chart
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
    assert text.count("data:image/png") == 200  # two tables, ten classes, two sides, five of each
    assert "Agreement between methods" in text
    assert "431 of 1,437 samples kept by hardest" in text
    assert "training" in text
    assert "<script" not in text
    before = write_score_report([tmp_path / "0.parquet"], tmp_path / "again.html").read_bytes()
    assert (
        write_score_report([tmp_path / "0.parquet"], tmp_path / "again.html").read_bytes() == before
    )


def test_every_method_of_a_page_has_its_own_pictures_histogram_and_balance(tmp_path: Path) -> None:
    """Scores that rise with the id, and fall: the extremes change places."""
    rising = torch.arange(1437.0)
    text = page_of(tmp_path, digits_table("el2n", rising), digits_table("aum", -rising))
    for method in ("el2n", "aum"):
        for title in ("Most and least kept", "Class balance before and after"):
            assert f"{title} by {method}" in text
        assert f"Scores by {method}" in text
        assert f"kept, the hardest 50 % by {method}." in text
    first, second = text.split("Most and least kept by ")[1:]
    zeros = load_dataset("digits").train_labels.eq(0).nonzero().flatten().tolist()
    low, high = zeros[:5], zeros[::-1][:5]
    for part, (left, right), sign in ((first, (low, high), ""), (second, (high, low), "-")):
        captions = re.findall(r"<figcaption>(\d+)</figcaption>", part)
        assert list(map(int, captions[:10])) == [*left, *right]
        assert f'alt="sample {high[0]}, class 0, score {sign}{high[0]:.3g}"' in part


def test_class_names_stand_beside_the_pictures(tmp_path: Path) -> None:
    """A folder as Hugging Face's libraries write one, with the names of its classes."""
    import datasets  # noqa: PLC0415

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "<dog>"])}
    )
    pictures = [Image.new("L", (4, 4), 10 * shade) for shade in range(8)]
    for side in ("train", "test"):
        rows = {"image": pictures, "label": [0, 1] * 4}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{side}.parquet")
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("cat", "<dog>")
    samples = ImageSamples.of(data)
    table = ScoreTable(
        samples.ids, torch.arange(8.0).double(), "el2n", "pets", samples.fingerprint, 0,
        labels=samples.labels, provenance={"source": str(tmp_path)},
    )  # fmt: skip
    text = page_of(tmp_path, table)
    assert "<h3>class 0 (cat)</h3>" in text
    assert "<h3>class 1 (&lt;dog&gt;)</h3>" in text
    assert 'alt="sample 7, class 1 (&lt;dog&gt;), score 7"' in text
    assert load_dataset("digits").class_names == ()


def test_what_chance_decided_stands_on_the_page(tmp_path: Path) -> None:
    """63 ones and 1,374 zeros: of the hardest half, 656 are any of the zeros."""
    scores = torch.cat([torch.ones(63), torch.zeros(1374)])
    text = page_of(tmp_path, digits_table("forgetting", scores))
    assert "656 of the 719 were drawn by chance" in text
    other = digits_table("el2n")
    assert re.search(r"<td>656</td></tr>\s*<tr>.*<td>0</td></tr>", page_of(
        tmp_path, digits_table("forgetting", scores), other
    ))  # fmt: skip
    kept = select(digits_table("forgetting", scores), keep=100)
    text = page_of(tmp_path, digits_table("forgetting", scores), subset=kept)
    assert '<dd class="value">37</dd><dd>drawn among equal scores</dd>' in text


def test_a_logarithmic_histogram_has_no_bars_over_bars() -> None:
    """Counts are an outline; the bars below it are the shares that are kept, and no others."""
    scores = [0.0] * 90 + [1.0] * 10
    both = histogram_chart(scores, [1.0] * 10, name="x", label="Scores: x")
    assert "samples (log)" in both
    # One bar of the forty has a height: all of the ones are kept.
    bars = re.findall(r'<path d="M ([^"]*)"[^>]*style="fill: var\(--accent\)', both)
    heights = [{y for _, y in re.findall(r"([\d.]+) ([\d.]+)", bar)} for bar in bars]
    assert len(heights) == 40
    assert sum(len(values) > 1 for values in heights) == 1
    plain = histogram_chart([0.0, 0.5, 1.0] * 3, None, name="x", label="Scores: x")
    assert "log" not in plain
    assert "var(--accent)" not in plain


def test_settings_that_were_worked_out_are_shown_as_they_were(tmp_path: Path) -> None:
    values = {"density": None, "runs": None, "training": {"epochs": 3, "steps": None}}
    provenance = {"source": "digits", "settings": {**values, "options": {"window": 5}}}
    table = digits_table("ddd", provenance=provenance, model="resnet8")
    text = page_of(tmp_path, table)
    for row in (("density", "1 (dense)"), ("runs", "each method's own"), ("steps", "by epochs")):
        assert f"<td>{escape(row[0])}</td><td>{escape(row[1])}</td>" in text
    assert "<td>ddd</td><td>resnet8</td><td>10</td><td>window = 5</td>" in text


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


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 1.0 + 2.0**-52],
        [1e17, 1e17],
        [1e308, -1e308],
        [5e-324, 0.0],
        [-torch.inf, -torch.inf],
    ],
    ids=["all but equal", "large", "as far apart as can be", "as near as can be", "infinite"],
)
def test_scores_at_the_ends_of_what_numbers_can_be(scores: list[float], tmp_path: Path) -> None:
    values = torch.tensor([*scores * 718, scores[0]], dtype=torch.float64)
    text = page_of(tmp_path, digits_table("mine", values))
    assert "Scores by mine" in text
    assert ("have no scale" in text) == (scores[0] == 1e308)


def test_a_method_without_a_score_does_not_take_the_page_from_the_others(tmp_path: Path) -> None:
    none = digits_table("tracin", torch.full((1437,), torch.nan))
    text = page_of(tmp_path, digits_table("el2n"), none)
    assert "<td>el2n, tracin</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td>" in text
    assert "Most and least kept by el2n" in text


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
