"""Which of two ways to compute a sparse layer is faster, predicted from its shape.

A linear model of one pass (forward, or one of the two backward products) on one core. Its
constants are nanoseconds, fitted to measurements on an AMD EPYC (Zen 4) with AVX-512; only their
ratios matter. `python -m benchmarks.execution_choice` measures both ways beside the dense layer
and shows where the prediction is wrong.
"""

from __future__ import annotations

import math

from sparsemodel.kernels.geometry import ConvGeometry

# From this density on the index that sparse kernels need is not worth its memory, except where it
# is small beside any input: in grouped convolutions, whose rows are short.
MAX_SPARSE_DENSITY = 0.6
MAX_SHORT_ROW = 32

# A column is one output pixel of one sample: each active weight is multiplied once a column.
_SPARSE_CALL = 18e3
_SPARSE_WEIGHT = 4.0  # of an active weight: reading it and its place
_SPARSE_PRODUCT = 0.036
_SPARSE_INPUT = 0.3  # of an input value: memory
_CONVERSION = 1.0  # of an input value, where it comes in another layout
_DENSE_CALL = 12e3
_DENSE_WEIGHT = 0.2  # of a weight, active or not: clearing and reading it
_DENSE_ACTIVE = 0.85  # of an active weight: putting it there, taking its gradient from there
_DENSE_PRODUCT = 0.018
_DENSE_PRODUCT_ALONE = 0.013  # added for a batch of one, falls with the batch's square root
_DENSE_PRODUCT_NARROW = 0.16  # added for one output channel, falls with their number
_DENSE_INPUT = 0.5
# Sparse kernels must promise this much: a wrong choice of the dense ones costs less.
_MARGIN = 1.1


def sparse_may_be_faster(geometry: ConvGeometry, nnz: int) -> bool:
    """Whether a layer of so many active weights needs the index of sparse kernels at all."""
    weights = geometry.out_channels * geometry.row_length
    short = geometry.groups > 1 and geometry.row_length <= MAX_SHORT_ROW
    return short or nnz <= MAX_SPARSE_DENSITY * weights


def dense_is_faster(
    geometry: ConvGeometry, nnz: int, batch: int, size: tuple[int, int], *, in_layout: bool
) -> bool:
    """Whether dense kernels, weight made for the call, are predicted to beat sparse ones.

    Args:
        geometry: the layer's; a linear layer is a 1×1 convolution.
        nnz: active weights.
        batch: samples; rows of a linear layer.
        size: height and width of the input, (1, 1) for a linear layer.
        in_layout: whether the input is batch innermost already.
    """
    weights = geometry.out_channels * geometry.row_length
    if not sparse_may_be_faster(geometry, nnz):
        return True
    height, width = geometry.output_size(*size)
    columns = batch * height * width
    inputs = batch * geometry.in_channels * size[0] * size[1]
    sparse = (
        _SPARSE_CALL
        + nnz * (_SPARSE_WEIGHT + _SPARSE_PRODUCT * columns)
        + inputs * (_SPARSE_INPUT if in_layout else _SPARSE_INPUT + _CONVERSION)
    )
    product = (
        _DENSE_PRODUCT
        + _DENSE_PRODUCT_ALONE / math.sqrt(max(1, batch))
        + _DENSE_PRODUCT_NARROW / geometry.out_channels
    )
    dense = (
        _DENSE_CALL
        + weights * (_DENSE_WEIGHT + product * columns)
        + nnz * _DENSE_ACTIVE
        + inputs * _DENSE_INPUT
    )
    return dense < _MARGIN * sparse
