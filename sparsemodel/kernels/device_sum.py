"""`runtime.fixed_sum.FixedSum` on a torch device, by its kernel where it has one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sparsemodel.kernels import fixed_point
from sparsemodel.kernels.cuda import array_ops
from sparsemodel.runtime.state import Array


class DeviceSum:
    """A running sum of weighted arrays of one shape, held on a device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        self.shape = shape
        self._high, self._low = (
            torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2)
        )

    def add(self, values: Array, means: Array | None, weight: int) -> int:
        """As `FixedSum.add`."""
        device = self._high.device
        refused = torch.zeros(2, dtype=torch.int64, device=device)
        tensors = [
            None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device)
            for array in (values, means)
        ]
        array_ops.fixed_add(self._high, self._low, *tensors, None, weight, refused)
        return int(refused[0])

    def mean(self, total_weight: int) -> NDArray[np.float64]:
        """As `FixedSum.mean`."""
        mean: NDArray[np.float64] = (
            fixed_point.value(self._high, self._low, total_weight).cpu().numpy()
        )
        return mean
