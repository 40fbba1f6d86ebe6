"""Whatever people predict and evaluate on, as arrays that a trained model takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.data.arrays import image_array, is_array, note
from prunelab.data.columns import CLIENT_NAMES, LABEL_NAMES, columns_of
from prunelab.data.datasets import DATASETS, ImageSet
from prunelab.data.features import feature_names, features_of
from prunelab.data.folders import PICTURE_SUFFIXES
from prunelab.data.gathered import is_grouped
from prunelab.data.given import load_sample_set, sample_set_of
from prunelab.data.labels import as_classes
from prunelab.data.objects import is_samples
from prunelab.data.pictures import decoded
from prunelab.data.reading import reading
from prunelab.data.samples import Samples, stored
from prunelab.data.sides import SampleSet
from prunelab.data.table_folders import TABLE_SUFFIXES
from prunelab.data.tables import read_table
from prunelab.errors import DataError

Array = NDArray[Any]
_Found = tuple[str, Samples, tuple[str, ...], bool]  # name, samples, class names, one side of two


@dataclass(frozen=True, eq=False)
class Accepted:
    """What a model takes.

    Attributes:
        dtype: of the inputs that it was trained on: "uint8", "float32", or "int64" of tokens.
        shape: of one of them.
        class_names: of its classes, or of its outputs; empty where nobody named them.
        num_classes: None where it tells no classes apart.
        columns, task: of the data that it was trained on, as `as_sample_set` takes them.
        feature_names: of the columns that are its inputs, in their order; empty where there were
            none.
    """

    dtype: str
    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    num_classes: int | None = None
    columns: str = ""
    task: str = ""
    feature_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Inputs:
    """Samples, labelled or not.

    Attributes:
        name: of the data, for people.
        ids: of each sample: its number, or the name of its file.
        inputs: [N, ...], as a `SampleStore` has them.
        targets: [N] or [N, ...]; None where nobody gave any.
        has_side: whether they are one side of the data, and not all there are.
    """

    name: str
    ids: Sequence[int | str]
    inputs: Array
    targets: Array | None
    has_side: bool = False

    def __len__(self) -> int:
        return len(self.inputs)


def accepted_inputs(metadata: Mapping[str, str], class_names: tuple[str, ...]) -> Accepted:
    """What the file of a model says of its inputs and classes."""
    shape = tuple(int(size) for size in metadata["input_shape"].split("x") if size)
    count = metadata["num_classes"]
    return Accepted(
        metadata["inputs"], shape, class_names, int(count) if count else None,
        metadata.get("columns", ""), metadata.get("task", ""),
        tuple(map(str, json.loads(metadata.get("feature_names", "[]")))),
    )  # fmt: skip


def read_inputs(data: Any, accepted: Accepted) -> Inputs:
    """Samples that a model takes.

    Args:
        data: a picture's file, or a folder with nothing but pictures in it; a picture, pictures,
            an array of inputs or a table without labels; or anything that
            `prunelab.data.given.as_sample_set` takes: its test side where it has one.

    Raises:
        DataError: no such data, inputs of another kind, or classes that the model does not know.
    """
    pictures = _pictures(data)
    if pictures is not None:
        ids, cells, where = pictures
        size = accepted.shape[-2:] if len(accepted.shape) == 3 else None
        read = decoded(cells, where=where, resize=size)
        found = Inputs(where, ids, _with_channels(read, accepted, where), None)
    elif (features := _features(data, accepted)) is not None:
        found = Inputs(features[0], range(len(features[1])), features[1], None)
    elif is_array(data):
        array = image_array(data)
        found = Inputs("array", range(len(array)), array, None)
    else:
        found = _of_samples(_side(data, accepted), accepted)
    _check_kind(found, accepted)
    return found


def of_sample_set(data: SampleSet, accepted: Accepted, *, side: str) -> Inputs:
    """The side "train" or "test" of a data set that was read already."""
    found = _of_samples(_chosen(data, side), accepted)
    _check_kind(found, accepted)
    return found


def _side(data: Any, accepted: Accepted) -> _Found:
    if isinstance(data, ImageSet):
        data = SampleSet.of(data)
    if is_samples(data):
        return "samples", data, (), False
    if not isinstance(data, SampleSet):
        is_folder = isinstance(data, str | Path) and str(data) not in DATASETS
        is_resized = is_folder and accepted.dtype == "uint8" and len(accepted.shape) == 3
        how = reading(
            resize=accepted.shape[1:] if is_resized else None,  # type: ignore[arg-type]
            columns=accepted.columns or None,
            task=accepted.task,
            test_share=0,
        )
        # The classes that these data lack keep the model's numbers.
        how = replace(
            how,
            class_names=accepted.class_names or None,
            feature_names=accepted.feature_names,
        )
        is_named = isinstance(data, str | Path)
        data = load_sample_set(str(data), how=how) if is_named else sample_set_of(data, how)
    return _chosen(data, "train" if data.test is None else "test")


def _chosen(data: SampleSet, side: str) -> _Found:
    samples = data.train if side == "train" else data.test
    assert samples is not None, "asked for by those who have looked"
    return data.name, samples, data.class_names, data.test is not None


def _of_samples(found: _Found, accepted: Accepted) -> Inputs:
    name, samples, class_names, has_side = found
    inputs, targets = stored(samples)
    if samples.labels is not None:
        targets = _renumbered(name, targets, class_names, accepted)
    elif class_names and accepted.class_names and class_names != accepted.class_names:
        targets = _reordered(name, targets, class_names, accepted.class_names)
    return Inputs(name, samples.ids.tolist(), inputs, targets, has_side)


def _renumbered(
    name: str, labels: Array, class_names: tuple[str, ...], accepted: Accepted
) -> Array:
    """Labels by the model's numbers of its classes, told by their names where both have some."""
    known = accepted.class_names
    if not known and accepted.num_classes and all(name.isdecimal() for name in class_names):
        known = tuple(map(str, range(accepted.num_classes)))
    if known:
        found, _ = as_classes(labels, class_names=known, own_names=class_names, where=name)
        return found
    if accepted.num_classes is not None and labels.max() >= accepted.num_classes:
        raise DataError(
            f"{name} has the label {labels.max()}; the model knows the classes 0 to "
            f"{accepted.num_classes - 1}"
        )
    return labels


def _reordered(
    name: str, targets: Array, class_names: tuple[str, ...], known: tuple[str, ...]
) -> Array:
    """Several labels a sample by the model's order of its classes; those never given are 0."""
    used = np.flatnonzero(targets.any(axis=0))
    _check_known(name, [class_names[k] for k in used], known)
    made = np.zeros((len(targets), len(known)), targets.dtype)
    made[:, [known.index(class_names[k]) for k in used]] = targets[:, used]
    return made


def _check_known(name: str, found: Sequence[str], known: tuple[str, ...]) -> None:
    unknown = [each for each in found if each not in known]
    if unknown:
        raise DataError(
            f"{name} has the class {unknown[0]!r}, which the model does not know; it knows "
            f"{', '.join(known)}"
        )


def _pictures(data: Any) -> tuple[list[int | str], list[tuple[str, Any]], str] | None:
    """Names and content of pictures without labels, and what they are called together."""
    if isinstance(data, str | Path) and str(data) not in DATASETS:
        path = Path(data)
        if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES:
            files = [path]
        elif path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
            files = [entry for entry in inside if entry.suffix.lower() in PICTURE_SUFFIXES]
            if not files or len(files) < len(inside):
                return None
        elif path.suffix.lower() in PICTURE_SUFFIXES and not path.exists():
            raise DataError(f"{path}: no such file")
        else:
            return None
        return [file.name for file in files], [(str(f), f.read_bytes()) for f in files], path.name
    given = data if isinstance(data, list) else [data]
    if not given or not all(hasattr(each, "convert") and hasattr(each, "mode") for each in given):
        return None
    return list(range(len(given))), [(f"picture {n}", p) for n, p in enumerate(given)], "pictures"


def _features(data: Any, accepted: Accepted) -> tuple[str, Array] | None:
    """Name and features of a table without a column to predict."""
    if len(accepted.shape) != 1 or isinstance(data, ImageSet | SampleSet) or is_grouped(data):
        return None
    if isinstance(data, str | Path):
        if not Path(data).is_file() or Path(data).suffix.lower() not in TABLE_SUFFIXES:
            return None
        data = read_table(Path(data))
    columns, how = columns_of(data), reading(columns=accepted.columns)
    labels = {how.column("label")} if how.column("label") else set(LABEL_NAMES)
    if columns is None or any(name in labels or name.lower() in labels for name in columns.names):
        return None
    others = [how.column("client"), *(n for n in columns.names if n.lower() in CLIENT_NAMES)]
    names = feature_names(columns, accepted.feature_names or how.features, others)
    return columns.where, features_of(columns, names)


def _with_channels(pictures: Array, accepted: Accepted, where: str) -> Array:
    """Pictures with the model's number of channels: gray ones as RGB, coloured ones as gray."""
    wanted = accepted.shape[0] if len(accepted.shape) == 3 else pictures.shape[1]
    if pictures.shape[1] == 1 and wanted == 3:
        return np.repeat(pictures, 3, axis=1)
    if pictures.shape[1] == 3 and wanted == 1:
        from PIL import Image  # noqa: PLC0415

        note(f"{where}: the model takes gray pictures; coloured ones were made so")
        gray = [np.asarray(Image.fromarray(p.transpose(1, 2, 0)).convert("L")) for p in pictures]
        return np.stack(gray)[:, None]
    return pictures


def _check_kind(found: Inputs, accepted: Accepted) -> None:
    """Refuse inputs that were prepared otherwise than those the model was trained on."""
    dtype, shape = str(found.inputs.dtype), found.inputs.shape[1:]
    if dtype != accepted.dtype:
        kinds = {"uint8": "bytes (uint8, 0 ... 255)", "float32": "floats", "int64": "tokens"}
        cure = ""
        if (dtype, accepted.dtype) == ("float32", "uint8"):
            cure = (
                ": give the pictures as they are, the model's own preprocessing is applied (what "
                "is preprocessed already goes into `.model`)"
            )
        elif (dtype, accepted.dtype) == ("uint8", "float32"):
            cure = ": scale them as the training data were"
        raise DataError(
            f"{found.name}: these are {kinds[dtype]}, and the model was trained on "
            f"{kinds[accepted.dtype]}{cure}"
        )
    if dtype != "int64" and tuple(shape) != accepted.shape:
        sizes = ["×".join(map(str, size)) for size in (shape, accepted.shape)]
        raise DataError(f"{found.name}: inputs are {sizes[0]}, and the model takes {sizes[1]}")
