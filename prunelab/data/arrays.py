"""The gate: images and labels as people have them become arrays of one form, or a clear error.

Whatever enters (arrays, data sets, pictures, files) passes here. What can mean one thing alone is
converted; where that is more than another type of number, a DataWarning says so in a line. Needs
numpy alone; `checked` gives the same as tensors.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from prunelab.errors import DataError, DataWarning

Array = np.ndarray[Any, Any]

MOST_CHANNELS = 4
MOST_CLASSES = 1 << 16  # a label beyond, and beyond the number of samples, is no class
_LOOKED_AT = 64  # images whose range is looked at


def image_array(images: Any, *, where: str = "") -> Array:
    """Images in one contiguous array.

    Args:
        images: uint8 or floats, a tensor, an array or nested lists: [N, C, H, W]; [N, H, W, C]
            where the last dimension alone can be channels (1 to 4); gray [N, H, W]; vectors
            [N, D]; or with more dimensions, which stay as they are.

    Returns:
        uint8, which is normalised when a network is fed, or float32, which is fed as it is.

    Raises:
        DataError: no samples, another type of number, or values that are not finite.

    >>> image_array(np.zeros((5, 8, 8), np.uint8)).shape
    (5, 1, 8, 8)
    """
    array = array_of(images, "images", where)
    shape = list(array.shape)
    if array.ndim < 2 or 0 in shape:
        raise DataError(
            f"{at(where)}images have shape {shape}; expected at least one, as [N, C, H, W], "
            "[N, H, W, C], [N, H, W] or vectors [N, D]"
        )
    if array.dtype.kind == "f":
        array = _finite(array, where)
    elif array.dtype != np.uint8:
        raise DataError(
            f"{at(where)}images are {array.dtype}; expected bytes (uint8, 0 ... 255) or floats: "
            "convert with astype, once their values are in that range"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] > MOST_CHANNELS >= array.shape[3]:
        array = np.moveaxis(array, 3, 1)
        note(f"{at(where)}images {shape} have channels last; they were moved to the front")
    # torch trains narrow networks on channels-last images out of bounds (oneDNN's issue 6035).
    return np.ascontiguousarray(array)


def label_array(labels: Any, *, where: str = "") -> Array:
    """The class of each sample, int64 [N].

    Args:
        labels: whole numbers of any type (or truth values) [N] or [N, 1], or one-hot rows [N, C];
            a tensor, an array or a list.

    Raises:
        DataError: no samples, something else, or a number that is no class: below 0, or beyond
            both the number of samples and MOST_CLASSES.

    >>> label_array(np.array([[1], [0]], np.uint8))
    array([1, 0])
    """
    array = array_of(labels, "labels", where)
    shape = list(array.shape)
    if array.ndim == 2 and shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 2 and is_one_hot(array):
        array = array.argmax(1)
        note(f"{at(where)}labels {shape} are one-hot; the class is the place of the 1")
    if array.ndim == 1 and not len(array):
        raise DataError(f"{at(where)}no samples: labels are empty")
    if array.ndim != 1 or array.dtype.kind not in "iub":
        cure = "; convert with astype(int), if they are that" if array.dtype.kind == "f" else ""
        raise DataError(
            f"{at(where)}labels are {array.dtype} of shape {shape}, expected whole numbers [N]: "
            f"the class of each sample, from 0 on{cure}"
        )
    limit = max(len(array), MOST_CLASSES)
    wrong = np.flatnonzero((array < 0) | (array >= limit))
    if len(wrong):
        raise DataError(
            f"{at(where)}sample {wrong[0]} has the label {array[wrong[0]]}; expected a class "
            f"from 0 to {limit - 1}: number the classes 0, 1, 2 and so on"
        )
    return array.astype(np.int64)


def target_array(targets: Any, *, where: str = "") -> Array:
    """Numbers to predict, float32 [N] or [N, K].

    Args:
        targets: numbers or truth values [N], [N, 1] (as [N]) or [N, K]; a tensor, an array, a list.

    Raises:
        DataError: no samples, another shape, or values that are not finite.

    >>> target_array([[1.5], [2]])
    array([1.5, 2. ], dtype=float32)
    """
    array = array_of(targets, "targets", where)
    shape = list(array.shape)
    if array.ndim == 2 and shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or 0 in shape or array.dtype.kind == "c":
        raise DataError(
            f"{at(where)}targets are {array.dtype} of shape {shape}; expected numbers [N] or "
            "[N, K], at least one"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    good = np.isfinite(array.reshape(len(array), -1)).all(1)
    if not good.all():
        raise DataError(
            f"{at(where)}sample {np.flatnonzero(~good)[0]} has a target that is not finite; leave "
            "it out or mend it"
        )
    return np.ascontiguousarray(array)


def whole_array(values: Any, what: str) -> Array:
    """Whole numbers of any type, and truth values, as int64 of the same shape.

    Raises:
        DataError: something else, or a number beyond int64.
    """
    array = array_of(values, what)
    if array.dtype.kind not in "iub" or (array.size and array.max() > np.iinfo(np.int64).max):
        raise DataError(f"{what} are {array.dtype}; expected whole numbers that fit into int64")
    return array.astype(np.int64)


def count_classes(train: Any, test: Any = None, *, where: str = "") -> int:
    """One more than the largest training label; numbers without a sample are named in a warning.

    Args:
        train, test: int64 [N], checked; of numpy or torch.

    Raises:
        DataError: a test label beyond the training side's, or more classes than training samples.
    """
    train = np.asarray(train)
    num_classes = int(train.max()) + 1
    if num_classes > len(train):
        raise DataError(
            f"{at(where)}the labels reach {num_classes - 1}, and {len(train)} training samples "
            "cannot have so many classes; number the classes 0, 1, 2 and so on"
        )
    test = np.zeros(1, np.int64) if test is None else np.asarray(test)
    if int(test.max()) >= num_classes:
        row = int(np.flatnonzero(test >= num_classes)[0])
        raise DataError(
            f"{at(where)}test label {int(test[row])} of row {row} lies outside "
            f"0 ... {num_classes - 1}, the training side's classes"
        )
    warn_of_gaps(train, where=where)
    return num_classes


def warn_of_gaps(labels: Any, *, where: str = "") -> None:
    """Warn where the numbers up to the largest label are not all classes: networks count them."""
    counts = np.bincount(np.asarray(labels))
    num_classes, absent = len(counts), np.flatnonzero(counts == 0).tolist()
    if absent:
        first = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        note(
            f"{at(where)}labels reach {num_classes - 1}, so the network gets {num_classes} "
            f"outputs, but no sample has the class {first}; number the classes 0, 1, 2 and so on "
            "if there are no others"
        )


def note(text: str) -> None:
    """Say in one line how data were taken."""
    warnings.warn(text, DataWarning, stacklevel=2)


def at(where: str) -> str:
    """What a message begins with."""
    return f"{where}: " if where else ""


def array_of(values: Any, what: str, where: str = "") -> Array:
    """An array of numbers (nothing copied where it need not be) that torch can share.

    Raises:
        DataError: no numbers, rows of different shapes, or masked places.
    """
    if is_tensor(values):
        values = _numpy_of(values, f"{at(where)}{what}")
    if np.ma.is_masked(values):
        raise DataError(f"{at(where)}{what} have masked places; leave those samples out")
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O":  # such as a column of pandas
            array = np.array(array.tolist())
    except (ValueError, TypeError, RuntimeError):  # the last of odd tensors of torch's
        raise DataError(
            f"{at(where)}{what} are not all of one shape; bring them to one (pictures with "
            "torchvision.transforms.Resize, for instance)"
        ) from None
    if array.dtype.kind not in "biufc":
        kind = {"U": "texts", "S": "texts"}.get(array.dtype.kind, str(array.dtype))
        first = f", such as {array.ravel().tolist()[0]!r}" if array.size else ""
        raise DataError(
            f"{at(where)}{what} are {kind}{first}; expected numbers (classes: whole numbers, "
            "0, 1, 2 and so on)"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch takes no negative strides, and warns of what is read-only.
    return array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()


def is_array(value: Any) -> bool:
    """Whether an object is a tensor or an array of numbers."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch's, which need not be installed."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def _numpy_of(tensor: Any, what: str) -> Array:
    import torch  # noqa: PLC0415 - there is a tensor

    try:
        tensor = tensor.detach().cpu()
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
        numpy_has_it = tensor.dtype in (torch.float16, torch.float32, torch.float64)
        tensor = tensor.float() if tensor.is_floating_point() and not numpy_has_it else tensor
        array: Array = tensor.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise DataError(f"{what} are a tensor that numpy cannot read ({error})") from None
    return array


def is_one_hot(array: Array) -> bool:
    """Whether every row [N, C] is 0 but for a single 1."""
    zeros_and_ones = array.size > 0 and bool(((array == 0) | (array == 1)).all())
    return zeros_and_ones and bool((array.sum(1) == 1).all())


def _finite(array: Array, where: str) -> Array:
    """Floats as float32, once all are finite; those that look like pixels are mentioned."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    good = np.isfinite(array.reshape(len(array), -1)).all(1)
    if not good.all():
        raise DataError(
            f"{at(where)}sample {np.flatnonzero(~good)[0]} holds values that are not finite; "
            "leave it out or mend it"
        )
    low, high = float(array[:_LOOKED_AT].min()), float(array[:_LOOKED_AT].max())
    if array.ndim > 2 and 0 <= low < high <= 1:
        note(
            "images are floats between 0 and 1, and are fed to the network as they are; bytes "
            "(uint8) would be normalised to -2 ... 2"
        )
    elif array.ndim > 2 and 0 <= low < high <= 255:
        # Of no place and in the same words each time, so that Python shows it once.
        note(
            "images are floats between 0 and 255, and are fed to the network as they are; give "
            "uint8 to have them normalised as bytes are"
        )
    return array
