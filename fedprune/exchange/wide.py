"""Numbers of 0 or more, of nearly any size, for means whose numbers are below 2^20.

Means of clients' tensors hold magnitudes below 2^20 with a resolution of 2^-52 (aggregate.py), and
sums of squares leave both bounds. Here each number goes into one of three parts by its size, times
a power of two that brings it to where it is held well, and the other two parts hold 0. Parts are
added up each by itself, under masks as well, and put together afterwards: nothing cancels, so the
mean is off by a relative 2^-22 at most (rounding to float32 here and of the mean, 2^-24 each, and
2^-25 of the sum), for numbers from 2^-76 to 2^60. Below that there is an absolute 2^-100.

Rules that take no mean (medians, say) see each part by itself, and do as always where a number is
in the middle part at all clients, from 2^-28 to 2^20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import DIVERGED, ClientError
from sparsemodel.runtime.state import Tensors

PARTS: Mapping[str, int] = {"small": 48, "middle": 0, "large": -40}
"""Part -> the power of two that its numbers are multiplied by."""
_SMALL, _LARGE, _TOO_LARGE = 2.0**-28, 2.0**20, 2.0**60


def parted(values: Mapping[str, NDArray[Any]]) -> dict[str, Tensors]:
    """Part -> name -> float32 of the shape that was given.

    Args:
        values: float64, 0 or more.

    Raises:
        ClientError: a number that is not finite, below 0, or 2^60 or more.

    >>> {part: some["a"].tolist() for part, some in parted({"a": np.array([0.5, 2.0**50])}).items()}
    {'small': [0.0, 0.0], 'middle': [0.5, 0.0], 'large': [0.0, 1024.0]}
    """
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, value in values.items():
        # Rounded before it is sorted, so that no number is rounded out of its part.
        with np.errstate(over="ignore"):
            rounded = np.asarray(value, np.float64).astype(np.float32).astype(np.float64)
        if not ((rounded >= 0) & (rounded < _TOO_LARGE)).all():  # NaN is neither
            raise ClientError(
                f"{name!r} holds numbers below 0, of 2^60 or more, or NaN: {DIVERGED}"
            )
        chosen = {
            "small": rounded < _SMALL,
            "middle": (rounded >= _SMALL) & (rounded < _LARGE),
            "large": rounded >= _LARGE,
        }
        for part, power in PARTS.items():
            scaled = np.where(chosen[part], rounded, 0.0) * 2.0**power
            parts[part][name] = scaled.astype(np.float32)
    return dict(parts)


def joined(parts: Mapping[str, Tensors]) -> dict[str, NDArray[np.float64]]:
    """Name -> the numbers whose `parted`, or means of them, these are.

    >>> joined(parted({"a": np.array([0.0, 3.0, 2.0**21, 2.0**-30])}))["a"].tolist()
    [0.0, 3.0, 2097152.0, 9.313225746154785e-10]
    """
    return {
        name: np.sum(
            [parts[part][name].astype(np.float64) * 2.0**-power for part, power in PARTS.items()],
            axis=0,
        )
        for name in parts["middle"]
    }
