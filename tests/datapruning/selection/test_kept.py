"""Kept samples are what the data were: cut, selected or streamed, in order and with their types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import datapruning
from datapruning.errors import SelectionError, SubsetWarning
from datapruning.selection.table import Subset as Kept
from prunelab.data.given import load_sample_set
from prunelab.data.reading import reading

N = 30
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 1, 8, 8), dtype=np.uint8)
LABELS = np.arange(N) % 2
IDS = [0, 3, 4, 11, 29]


def kept_of(data: Any) -> Kept:
    """As a selection leaves it that was made on these data."""
    samples = datapruning.ImageSamples(IMAGES, LABELS) if data is None else data
    return Kept(
        ids=torch.tensor(IDS), num_samples=N, dataset="d", fingerprint=samples.fingerprint,
        policy="p", seed=0, labels=torch.from_numpy(LABELS)[IDS],
    )  # fmt: skip


@pytest.fixture
def kept() -> Kept:
    return kept_of(None)


def hugging_face() -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "owl"]),
            "weight": datasets.Value("float16"),
        }
    )
    columns = {
        "image": [Image.fromarray(image[0]) for image in IMAGES],
        "label": LABELS.tolist(),
        "weight": [k / 4 for k in range(N)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_data_set_of_hugging_face_is_selected(kept: Kept) -> None:
    """Columns, types and class names stay, and it trains, with a class that nothing is kept of."""
    data = hugging_face()
    chosen = kept.of(data)
    assert type(chosen) is datasets.Dataset
    assert chosen.features == data.features
    assert chosen["weight"][:] == [k / 4 for k in IDS]
    assert chosen.map(lambda row: {"twice": 2 * row["weight"]})["twice"][1] == 1.5
    short = datapruning.TrainingConfig(epochs=1, batch_size=4)
    with pytest.warns(SubsetWarning, match="no sample of class 2"):
        student = datapruning.train(chosen, model="resnet8", training=short)
    assert student.fc.out_features == 3


def test_the_training_side_of_a_dict_is_replaced(kept: Kept) -> None:
    data = hugging_face()
    both = datasets.DatasetDict({"train": data, "test": data.select(range(6))})
    chosen = kept.of(both)
    assert type(chosen) is datasets.DatasetDict
    assert (len(chosen["train"]), len(chosen["test"]), len(both["train"])) == (5, 6, N)
    assert chosen["train"]["weight"][:] == [k / 4 for k in IDS]
    plain = kept.of({"train": (IMAGES, LABELS), "test": (IMAGES, LABELS)})
    assert isinstance(plain["train"], datapruning.KeptSamples)
    assert plain["test"][0] is IMAGES


def test_a_torch_data_set_gives_a_torch_subset(kept: Kept) -> None:
    data = TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
    chosen = kept.of(data)
    assert isinstance(chosen, Subset)
    assert chosen.dataset is data
    assert chosen.indices == IDS


def test_indices_are_for_anything_with_rows(kept: Kept) -> None:
    assert kept.indices.dtype == np.int64
    assert np.array_equal(IMAGES[kept.indices], IMAGES[IDS])
    data = TensorDataset(torch.from_numpy(IMAGES), torch.arange(N))
    loader = DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(kept.indices))
    (batch,) = loader
    assert sorted(batch[1].tolist()) == IDS
    own = datapruning.ImageSamples(IMAGES, LABELS, ids=np.arange(N) + 100)
    other = Kept(torch.tensor([100, 129]), N, "d", own.fingerprint, "p", 0)
    with pytest.raises(SelectionError, match=r"the id 129 is no row of 30 samples.* use rows"):
        _ = other.indices
    assert other.rows(own).tolist() == [0, 29]


def test_arrays_and_frames_are_cut(kept: Kept) -> None:
    for rows in (IMAGES, torch.from_numpy(IMAGES)):
        cut = kept.of(rows)
        assert type(cut) is type(rows)
        assert np.array_equal(np.asarray(cut), IMAGES[IDS])
    with pytest.raises(SelectionError, match="chosen from 30 samples of d, these data have 29"):
        kept.of(IMAGES[1:])
    frame = pandas.DataFrame({"height": np.arange(N) / 2, "kind": ["a", "b"] * (N // 2)})
    frame.columns = ["height", "label"]
    chosen = kept_of(datapruning_samples(frame)).of(frame)
    assert list(chosen.index) == IDS
    assert list(chosen.dtypes) == list(frame.dtypes)
    with pytest.raises(SelectionError, match="these data have fingerprint"):
        kept.of(frame)


def datapruning_samples(data: Any) -> Any:
    from prunelab.data.objects import as_samples  # noqa: PLC0415

    return as_samples(data)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


def test_streams_are_thinned_by_place(kept: Kept) -> None:
    chosen = kept.of(Stream())
    assert isinstance(chosen, IterableDataset)
    assert list(chosen) == list(chosen) == IDS
    assert [int(k) for k in DataLoader(chosen, batch_size=None)] == IDS
    with pytest.raises(SelectionError, match="use one worker at most"):
        list(DataLoader(chosen, batch_size=None, num_workers=2))
    streamed = kept.of(hugging_face().to_iterable_dataset())
    assert isinstance(streamed, datasets.IterableDataset)
    assert [row["weight"] for row in streamed] == [k / 4 for k in IDS]


def test_a_stream_in_shards_keeps_the_same_samples_however_it_is_read(kept: Kept) -> None:
    """By a worker, in another order, by two nodes: places are those of the whole stream."""
    stream = hugging_face().to_iterable_dataset(num_shards=4)
    chosen = kept.of(stream)
    expected = [k / 4 for k in IDS]
    assert chosen.features == stream.features
    assert [row["weight"] for row in chosen] == expected
    assert all(
        np.array_equal(np.asarray(row["image"]), IMAGES[k, 0])
        for k, row in zip(IDS, chosen, strict=True)
    )
    for seed in (2, 3, 42):
        shuffled = chosen.shuffle(seed=seed, buffer_size=3)
        assert sorted(row["weight"] for row in shuffled) == expected
    nodes = [split_dataset_by_node(chosen, rank, 2) for rank in (0, 1)]
    assert sorted(row["weight"] for node in nodes for row in node) == expected
    weights = chosen.select_columns("weight")
    loader = DataLoader(weights, batch_size=None, num_workers=1)
    assert [float(row["weight"]) for row in loader] == expected
    with pytest.raises(SelectionError, match="use one worker at most"):
        list(DataLoader(weights, batch_size=None, num_workers=2))


def test_labels_that_are_texts_are_selected(kept: Kept) -> None:
    """As they were scored: numbered by all of the samples."""
    data = hugging_face().cast_column("label", datasets.Value("string"))
    data = data.map(lambda row: {"label": ["cat", "dog"][int(row["label"])]})
    table = datapruning.score(data, method="random")
    subset = table.select(keep=5, policy="random", seed=0)
    chosen = subset.of(data)
    assert chosen.features == data.features
    assert chosen["weight"][:] == [k / 4 for k in subset.indices]
    with pytest.raises(SelectionError, match="these data have fingerprint"):
        kept_of(None).of(data.select(range(N - 1, -1, -1)))


def test_a_file_is_scored_whole_and_ids_are_its_rows(tmp_path: Any) -> None:
    """Also where a part of it is set aside: then its ids are no rows of what is left."""
    values = np.random.default_rng(0).normal(size=(50, 2))
    frame = pandas.DataFrame(values, columns=["a", "b"]).assign(label=values[:, 0] > 0)
    frame["label"] = frame["label"].astype(int)
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = datapruning.score(tmp_path / "t.csv", method="random")
    subset = table.select(keep=7, policy="random", seed=0)
    assert len(table) == 50
    assert subset.of(frame).equals(frame.iloc[subset.indices])
    assert isinstance(subset.of(str(tmp_path / "t.csv")), datapruning.KeptSamples)
    how = reading(columns="label=label", test_share=0.4)
    part = datapruning.score(tmp_path / "t.csv", method="random", reading=how)
    expected = load_sample_set(str(tmp_path / "t.csv"), how=how).train
    assert part.ids.tolist() == expected.ids.tolist()
    rows = torch.from_numpy(values.astype(np.float32))[part.ids]
    assert torch.equal(expected.batch(torch.arange(30))[0], rows)
    kept = part.select(keep=30, policy="random", seed=0)
    with pytest.raises(SelectionError, match="is no row of 30 samples"):
        _ = kept.indices
