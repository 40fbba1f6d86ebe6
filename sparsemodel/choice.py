"""Which of two ways to compute a sparse layer is faster, predicted from its shape."""

from __future__ import annotations

from sparsemodel.kernels.geometry import ConvGeometry


def dense_is_faster(
    geometry: ConvGeometry, nnz: int, batch: int, size: tuple[int, int], *, in_place: bool
) -> bool:
    """placeholder."""
    return nnz > 0.25 * geometry.out_channels * geometry.row_length
