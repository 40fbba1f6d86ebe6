"""What is to be predicted, as people write it: names, numbers, several classes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunelab.data.checked import Array, checked_labels
from prunelab.errors import DataError


def as_classes(
    values: Any, *, class_names: Sequence[str] = (), where: str = "data"
) -> tuple[Array, tuple[str, ...]]:
    """The class of each sample, int64 [N], and the names of the classes where they have some.

    Args:
        values: whole numbers (as `checked_labels` takes them), or names.
        class_names: of the classes 0, 1, ...; by default names are numbered in their sorted order.

    Raises:
        DataError: names and numbers mixed, a cell without a value, a name that is no class, or
            numbers that are no classes.

    >>> as_classes(["dog", "cat", "dog"])
    (array([1, 0, 1]), ('cat', 'dog'))
    """
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(listed, list | tuple) or not any(isinstance(v, str) for v in listed):
        return checked_labels(values, where=where).numpy(), tuple(class_names)
    for row, value in enumerate(listed):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: row {row} has the label {value!r} among names such as "
                f"{next(v for v in listed if isinstance(v, str))!r}; expected a name for each"
            )
    names = tuple(class_names) or tuple(sorted(set(listed)))
    number = {name: place for place, name in enumerate(names)}
    for row, value in enumerate(listed):
        if value not in number:
            raise DataError(
                f"{where}: row {row} has the label {value!r}, which is none of the classes "
                f"{', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}"
            )
    return np.array([number[value] for value in listed], np.int64), names
