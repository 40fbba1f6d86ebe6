"""Samples of what people have in memory: arrays, torch data sets, Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.samples import ImageSamples, Samples
from prunelab.errors import DataError

IMAGE_NAMES = ("image", "img", "images", "pixel_values", "input", "inputs", "x")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "y")
_MOST_CHANNELS = 4


def as_samples(data: Any) -> Samples:
    """Samples of any data set that scores and training understand.

    Images end up in memory as they are, [N, C, H, W], uint8 (normalised when a network is fed) or
    float32 (left alone); where the last dimension alone can be channels (1 to 4), it is moved to
    the front. The fingerprint is of the content.

    Args:
        data: `Samples` (returned as they are); the name of a data set or a folder of parquet
            files (its training side); an `ImageSet` (its training side); a pair of arrays or
            tensors (images, labels); a torch data set of (image, label); or a Hugging Face
            data set with an image and a label column.

    Raises:
        DataError: something else, or samples that are not of one shape, not finite, without a
            label, or different each time they are read.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    >>> as_samples((images, labels)).batch(torch.tensor([0]))[0].shape
    torch.Size([1, 1, 8, 8])
    """
    if is_samples(data):
        samples: Samples = data
        return samples
    if isinstance(data, str | Path):
        data = load_dataset(str(data))
    if isinstance(data, ImageSet):
        return ImageSamples.of(data)
    if isinstance(data, tuple | list) and len(data) == 2 and all(map(is_array, data)):
        return _of_arrays(*map(_tensor, data))
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, data))
        raise DataError(
            f"data is a mapping of {names}; give one of them, such as the training side"
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _of_items(data)
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


def item_of(item: Any, row: int) -> tuple[Any, int]:
    """Image and label of one item of a data set.

    Raises:
        DataError: an item that is no pair and no mapping with an image and a label, or a label
            that is no whole number.
    """
    if isinstance(item, Mapping):
        names = [
            next((name for name in known if name in item), None)
            for known in (IMAGE_NAMES, LABEL_NAMES)
        ]
        if None in names:
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
    if isinstance(label, np.generic) or (is_array(label) and label.ndim == 0):
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(
            f"sample {row} has the label {label!r}, expected a whole number: the class, from 0 on"
        )
    return image, label


def _of_items(data: Any) -> Samples:
    """Samples of a data set with items, each read once."""
    if not len(data):
        raise DataError("data holds no samples")
    images, labels = [], []
    for row in range(len(data)):
        image, label = item_of(data[row], row)
        images.append(_picture(image, row))
        labels.append(label)
        first = images[0]
        if (images[-1].shape, images[-1].dtype) != (first.shape, first.dtype):
            raise DataError(
                f"sample {row} is {images[-1].dtype} of shape {tuple(images[-1].shape)}, sample 0 "
                f"{first.dtype} of {tuple(first.shape)}; bring all to one size, with "
                "torchvision.transforms.Resize for instance"
            )
    if not torch.equal(_picture(item_of(data[0], 0)[0], 0), images[0]):
        raise DataError(
            "sample 0 is another one each time it is read; leave random transforms out "
            "(TrainingConfig(augment=True) has crops and flips for training)"
        )
    return _of_arrays(torch.stack(images), torch.tensor(labels))


def _picture(image: Any, row: int) -> Tensor:
    """An image as a tensor; a picture of Pillow as uint8 [C, H, W]."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        array = np.asarray(plain)
        return torch.from_numpy(
            array.copy() if array.ndim == 2 else array.transpose(2, 0, 1).copy()
        )
    if not is_array(image):
        raise DataError(
            f"the image of sample {row} is a {type(image).__name__}, expected a tensor, an array "
            "or a picture; add a transform such as torchvision.transforms.ToTensor"
        )
    return _tensor(image)


def _of_arrays(images: Tensor, labels: Tensor) -> ImageSamples:
    """Checked samples of whole tensors."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers [N]:"
            " the class of each sample, from 0 on"
        )
    labels = labels.long()  # torch cannot compare unsigned labels
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{len(images)} images but {len(labels)} labels; expected one of each a sample"
        )
    if int(labels.min()) < 0:
        row = int((labels < 0).nonzero()[0])
        raise DataError(f"sample {row} has the label {int(labels[row])}; classes count from 0")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DataError(f"images are {images.dtype}; expected uint8 or floating point")
        images = images.float()
        finite = images.flatten(1).isfinite().all(1) if images.dim() > 1 else images.isfinite()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise DataError(
                f"sample {row} holds values that are not finite; leave it out or mend it"
            )
    if images.dim() == 3:
        images = images[:, None]
    elif images.dim() == 4 and images.shape[1] > _MOST_CHANNELS >= images.shape[3]:
        images = images.permute(0, 3, 1, 2).contiguous()
    elif images.dim() not in (2, 4):
        raise DataError(
            f"images have shape {tuple(images.shape)}; expected [N, C, H, W], [N, H, W, C], "
            "[N, H, W] or vectors [N, D]"
        )
    return ImageSamples(images, labels)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
