"""What is to be predicted, as people write it: names, numbers, several classes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelab.data.arrays import (
    Array,
    array_of,
    is_one_hot,
    label_array,
    note,
    target_array,
)
from prunelab.errors import DataError


@dataclass(frozen=True)
class Targets:
    """Classes, int64 [N], or numbers, float32 [N] or [N, K]; names of the classes, if they have.

    Attributes:
        were_lists: several classes a sample, given as lists of classes and not as rows of 0 and 1.
    """

    values: Array
    class_names: tuple[str, ...] = ()
    were_lists: bool = False

    @property
    def are_classes(self) -> bool:
        return bool(self.values.dtype.kind == "i")

    @property
    def task(self) -> str:
        """What such targets are for, one of `reading.KINDS`."""
        if self.are_classes:
            return "classification"
        are_several = self.values.ndim == 2 and bool(np.isin(self.values, (0, 1)).all())
        return "multi-label" if are_several else "regression"


def targets_of(
    values: Any,
    *,
    class_names: Sequence[str] | None = None,
    own_names: Sequence[str] = (),
    fields: Sequence[Any] | None = None,
    kind: str = "",
    lists: bool | None = None,
    where: str = "data",
) -> Targets:
    """What is to be predicted of each sample.

    Args:
        values: whole numbers or names: classes; floats: numbers to predict (regression); rows of
            0 and 1, or a list of names or of classes for each sample: several classes a sample
            (rows with a single 1 each are one-hot classes, lists of one name each plain names).
        class_names, own_names, fields: as of `as_classes`.
        kind: one of `reading.KINDS`, where values could be meant in another way; "": as above.
        lists: whether several classes are lists of classes, or rows of 0 and 1, as on another side;
            None: as they look.

    Raises:
        DataError: values that are none of these, or not of this kind.

    >>> targets_of([["sun"], [], ["sun", "rain"]]).values
    array([[0., 1.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """
    if isinstance(values, np.ndarray) and values.ndim == 2 and _has_names(values):
        values = values.tolist()
    if lists is None and kind != "multi-label":
        values = _flat(values)
    if _are_lists_of_classes(values, class_names or own_names, lists):
        return _several(values, class_names, own_names, where)
    if _has_names(values):
        return Targets(*as_classes(values, class_names=class_names, where=where))
    array = array_of(values, "labels", where)
    if kind == "regression":
        return Targets(target_array(array, where=where))
    flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if kind == "multi-label" or (not kind and _is_several_hot(flat)):
        if not (array.ndim == 2 and np.isin(array, (0, 1)).all()):
            raise DataError(f"{where}: expected rows of 0 and 1, one for each class, as labels")
        if own_names and class_names and tuple(own_names) != tuple(class_names):
            order = _numbers([own_names], class_names, where)[0]
            wide = np.zeros((len(array), len(class_names)), array.dtype)
            wide[:, order] = array
            array = wide
        return Targets(target_array(array, where=where), tuple(class_names or own_names))
    if flat.dtype.kind == "f" and not (flat.ndim == 2 and is_one_hot(flat)):
        is_whole = bool((np.isfinite(flat) & (flat == np.floor(flat))).all())
        if kind != "classification":
            if is_whole:
                note(
                    f"{where}: labels are floats, and are taken as numbers to predict; if they are "
                    "classes, give whole numbers, or the task classification"
                )
            return Targets(target_array(array, where=where))
        if not is_whole:
            raise DataError(f"{where}: labels are floats with a fraction; expected classes")
        flat = flat.astype(np.int64)
    classes, names = as_classes(
        flat, class_names=class_names, own_names=own_names, fields=fields, where=where
    )
    return Targets(classes, names)


def as_classes(
    values: Any,
    *,
    class_names: Sequence[str] | None = None,
    own_names: Sequence[str] = (),
    fields: Sequence[Any] | None = None,
    where: str = "data",
) -> tuple[Array, tuple[str, ...]]:
    """The class of each sample, int64 [N], and the names of the classes where they have some.

    A class is known by its name. Numbers without names of their own are places in `class_names`;
    where these hold whole numbers as names ("0", "1", "10"), those names are meant.

    Args:
        values: whole numbers as `label_array` takes them, or names: a list, or an array or a
            column of texts.
        class_names: of another side: what number each name has; empty where it has numbers alone;
            None: there is none, and names are numbered in their sorted order.
        own_names: of the numbers in `values`, where these data name them.
        fields: the values as a file has them, in texts; where all are names, those are meant.

    Raises:
        DataError: neither, a sample without a name, a name or a number that the other side does not
            have, or a number that could be meant as a name and as a place.

    >>> as_classes(["dog", "cat", "dog"])
    (array([1, 0, 1]), ('cat', 'dog'))
    >>> as_classes([0, 1], class_names=["dog", "cat"], own_names=["cat", "dog"])
    (array([1, 0]), ('dog', 'cat'))
    """
    names = None if class_names is None else tuple(class_names)
    if not _has_names(values):
        if names and fields is not None and set(fields) <= set(names):
            return np.array(_numbers([fields], names, where)[0]), names
        labels = label_array(values, where=where)
        if own_names:
            return renumbered(labels, tuple(own_names), names, where=where)
        if names and any(name.isdecimal() for name in names):
            _check_places(labels, names, where)
        elif names:
            _check_below(labels, names, where)
        return labels, names or ()
    listed = [str(v) if isinstance(v, np.str_) else v for v in values]
    for row, value in enumerate(listed):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: row {row} has the label {value!r} among names such as "
                f"{next(v for v in listed if isinstance(v, str))!r}; expected a name for each"
            )
    if names is None:
        names = tuple(sorted(set(listed)))
    return np.array(_numbers([listed], names, where)[0]), names


def renumbered(
    labels: Array,
    own_names: tuple[str, ...],
    class_names: tuple[str, ...] | None,
    *,
    where: str,
) -> tuple[Array, tuple[str, ...]]:
    """Classes called `own_names` by the numbers that `class_names` have, and the names they have.

    Args:
        labels: int64 [N], places in `own_names`.
        class_names: as of `as_classes`; those that no sample has may be missing here.

    Raises:
        DataError: a number without a name, or a class that is none of the others; names it.
    """
    _check_below(labels, own_names, where)
    if class_names is None or own_names == class_names:
        return labels, own_names
    if not class_names:
        note(
            f"{where}: the classes are called {_listed(own_names)}, and are numbers alone on the "
            "other side; their numbers are taken as they are"
        )
        return labels, own_names
    place = {name: number for number, name in enumerate(class_names)}
    used = np.unique(labels).tolist()
    unknown = [own_names[number] for number in used if own_names[number] not in place]
    if unknown:
        raise DataError(
            f"{where} has the class {unknown[0]!r}, which is none of the classes "
            f"{_listed(class_names)}"
        )
    return np.array([place.get(name, -1) for name in own_names])[labels], class_names


def _check_below(labels: Array, names: Sequence[str], where: str) -> None:
    if int(labels.max()) >= len(names):
        raise DataError(
            f"{where}: the label {int(labels.max())} is none of the {len(names)} classes "
            f"{_listed(names)}"
        )


def _check_places(labels: Array, names: Sequence[str], where: str) -> None:
    """Refuse numbers that are not both name and place of the same class."""
    for number in np.unique(labels).tolist():
        if number >= len(names) or names[number] != str(number):
            raise DataError(
                f"{where}: the label {number} could be the class {str(number)!r} or the place "
                f"{number} among {_listed(names)}; give the names of the classes, as texts"
            )


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


def _flat(values: Any) -> Any:
    """Names of which each lies in a list of its own, beside each other."""
    are_lists = isinstance(values, list | tuple) and all(
        isinstance(v, list | tuple) for v in values
    )
    if are_lists and len(values) and all(len(v) == 1 and isinstance(v[0], str) for v in values):
        return [value[0] for value in values]
    return values


def _are_lists_of_classes(values: Any, class_names: Sequence[str], lists: bool | None) -> bool:
    """Whether each sample has a list of its classes, by name or number."""
    if (
        not isinstance(values, list | tuple)
        or not len(values)
        or not all(isinstance(v, list | tuple) for v in values)
    ):
        return False
    if lists is not None:
        return lists
    has_texts = any(isinstance(part, str) for cell in values for part in cell)
    lengths = {len(cell) for cell in values}
    is_hot = lengths == {len(class_names)} and all(p in (0, 1) for cell in values for p in cell)
    return has_texts or len(lengths) > 1 or (bool(class_names) and not is_hot)


def _several(
    cells: Sequence[Sequence[Any]],
    class_names: Sequence[str] | None,
    own_names: Sequence[str],
    where: str,
) -> Targets:
    """Lists of classes as rows of 0 and 1."""
    found = {part for cell in cells for part in cell}
    are_texts = {isinstance(part, str) for part in found}
    if len(are_texts) > 1:
        raise DataError(f"{where}: some labels are texts, others numbers; expected one kind")
    if found and are_texts == {False}:
        numbers = label_array(sorted(found), where=where)
        counted = tuple(map(str, range(int(numbers.max()) + 1)))
        own = tuple(own_names or class_names or counted)
        _check_below(numbers, own, where)
        if not own_names and class_names and any(name.isdecimal() for name in own):
            _check_places(numbers, own, where)
        cells = [[own[int(part)] for part in cell] for cell in cells]
        names = tuple(class_names or own)
    else:
        names = tuple((own_names or sorted(found)) if class_names is None else class_names)
    hot = np.zeros((len(cells), len(names)), np.float32)
    for row, cell in enumerate(_numbers(cells, names, where)):
        hot[row, cell] = 1
    return Targets(hot, names, were_lists=True)


def _is_several_hot(array: Array) -> bool:
    if array.ndim != 2 or array.dtype.kind not in "biuf" or not array.size:
        return False
    return bool(np.isin(array, (0, 1)).all()) and not is_one_hot(array)
