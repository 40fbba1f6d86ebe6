"""Samples of what people have in memory: arrays, torch data sets, Hugging Face data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prunelab.data.checked import Array, array_of, checked_label, checked_labels
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.pictures import pixels, say_seen
from prunelab.data.samples import ImageSamples, Samples
from prunelab.errors import DataError

IMAGE_NAMES = ("image", "img", "images", "pixel_values", "input", "inputs", "x")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "y")


def as_samples(data: Any) -> Samples:
    """Samples of any data set that scores and training understand.

    Images end up in memory as `checked` has them, [N, C, H, W], uint8 (normalised when a network
    is fed) or float32 (fed as they are). The fingerprint is of the content.

    Args:
        data: `Samples` (returned as they are); the name of a data set or a folder of parquet
            files (its training side); an `ImageSet` (its training side); a pair (images, labels)
            of arrays, tensors or lists, or a mapping of them by name; a torch data set of (image,
            label); or a Hugging Face data set with an image and a label column. Images are arrays,
            tensors or pictures.

    Raises:
        DataError: something else, or samples that are not of one shape, not finite, without a
            label, or different each time they are read.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    >>> as_samples((images, labels)).images.shape
    torch.Size([4, 1, 8, 8])
    """
    if is_samples(data):
        samples: Samples = data
        return samples
    if isinstance(data, str | Path):
        data = load_dataset(str(data))
    if isinstance(data, ImageSet):
        return ImageSamples.of(data)
    if is_pair(data):
        images, labels = data
        if is_array(images):
            return ImageSamples(images, labels)
        return samples_of_items(_Pairs(images, labels))
    if isinstance(data, Mapping):
        names = _names(data)
        if names is None:
            raise DataError(
                f"data is a mapping of {', '.join(map(repr, data))}; give one of them, such as the "
                "training side"
            )
        return as_samples(tuple(data[name] for name in names))
    is_listed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_listed and not isinstance(data, str | bytes) and not is_array(data):
        return samples_of_items(data)
    raise DataError(
        f"data is a {type(data).__name__}; expected (images, labels), a torch data set of (image, "
        "label), a Hugging Face data set, samples, or the name of a data set"
    )


def is_samples(data: Any) -> bool:
    """Whether an object has what `Samples` need, with nothing computed."""
    return hasattr(data, "ids") and callable(getattr(data, "batch", None))


def is_array(value: Any) -> bool:
    """Whether an object is a tensor or an array of numbers."""
    return isinstance(value, Tensor | np.ndarray)


def is_pair(data: Any) -> bool:
    """Whether data are (images, labels) of all samples, and not a data set of two items."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, labels = data
    if is_array(images):
        return is_array(labels) or isinstance(labels, list | tuple) or hasattr(labels, "__array__")
    return isinstance(images, list | tuple) and (
        is_array(labels) or (isinstance(labels, list) and all(isinstance(x, int) for x in labels))
    )


class _Pairs:
    """Lists of pictures and of labels as a data set."""

    def __init__(self, images: Sequence[Any], labels: Any) -> None:
        self._images, self._labels = images, checked_labels(labels).tolist()
        if len(images) != len(self._labels):
            raise DataError(
                f"{len(images)} images but {len(self._labels)} labels; expected one of each a "
                "sample"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self._images[row], self._labels[row]


def item_of(item: Any, row: int) -> tuple[Any, int]:
    """Image and label of one item of a data set.

    Raises:
        DataError: an item that is no pair and no mapping with an image and a label, or a label
            that is no class (see `checked_label`).
    """
    if isinstance(item, Mapping):
        names = _names(item)
        if names is None:
            raise DataError(
                f"sample {row} has {', '.join(map(repr, item))}; expected an image "
                f"({', '.join(IMAGE_NAMES)}) and a label ({', '.join(LABEL_NAMES)}): rename the "
                "columns"
            )
        image, label = (item[name] for name in names)
    elif isinstance(item, tuple | list) and len(item) == 2:
        image, label = item
    else:
        raise DataError(
            f"sample {row} is a {type(item).__name__}, expected (image, label); texts are for "
            "prunelab.data.samples.TokenSamples"
        )
    return image, checked_label(label, row)


def _names(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the image and the label are called."""
    image = next((name for name in IMAGE_NAMES if name in item), None)
    label = next((name for name in LABEL_NAMES if name in item), None)
    return None if image is None or label is None else (image, label)


def samples_of_items(data: Any) -> ImageSamples:
    """Samples of a data set with items, each read once.

    Raises:
        DataError: as `as_samples`.
    """
    if not len(data):
        raise DataError("data holds no samples")
    images, labels, seen = [], [], Counter[str]()
    for row in range(len(data)):
        image, label = item_of(_item(data, row), row)
        images.append(_picture(image, row, seen))
        labels.append(label)
        first = images[0]
        if (images[-1].shape, images[-1].dtype) != (first.shape, first.dtype):
            raise DataError(
                f"sample {row} is {images[-1].dtype} of shape {images[-1].shape}, sample 0 "
                f"{first.dtype} of {first.shape}; bring all to one size and type, with "
                "torchvision.transforms.Resize for instance"
            )
    if not np.array_equal(
        _picture(item_of(data[0], 0)[0], 0, Counter()), images[0], equal_nan=True
    ):
        raise DataError(
            "sample 0 is another one each time it is read; leave random transforms out "
            "(TrainingConfig(augment=True) has crops and flips for training)"
        )
    say_seen(seen, "data")
    return ImageSamples(np.stack(images), labels)


def _item(data: Any, row: int) -> Any:
    try:
        return data[row]
    except (KeyError, NotImplementedError) as error:  # such as a table of pandas
        raise DataError(
            f"sample {row} of a {type(data).__name__} cannot be read by its number "
            f"({type(error).__name__}: {error}); give (images, labels) or a list of them"
        ) from error


def _picture(image: Any, row: int, seen: Counter[str]) -> Array:
    """An image as an array; a picture of Pillow as uint8 [C, H, W]."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return pixels(image, place=f"the image of sample {row}", seen=seen)
    if not is_array(image):
        raise DataError(
            f"the image of sample {row} is a {type(image).__name__}, expected a tensor, an array "
            "or a picture; add a transform such as torchvision.transforms.ToTensor"
        )
    return array_of(image, "images", f"sample {row}")
