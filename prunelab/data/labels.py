"""What is to be predicted, as people write it: names, numbers, several classes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prunelab.data.checked import Array, array_of, checked_labels, checked_targets, is_one_hot, note
from prunelab.errors import DataError


@dataclass(frozen=True)
class Targets:
    """Classes, int64 [N], or numbers, float32 [N] or [N, K]; names of the classes, if they have."""

    values: torch.Tensor
    class_names: tuple[str, ...] = ()

    @property
    def are_classes(self) -> bool:
        return not self.values.is_floating_point()


def targets_of(
    values: Any,
    *,
    class_names: Sequence[str] | None = None,
    kind: str = "",
    where: str = "data",
) -> Targets:
    """What is to be predicted of each sample.

    Args:
        values: whole numbers or names: classes; floats: numbers to predict (regression); rows of
            0 and 1, or a list of names or of classes for each sample: several classes a sample
            (rows with a single 1 each are one-hot classes).
        class_names: of the classes 0, 1, ..., empty where they are numbers alone; None: names are
            numbered in their sorted order.
        kind: one of `reading.KINDS`, where values could be meant in another way; "": as above.

    Raises:
        DataError: values that are none of these, or not of this kind.

    >>> targets_of([["sun"], [], ["sun", "rain"]]).values
    tensor([[0., 1.],
            [0., 0.],
            [1., 1.]])
    """
    if _are_lists_of_classes(values, class_names):
        return _several(values, class_names, where)
    if _has_names(values):
        return Targets(*as_classes(values, class_names=class_names, where=where))
    array = array_of(values, "labels", where)
    names = tuple(class_names or ())
    if kind == "regression":
        return Targets(checked_targets(array, where=where))
    flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if kind == "multi-label" or (not kind and _is_several_hot(flat)):
        if not (array.ndim == 2 and np.isin(array, (0, 1)).all()):
            raise DataError(f"{where}: expected rows of 0 and 1, one for each class, as labels")
        return Targets(checked_targets(array, where=where), names)
    if flat.dtype.kind == "f" and not (flat.ndim == 2 and is_one_hot(flat)):
        is_whole = bool((np.isfinite(flat) & (flat == np.floor(flat))).all())
        if kind != "classification":
            if is_whole:
                note(
                    f"{where}: labels are floats, and are taken as numbers to predict; if they are "
                    "classes, give whole numbers, or the task classification"
                )
            return Targets(checked_targets(array, where=where))
        if not is_whole:
            raise DataError(f"{where}: labels are floats with a fraction; expected classes")
        flat = flat.astype(np.int64)
    labels = checked_labels(flat, where=where)
    if names and int(labels.max()) >= len(names):
        raise DataError(
            f"{where}: the label {int(labels.max())} is none of the {len(names)} classes "
            f"{_listed(names)}"
        )
    return Targets(labels, names)


def as_classes(
    values: Any, *, class_names: Sequence[str] | None = None, where: str = "data"
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The class of each sample, int64 [N], and the names of the classes where they have some.

    Args:
        values: whole numbers (as `checked_labels` takes them), or names.
        class_names: as of `targets_of`.

    Raises:
        DataError: names and numbers mixed, a cell without a value, a name that is no class, or
            numbers that are no classes.

    >>> as_classes(["dog", "cat", "dog"])
    (tensor([1, 0, 1]), ('cat', 'dog'))
    """
    if not _has_names(values):
        return checked_labels(values, where=where), tuple(class_names or ())
    listed = [str(v) if isinstance(v, np.str_) else v for v in values]
    for row, value in enumerate(listed):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: row {row} has the label {value!r} among names such as "
                f"{next(v for v in listed if isinstance(v, str))!r}; expected a name for each"
            )
    names = tuple(sorted(set(listed)) if class_names is None else class_names)
    return torch.tensor(_numbers([listed], names, where)[0]), names


def _numbers(cells: Sequence[Sequence[Any]], names: Sequence[str], where: str) -> list[list[int]]:
    """The numbers of the names in each cell; a single cell is a whole column."""
    number = {name: place for place, name in enumerate(names)}
    for row, cell in enumerate(cells):
        for place, value in enumerate(cell):
            if value not in number:
                none_of = f"none of the classes {_listed(names)}" if names else "no number"
                raise DataError(
                    f"{where}: row {place if len(cells) == 1 else row} has the label {value!r}, "
                    f"which is {none_of} as on the other side"
                )
    return [[number[value] for value in cell] for cell in cells]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


def _has_names(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "UO" and any(isinstance(v, str) for v in values.flat)
    return isinstance(values, list | tuple) and any(isinstance(v, str) for v in values)


def _are_lists_of_classes(values: Any, class_names: Sequence[str] | None) -> bool:
    """Whether each sample has a list of its classes, by name or number."""
    if (
        not isinstance(values, list | tuple)
        or not len(values)
        or not all(isinstance(v, list | tuple) for v in values)
    ):
        return False
    has_texts = any(isinstance(part, str) for cell in values for part in cell)
    lengths = {len(cell) for cell in values}
    is_hot = lengths == {len(class_names or ())} and all(
        p in (0, 1) for cell in values for p in cell
    )
    return has_texts or len(lengths) > 1 or (bool(class_names) and not is_hot)


def _several(
    cells: Sequence[Sequence[Any]], class_names: Sequence[str] | None, where: str
) -> Targets:
    """Lists of classes as rows of 0 and 1."""
    found = {part for cell in cells for part in cell}
    if all(isinstance(part, str) for part in found):
        names = tuple(sorted(found) if class_names is None else class_names)
        rows = _numbers(cells, names, where)
    else:
        numbers = checked_labels(sorted(found), where=where).tolist()
        names = tuple(class_names or ()) or tuple(map(str, range(max(numbers) + 1)))
        if max(numbers) >= len(names):
            raise DataError(f"{where}: {max(numbers)} is none of the {len(names)} classes")
        rows = [list(map(int, cell)) for cell in cells]
    hot = torch.zeros(len(cells), len(names))
    for row, cell in enumerate(rows):
        hot[row, cell] = 1
    return Targets(hot, names)


def _is_several_hot(array: Array) -> bool:
    if array.ndim != 2 or array.dtype.kind not in "biuf" or not array.size:
        return False
    return bool(np.isin(array, (0, 1)).all()) and not is_one_hot(array)
