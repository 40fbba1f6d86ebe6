"""Whatever people predict and evaluate on, as arrays that a trained model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.data.checked import checked_images, note
from prunelab.data.datasets import DATASETS, ImageSet
from prunelab.data.folders import PICTURE_SUFFIXES
from prunelab.data.given import as_sample_set
from prunelab.data.objects import is_array, is_samples
from prunelab.data.pictures import decoded
from prunelab.data.samples import Samples, stored
from prunelab.data.sides import SampleSet
from prunelab.errors import DataError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Accepted:
    """What a model takes.

    Attributes:
        dtype: of the inputs that it was trained on: "uint8", "float32", or "int64" of tokens.
        shape: of one of them.
        class_names: of its classes, or of its outputs; empty where nobody named them.
        num_classes: None where it tells no classes apart.
    """

    dtype: str
    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    num_classes: int | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Samples, labelled or not.

    Attributes:
        name: of the data, for people.
        ids: of each sample: its number, or the name of its file.
        inputs: [N, ...], as a `SampleStore` has them.
        targets: [N] or [N, ...]; None where nobody gave any.
    """

    name: str
    ids: Sequence[int | str]
    inputs: Array
    targets: Array | None

    def __len__(self) -> int:
        return len(self.inputs)


def read_inputs(data: Any, accepted: Accepted, *, side: str = "") -> Inputs:
    """Samples that a model takes.

    Args:
        data: a picture's file, or a folder with nothing but pictures in it; a picture, pictures or
            an array of inputs without labels; or anything that
            `prunelab.data.given.as_sample_set` takes: its test side where it has one.
        side: "train" or "test"; "" as said above.

    Raises:
        DataError: no such data, inputs of another kind, or classes that the model does not know.
    """
    pictures = _pictures(data)
    if pictures is not None:
        ids, cells, where = pictures
        size = accepted.shape[-2:] if len(accepted.shape) == 3 else None
        read = decoded(cells, where=where, resize=size)
        found = Inputs(where, ids, _with_channels(read, accepted, where), None)
    elif is_array(data):
        array = checked_images(data).numpy()
        found = Inputs("array", range(len(array)), array, None)
    else:
        found = _of_samples(_side(data, accepted, side), accepted)
    _check_kind(found, accepted)
    return found


def of_sample_set(data: SampleSet, accepted: Accepted, *, side: str = "") -> Inputs:
    """One side of a data set that was read already."""
    found = _of_samples(_chosen(data, side), accepted)
    _check_kind(found, accepted)
    return found


def _side(data: Any, accepted: Accepted, side: str) -> tuple[str, Samples, tuple[str, ...]]:
    if isinstance(data, ImageSet):
        data = SampleSet.of(data)
    if is_samples(data):
        return "samples", data, ()
    if not isinstance(data, SampleSet):
        is_folder = isinstance(data, str | Path) and str(data) not in DATASETS
        size = accepted.shape[-2:] if is_folder and accepted.dtype == "uint8" else None
        data = as_sample_set(data, test_share=0, resize=size if size and len(size) == 2 else None)
    return _chosen(data, side)


def _chosen(data: SampleSet, side: str) -> tuple[str, Samples, tuple[str, ...]]:
    samples = data.train if side == "train" or (not side and data.test is None) else data.test
    if samples is None:
        raise DataError(f"{data.name} has no {side} side")
    return data.name, samples, data.class_names


def _of_samples(found: tuple[str, Samples, tuple[str, ...]], accepted: Accepted) -> Inputs:
    name, samples, class_names = found
    inputs, targets = stored(samples)
    if samples.labels is not None:
        targets = _renumbered(name, targets, class_names, accepted)
    return Inputs(name, samples.ids.tolist(), inputs, targets)


def _renumbered(
    name: str, labels: Array, class_names: tuple[str, ...], accepted: Accepted
) -> Array:
    """Labels by the model's numbers of its classes, told by their names where both have some."""
    if class_names and accepted.class_names and class_names != accepted.class_names:
        used = np.unique(labels)
        unknown = [class_names[k] for k in used if class_names[k] not in accepted.class_names]
        if unknown:
            raise DataError(
                f"{name} has the class {unknown[0]!r}, which the model does not know; it knows "
                f"{', '.join(accepted.class_names)}"
            )
        numbers = np.zeros(len(class_names), np.int64)
        for label in used:
            numbers[label] = accepted.class_names.index(class_names[label])
        return numbers[labels]
    if accepted.num_classes is not None and labels.max() >= accepted.num_classes:
        raise DataError(
            f"{name} has the label {labels.max()}; the model knows the classes 0 to "
            f"{accepted.num_classes - 1}"
        )
    return labels


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
        else:
            return None
        return [file.name for file in files], [(str(f), f.read_bytes()) for f in files], path.name
    given = data if isinstance(data, list) else [data]
    if not given or not all(hasattr(each, "convert") and hasattr(each, "mode") for each in given):
        return None
    return list(range(len(given))), [(f"picture {n}", p) for n, p in enumerate(given)], "pictures"


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
