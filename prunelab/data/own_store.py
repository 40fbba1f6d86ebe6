"""A node's own pictures or table as a sample store, its classes numbered as a run numbers them.

    python -m prunelab.data.own_store PATH FOLDER --classes cat,dog [--resize 32]

makes one beforehand; nodes of a run make theirs when they join, by the same command. numpy and
Pillow are enough for class folders, tables of text and arrays; parquet needs pyarrow, and data sets
of torch's, torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunelab.data.arrays import Array, count_classes, image_array
from prunelab.data.datasets import num_classes_of, sources
from prunelab.data.gathered import gathered
from prunelab.data.named import data_of, names_pictures
from prunelab.data.reading import Reading, reading
from prunelab.data.store import IMAGE_TASK, SampleStore, write_store
from prunelab.errors import DataError, PrunelabError
from sparsemodel.errors import NotInstalledError
from sparsemodel.extras import extras_named

REFUSED = 3  # exit status where the last line says what a user can mend


@dataclass(frozen=True)
class RunSamples:
    """What a run's samples are, which those of a node have to be as well.

    Attributes:
        task: what they are for, a name in prunelab.training.task.TASKS; "": whatever they are.
        num_classes: of the run; None: it has no classes, or as many as the node's.
        class_names: of the classes 0, 1, ...; None: the node's own, sorted; empty: numbers alone.
        input_shape: of one input; empty: whatever it is.
        feature_names: of the columns of a table, in the run's order; empty: the node's own.
    """

    task: str = ""
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] = ()
    feature_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunSamples:
        """Of `to_dict`."""
        names, count = values.get("class_names"), values.get("num_classes")
        return cls(
            str(values.get("task", "")),
            None if count is None else int(count),
            None if names is None else tuple(map(str, names)),
            tuple(map(int, values.get("input_shape", ()))),
            tuple(map(str, values.get("feature_names", ()))),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        names = None if self.class_names is None else list(self.class_names)
        return {
            "task": self.task,
            "num_classes": self.num_classes,
            "class_names": names,
            "input_shape": list(self.input_shape),
            "feature_names": list(self.feature_names),
        }


def write_own_store(
    path: str,
    folder: Path,
    *,
    how: Reading | None = None,
    expected: RunSamples | None = None,
    made_for: str = "",
) -> SampleStore:
    """Write a store of all that a node has; of data with two sides, of the training side.

    A class that the node lacks has no samples here, and keeps its number.

    Args:
        path: what `load_sample_set` takes: a folder of class folders or of parquet files, a table,
            arrays (inputs.npy and targets.npy, or a .npz), or "module:function".
        folder: of the store; must not be there.
        how: how the data are taken.
        expected: what the run's samples are.
        made_for: as of `write_store`.

    Raises:
        NotInstalledError: they need Pillow, or torch, which is not there.
        DataError: as `load_sample_set` and `write_store`, a class that the run does not know, or
            samples of another task or shape; says what the run has.
    """
    run = expected or RunSamples()
    names = run.class_names
    if names == () and run.num_classes is not None:  # folders are called by their number then
        names = tuple(map(str, range(run.num_classes)))
    how = how or Reading()
    how = replace(
        how, test_share=0.0, class_names=names, task=run.task or how.task,
        feature_names=run.feature_names,
    )  # fmt: skip
    with extras_named(path):
        own = _own(path, how)
    if run.task and own.task != run.task:
        raise DataError(f"{path}: samples are for {own.task}, those of the run for {run.task}")
    shape = tuple(own.inputs.shape[1:])
    if run.input_shape and own.inputs.dtype.kind != "i" and shape != run.input_shape:
        cure = "; bring pictures to its size by data.resize" if len(shape) == 3 else ""
        raise DataError(
            f"{path}: inputs are {list(shape)}, the run's {list(run.input_shape)}{cure}"
        )
    num_classes = own.num_classes
    if num_classes is not None and names:
        num_classes = len(names)
    if run.num_classes is not None and own.num_classes is not None:
        largest = int(own.targets.max())
        if largest >= run.num_classes:
            raise DataError(f"{path}: has the class {largest}; the run has {run.num_classes}")
        num_classes = run.num_classes
    classes = own.class_names if run.class_names is None else run.class_names
    return write_store(
        folder, own.inputs, own.targets,
        num_classes=num_classes, name=own.name, task=own.task, class_names=classes,
        feature_names=own.feature_names, made_for=made_for,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Own:
    """All of a node's samples, as a store has them; of data with two sides, the training side."""

    name: str
    task: str
    inputs: Array
    targets: Array
    num_classes: int | None
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()


def _own(path: str, how: Reading) -> _Own:
    """Read with numpy (and Pillow for pictures), but for what needs torch by its nature."""
    name = Path(path).name
    if names_pictures(path, how):
        train, test = sources(path, how)
        images = image_array(train.images(np.arange(len(train.labels)), how.resize))
        count = num_classes_of(train, test, where=path)
        return _Own(name, IMAGE_TASK, images, train.labels, count, train.class_names)
    data = data_of(path)
    if isinstance(data, str | Path):
        return _own(str(data), how)
    found = gathered(data, how)
    if found is None:
        return _of_sample_set(data, how, name)
    targets, names = found.targets, found.targets.class_names
    num_classes = None
    if targets.are_classes:
        num_classes = len(names) or count_classes(targets.values, where=name)
    return _Own(
        name, targets.task, image_array(found.inputs), targets.values, num_classes, names,
        found.feature_names,
    )  # fmt: skip


def _of_sample_set(data: Any, how: Reading, name: str) -> _Own:
    """Data sets of torch's, samples, partitions."""
    from prunelab.data.given import sample_set_of  # noqa: PLC0415 - needs torch
    from prunelab.data.objects import called_as  # noqa: PLC0415
    from prunelab.data.samples import stored  # noqa: PLC0415
    from prunelab.training.task import task_of  # noqa: PLC0415

    found = sample_set_of(data, how, name=name)
    samples = called_as(found.train, found.class_names, how.class_names, where=found.name)
    return _Own(
        found.name, task_of(samples), *stored(samples), found.num_classes, found.class_names,
        found.feature_names,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a refusal is one line."""
    parser = argparse.ArgumentParser("python -m prunelab.data.own_store", description=__doc__)
    parser.add_argument("path", help="class folders, parquet, a table, .npz, or module:function")
    parser.add_argument("folder", type=Path, help="of the store")
    parser.add_argument("--classes", help="the run's classes in its order, commas between them")
    parser.add_argument("--resize", default="", help="N or HxW pixels")
    parser.add_argument("--columns", default="", help="such as image=picture,label=kind")
    parser.add_argument("--task", default="", help="where labels could be meant in several ways")
    parser.add_argument("--expected", type=json.loads, help="what a run tells its nodes, as JSON")
    parser.add_argument("--made-for", default="", help="a mark that the store bears")
    given = parser.parse_args(arguments)
    names = None if given.classes is None else tuple(filter(None, given.classes.split(",")))
    run = RunSamples(class_names=names)
    if given.expected is not None:
        run = RunSamples.of(given.expected)
    try:
        how = reading(resize=given.resize, columns=given.columns, task=given.task)
        store = write_own_store(
            given.path, given.folder, how=how, expected=run, made_for=given.made_for
        )
    except (PrunelabError, NotInstalledError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    print(f"{store.folder}: {len(store):,} samples")


if __name__ == "__main__":
    main()
