"""Streamed shards through score, select, train and the command: as in memory, in less of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_a_process
from sharded import images, peak_of_scoring, png, write_parquet, write_shards
from torch import nn
from torch.utils.data import DataLoader

import datapruning
from datapruning.reports.score_report import write_score_report
from datapruning.scoring import engines
from prunelab.data.samples import ImageSamples
from prunelab.data.streamed import StreamedImages
from prunelab.errors import ModelError, PrunelabError, RunError
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig

COUNT, ENDS = 150, (41, 100, 150)
IMAGES = images(COUNT, (3, 8, 8))
LABELS = [number * 7 % 3 for number in range(COUNT)]
TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=0.05)


def small(seed: int) -> nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=(3, 8, 8), seed=seed, width=4)


@pytest.fixture(params=["parquet", "tar"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", request.param, IMAGES, LABELS, ENDS, group=13)


@pytest.fixture
def samples(folder: Path) -> StreamedImages:
    return datapruning.stream(folder)


def in_memory() -> ImageSamples:
    return ImageSamples(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("model", "methods"),
    [
        (small(0).eval(), ["el2n", "grand", "loss", "margin", "entropy", "semdedup"]),
        (small, ["el2n", "forgetting", "aum", "tracin", "influence-cg"]),
    ],
)
def test_scores_are_those_of_images_in_memory(
    model: Any, methods: list[str], samples: StreamedImages
) -> None:
    arguments: dict[str, Any] = {"method": methods, "model": model, "training": TRAINING}
    arguments |= {"shard_size": 47, "options": {"damping": 10.0} if model is small else {}}
    ours = datapruning.score(samples, **arguments)
    theirs = datapruning.score(in_memory(), **arguments)
    for method in methods:
        assert torch.equal(ours[method].scores, theirs[method].scores), method
        assert torch.equal(ours[method].labels, theirs[method].labels)
        assert ours[method].dataset == "shards"


def test_kept_samples_train_to_the_same_bits(samples: StreamedImages) -> None:
    trained = []
    for data in (samples, in_memory()):
        table = datapruning.score(data, model=small(0).eval(), method="el2n")
        kept = table.select(keep=0.4, class_balanced=True)
        items = kept.of(data)
        (pictures, labels) = next(iter(DataLoader(items, batch_size=len(items))))
        assert torch.equal(pictures, data.batch(kept.ids)[0])
        assert torch.equal(labels, data.labels[kept.ids])
        augmented = TrainingConfig(epochs=2, batch_size=16, lr=0.05, augment=True)
        trained.append(datapruning.train(items, model=small, training=augmented))
    for ours, theirs in zip(*(model.state_dict().values() for model in trained), strict=True):
        assert torch.equal(ours, theirs)


def test_other_data_are_refused(samples: StreamedImages) -> None:
    table = datapruning.score(samples, method="random")
    with pytest.raises(PrunelabError, match="these data have fingerprint"):
        table.select(keep=3).of(in_memory())


def test_a_network_that_does_not_fit_is_refused(samples: StreamedImages) -> None:
    with pytest.raises(ModelError):
        datapruning.score(
            samples, model=nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), method="el2n"
        )


def test_a_run_that_was_cut_off_goes_on_but_not_with_changed_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"method": "el2n", "model": small(0).eval(), "shard_size": 40}
    whole = datapruning.score(datapruning.stream(folder), **arguments)
    observe = engines.observe_shard

    def cut(recipe: Any, number: int, *others: Any) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return observe(recipe, number, *others)

    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "observe_shard", cut)
        with pytest.raises(KeyboardInterrupt):
            datapruning.score(datapruning.stream(folder), out=out, **arguments)
    last = max(folder.iterdir())
    content, stamp = last.read_bytes(), last.stat().st_mtime_ns
    write_shards(folder, last.suffix[1:], IMAGES, LABELS[::-1], ENDS, group=13)
    with pytest.raises(RunError, match="fingerprint was"):
        datapruning.score(datapruning.stream(folder), out=out, **arguments)
    write_shards(folder, last.suffix[1:], IMAGES, LABELS, ENDS, group=13)
    last.write_bytes(content)
    os.utime(last, ns=(stamp, stamp))
    table = datapruning.score(datapruning.stream(folder), out=out, **arguments)
    assert torch.equal(table.scores, whole.scores)
    page = write_score_report([out], tmp_path / "s.html").read_text(encoding="utf-8")
    assert "data:image/png" in page
    last.unlink()
    page = write_score_report([out], tmp_path / "s.html").read_text(encoding="utf-8")
    assert "not the one that was scored" in page


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Each file is one row group; 4N pictures are 37 MB more than N, encoded or decoded."""
    count, side = 1_000, 64
    cells = [png(image, level=0) for image in images(100, (side, side, 3))]
    peaks = []
    for number in (count, 4 * count):
        path = tmp_path / f"{number}.parquet"
        # Bytes behind a picture's end are not looked at, and keep a dictionary from being made.
        many = [cells[i % len(cells)] + i.to_bytes(8, "little") for i in range(number)]
        write_parquet(path, many, [i % 3 for i in range(number)], group=number)
        peak, scored = in_a_process(peak_of_scoring, str(path), side=side)
        assert scored == number
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0], peaks
