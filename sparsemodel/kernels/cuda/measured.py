"""Which way a GPU computes a sparse linear layer: by what was measured on it.

The rows of a device are what `python -m benchmarks.gpu_choice` prints on it. A GPU that has none
goes by the one of nearest compute capability. Only float32 without TF32 has rows in which sparse
kernels win: with TF32 and in half types dense tensor cores are faster at every density measured.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch

Operator = Literal[
    "forward", "input gradient", "gradient at the mask", "norms", "norms of sequences"
]

# A gradient of so many coordinates (256 MiB of float32) is taken at the mask alone, however slow.
MAX_DENSE_GRADIENT = 1 << 26


class Timed(NamedTuple):
    """Milliseconds of both ways in a layer width → width of float32, TF32 off.

    `rows` are samples, or samples times positions.
    """

    operator: Operator
    width: int
    rows: int
    density: float
    sparse: float
    dense: float


class Gpu(NamedTuple):
    """A device, its compute capability, and what was measured on it."""

    name: str
    capability: tuple[int, int]
    timed: tuple[Timed, ...]


# torch 2.11, CUDA 13, commit e12991b. Of the dense gradients no time was kept: theirs here is that
# of the forward product, which has as many operations.
_H200 = Gpu(
    "NVIDIA H200",
    (9, 0),
    (
        Timed("forward", 4096, 8192, 0.01, 0.68, 5.4),
        Timed("forward", 4096, 8192, 0.05, 2.6, 5.4),
        Timed("forward", 4096, 8192, 0.1, 4.4, 5.4),
        Timed("input gradient", 4096, 8192, 0.01, 0.72, 5.4),
        Timed("input gradient", 4096, 8192, 0.05, 2.9, 5.4),
        Timed("input gradient", 4096, 8192, 0.1, 5.2, 5.4),
        Timed("gradient at the mask", 4096, 8192, 0.01, 1.04, 5.4),
        Timed("gradient at the mask", 4096, 8192, 0.05, 4.7, 5.4),
        Timed("gradient at the mask", 4096, 8192, 0.1, 9.4, 5.4),
        Timed("norms", 4096, 8192, 0.01, 1.2, 5.6),
        Timed("norms", 4096, 8192, 0.05, 5.1, 5.6),
        Timed("norms", 4096, 8192, 0.1, 9.9, 5.6),
        Timed("norms of sequences", 4096, 8192, 0.01, 4.8, 38),
        Timed("norms of sequences", 4096, 8192, 0.05, 23, 40),
        Timed("norms of sequences", 4096, 8192, 0.1, 46, 41),
    ),
)
MEASURED = (_H200,)


def sparse_is_faster(
    operator: Operator, x: torch.Tensor, *, weights: int, nnz: int, rows: int | None = None
) -> bool:
    """Whether sparse kernels won where a layer no larger and no sparser was measured.

    A smaller layer than any in the table is dense: launches bound it.

    Args:
        operator: which product.
        x: of the layer's device and dtype.
        weights: of the dense layer.
        nnz: active weights.
        rows: samples, or samples times positions; None for any number.
    """
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return False
    return any(
        t.operator == operator
        and t.sparse < t.dense
        and t.width**2 <= weights
        and (rows is None or t.rows <= rows)
        and nnz <= round(t.density * weights)
        for t in gpu_of(x.device).timed
    )


def gpu_of(device: torch.device) -> Gpu:
    """What stands for a device: its own rows, else those of nearest capability."""
    if device.type != "cuda":
        return MEASURED[0]
    return _gpu_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_of(index: int) -> Gpu:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return nearest(name, capability)


def nearest(name: str, capability: tuple[int, int]) -> Gpu:
    """Of this name, else of the nearest capability; the first of several."""

    def distance(gpu: Gpu) -> tuple[bool, int]:
        (major, minor), (other, other_minor) = capability, gpu.capability
        return gpu.name != name, abs(10 * (major - other) + minor - other_minor)

    return min(MEASURED, key=distance)
