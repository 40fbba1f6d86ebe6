"""Columns of numbers as the input of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunelab.data.arrays import Array, note
from prunelab.data.columns import Columns, check_filled, typed
from prunelab.errors import DataError

ROW_NUMBERS = ("", "id", "index", "unnamed: 0")
"""What columns are called, in small letters, that number the rows; some programs write them."""

_WILD = 1000  # spreads of features that differ more than so are mentioned


def feature_names(
    columns: Columns, wanted: Sequence[str], others: Sequence[str | None]
) -> list[str]:
    """Which columns are features: those wanted, or all but the others where none are.

    A column that only numbers the rows is left out, and a warning says so.
    """
    if wanted:
        return [str(columns.pick(name, (), "features")) for name in wanted]
    found = [name for name in columns.names if name not in others]
    numbering = [n for n in found if n.lower() in ROW_NUMBERS and _is_numbering(columns.read(n))]
    if numbering and len(found) > 1:
        note(f"{columns.where}: column {numbering[0]!r} numbers the rows, and is no feature")
        found = [name for name in found if name not in numbering]
    return found


def features_of(columns: Columns, names: Sequence[str]) -> Array:
    """The columns beside each other, float32 [N, D], as they are: nothing is scaled.

    Truth values are 0 and 1; a column of lists of one length gives as many features.

    Raises:
        DataError: no column, a cell without a value, texts, or lists of several lengths; names the
            column and the row.
    """
    if not names:
        raise DataError(f"{columns.where}: no column is left for the features; {columns.listed}")
    parts = [_numbers(columns.read(name), f"{columns.where}, column {name!r}") for name in names]
    made = np.concatenate(parts, axis=1)
    spread = np.ptp(made, axis=0) if len(made) else np.zeros(made.shape[1])
    used = spread[spread > 0]
    if len(used) and used.max() > _WILD * used.min():
        note(
            f"{columns.where}: the features' ranges reach from {used.min():.3g} to "
            f"{used.max():.3g}, and are fed to the network as they are; scale them, each by a "
            "number that everybody shares"
        )
    return made


def _numbers(values: Any, where: str) -> Array:
    """float32 [N, D]."""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O":
            array = np.array([list(v) if np.ndim(v) else v for v in values])
    except ValueError:
        raise DataError(
            f"{where}: lists of several lengths; expected as many numbers each"
        ) from None
    if array.dtype.kind in ("U", "O"):
        check_filled(values, where)
        for row, value in enumerate(values):  # of texts the first that is no number, not any
            if isinstance(value, str) and isinstance(typed([value])[0], str):
                _number(value, row, where)
        array = np.array([[_number(v, row, where)] for row, v in enumerate(values)])
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: {array.dtype}; expected numbers")
    if array.dtype.kind == "f" and array.ndim == 1:
        check_filled(array.tolist(), where)
    with np.errstate(over="ignore"):
        made: Array = array.reshape(len(array), -1).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(made).all(axis=1))
    if len(bad):
        raise DataError(f"{where}: row {bad[0]} is not finite; mend it or leave the row out")
    return made


def _number(value: Any, row: int, where: str) -> float:
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise DataError(
        f"{where}: row {row} is {value!r}, no number; write categories as numbers (one column of 0 "
        "and 1 for each, as pandas.get_dummies does), or name the columns to use: "
        "columns={'features': 'a+b'}"
    )


def _is_numbering(values: Any) -> bool:
    """Whether the cells are different whole numbers."""
    array = np.asarray(values)
    return array.ndim == 1 and array.dtype.kind in "iu" and len(np.unique(array)) == len(array)
