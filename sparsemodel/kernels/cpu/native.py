"""The native CPU library on torch tensors: addresses and sizes are read off here.

Callers make the outputs and see to dtype (float32), device (CPU) and layout (batch innermost).
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor

_NOT_FINITE = "NaN"


def runs(x: Tensor) -> bool:
    """Whether the native library is loaded and takes tensors like `x`."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and loaded()


def reaches(x: Tensor) -> bool:
    """Whether `x` is real memory (not traced, not fake) that the native library takes."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in {torch.Tensor, torch.nn.Parameter}
        and runs(x)
        and x.numel() > 0
    )


def reaches_pattern(cols: Tensor) -> bool:
    """Whether a pattern is real memory that the native library takes."""
    return not torch.compiler.is_compiling() and cols.device.type == "cpu" and loaded()


def loaded() -> bool:
    """Whether the native library can be used in this process."""
    return cpu.library() is not None


def transpose_pattern(row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry) -> Tensor:
    """The index that input gradients need: int32, t_cols then t_perm then t_row_ptr."""
    lib, g = library(), _smallest(geometry)
    nnz = cols.numel()
    index = torch.empty(2 * nnz + lib.transposed_rows(g) + 1, dtype=torch.int32)
    lib.transpose_pattern(g, row_ptr.data_ptr(), cols.data_ptr(), *index_parts(index, nnz))
    return index


def pattern_bits(row_ptr: Tensor, cols: Tensor, row_length: int) -> Tensor:
    """A bit a weight: int16 [rows, ceil(row_length / 16)]."""
    rows = row_ptr.numel() - 1
    bits = torch.empty((rows, (row_length + 15) // 16), dtype=torch.int16)
    library().pattern_bits(
        rows, row_length, row_ptr.data_ptr(), cols.data_ptr(), bits.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return bits


def dense_weight(values: Tensor, row_ptr: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of shape `shape`, zeros at its pruned places."""
    weight = values.new_empty(shape)
    library().dense_weight(
        shape[0], math.prod(shape[1:]), row_ptr.data_ptr(), bits.data_ptr(), values.data_ptr(),
        weight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight


def active_values(weight: Tensor, row_ptr: Tensor, cols: Tensor, bits: Tensor) -> Tensor:
    """The entries of a contiguous dense weight or gradient at the active places: [nnz]."""
    values = weight.new_empty(cols.numel())
    library().active_values(
        weight.shape[0], math.prod(weight.shape[1:]), row_ptr.data_ptr(), bits.data_ptr(),
        weight.data_ptr(), values.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return values


def linear_few(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, bits: Tensor
) -> Tensor:
    """W · x + bias of few rows: x contiguous [*, in]."""
    width_in, width_out = x.shape[-1], bits.shape[0]
    y = x.new_empty((*x.shape[:-1], width_out))
    library().linear_few(
        x.numel() // width_in, width_in, width_out, row_ptr.data_ptr(), bits.data_ptr(),
        values.data_ptr(), address(bias), x.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def linear_few_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    bits: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for input, values and bias, those that are wanted."""
    width_in, width_out = x.shape[-1], bits.shape[0]
    dx = torch.empty_like(x) if wanted[0] else None
    dvalues = torch.empty_like(values) if wanted[1] else None
    dbias = values.new_empty(width_out) if wanted[2] else None
    library().linear_few_backward(
        x.numel() // width_in, width_in, width_out, row_ptr.data_ptr(), bits.data_ptr(),
        values.data_ptr(), x.data_ptr(), dy.data_ptr(), address(dx), address(dvalues),
        address(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dvalues, dbias


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor, y: Tensor
) -> None:
    """Write W · x + bias into `y`."""
    g = _linear_geometry(x, y)
    _forward(g, x, values, bias, row_ptr, cols, y)


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    dx: Tensor,
    dvalues: Tensor,
    dbias: Tensor,
) -> None:
    """Write those gradients that have elements; `x` is needed for values and bias."""
    width_out = dy.shape[-1]
    g = _linear_sizes(dy.numel() // width_out if width_out else 0, in_features, width_out)
    _backward(g, dy, x, values, row_ptr, cols, transposed, dx, dvalues, dbias)


def linear_topk_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Indices and values of the k largest gradients outside the mask."""
    pruned = x.shape[-1] * dy.shape[-1] - cols.numel()
    return _topk_grad(_linear_geometry(x, dy), x, dy, row_ptr, cols, min(k, pruned))


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: ConvGeometry,
    y: Tensor,
) -> None:
    """Write the convolution into `y`."""
    _forward(_conv_geometry(x, y, geometry), x, values, bias, row_ptr, cols, y)


def conv2d_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    geometry: ConvGeometry,
    size: tuple[int, int],
    dx: Tensor,
    dvalues: Tensor,
    dbias: Tensor,
) -> None:
    """Write those gradients that have elements; `x` is needed for values and bias."""
    g = conv_sizes(dy.shape[0], size, (dy.shape[2], dy.shape[3]), geometry)
    _backward(g, dy, x, values, row_ptr, cols, transposed, dx, dvalues, dbias)


def conv2d_topk_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry, k: int
) -> tuple[Tensor, Tensor]:
    """Indices and values of the k largest gradients outside the mask."""
    pruned = geometry.out_channels * geometry.row_length - cols.numel()
    g = _conv_geometry(x, dy, geometry)
    return _topk_grad(g, x, dy, row_ptr, cols, min(k, pruned))


def transpose(x: Tensor, y: Tensor, rows: int, columns: int) -> None:
    """Write the transpose of the `rows` × `columns` numbers of `x` into `y`."""
    library().transpose(rows, columns, x.data_ptr(), y.data_ptr(), torch.get_num_threads())


def transpose_planes(x: Tensor, y: Tensor) -> None:
    """Copy `x` into `y`, both [P, R, C] of any strides, `x` dense along C and `y` along R."""
    planes, rows, columns = x.shape
    library().transpose_planes(
        planes,
        rows,
        columns,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        y.data_ptr(),
        y.stride(0),
        y.stride(2),
        torch.get_num_threads(),
    )


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element is; None stays a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def library() -> Any:
    """The bindings, of a library that is known to be loaded."""
    bindings = cpu.library()
    assert bindings is not None, "callers ask runs() first"
    return bindings


def _forward(
    g: cpu.Geometry,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    y: Tensor,
) -> None:
    if y.numel():
        library().conv_forward(
            g, row_ptr.data_ptr(), cols.data_ptr(), values.data_ptr(), address(bias),
            x.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def _backward(
    g: cpu.Geometry,
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    dx: Tensor,
    dvalues: Tensor,
    dbias: Tensor,
) -> None:
    if dy.numel() == 0:
        for gradient in (dx, dvalues, dbias):
            gradient.zero_()
        return
    lib, threads = library(), torch.get_num_threads()
    index = index_parts(transposed, cols.numel())
    bias = dbias.data_ptr() if dbias.numel() else None
    weights = bool(dvalues.numel() or dbias.numel())
    if weights and dx.numel():
        lib.conv_backward(
            g, *index, values.data_ptr(), address(x), dy.data_ptr(), dx.data_ptr(),
            dvalues.data_ptr(), bias, threads,
        )  # fmt: skip
    elif dx.numel():
        lib.conv_input_grad(g, *index, values.data_ptr(), dy.data_ptr(), dx.data_ptr(), threads)
    elif weights:
        lib.conv_weight_grad(
            g, row_ptr.data_ptr(), cols.data_ptr(), address(x), dy.data_ptr(), dvalues.data_ptr(),
            bias, threads,
        )  # fmt: skip


def _topk_grad(
    g: cpu.Geometry, x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    indices, top = torch.empty(k, dtype=torch.int64), torch.empty(k)
    count = torch.zeros(1, dtype=torch.int64)
    try:
        library().topk_grad(
            g, row_ptr.data_ptr(), cols.data_ptr(), x.data_ptr(), dy.data_ptr(), k, 0,
            indices.data_ptr(), top.data_ptr(), count.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    except SparseModelError as error:
        if _NOT_FINITE not in str(error):
            raise
        raise MaskError(f"{error}; has training diverged?") from error
    assert int(count) == k, "k was cut to the number of pruned weights"
    return indices, top


def index_parts(transposed: Tensor, nnz: int) -> tuple[int, int, int]:
    """Addresses of t_row_ptr, t_cols and t_perm inside the transposed index."""
    start = transposed.data_ptr()
    return start + 8 * nnz, start, start + 4 * nnz


def _linear_geometry(x: Tensor, y: Tensor) -> cpu.Geometry:
    width_in, width_out = x.shape[-1], y.shape[-1]
    return _linear_sizes(y.numel() // width_out if width_out else 0, width_in, width_out)


@functools.lru_cache(maxsize=1024)
def _linear_sizes(batch: int, width_in: int, width_out: int) -> cpu.Geometry:
    return cpu.Geometry.linear(batch, width_in, width_out)


def _conv_geometry(x: Tensor, y: Tensor, g: ConvGeometry) -> cpu.Geometry:
    return conv_sizes(x.shape[0], (x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]), g)


@functools.lru_cache(maxsize=1024)
def conv_sizes(
    batch: int, size: tuple[int, int], out_size: tuple[int, int], g: ConvGeometry
) -> cpu.Geometry:
    """The library's form of a convolution of planes of `size` (h, w) to planes of `out_size`."""
    return cpu.Geometry(
        batch, g.in_channels, g.out_channels, *size, *out_size, g.kernel_h, g.kernel_w, g.stride_h,
        g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w, g.groups,
    )  # fmt: skip


def _smallest(g: ConvGeometry) -> cpu.Geometry:
    """The geometry with one output pixel: the transposed index does not depend on sizes."""
    height = g.dilation_h * (g.kernel_h - 1) + 1
    width = g.dilation_w * (g.kernel_w - 1) + 1
    return conv_sizes(1, (height, width), g.output_size(height, width), g)
