"""Which of two ways to compute a sparse layer is faster, predicted from its shape.

A linear model of one pass on one core: the forward pass, or a third of forward and backward in
training. Its constants are nanoseconds on an AMD EPYC (Zen 4) with AVX-512; only their ratios
matter. They are what `python -m benchmarks.choice_fit` prints: it measures both ways on some
seventy layers, fits the constants and lists where the choice is wrong. `python -m
benchmarks.execution_choice` shows the choice beside the plain dense layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sparsemodel.kernels.geometry import ConvGeometry

# From this density on the index that sparse kernels need is not worth its memory, except in layers
# so small that it is nothing beside their input.
MAX_SPARSE_DENSITY = 0.6
MAX_SMALL_LAYER = 1 << 14

# Up to so many rows the dense weight of a linear layer is put together in registers: at 16 that
# takes as long as making it and torch's product, beyond longer.
MAX_FEW_ROWS = 16

# Predictions err. In doubt a layer is dense: slower than the dense layer it must not be.
TRAINING_DOUBT, FORWARD_DOUBT = 0.85, 0.95

# Inputs that the nearest cache holds, whatever the layer.
NEAR_INPUTS = 64


class Work(NamedTuple):
    """What the cost of a pass depends on.

    A column is one output pixel of one sample: each weight is multiplied once a column.
    Activations are the values of input and output together, `group_in` and `group_out` the channels
    of a group, `few` a linear layer of at most MAX_FEW_ROWS rows.
    """

    weights: int
    nnz: int
    columns: int
    activations: int
    group_in: int
    group_out: int
    few: bool
    in_layout: bool


class Costs(NamedTuple):
    """Nanoseconds of a call, a weight, a product (weight times column), an activation."""

    sparse_call: float
    sparse_weight: float  # of an active weight: reading it and its place
    sparse_product: float
    sparse_product_far: float  # added for each doubling of the inputs: they come from afar
    sparse_activation: float
    sparse_conversion: float  # added where the input comes in torch's layout
    dense_call: float
    dense_weight: float  # of any weight: putting it there, taking its gradient from there
    dense_product: float
    dense_product_narrow: float  # added for one output channel of a group
    dense_activation: float
    dense_conversion: float  # added where the input comes batch innermost
    few_call: float
    few_weight: float
    few_product: float


TRAINING = Costs(
    sparse_call=35e3,
    sparse_weight=3,
    sparse_product=0.027,
    sparse_product_far=0.0021,
    sparse_activation=0.23,
    sparse_conversion=0.23,
    dense_call=54e3,
    dense_weight=0.82,
    dense_product=0.02,
    dense_product_narrow=0.00046,
    dense_activation=0.83,
    dense_conversion=0.14,
    few_call=28e3,
    few_weight=0.1,
    few_product=0.035,
)
FORWARD = Costs(
    sparse_call=23e3,
    sparse_weight=1.7,
    sparse_product=0.032,
    sparse_product_far=0.0026,
    sparse_activation=0.18,
    sparse_conversion=0.17,
    dense_call=23e3,
    dense_weight=0.43,
    dense_product=0.019,
    dense_product_narrow=0.066,
    dense_activation=0.49,
    dense_conversion=0.074,
    few_call=18e3,
    few_weight=0.059,
    few_product=0.03,
)


def work_of(
    geometry: ConvGeometry, nnz: int, batch: int, size: tuple[int, int], *, in_layout: bool
) -> Work:
    """The work of one pass; arguments as of `dense_is_faster`."""
    height, width = geometry.output_size(*size)
    inputs = batch * geometry.in_channels * size[0] * size[1]
    columns = batch * height * width
    return Work(
        weights=geometry.out_channels * geometry.row_length,
        nnz=nnz,
        columns=columns,
        activations=inputs + columns * geometry.out_channels,
        group_in=geometry.in_channels // geometry.groups,
        group_out=geometry.out_channels // geometry.groups,
        few=batch <= MAX_FEW_ROWS and (geometry.kernel_h, geometry.kernel_w, *size) == (1, 1, 1, 1),
        in_layout=in_layout,
    )


def sparse_cost(work: Work, costs: Costs) -> float:
    """Nanoseconds of a pass of the sparse kernels."""
    conversion = 0.0 if work.in_layout else costs.sparse_conversion
    doublings = math.log2(1 + work.group_in / NEAR_INPUTS)
    product = costs.sparse_product + costs.sparse_product_far * doublings
    return (
        costs.sparse_call
        + work.nnz * (costs.sparse_weight + product * work.columns)
        + work.activations * (costs.sparse_activation + conversion)
    )


def dense_cost(work: Work, costs: Costs) -> float:
    """Nanoseconds of a pass through the dense weight."""
    if work.few:
        product = costs.few_product * work.columns
        return costs.few_call + work.weights * (costs.few_weight + product)
    product = costs.dense_product + costs.dense_product_narrow / work.group_out
    conversion = costs.dense_conversion if work.in_layout else 0.0
    return (
        costs.dense_call
        + work.weights * (costs.dense_weight + product * work.columns)
        + work.activations * (costs.dense_activation + conversion)
    )


def sparse_may_be_faster(geometry: ConvGeometry, nnz: int) -> bool:
    """Whether a layer of so many active weights needs the index of sparse kernels at all."""
    weights = geometry.out_channels * geometry.row_length
    return weights <= MAX_SMALL_LAYER or nnz <= MAX_SPARSE_DENSITY * weights


def dense_is_faster(
    geometry: ConvGeometry,
    nnz: int,
    batch: int,
    size: tuple[int, int],
    *,
    in_layout: bool,
    training: bool,
) -> bool:
    """Whether dense kernels, weight made for the call, are predicted to beat sparse ones.

    Args:
        geometry: the layer's; a linear layer is a 1×1 convolution.
        nnz: active weights.
        batch: samples; rows of a linear layer.
        size: height and width of the input, (1, 1) for a linear layer.
        in_layout: whether the input is batch innermost already.
        training: whether a backward pass follows.
    """
    if not sparse_may_be_faster(geometry, nnz):
        return True
    work = work_of(geometry, nnz, batch, size, in_layout=in_layout)
    if nnz == work.weights and not in_layout:
        return True  # the values are the dense weight, and torch's own layer runs on them
    costs, doubt = (TRAINING, TRAINING_DOUBT) if training else (FORWARD, FORWARD_DOUBT)
    return doubt * dense_cost(work, costs) < sparse_cost(work, costs)
