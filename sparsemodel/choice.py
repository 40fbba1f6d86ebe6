"""Which of two ways to compute a sparse layer is faster, predicted from its shape."""

from __future__ import annotations

from sparsemodel.kernels.geometry import ConvGeometry

# From this density on no sparse kernel is faster than the dense ones.
MAX_SPARSE_DENSITY = 0.5


def dense_is_faster(
    geometry: ConvGeometry, nnz: int, batch: int, size: tuple[int, int], *, in_place: bool
) -> bool:
    """placeholder."""
    return nnz > 0.25 * geometry.out_channels * geometry.row_length
