"""The nearest prototype of each point by the kernel of nearest.cu."""

from __future__ import annotations

import torch

from sparsemodel.kernels.cuda.launch import Runner, blocks_of

Tensor = torch.Tensor

_SIDE = 64  # points of a block, as in nearest.cu


def nearest(runner: Runner, points: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Index and squared distance of each point's nearest prototype, ties to the lower index.

    The matrix of distances is never made. A point whose distance to a prototype is NaN gets the
    first such prototype and NaN.

    Args:
        runner: where to run.
        points: [N, D], contiguous, float32, bfloat16 or float16.
        prototypes: [K, D], K >= 1, alike.

    Returns:
        int64 [N] and float32 [N].
    """
    index = points.new_empty(len(points), dtype=torch.int64)
    distance = points.new_empty(len(points), dtype=torch.float32)
    runner.launch(
        "nearest", "nearest", blocks_of(len(points), _SIDE), points, prototypes, index, distance,
        len(points), len(prototypes), points.shape[1], real=points.dtype,
    )  # fmt: skip
    return index, distance
