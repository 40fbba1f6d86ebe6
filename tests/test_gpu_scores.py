"""The benchmark of scores on a device, run small on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from benchmarks import gpu_scores
from benchmarks.gpu_scores import PATCHES, Row, Sides, Size, drawn, rows
from benchmarks.gpu_simulation import write_images
from prunelab.networks import build_model
from sparsemodel.gradients import sample_gradients

SMALL = Size("resnet8", 12, 12, 12, (6, 12), (12,), 1)


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows(SMALL, drawn(12), "cpu"))


@pytest.fixture
def sides() -> Sides:
    model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    return Sides(drawn(12), model, "cpu")


def test_every_score_stands_beside_forward_pass_and_vmap(found: list[Row]) -> None:
    pairs = [(row.case.partition(", resnet8 on cpu")[0], row.peer_name[:4]) for row in found]
    assert pairs == [
        ("forward pass b6, torch's layout", "forw"),
        ("EL2N", "forw"),
        ("prototypes", "forw"),
        ("influence", "forw"),
        ("influence", "vmap"),
        ("GraNd", "forw"),
        ("GraNd", "vmap"),
        (PATCHES, "forw"),
        (PATCHES, "vmap"),
    ]
    assert all(row.ours > 0 and row.peer > 0 and row.unit == "us" for row in found)


def test_what_agrees_is_told(found: list[Row]) -> None:
    """Scores beside the side that computes the same: rounding, and on a CPU one k-means."""
    told = {row.case.partition(",")[0]: row.off for row in found if row.off is not None}
    assert set(told) == {"EL2N", "prototypes", "influence", "GraNd", PATCHES}
    assert all(off < 1e-5 for off in told.values())
    assert told["prototypes"] == 0


def test_rates_are_samples_a_second() -> None:
    row = Row("gpu_scores", "EL2N", 1.0, 20.0, 10.0, "forward pass b256", "us", 1e-7)
    fields = json.loads(row.as_json())
    assert (fields["samples_per_second"], fields["peer_samples_per_second"]) == (5e4, 1e5)
    assert (fields["ratio"], fields["off"]) == (0.5, 1e-7)
    line = row.as_line()
    assert "50,000 samples/s" in line
    assert "0.50 x  forward pass b256 (100,000), off by 1e-07" in line


@pytest.mark.parametrize("what", ["EL2N", "GraNd", "influence", "prototypes"])
def test_a_side_that_computes_something_else_is_refused(
    what: str, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Sides.ours

    def wrong(self: Sides, asked: str) -> torch.Tensor:
        return ours(self, asked) * (1.2 if asked == what else 1)

    monkeypatch.setattr(Sides, "ours", wrong)
    with pytest.raises(RuntimeError, match=f"{what}: off by"):
        gpu_scores.agreement(sides, SMALL)


def test_patches_are_taken_and_given_back(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    before, grouped = sample_gradients.FEW_WEIGHTS, []
    plain = sample_gradients.Convolution._side_by_side
    monkeypatch.setattr(
        sample_gradients.Convolution, "_side_by_side",
        lambda self, x, dy: (grouped.append(len(x)), plain(self, x, dy))[1],
    )  # fmt: skip
    sides.ours(PATCHES)
    assert not grouped
    assert before == sample_gradients.FEW_WEIGHTS
    sides.ours("GraNd")
    assert grouped


def test_images_of_a_folder(tmp_path: Path) -> None:
    """As many as asked for, in the files' order; the last is not even a picture."""
    write_images(tmp_path, num_train=6, num_test=1)
    path = tmp_path / "train.parquet"
    table = pyarrow.parquet.read_table(path).to_pylist()
    table[-1]["img"]["bytes"] = b"no picture"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    samples = gpu_scores.read(str(tmp_path), 5)
    assert samples.images.shape == (5, 3, 32, 32)
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
