"""The gate, in torch's tensors: what `arrays` makes of images and labels as people have them."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data.arrays import (
    array_of,
    at,
    image_array,
    is_one_hot,
    label_array,
    target_array,
    whole_array,
)
from prunelab.errors import DataError


def checked(images: Any, labels: Any, *, where: str = "") -> tuple[Tensor, Tensor]:
    """Images and labels of the same samples.

    Args:
        images, labels: as `checked_images` and `checked_labels` take them.
        where: what errors and warnings begin with, such as a folder.

    Returns:
        uint8 or float32 [N, ...] and int64 [N], contiguous, on the CPU, N >= 1.

    Raises:
        DataError: as those, or numbers of samples that differ.
    """
    pictures = array_of(images, "images", where)
    classes = checked_labels(labels, where=where)
    if pictures.ndim and len(pictures) != len(classes):
        raise DataError(
            f"{at(where)}{len(pictures)} images but {len(classes)} labels; expected one of each "
            "a sample"
        )
    return checked_images(pictures, where=where), classes


def checked_images(images: Any, *, where: str = "") -> Tensor:
    """`image_array` as a tensor, uint8 or float32 [N, ...].

    >>> checked_images(np.zeros((5, 8, 8), np.uint8)).shape
    torch.Size([5, 1, 8, 8])
    """
    return torch.from_numpy(image_array(images, where=where))


def checked_labels(labels: Any, *, where: str = "") -> Tensor:
    """`label_array` as a tensor, int64 [N].

    >>> checked_labels(np.array([[1], [0]], np.uint8))
    tensor([1, 0])
    """
    return torch.from_numpy(label_array(labels, where=where))


def checked_label(label: Any, row: int) -> int:
    """The class of one sample: what `checked_labels` takes of many.

    Raises:
        DataError: names the row.
    """
    with contextlib.suppress(DataError):
        array = array_of(label, "labels")
        if array.ndim == 1 and len(array) > 1 and is_one_hot(array[None]):
            array = np.asarray(array.argmax())
        if array.size == 1 and array.dtype.kind in "iub" and array.item() >= 0:
            return int(array.item())
    raise DataError(
        f"sample {row} has the label {label!r}, expected a whole number: the class, from 0 on"
    )


def checked_targets(targets: Any, *, where: str = "") -> Tensor:
    """`target_array` as a tensor, float32 [N] or [N, K].

    >>> checked_targets([[1.5], [2]])
    tensor([1.5000, 2.0000])
    """
    return torch.from_numpy(target_array(targets, where=where))


def whole_numbers(values: Any, what: str) -> Tensor:
    """`whole_array` as a tensor, int64."""
    return torch.from_numpy(whole_array(values, what))


def checked_groups(groups: Any, count: int, *, where: str) -> Tensor:
    """The natural client of each of `count` training samples, int64 [N].

    Raises:
        DataError: something else than whole numbers, or another number of them.
    """
    found = whole_numbers(groups, f"{where}: natural clients")
    if found.shape != (count,):
        raise DataError(
            f"{where}: {len(found)} natural clients for {count} training samples; expected one each"
        )
    return found
