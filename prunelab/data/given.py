"""Both sides of any data: by name, folder, file or "module:function", or as objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunelab.data.datasets import (
    DATASETS,
    ImageSet,
    Source,
    cut,
    held_out,
    num_classes_of,
    sources,
    subset,
)
from prunelab.data.gathered import is_grouped
from prunelab.data.named import data_of, names_pictures
from prunelab.data.objects import Side, divided_split, has_partitions, side_of
from prunelab.data.reading import TEST_NAMES, TEST_SHARE, Reading, reading
from prunelab.data.samples import ImageSamples, Samples, taken
from prunelab.data.sides import SampleSet
from prunelab.data.table_folders import note_left
from prunelab.errors import DataError
from prunelab.runs.stamps import stamp_of
from prunelab.training.task import task_of


def as_sample_set(
    data: Any,
    *,
    seed: int = 0,
    test_share: float = TEST_SHARE,
    resize: int | str | tuple[int, int] | None = None,
    columns: Mapping[str, str | Sequence[str]] | str | None = None,
    task: str | None = None,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int = 128,
) -> SampleSet:
    """Both sides of any data that people have.

    Args:
        data: a name, folder, file or "module:function" (see `load_sample_set`); a function that
            gives any of these; a mapping of sides with "train" and "test" (or another of
            `reading.TEST_NAMES`); a federated data set or a partitioner of flwr-datasets, whose
            partitions are the clients; or anything that `prunelab.data.objects.as_samples` takes.
        seed: decides what is set aside.
        test_share: of every class (of samples without classes: of all), set aside for the test
            where there is no test side; 0: there is none then.
        resize, columns, task, tokenizer, max_length: as of `as_samples`.

    Raises:
        DataError: as `as_samples`, or sides that are not alike.

    >>> both = as_sample_set((np.zeros((10, 3, 8, 8), np.uint8), ["cat", "dog"] * 5))
    >>> both.class_names, len(both.train), len(both.test)
    (('cat', 'dog'), 8, 2)
    """
    how = reading(
        resize=resize, columns=columns, task=task, test_share=test_share, tokenizer=tokenizer,
        max_length=max_length,
    )  # fmt: skip
    if isinstance(data, str | Path):
        return load_sample_set(str(data), how=how, seed=seed)
    return sample_set_of(data, how, seed=seed)


def load_sample_set(
    name: str,
    *,
    how: Reading | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
) -> SampleSet:
    """A data set by name; kept for the process, and read anew where its files have changed.

    Args:
        name: one of DATASETS; a folder of class folders (ROOT/CLASS/picture.png, or the same in
            ROOT/train and ROOT/test or val); a folder of parquet files with pictures, or of the
            tables train and test; a table (.csv, .tsv, .parquet) of numbers and a target, or of
            pictures; arrays (a folder of inputs.npy and targets.npy, or a .npz file of both); or
            "module:function", which gives anything that `as_sample_set` takes.
        how: how it is taken where that is not plain.
        num_train, num_test: keep a stratified subset of so many.
        seed: decides the subsets and what is set aside.

    Raises:
        DataError: unknown name, no access to the data, or data that are none of these.
    """
    stamp = "" if name in DATASETS else stamp_of(name)
    how = how or Reading()
    return _loaded(name, stamp, how=how, num_train=num_train, num_test=num_test, seed=seed)


def forget() -> None:
    """Let go of what was loaded by name."""
    _loaded.cache_clear()


@lru_cache(maxsize=2)
def _loaded(
    name: str,
    stamp: str,
    *,
    how: Reading,
    num_train: int | None,
    num_test: int | None,
    seed: int,
) -> SampleSet:
    path = Path(name)
    if names_pictures(name, how):
        train, test = sources(name, how, seed=seed)
        num_classes = num_classes_of(train, test, where=name)
        train, test = cut(
            train, test, num_train=num_train, num_test=num_test, seed=seed, where=name
        )
        return SampleSet(
            path.name,
            _decoded(train, how),
            None if test is None else _decoded(test, how),
            num_classes=num_classes,
            class_names=train.class_names,
            train_groups=None if train.groups is None else torch.from_numpy(train.groups),
        )
    data = data_of(name)
    if isinstance(data, str | Path):
        return load_sample_set(
            str(data), how=how, num_train=num_train, num_test=num_test, seed=seed
        )
    found = sample_set_of(data, how, seed=seed, name=path.name)
    return _cut(found, num_train, num_test, seed=seed)


def described(data: SampleSet) -> str:
    """What was found, in one line for a user.

    >>> described(as_sample_set("digits"))
    'digits: 1,437 training and 360 test samples, inputs 1x8x8, 10 classes'
    """
    test = "no" if data.test is None else f"{len(data.test):,}"
    parts = [f"{data.name}: {len(data.train):,} training and {test} test samples"]
    batch = data.train.batch(torch.zeros(1, dtype=torch.int64))
    if isinstance(batch, tuple):
        parts.append(f"inputs {'x'.join(map(str, batch[0].shape[1:]))}")
    names = list(data.class_names)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if data.num_classes is not None:
        parts.append(f"{data.num_classes} classes" + (f" ({listed})" if names else ""))
    elif names:
        parts.append(f"several of {len(names)} classes each ({listed})")
    if data.train_groups is not None:
        parts.append(f"{len(data.train_groups.unique())} natural clients")
    return ", ".join(parts)


def sample_set_of(data: Any, how: Reading, *, seed: int = 0, name: str = "given") -> SampleSet:
    """Both sides of an object, called by a name; see `as_sample_set`."""
    if inspect.isfunction(data):
        data = data()
    if isinstance(data, SampleSet):
        return data
    if isinstance(data, ImageSet):
        return SampleSet.of(data)
    test: Any = None
    if has_partitions(data):
        train = side_of(data, how)
        test = _central_test(data)
    elif is_grouped(data):
        if "train" not in data:
            raise DataError(f"expected the sides train and test, got {', '.join(map(str, data))}")
        train = side_of(data["train"], how)
        named = next((side for side in TEST_NAMES if side in data), None)
        test = None if named is None else data[named]
        left = [str(side) for side in data if side not in ("train", named)]
        note_left(name, named or "set aside", left)
    else:
        train = side_of(data, how)
    names = tuple(getattr(train.samples, "class_names", ()))
    features = tuple(getattr(train.samples, "feature_names", ()))
    if test is not None:
        # What the training side's labels are, though those of few test samples look otherwise.
        task = task_of(train.samples)
        lists = train.were_lists if task == "multi-label" else None
        as_trained = replace(how, class_names=names, task=task, lists=lists, feature_names=features)
        tested = side_of(test, as_trained).samples
        return _both(train, tested, names, features, name)
    labels = train.samples.labels
    held = held_out(
        None if labels is None else labels.numpy(),
        count=len(train.samples), share=how.test_share, seed=seed, where=name,
    )  # fmt: skip
    if not held.any():
        return _both(train, None, names, features, name)
    kept, aside = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~held, held))
    groups = None if train.groups is None else train.groups[kept]
    sides = [taken(train.samples, rows) for rows in (kept, aside)]
    return _both(Side(sides[0], groups), sides[1], names, features, name)


def _both(
    train: Side, test: Samples | None, names: tuple[str, ...], features: tuple[str, ...], name: str
) -> SampleSet:
    counted = len(names) if train.samples.labels is not None else 0
    return SampleSet(
        name, train.samples, test,
        num_classes=counted, class_names=names, train_groups=train.groups,
        feature_names=features,
    )  # fmt: skip


def _decoded(source: Source, how: Reading) -> ImageSamples:
    images = source.images(np.arange(len(source.labels)), how.resize)
    return ImageSamples(images, source.labels, class_names=source.class_names)


def _cut(data: SampleSet, num_train: int | None, num_test: int | None, *, seed: int) -> SampleSet:
    """Subsets of samples that are in memory."""
    if not num_train and not num_test:
        return data

    def rows(samples: Samples, count: int | None, what: str) -> torch.Tensor:
        labels = samples.labels
        groups = np.zeros(len(samples), np.int64) if labels is None else labels.numpy()
        found = subset(groups, count, seed=seed, what=f"{data.name}, {what} side")
        return torch.from_numpy(found)

    chosen = rows(data.train, num_train, "training")
    groups = data.train_groups
    return SampleSet(
        data.name,
        taken(data.train, chosen),
        None if data.test is None else taken(data.test, rows(data.test, num_test, "test")),
        num_classes=data.num_classes,
        class_names=data.class_names,
        train_groups=None if groups is None else groups[chosen],
        feature_names=data.feature_names,
    )


def _central_test(data: Any) -> Any:
    """The test split of a federated data set, if it is not what the clients share."""
    if not hasattr(data, "load_split"):
        return None
    for name in TEST_NAMES:
        if name == divided_split(data):
            continue
        try:
            return data.load_split(name)
        except ValueError:  # there is none of that name
            continue
    return None
